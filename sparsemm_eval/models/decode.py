"""Prompt to tokens: read the prompt once, compress it, decode on the ragged cache."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsemm_eval.cache import HeadBudgetCache
from sparsemm_eval.methods import Method


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
        Bytes of the whole cache at the end: new tokens, slack and metadata included.
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

    Returns
    -------
    Decoded
        One row a sample; with ``num_return_sequences`` that many rows a sample.
    """
    start = time.perf_counter()
    cache = HeadBudgetCache(method, backend)
    length = inputs["input_ids"].shape[1]
    out = model.generate(**inputs, past_key_values=cache, **options)
    # A beam search holds every beam as a row of its own; they share the prompt.
    beams = cache.kept().shape[0] // out.shape[0]
    kept = cache.kept()[::beams]
    token_bytes = _token_bytes(cache)
    return Decoded(
        tokens=[_cut(row, _ends(model)) for row in out[:, length:].cpu()],
        prompt_tokens=cache.prompt_lengths()[::beams],
        kept=kept,
        kept_bytes=(kept.sum((1, 2)) * token_bytes).tolist(),
        cache_bytes=cache.bytes().total,
        backend=cache.backend(),
        seconds=time.perf_counter() - start,
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
