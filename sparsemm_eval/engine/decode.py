"""Prompt to tokens: read the prompt once, compress it for every method, decode all of them.

Greedy decoding runs step by step between static buffers, on every device and with every backend.
transformers' ``generate`` reads the prompt and serves what is not greedy: sampling, beams.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LogitsProcessor, PreTrainedModel

from sparsemm_eval.cache import CACHE_ARGUMENT, HeadBudgetCache
from sparsemm_eval.choices import CUDA_GRAPH
from sparsemm_eval.engine.decoder import NO_TOKEN, decoder_of, ends_of
from sparsemm_eval.engine.step import Prompts, Start
from sparsemm_eval.errors import check_choice
from sparsemm_eval.families import family_of
from sparsemm_eval.methods import HeadMask, Method

# Generation settings that change nothing in greedy decoding, or are heeded apart.
_WITHOUT_EFFECT = {
    "_from_model_config", "bos_token_id", "do_sample", "early_stopping", "eos_token_id",
    "epsilon_cutoff", "eta_cutoff", "length_penalty", "max_length", "max_new_tokens",
    "min_new_tokens", "min_p", "pad_token_id", "repetition_penalty", "temperature", "top_h",
    "top_k", "top_p", "transformers_version", "typical_p", "use_cache",
}  # fmt: skip
_NEUTRAL = {
    "num_beams": 1, "num_return_sequences": 1, "num_beam_groups": 1, "min_length": 0,
    "no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0, "diversity_penalty": 0.0,
}  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """A given answer to a prompt.

    Parameters
    ----------
    tokens : tuple of int
        Its tokens.
    log_likelihood : float
        Sum over them, in nats, each token behind the prompt and those before it.
    is_greedy : bool
        Whether each was the likeliest: whether greedy decoding would begin with this answer.
    """

    tokens: tuple[int, ...]
    log_likelihood: float
    is_greedy: bool


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
        Bytes of keys and values of these tokens, and of what layers that no method compresses
        hold of the prompt.
    cache_bytes : list of int
        Bytes of the row's cache at the end: new tokens, slack and metadata included. Of many
        rows, when the row was taken out of the batch, which may be steps after its own last.
    not_finite : list of int or None
        At which new token, from 1, the logits were not finite: then the tokens are no answer.
        None where all were.
    kl_full : list of float or None
        KL(full KV's next token || this row's) in nats, where both have read the prompt and its
        first new token; None where the answer ended there, or full KV was not in the batch.
    backend : str
        What attended over the ragged rows.
    seconds : float
        Wall time; of methods that were decoded together an equal share each.
    candidates : list of tuple of Candidate
        Of `score`, which gives the likeliest one's tokens as the row's; none of `decode`.
    """

    tokens: list[Tensor]
    prompt_tokens: list[int]
    kept: Tensor
    kept_bytes: list[int]
    cache_bytes: list[int]
    not_finite: list[int | None]
    kl_full: list[float | None]
    backend: str
    seconds: float
    candidates: list[tuple[Candidate, ...]] = field(default_factory=list)


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    methods: Sequence[Method],
    options: Mapping[str, Any],
    backend: str = "auto",
    mask: HeadMask | None = None,
    cuda_graph: str = "auto",
) -> list[Decoded]:
    """Answer prompts under methods; greedy ones are read once for all methods.

    All methods leave the prompt's own attention whole, so that vision tower, prefill and first
    token are the same for all; each layer is packed for every method while it is dense.

    Parameters
    ----------
    model : PreTrainedModel
        On `sparsemm_eval.cache.use_head_budget_attention`.
    inputs : mapping
        The processor's output, padded on the left, on the model's device.
    methods : sequence of Method
        For this model's shape.
    options : mapping
        Of transformers' ``generate``: max_new_tokens, do_sample, num_beams, ….
    backend : str
        What attends over the ragged rows.
    mask : HeadMask, optional
        Query heads that are silenced.
    cuda_graph : {"auto", "compile", "eager", "off"}
        On a GPU the step of greedy decoding is captured, or captured after torch.compile; eager
        and off run it as it is, as is done everywhere else.

    Returns
    -------
    list of Decoded
        One a method, of one row a sample; with ``num_return_sequences`` that many rows a sample.
    """
    if not is_greedy(model, options):
        return [_generate(model, inputs, method, options, backend, mask) for method in methods]
    start = time.perf_counter()
    decoder = decoder_of(model)
    visual = visual_tokens(model, inputs, methods)
    cache = HeadBudgetCache(methods, backend, mask, decoder.buffers, visual)
    prompts = prefill(model, inputs, options, cache)
    rows = decoder.decode(model, cache, prompts, options, mask, cuda_graph)
    count = len(methods)
    seconds = (time.perf_counter() - start) / count
    ends = ends_of(model)
    tokens = [_cut(row, (*ends, NO_TOKEN)) for row in rows.tokens]
    not_finite = [
        len(cut) + 1 if len(cut) < len(row) and row[len(cut)] == NO_TOKEN else None
        for cut, row in zip(tokens, rows.tokens, strict=True)
    ]
    return [
        Decoded(
            tokens=tokens[m::count],
            prompt_tokens=prompts.tokens[m::count],
            kept=prompts.kept[m::count],
            kept_bytes=prompts.kept_bytes[m::count],
            cache_bytes=rows.cache_bytes[m::count],
            not_finite=not_finite[m::count],
            kl_full=rows.kl_full[m::count],
            backend=cache.backend(),
            seconds=seconds,
        )
        for m in range(count)
    ]


@torch.inference_mode()
def score(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    methods: Sequence[Method],
    candidates: Sequence[Sequence[Sequence[int]]],
    options: Mapping[str, Any],
    backend: str = "auto",
    mask: HeadMask | None = None,
    cuda_graph: str = "auto",
) -> list[Decoded]:
    """How likely given answers are under methods; prompts are read once for all of both.

    The tokens of an answer are decoded as if they had been chosen, on each method's cache. The
    first one's likelihood comes out of the prefill, which no method touches: answers of one token
    tell methods no more apart than a generated first token does.

    Parameters
    ----------
    model, inputs, methods, backend, mask, cuda_graph
        As for `decode`.
    candidates : sequence of sequence of sequence of int
        Of each prompt, one at least: its tokens, one at least.
    options : mapping
        Of a greedy ``generate``.

    Returns
    -------
    list of Decoded
        One a method, of one row a sample; ``cache_bytes`` are those of its largest candidate.
    """
    start = time.perf_counter()
    decoder = decoder_of(model)
    visual = visual_tokens(model, inputs, methods)
    cache = HeadBudgetCache(methods, backend, mask, decoder.buffers, visual)
    prompts = prefill(model, inputs, options, cache)
    forced = decoder.force(model, cache, prompts, candidates, mask, cuda_graph)
    count = len(methods)
    seconds = (time.perf_counter() - start) / count
    scored: list[tuple[Candidate, ...]] = []
    not_finite: list[int | None] = []
    cache_bytes: list[int] = []
    for of_sample in (one for one in candidates for _ in methods):
        here = slice(begin := sum(map(len, scored)), begin + len(of_sample))
        values = forced.log_likelihood[here], forced.is_greedy[here]
        scored.append(tuple(map(Candidate, map(tuple, of_sample), *values)))
        not_finite.append(min(filter(None, forced.not_finite[here]), default=None))
        cache_bytes.append(max(forced.cache_bytes[here]))
    likeliest = [max(row, key=lambda one: one.log_likelihood).tokens for row in scored]
    return [
        Decoded(
            tokens=[torch.tensor(tokens) for tokens in likeliest[m::count]],
            prompt_tokens=prompts.tokens[m::count],
            kept=prompts.kept[m::count],
            kept_bytes=prompts.kept_bytes[m::count],
            cache_bytes=cache_bytes[m::count],
            not_finite=not_finite[m::count],
            kl_full=[None] * len(candidates),
            backend=cache.backend(),
            seconds=seconds,
            candidates=scored[m::count],
        )
        for m in range(count)
    ]


def is_greedy(model: PreTrainedModel, options: Mapping[str, Any]) -> bool:
    """Whether tokens are the likeliest ones, but for a repetition penalty.

    Only then do methods share a prompt. The model's own generation_config counts too.
    """
    given = {**model.generation_config.to_dict(), **options}
    # The first token comes out of `generate` itself, which heeds one token at least.
    if given.get("do_sample") or (given.get("min_new_tokens") or 0) > 1:
        return False
    return "max_new_tokens" in options and all(
        value is None or value is False or name in _WITHOUT_EFFECT or value == _NEUTRAL.get(name)
        for name, value in given.items()
    )


def visual_tokens(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], methods: Sequence[Method]
) -> Tensor | None:
    """Which tokens of prompts show an image or a video, [B, n] bool; None if no method asks."""
    if not any("visual" in method.needs for method in methods):
        return None
    tokens = family_of(model.config).visual_tokens(model.config)
    ids = inputs["input_ids"]
    return torch.isin(ids, torch.tensor(tokens, dtype=ids.dtype, device=ids.device))


def not_finite_words(model: PreTrainedModel, token: int | None = None) -> str:
    """Say that logits were not finite, at which new token, and what mends it."""
    dtype = str(model.dtype).removeprefix("torch.")
    larger = {"float16": "take dtype=bfloat16 or float32", "bfloat16": "take dtype=float32"}
    remedy = larger.get(dtype, "look at the checkpoint's weights")
    where = "" if token is None else f" at new token {token}"
    return f"logits are not finite{where} in {dtype}: {remedy}"


def check_cuda_graph(value: Any) -> str:
    """The setting as a word; True and False are auto and off.

    Raises
    ------
    UserError
        For any other value.
    """
    word = {True: "auto", False: "off"}.get(value, value) if isinstance(value, bool) else value
    check_choice("cuda_graph", word, CUDA_GRAPH)
    return word


@torch.inference_mode()
def prefill(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    options: Mapping[str, Any],
    cache: HeadBudgetCache,
) -> Prompts:
    """Read prompts into a cache and choose each one's first token; parameters as of `decode`."""
    first_alone = {**options, "max_new_tokens": 1}
    first_alone |= {"return_dict_in_generate": True, "output_logits": True}
    look = _Look()
    with cache.watching(model):
        out = model.generate(
            **inputs, **{CACHE_ARGUMENT: cache}, **first_alone, logits_processor=[look]
        )
    ids = out.sequences
    count = len(cache.methods)
    padding = inputs["attention_mask"]
    positions = padding.sum(1)
    if (delta := family_of(model.config).rope_delta(model)) is not None:
        positions = positions + delta[:, 0].to(positions.device)
    first = ids[:, -1]
    # No token of the prompt is a padding, which a repetition penalty must not count.
    read = functional.pad(padding, (0, 1), value=1).bool()
    ids = torch.where(read, ids, first[:, None])
    ended = torch.isin(first, torch.tensor(ends_of(model), dtype=first.dtype, device=first.device))
    not_finite = look.first > 0
    of_samples = (ids, positions, ended | not_finite, not_finite)
    start = Start(*(x.repeat_interleave(count, 0) for x in of_samples))
    lengths, kept_bytes = cache.prompt_lengths(), cache.kept_bytes().tolist()
    width = padding.shape[1]
    return Prompts(start, lengths, cache.kept(), kept_bytes, width, out.logits[0])


def _generate(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    method: Method,
    options: Mapping[str, Any],
    backend: str,
    mask: HeadMask | None,
) -> Decoded:
    """Sampling and beams, by transformers' ``generate``."""
    start = time.perf_counter()
    cache = HeadBudgetCache(method, backend, mask, visual=visual_tokens(model, inputs, [method]))
    length = inputs["input_ids"].shape[1]
    look = _Look()
    with cache.watching(model):
        out = model.generate(
            **inputs, **{CACHE_ARGUMENT: cache}, **options, logits_processor=[look]
        )[:, length:].cpu()
    # A beam search holds every beam as a row of its own; they share the prompt.
    beams = cache.kept().shape[0] // out.shape[0]
    kept = cache.kept()[::beams]
    tokens = [_cut(row, ends_of(model)) for row in out]
    # Of a row that has ended other tokens follow, which are none of the answer.
    not_finite = [
        min((n for n in of_row if 0 < n <= len(cut) + 1), default=None)
        for cut, of_row in zip(tokens, look.first.view(len(out), -1).tolist(), strict=True)
    ]
    return Decoded(
        tokens=tokens,
        prompt_tokens=cache.prompt_lengths()[::beams],
        kept=kept,
        kept_bytes=cache.kept_bytes()[::beams].tolist(),
        cache_bytes=cache.row_bytes().view(-1, beams).sum(1).tolist(),
        not_finite=not_finite,
        kl_full=[None] * len(out),
        backend=cache.backend(),
        seconds=time.perf_counter() - start,
    )


class _Look(LogitsProcessor):
    """Notes by row at which new token logits were first not finite; nothing is drawn from these.

    Others may set logits to -inf: a token that must not be. Not all of them, and never to NaN.
    """

    def __init__(self) -> None:
        self.first: Tensor | None = None  # [rows], from 1; 0 where all were finite
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        not_finite = ~scores.amax(-1).isfinite()
        if self.first is None:
            self.first = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
        self.first += self.calls * (not_finite & (self.first == 0))
        return scores.masked_fill(not_finite[:, None], 0)


def _cut(row: Tensor, ends: Sequence[int]) -> Tensor:
    stops = torch.isin(row, torch.tensor(ends, dtype=row.dtype)).nonzero()
    return row[: stops[0, 0]] if len(stops) else row
