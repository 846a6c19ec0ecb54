"""Prompt to tokens: read the prompt once, compress it, decode on the ragged cache."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsemm_eval.cache import CACHE_ARGUMENT, HeadBudgetCache
from sparsemm_eval.engine.graph import decoder_of
from sparsemm_eval.engine.greedy import ends_of, static_kind
from sparsemm_eval.engine.rows import Rows, kept_bytes
from sparsemm_eval.engine.step import Kind
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
    cuda_graph: str = "auto",
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
    cuda_graph : {"auto", "compile", "eager", "off"}
        Where greedy decoding runs between static buffers; see
        `sparsemm_eval.engine.greedy.static_kind`.

    Returns
    -------
    Decoded
        One row a sample; with ``num_return_sequences`` that many rows a sample.
    """
    if _kind(model, inputs, [method], options, backend, mask, cuda_graph) is not None:
        return generate_rows(model, inputs, [method], options, backend, mask, cuda_graph)[0]
    start = time.perf_counter()
    cache = HeadBudgetCache(method, backend, mask)
    length = inputs["input_ids"].shape[1]
    out = model.generate(**inputs, **{CACHE_ARGUMENT: cache}, **options)[:, length:]
    # A beam search holds every beam as a row of its own; they share the prompt.
    beams = cache.kept().shape[0] // out.shape[0]
    kept = cache.kept()[::beams]
    return Decoded(
        tokens=[_cut(row, ends_of(model)) for row in out.cpu()],
        prompt_tokens=cache.prompt_lengths()[::beams],
        kept=kept,
        kept_bytes=kept_bytes(cache, kept),
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
    cuda_graph: str = "auto",
) -> list[Decoded]:
    """Generate greedily under many methods, reading the prompts once.

    All methods leave the prompt's own attention whole, so that vision tower, prefill and first
    token are the same for all; each layer is packed for every method while it is dense. Rows that
    have ended are taken out whenever they are half of the batch.

    Parameters
    ----------
    model, inputs, options, backend, mask, cuda_graph
        As for :func:`generate`; ``options`` must satisfy :func:`shares_prompt`.
    methods : sequence of Method
        M methods for this model's shape.

    Returns
    -------
    list of Decoded
        One a method, of one row a sample; an equal share of the wall time each.
    """
    start = time.perf_counter()
    kind = _kind(model, inputs, methods, options, backend, mask, cuda_graph)
    if kind is None:
        rows = Rows(model, inputs, methods, options, HeadBudgetCache(methods, backend, mask))
        rows.decode()
    else:
        decoder = decoder_of(model)
        cache = HeadBudgetCache(methods, backend, mask, decoder.buffers)
        rows = Rows(model, inputs, methods, options, cache)
        rows.decode_static(decoder, kind)
    count = len(methods)
    seconds = (time.perf_counter() - start) / count
    tokens = [_cut(row.cpu(), ends_of(model)) for row in rows.tokens]
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


def _kind(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    methods: Sequence[Method],
    options: Mapping[str, Any],
    backend: str,
    mask: HeadMask | None,
    cuda_graph: str,
) -> Kind | None:
    if "max_new_tokens" not in options:
        return None
    samples, tokens = inputs["input_ids"].shape
    longest = tokens + options["max_new_tokens"]
    return static_kind(model, samples * len(methods), longest, options, backend, mask, cuda_graph)


def _cut(row: Tensor, ends: Sequence[int]) -> Tensor:
    stops = torch.isin(row, torch.tensor(ends, dtype=row.dtype)).nonzero()
    return row[: stops[0, 0]] if len(stops) else row
