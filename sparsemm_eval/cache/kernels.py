"""Attention of one new token over ragged KV, by what the machine has.

Every backend has one face: ``attend(query [S, G, D], kv, scale) -> [S, G, D]``, where sequence s
(a row's KV head) sees its own ``kv`` slots only. Softmax is float32 or better.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsemm_eval.methods.checks import check_choice

BACKENDS = ("auto", "varlen", "torch")


class Slots(Protocol):
    """What a backend needs of ragged keys and values; `sparsemm_eval.cache.ragged.RaggedKV`."""

    keys: Tensor  # [T, D]
    values: Tensor  # [T, D]
    offsets: Tensor  # [S + 1] int32, first slot of each sequence
    lengths: Tensor  # [S] int32, filled slots of each sequence
    host_starts: list[int]

    def host_lengths(self) -> list[int]:
        """`lengths`, known without asking the device."""


def resolve_backend(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Name the backend that will run.

    Parameters
    ----------
    name : {"auto", "varlen", "torch"}
        As set by the user; auto takes the fastest that can run.
    device, dtype, head_dim
        Of keys and values.

    Raises
    ------
    ValueError
        For an unknown name, or one that cannot run here.
    """
    check_choice("backend", name, BACKENDS)
    half = dtype in (torch.float16, torch.bfloat16)
    fits = device.type == "cuda" and half and head_dim % 8 == 0 and head_dim <= 256
    if name == "varlen" and not fits:
        raise ValueError(
            f"backend=varlen cannot run {dtype} with head size {head_dim} on {device.type}: it "
            "needs a CUDA device, float16 or bfloat16 and a head size that is a multiple of 8 up "
            "to 256; use backend=auto or torch"
        )
    return "torch" if name == "torch" or not fits else "varlen"


def attend(backend: str, query: Tensor, kv: Slots, scale: float) -> Tensor:
    """Attend with a resolved backend; query [S, G, D] to output [S, G, D]."""
    return _ATTEND[backend](query, kv, scale)


def _attend_torch(query: Tensor, kv: Slots, scale: float) -> Tensor:
    """One SDPA call a sequence, or one for all where their lengths are equal; no KV is copied."""
    lengths = kv.host_lengths()
    if len(set(lengths)) == 1:
        shape = (len(lengths), -1, query.shape[-1])
        keys = kv.keys.view(shape)[:, : lengths[0]]
        values = kv.values.view(shape)[:, : lengths[0]]
        return F.scaled_dot_product_attention(query, keys, values, scale=scale)
    out = torch.empty_like(query)
    for s, (start, length) in enumerate(zip(kv.host_starts, lengths, strict=True)):
        keys = kv.keys[None, start : start + length]
        values = kv.values[None, start : start + length]
        out[s] = F.scaled_dot_product_attention(query[None, s], keys, values, scale=scale)[0]
    return out


def _attend_varlen(query: Tensor, kv: Slots, scale: float) -> Tensor:
    """Varlen flash attention with each sequence as a batch entry; reads the slots in place."""
    sequences = query.shape[0]
    starts = torch.arange(sequences + 1, dtype=torch.int32, device=query.device)
    longest = max(kv.host_lengths())
    keys, values = kv.keys[:, None], kv.values[:, None]  # one KV head a sequence
    if find_spec("flash_attn") is not None:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        return _flash_attn_varlen_forward(
            query, keys, values, starts, kv.offsets, 1, longest,
            dropout_p=0.0, softmax_scale=scale, causal=False, seqused_k=kv.lengths,
        )[0]  # fmt: skip
    # The op below torch.nn.attention.varlen, whose public face has no seqused_k in torch 2.11.
    return torch.ops.aten._flash_attention_forward(
        query, keys, values, starts, kv.offsets, 1, longest, 0.0, False, False,
        scale=scale, seqused_k=kv.lengths,
    )[0]  # fmt: skip


_ATTEND: dict[str, Callable[[Tensor, Slots, float], Tensor]] = {
    "torch": _attend_torch,
    "varlen": _attend_varlen,
}
