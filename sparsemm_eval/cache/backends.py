"""Append one new token and attend over ragged KV, by what the machine has.

Every backend has one face: ``append_attend(query [S, G, D], key [S, D], value [S, D], kv, scale) ->
[S, G, D]``, where sequence s (a row's KV head) gets one token more and sees its own ``kv`` slots
only. Softmax is float32 or better.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsemm_eval.cache.extension import ExtensionError, load_extension
from sparsemm_eval.choices import BACKENDS
from sparsemm_eval.errors import UserError, check_choice

_HALF = (torch.float16, torch.bfloat16)


class Slots(Protocol):
    """What a backend needs of ragged keys and values, all of it where the model lies.

    A length below zero marks a sequence as finished: ``~length`` tokens are there, it is neither
    appended to nor read, and its output is zero or anything finite.
    """

    keys: Tensor  # [T, D]
    values: Tensor  # [T, D]
    offsets: Tensor  # [S + 1] int32, first slot of each sequence
    lengths: Tensor  # [S] int32, filled slots of each sequence; updated in place
    longest: int  # at least the slots of any sequence, known without asking the device


def check_backend(name: str, device: str) -> None:
    """Refuse early what cannot run on a kind of device, and build what is missing.

    Parameters
    ----------
    name : {"auto", "cuda_ext", "varlen", "torch"}
        As set by the user.
    device : {"cpu", "cuda"}
        Where the model will run.

    Raises
    ------
    UserError
        For an unknown name, or one that cannot run here whatever the model.
    """
    check_choice("backend", name, BACKENDS)
    if name == "varlen" and device != "cuda":
        raise UserError(
            "backend=varlen needs a CUDA device, and there is none: use auto, cuda_ext or torch"
        )
    if name == "cuda_ext":
        _load(device)
    elif name == "auto":
        _loads(device)


def resolve_backend(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, group: int
) -> str:
    """Name the backend that will run.

    Parameters
    ----------
    name : {"auto", "cuda_ext", "varlen", "torch"}
        As set by the user; auto takes the fastest that can run.
    device, dtype, head_dim
        What keys and values are like.
    group : int
        Query heads a KV head.

    Raises
    ------
    UserError
        For an unknown name, or one that cannot run here.
    """
    check_choice("backend", name, BACKENDS)
    here = f"{dtype} with head size {head_dim} and {group} query heads a KV head on {device.type}"
    compiled = _fits_compiled(device.type, dtype, head_dim, group)
    varlen = device.type == "cuda" and dtype in _HALF and head_dim % 8 == 0 and head_dim <= 256
    if name == "cuda_ext":
        if not compiled:
            raise UserError(
                f"backend=cuda_ext cannot run {here}: on CUDA it takes float16 and bfloat16, head "
                "sizes 64, 96 and 128 and up to 8 query heads a KV head, on the CPU float32, "
                "float16 and bfloat16; use backend=auto or torch"
            )
        _load(device.type)
    if name == "varlen" and not varlen:
        raise UserError(
            f"backend=varlen cannot run {here}: it needs a CUDA device, float16 or bfloat16 and a "
            "head size that is a multiple of 8 up to 256; use backend=auto or torch"
        )
    if name != "auto":
        return name
    if compiled and _loads(device.type):
        return "cuda_ext"
    return "varlen" if varlen else "torch"


def append_attend(
    backend: str, query: Tensor, key: Tensor, value: Tensor, kv: Slots, scale: float
) -> Tensor:
    """Append and attend with a resolved backend; query [S, G, D] to output [S, G, D]."""
    return _APPEND_ATTEND[backend](query, key, value, kv, scale)


def _fits_compiled(device: str, dtype: torch.dtype, head_dim: int, group: int) -> bool:
    if device == "cuda":
        return dtype in _HALF and head_dim in (64, 96, 128) and group <= 8
    return device == "cpu" and dtype in (torch.float32, *_HALF)


def _load(device: str) -> None:
    try:
        load_extension(device)
    except ExtensionError as error:
        raise UserError(f"backend=cuda_ext cannot run here: {error}") from error


@cache
def _loads(device: str) -> bool:
    """Whether the compiled op runs on a device; says so once if it does not."""
    try:
        load_extension(device)
    except ExtensionError as error:
        warnings.warn(f"attention over the ragged cache is slow here: {error}", stacklevel=2)
        return False
    return True


def _append_attend_compiled(
    query: Tensor, key: Tensor, value: Tensor, kv: Slots, scale: float
) -> Tensor:
    # By its overload's name: looking for the one that fits takes as long as a small attention.
    return torch.ops.sparsemm.append_attend.default(
        query, key, value, kv.keys, kv.values, kv.offsets, kv.lengths, scale
    )


def _append_attend_torch(
    query: Tensor, key: Tensor, value: Tensor, kv: Slots, scale: float
) -> Tensor:
    """One SDPA call a sequence, or one for all where their lengths are equal; no KV is copied."""
    append(key, value, kv)
    starts, lengths = kv.offsets.tolist(), kv.lengths.tolist()
    slots = starts[1] - starts[0]
    evenly = starts[0] == 0 and starts[-1] == slots * len(lengths)
    if evenly and len(set(lengths)) == 1 and lengths[0] > 0:
        shape = (len(lengths), slots, query.shape[-1])
        keys = kv.keys[: starts[-1]].view(shape)[:, : lengths[0]]
        values = kv.values[: starts[-1]].view(shape)[:, : lengths[0]]
        return F.scaled_dot_product_attention(query, keys, values, scale=scale)
    out = torch.zeros_like(query)
    for s, (start, length) in enumerate(zip(starts, lengths, strict=False)):
        if length > 0:
            keys = kv.keys[None, start : start + length]
            values = kv.values[None, start : start + length]
            out[s] = F.scaled_dot_product_attention(query[None, s], keys, values, scale=scale)[0]
    return out


def _append_attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, kv: Slots, scale: float
) -> Tensor:
    """Varlen flash attention with each sequence as a batch entry; reads the slots in place."""
    append(key, value, kv)
    sequences = query.shape[0]
    starts = torch.arange(sequences + 1, dtype=torch.int32, device=query.device)
    # A finished sequence is read as it is: leaving it out would need another shape.
    used = torch.where(kv.lengths < 0, ~kv.lengths, kv.lengths)
    keys, values = kv.keys[:, None], kv.values[:, None]  # one KV head a sequence
    if find_spec("flash_attn") is not None:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

        return _flash_attn_varlen_forward(
            query, keys, values, starts, kv.offsets, 1, kv.longest,
            dropout_p=0.0, softmax_scale=scale, causal=False, seqused_k=used,
        )[0]  # fmt: skip
    # The op below torch.nn.attention.varlen, whose public face has no seqused_k in torch 2.11.
    return torch.ops.aten._flash_attention_forward(
        query, keys, values, starts, kv.offsets, 1, kv.longest, 0.0, False, False,
        scale=scale, seqused_k=used,
    )[0]  # fmt: skip


def append(key: Tensor, value: Tensor, kv: Slots) -> None:
    """Write one token a sequence in place, [S, D] each, where it is not finished."""
    finished = kv.lengths < 0
    slots = kv.offsets[:-1] + torch.where(finished, ~kv.lengths, kv.lengths)
    # A finished sequence writes what stands there over its last token.
    slots = torch.where(finished, slots - 1, slots).clamp_(min=0)
    for held, new in ((kv.keys, key), (kv.values, value)):
        held[slots] = torch.where(finished[:, None], held[slots], new)
    kv.lengths.add_((~finished).to(kv.lengths.dtype))


_APPEND_ATTEND: dict[str, Callable[[Tensor, Tensor, Tensor, Slots, float], Tensor]] = {
    "cuda_ext": _append_attend_compiled,
    "varlen": _append_attend_varlen,
    "torch": _append_attend_torch,
}
