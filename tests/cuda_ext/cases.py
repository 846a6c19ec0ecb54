"""Calls of sparsemm::append_attend: how they are drawn, and what must come of them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from torch import Tensor

from sparsemm_eval.cache.extension import ExtensionError, load_extension

# Arithmetic is float32 throughout: what is left in half precision is the rounding of the output.
TOLERANCE = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 1e-3},
    torch.bfloat16: {"rtol": 1e-2, "atol": 4e-3},
}
GUARD = 3  # slots before the first sequence and behind the last that belong to nobody


@dataclass(frozen=True)
class Case:
    """The arguments of one call, in order.

    Parameters
    ----------
    q, k_new, v_new, k_cache, v_cache, offsets, lengths, scale
        As the op names them.
    """

    q: Tensor
    k_new: Tensor
    v_new: Tensor
    k_cache: Tensor
    v_cache: Tensor
    offsets: Tensor
    lengths: Tensor
    scale: float

    @property
    def arguments(self) -> tuple:
        """All of them."""
        return tuple(vars(self).values())

    def clone(self) -> Case:
        """Give the same case again, whose caches and lengths are its own."""
        return replace(
            self, **{name: x.clone() for name, x in vars(self).items() if isinstance(x, Tensor)}
        )


def load_or_skip(device: str) -> None:
    """Load the op; skip where nothing could build it."""
    try:
        load_extension(device)
    except ExtensionError as error:
        if shutil.which({"cpu": "c++", "cuda": "nvcc"}[device]) is None:
            pytest.skip(str(error))
        raise


def draw_case(
    lengths: Sequence[int],
    group: int,
    dim: int,
    dtype: torch.dtype,
    device: str,
    *,
    free: int | Sequence[int] = 2,
    finished: Sequence[int] = (),
    seed: int = 0,
) -> Case:
    """Draw a case whose unfilled slots are all NaN.

    Parameters
    ----------
    lengths : sequence of int
        Filled slots of each sequence.
    group, dim, dtype, device
        Query heads a sequence, head size, and of what kind and where.
    free : int or sequence of int, default 2
        Free slots behind them, of all or of each.
    finished : sequence of int, optional
        Sequences that are marked finished.
    seed : int, default 0
        Of keys and values.
    """
    count = len(lengths)
    filled = torch.tensor(lengths, dtype=torch.int32)
    room = filled + torch.as_tensor(free, dtype=torch.int32)
    offsets = torch.full((count + 1,), GUARD, dtype=torch.int32)
    offsets[1:] += room.cumsum(0).to(torch.int32)
    slots = int(offsets[-1]) + GUARD
    there = torch.zeros(slots, dtype=torch.bool)
    for start, length in zip(offsets.tolist(), lengths, strict=False):
        there[start : start + length] = True
    caches = [
        torch.where(there[:, None], _noise((slots, dim), seed + i), torch.nan) for i in (0, 1)
    ]
    for s in finished:
        filled[s] = ~filled[s]
    q, k_new, v_new = new_token(count, group, dim, seed + 2)
    floats = (x.to(device, dtype) for x in (q, k_new, v_new, *caches))
    return Case(*floats, offsets.to(device), filled.to(device), dim**-0.5)


def new_token(count: int, group: int, dim: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw q, k_new and v_new; queries are sharp, so that single tokens matter."""
    q, *new = (
        _noise(shape, seed + i).clone()
        for i, shape in enumerate([(count, group, dim), (count, dim), (count, dim)])
    )
    return 2 * q, *new


def expected(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs in float64, and keys, values and lengths as they must be after the call."""
    keys, values, lengths = (x.clone() for x in (case.k_cache, case.v_cache, case.lengths))
    out = torch.zeros(case.q.shape, dtype=torch.float64, device=case.q.device)
    spans = zip(
        case.offsets.tolist(), case.offsets.tolist()[1:], case.lengths.tolist(), strict=False
    )
    for s, (start, end, length) in enumerate(spans):
        slot = start + length
        if length < 0:
            continue
        if slot >= end:
            out[s] = torch.nan
            continue
        keys[slot], values[slot] = case.k_new[s], case.v_new[s]
        lengths[s] += 1
        seen = slice(start, slot + 1)
        scores = case.q[s].double() @ keys[seen].double().T * case.scale
        out[s] = scores.softmax(-1) @ values[seen].double()
    return out, keys, values, lengths


def call(case: Case) -> Tensor:
    """Call the op, where memory that it may get for its output was NaN before."""
    torch.full_like(case.q, torch.nan)
    return torch.ops.sparsemm.append_attend(*case.arguments)


def check(case: Case) -> Tensor:
    """Call the op and check its output, and all it wrote and left, slot by slot and bit by bit."""
    wanted, keys, values, lengths = expected(case)
    out = call(case)
    assert out.shape == case.q.shape
    assert out.dtype == case.q.dtype
    assert out.is_contiguous()
    torch.testing.assert_close(out.double(), wanted, equal_nan=True, **TOLERANCE[out.dtype])
    assert torch.equal(case.lengths, lengths)
    assert torch.equal(_bits(case.k_cache), _bits(keys))
    assert torch.equal(_bits(case.v_cache), _bits(values))
    return out


def _bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


@cache
def _pool() -> Tensor:
    return torch.randn(2_500_000, generator=torch.Generator().manual_seed(0))


def _noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Normal noise, drawn once for all cases; `seed` says where in it to begin."""
    count, pool = math.prod(shape), _pool()
    start = seed * 7919 % 97_001
    return pool[start : start + count].view(shape)
