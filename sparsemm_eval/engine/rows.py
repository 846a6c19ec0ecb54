"""Samples under methods as rows of one batch, decoded greedily until each has ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, StoppingCriteria
from transformers.generation import GenerateDecoderOnlyOutput

from sparsemm_eval.cache import CACHE_ARGUMENT, HeadBudgetCache
from sparsemm_eval.engine.graph import StaticDecoder
from sparsemm_eval.engine.greedy import ends_of
from sparsemm_eval.engine.step import Kind, Start
from sparsemm_eval.methods import Method


class Rows:
    """Samples under methods, row ``b * M + m`` sample b under method m; those that still go on.

    ``tokens``, ``cache_bytes`` and ``kl_full`` have an entry for each of all rows, filled when it
    is known; ``going`` are the rows that are left, as are ``ids``, ``padding`` and ``lag``.

    Parameters
    ----------
    model, inputs, methods, options
        As for `sparsemm_eval.engine.decode.generate_rows`.
    cache : HeadBudgetCache
        For the methods; the prompts are read into it.
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
        self.kept_bytes = kept_bytes(cache, self.kept)
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

    def decode(self) -> None:
        """Decode with transformers' ``generate``."""
        while self._take_out_ended():
            self._go_on()

    def decode_static(
        self, decoder: StaticDecoder, kind: Kind, after_step: Callable[[], None] | None = None
    ) -> None:
        """Decode between static buffers; rows stay where they are until all have ended.

        Parameters
        ----------
        decoder : StaticDecoder
            Of the model; the cache lies in its buffers.
        kind : Kind
            Of the steps.
        after_step : callable, optional
            Called after each.
        """
        said = self.ids[:, self.length :]
        ended = torch.isin(said[:, 0], torch.tensor(kind.ends, dtype=said.dtype).to(said.device))
        positions = self.padding.sum(1)
        if self.lag is not None:
            positions = positions + self.lag[:, 0].to(positions.device)
        # No token of the prompt is a padding, which a repetition penalty must not count.
        read = functional.pad(self.padding, (0, 1), value=1).bool()
        ids = torch.where(read, self.ids, said)
        start, left = Start(ids, positions, ended), self.most - 1

        def look(steps: int, logits: Tensor) -> None:
            if steps == 1 and self._compares:
                self._compare(logits, self.going[~ended.cpu()].tolist())
            if after_step is not None:
                after_step()

        if left and not bool(ended.all()):
            more = decoder.decode(self.model, self.cache, start, kind, left, look)
            said = torch.cat([said, more], 1)
        self.tokens = list(said.cpu())
        self.cache_bytes = self.cache.row_bytes().tolist()

    @property
    def _compares(self) -> bool:
        return self.full is not None and self.count > 1

    def _compare(self, logits: Tensor, rows: Sequence[int]) -> None:
        """Note how far rows are from full KV after their first new token; logits of all `going`."""
        found = dict(zip(self.going.tolist(), _kl_from(logits, self.full, self.count), strict=True))
        for row in rows:
            self.kl_full[row] = found[row] if row % self.count != self.full else None

    def _take_out_ended(self) -> bool:
        """Note what ended rows gave and let go of them; whether any are left."""
        new = self.ids[:, self.length :]
        ends = torch.tensor(ends_of(self.model), dtype=new.dtype, device=new.device)
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

    def _go_on(self) -> None:
        """Generate until it pays to take rows out, or one token where rows are compared."""
        new = self.ids[:, self.length :]
        if self.lag is not None:
            self.model.model.rope_deltas = self.lag
        attended = torch.cat([self.padding, torch.ones_like(new)], 1)
        given = {"input_ids": self.ids, "attention_mask": attended}
        compared = self._compares and new.shape[1] == 1
        out = self._generate(given, new.shape[1], once=compared, output_logits=compared)
        self.ids = out.sequences
        if compared:
            self._compare(out.logits[0], self.going.tolist())

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
            **{CACHE_ARGUMENT: self.cache},
            stopping_criteria=[_Pause(ends_of(self.model), once)],
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


def kept_bytes(cache: HeadBudgetCache, kept: Tensor) -> list[int]:
    """Bytes of the kept tokens' keys and values, by row."""
    keys = cache.layers[0].filled().keys
    return (kept.sum((1, 2)) * 2 * keys.shape[1] * keys.element_size()).tolist()
