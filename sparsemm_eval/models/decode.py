"""Prompt to tokens: read the prompt once, compress it, decode on the ragged cache."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, StoppingCriteria
from transformers.generation import GenerateDecoderOnlyOutput

from sparsemm_eval.cache import HeadBudgetCache
from sparsemm_eval.methods import HeadMask, Method


@dataclass(frozen=True)
class Decoded:
    """What one batch gave under one method, and what it held; lists have an entry a row.

    Parameters
    ----------
    tokens : list of Tensor
        New tokens, the end-of-sequence token and padding cut off.
    prompt_tokens : list of int
        Tokens of the prompt, padding excluded.
    kept : Tensor
        [rows, L, H] tokens of the prompt that were kept.
    kept_bytes : list of int
        Bytes of keys and values of these tokens.
    cache_bytes : list of int
        Bytes of the row's cache at the end: new tokens, slack and metadata included. Of many
        methods, when the row was taken out of the batch, which may be steps after its own last.
    kl_full : list of float or None
        KL(full KV's next token || this row's) in nats, where both have read the prompt and its
        first new token; None where the answer ended there, or full KV was not in the batch.
    backend : str
        What attended over the ragged rows.
    seconds : float
        Wall time.
    """

    tokens: list[Tensor]
    prompt_tokens: list[int]
    kept: Tensor
    kept_bytes: list[int]
    cache_bytes: list[int]
    kl_full: list[float | None]
    backend: str
    seconds: float


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    method: Method,
    options: Mapping[str, Any],
    backend: str = "auto",
    mask: HeadMask | None = None,
) -> Decoded:
    """Generate with a prompt cache compressed by a method.

    Parameters
    ----------
    model : PreTrainedModel
        On `sparsemm_eval.cache.use_head_budget_attention`.
    inputs : mapping
        The processor's output, padded on the left, on the model's device.
    method : Method
        For this model's shape.
    options : mapping
        Of transformers' ``generate``: max_new_tokens, do_sample, num_beams, ….
    backend : str
        What attends over the ragged rows.
    mask : HeadMask, optional
        Query heads that are silenced.

    Returns
    -------
    Decoded
        One row a sample; with ``num_return_sequences`` that many rows a sample.
    """
    start = time.perf_counter()
    cache = HeadBudgetCache(method, backend, mask)
    length = inputs["input_ids"].shape[1]
    out = model.generate(**inputs, past_key_values=cache, **options)[:, length:]
    # A beam search holds every beam as a row of its own; they share the prompt.
    beams = cache.kept().shape[0] // out.shape[0]
    kept = cache.kept()[::beams]
    return Decoded(
        tokens=[_cut(row, _ends(model)) for row in out.cpu()],
        prompt_tokens=cache.prompt_lengths()[::beams],
        kept=kept,
        kept_bytes=_kept_bytes(cache, kept),
        cache_bytes=cache.row_bytes().view(-1, beams).sum(1).tolist(),
        kl_full=[None] * len(out),
        backend=cache.backend(),
        seconds=time.perf_counter() - start,
    )


def shares_prompt(options: Mapping[str, Any]) -> bool:
    """Whether many methods may answer from one reading of the prompt: greedy decoding only."""
    return not options.get("do_sample") and options.get("num_beams", 1) == 1


@torch.inference_mode()
def generate_rows(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    methods: Sequence[Method],
    options: Mapping[str, Any],
    backend: str = "auto",
    mask: HeadMask | None = None,
) -> list[Decoded]:
    """Generate greedily under many methods, reading the prompts once.

    All methods leave the prompt's own attention whole, so that vision tower, prefill and first
    token are the same for all; each layer is packed for every method while it is dense. Rows that
    have ended are taken out whenever they are half of the batch.

    Parameters
    ----------
    model, inputs, options, backend, mask
        As for :func:`generate`; ``options`` must satisfy :func:`shares_prompt`.
    methods : sequence of Method
        M methods for this model's shape.

    Returns
    -------
    list of Decoded
        One a method, of one row a sample; an equal share of the wall time each.
    """
    start = time.perf_counter()
    rows = _Rows(model, inputs, methods, options, HeadBudgetCache(methods, backend, mask))
    while rows.take_out_ended():
        rows.go_on()
    count = len(methods)
    seconds = (time.perf_counter() - start) / count
    tokens = [_cut(row.cpu(), _ends(model)) for row in rows.tokens]
    return [
        Decoded(
            tokens=tokens[m::count],
            prompt_tokens=rows.prompt_tokens[m::count],
            kept=rows.kept[m::count],
            kept_bytes=rows.kept_bytes[m::count],
            cache_bytes=rows.cache_bytes[m::count],
            kl_full=rows.kl_full[m::count],
            backend=rows.cache.backend(),
            seconds=seconds,
        )
        for m in range(count)
    ]


class _Rows:
    """Samples under methods, row ``b * M + m`` sample b under method m; those that still go on.

    ``tokens``, ``cache_bytes`` and ``kl_full`` have an entry for each of all rows, filled when it
    is known; ``going`` are the rows that are left, as are ``ids``, ``padding`` and ``lag``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Tensor],
        methods: Sequence[Method],
        options: Mapping[str, Any],
        cache: HeadBudgetCache,
    ) -> None:
        self.model, self.cache, self.options = model, cache, options
        self.most = options["max_new_tokens"]
        least = options.get("min_new_tokens", model.generation_config.min_new_tokens)
        self.least = least or 0
        self.length, self.count = inputs["input_ids"].shape[1], len(methods)
        self.full = next((m for m, method in enumerate(methods) if method.budget is None), None)
        ids = self._generate(inputs, done=0, once=True).sequences
        self.kept, self.prompt_tokens = cache.kept(), cache.prompt_lengths()
        self.kept_bytes = _kept_bytes(cache, self.kept)
        every = len(self.kept)
        self.tokens: list[Tensor] = [ids[0, :0]] * every
        self.cache_bytes = [0] * every
        self.kl_full: list[float | None] = [None] * every
        self.going = torch.arange(every)
        self.ids = ids.repeat_interleave(self.count, 0)
        self.padding = inputs["attention_mask"].repeat_interleave(self.count, 0)
        # Qwen2-VL remembers how far each row's text positions lag behind its tokens.
        lag = getattr(model.model, "rope_deltas", None)
        self.lag = None if lag is None else lag.repeat_interleave(self.count, 0)

    def take_out_ended(self) -> bool:
        """Note what ended rows gave and let go of them; whether any are left."""
        new = self.ids[:, self.length :]
        ends = torch.tensor(_ends(self.model), dtype=new.dtype, device=new.device)
        ended = torch.isin(new, ends).any(1).cpu()
        if new.shape[1] == self.most:
            ended[:] = True
        if not ended.any():
            return True
        held = self.cache.row_bytes()
        for place in ended.nonzero()[:, 0].tolist():
            row = int(self.going[place])
            self.tokens[row], self.cache_bytes[row] = new[place], int(held[place])
        stay = (~ended).nonzero()[:, 0]
        self.going = self.going[stay]
        if len(stay):
            self.cache.batch_select_indices(stay)
            there = stay.to(self.ids.device)
            self.ids, self.padding = self.ids[there], self.padding[there]
            if self.lag is not None:
                self.lag = self.lag[stay.to(self.lag.device)]
        return len(stay) > 0

    def go_on(self) -> None:
        """Generate until it pays to take rows out, or one token where rows are compared."""
        new = self.ids[:, self.length :]
        if self.lag is not None:
            self.model.model.rope_deltas = self.lag
        attended = torch.cat([self.padding, torch.ones_like(new)], 1)
        given = {"input_ids": self.ids, "attention_mask": attended}
        compared = self.full is not None and self.count > 1 and new.shape[1] == 1
        out = self._generate(given, new.shape[1], once=compared, output_logits=compared)
        self.ids = out.sequences
        if compared:
            found = _kl_from(out.logits[0], self.full, self.count)
            for row, kl in zip(self.going.tolist(), found, strict=True):
                self.kl_full[row] = kl if row % self.count != self.full else None

    def _generate(
        self, given: Mapping[str, Tensor], done: int, once: bool, output_logits: bool = False
    ) -> GenerateDecoderOnlyOutput:
        """From where ``done`` new tokens are there up to a pause; whole ids go in and out."""
        left = {
            "max_new_tokens": self.most - done,
            "min_new_tokens": max(0, self.least - done),
        }
        return self.model.generate(
            **given,
            past_key_values=self.cache,
            stopping_criteria=[_Pause(_ends(self.model), once)],
            return_dict_in_generate=True,
            output_logits=output_logits,
            **{**self.options, **left},
        )


class _Pause(StoppingCriteria):
    """Ends a call of ``generate`` after one token, or once half of its rows have ended."""

    def __init__(self, ends: Sequence[int], once: bool) -> None:
        self.ends, self.once = ends, once
        self.ended: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        last = input_ids[:, -1]
        if self.once:
            return torch.ones_like(last, dtype=torch.bool)
        ends = torch.tensor(self.ends, dtype=last.dtype, device=last.device)
        ended = torch.isin(last, ends)
        self.ended = ended if self.ended is None else self.ended | ended
        return (2 * self.ended.sum() >= len(last)).expand(len(last))


def _kl_from(logits: Tensor, full: int, count: int) -> list[float]:
    """KL of full KV's distribution from each row's: rows [samples * count, V], float32, in nats."""
    found: list[float] = []
    for of_sample in logits.float().split(count):  # one by one: a vocabulary is large
        log_p = functional.log_softmax(of_sample, -1)
        kl = functional.kl_div(log_p, log_p[full], reduction="none", log_target=True).sum(-1)
        found += kl.clamp(min=0).tolist()
    return found


def _kept_bytes(cache: HeadBudgetCache, kept: Tensor) -> list[int]:
    """Bytes of the kept tokens' keys and values, by row."""
    keys = cache.layers[0].filled().keys
    return (kept.sum((1, 2)) * 2 * keys.shape[1] * keys.element_size()).tolist()


def _ends(model: PreTrainedModel) -> Sequence[int]:
    ends = model.generation_config.eos_token_id
    if ends is None:
        return []
    return ends if isinstance(ends, list) else [ends]


def _cut(row: Tensor, ends: Sequence[int]) -> Tensor:
    stops = torch.isin(row, torch.tensor(ends, dtype=row.dtype)).nonzero()
    return row[: stops[0, 0]] if len(stops) else row
