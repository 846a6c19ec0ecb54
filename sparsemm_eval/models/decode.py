"""Prompt to tokens: read the prompt once, compress it, decode on the ragged cache."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsemm_eval.cache import HeadBudgetCache
from sparsemm_eval.methods import HeadMask, Method


@dataclass(frozen=True)
class Decoded:
    """What one batch gave, and what it held.

    Parameters
    ----------
    tokens : list of Tensor
        New tokens of each row, the end-of-sequence token and padding cut off.
    prompt_tokens : list of int
        Tokens of each row's prompt, padding excluded.
    kept : Tensor
        [rows, L, H] tokens of the prompt that were kept.
    kept_bytes : list of int
        Bytes of keys and values of these tokens, by row.
    cache_bytes : int
        Bytes of these rows' cache at the end: new tokens, slack and metadata included.
    backend : str
        What attended over the ragged rows.
    seconds : float
        Wall time.
    """

    tokens: list[Tensor]
    prompt_tokens: list[int]
    kept: Tensor
    kept_bytes: list[int]
    cache_bytes: int
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
    decoded = _decoded(
        model, cache, out, range(0, cache.kept().shape[0], beams), time.perf_counter() - start
    )
    return replace(decoded, cache_bytes=cache.bytes().total)


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
    token are the same for all; each layer is packed for every method while it is dense.

    Parameters
    ----------
    model, inputs, options, backend, mask
        As for :func:`generate`; ``options`` must satisfy :func:`shares_prompt`.
    methods : sequence of Method
        M methods for this model's shape.

    Returns
    -------
    list of Decoded
        One a method, of one row a sample.
    """
    start = time.perf_counter()
    cache = HeadBudgetCache(methods, backend, mask)
    new, least = options["max_new_tokens"], options.get("min_new_tokens") or 0
    length, count = inputs["input_ids"].shape[1], len(methods)
    first = {"max_new_tokens": 1, "min_new_tokens": min(least, 1)}
    ids = model.generate(**inputs, past_key_values=cache, **{**options, **first})
    ended = torch.isin(ids[:, -1], torch.tensor(_ends(model), device=ids.device))
    out = ids.repeat_interleave(count, 0)
    if new > 1 and not ended.all():
        attended = torch.cat([inputs["attention_mask"], torch.ones_like(ids[:, -1:])], 1)
        # Qwen2-VL remembers how far each row's text positions lag behind its tokens.
        if getattr(model.model, "rope_deltas", None) is not None:
            model.model.rope_deltas = model.model.rope_deltas.repeat_interleave(count, 0)
        rest = {"max_new_tokens": new - 1, "min_new_tokens": max(least - 1, 0)}
        out = model.generate(
            input_ids=out,
            attention_mask=attended.repeat_interleave(count, 0),
            past_key_values=cache,
            **{**options, **rest},
        )
    seconds = (time.perf_counter() - start) / count
    rows = range(len(out))
    return [
        _decoded(model, cache, out[m::count, length:], rows[m::count], seconds)
        for m in range(count)
    ]


def _decoded(
    model: PreTrainedModel, cache: HeadBudgetCache, out: Tensor, rows: range, seconds: float
) -> Decoded:
    """What some rows of a cache gave."""
    kept, lengths = cache.kept()[rows.start :: rows.step], cache.prompt_lengths()
    return Decoded(
        tokens=[_cut(row, _ends(model)) for row in out.cpu()],
        prompt_tokens=[lengths[row] for row in rows],
        kept=kept,
        kept_bytes=(kept.sum((1, 2)) * _token_bytes(cache)).tolist(),
        cache_bytes=cache.bytes(rows).total,
        backend=cache.backend(),
        seconds=seconds,
    )


def _token_bytes(cache: HeadBudgetCache) -> int:
    """Bytes of one token's key and value in one KV head."""
    keys = cache.layers[0].filled().keys
    return 2 * keys.shape[1] * keys.element_size()


def _ends(model: PreTrainedModel) -> Sequence[int]:
    ends = model.generation_config.eos_token_id
    if ends is None:
        return []
    return ends if isinstance(ends, list) else [ends]


def _cut(row: Tensor, ends: Sequence[int]) -> Tensor:
    stops = torch.isin(row, torch.tensor(ends, dtype=row.dtype)).nonzero()
    return row[: stops[0, 0]] if len(stops) else row
