"""Ragged caches taken apart: one sequence at a time, and attention over it written out."""

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

from sparsemm_eval.cache import HeadBudgetCache, RaggedKV


def sequences(kv: RaggedKV) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [length, D] of every sequence, found by what the device knows."""
    spans = zip(kv.offsets.tolist(), kv.lengths.tolist(), strict=False)
    return [(kv.keys[start : start + n], kv.values[start : start + n]) for start, n in spans]


def assert_same_sequences(one: RaggedKV, other: RaggedKV) -> None:
    """Check that two layers hold the same tokens in the same order, to the bit."""
    assert torch.equal(one.kept, other.kept)
    for (key, value), (other_key, other_value) in zip(
        sequences(one), sequences(other), strict=True
    ):
        assert torch.equal(key, other_key)
        assert torch.equal(value, other_value)


def assert_books_agree(kv: RaggedKV) -> None:
    """Check that host and device agree on who owns which slots, and that none is left over."""
    starts, filled = kv.offsets.tolist(), kv.lengths.tolist()
    assert filled == (kv.kept.flatten() + kv.steps).tolist()
    assert starts[0] == 0
    assert starts[-1] == len(kv.keys) == len(kv.values)
    ends = [start + n + kv.slack for start, n in zip(starts, filled, strict=False)]
    assert ends == starts[1:]


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention of queries [G, D] over one sequence [n, D], in float64."""
    query, key, value = (x.double() for x in (query, key, value))
    return (query @ key.T * scale).softmax(-1) @ value


def poison(kv: RaggedKV) -> None:
    """Fill every free slot with NaN."""
    free = torch.ones(len(kv.keys), dtype=torch.bool, device=kv.keys.device)
    for start, length in zip(kv.offsets.tolist(), kv.lengths.tolist(), strict=False):
        free[start : start + length] = False
    kv.keys[free] = torch.nan
    kv.values[free] = torch.nan


def draw(rows: int, heads: tuple[int, int], tokens: int, dim: int, seed: int = 0) -> list[Tensor]:
    """Draw query, key and value of one layer: (query heads, KV heads), float32."""
    generator = torch.Generator().manual_seed(seed)
    query_heads, kv_heads = heads
    return [
        torch.randn(rows, count, tokens, dim, generator=generator)
        for count in (query_heads, kv_heads, kv_heads)
    ]


def feed(
    cache: HeadBudgetCache, layer: int, qkv: list[Tensor], mask: Tensor | None = None
) -> Tensor:
    """Do what a model's attention does: update the cache, then attend. [B, m, Hq, D]."""
    query, key, value = qkv
    group = query.shape[1] // key.shape[1]
    module = SimpleNamespace(layer_idx=layer, num_key_value_groups=group, is_causal=True)
    handle, _ = cache.update(key, value, layer)
    return handle.attend(module, query, mask, scaling=query.shape[-1] ** -0.5)


def device_tensors(cache: HeadBudgetCache) -> Iterator[Tensor]:
    """Every tensor that the cache's layers hold on their device.

    ``kept`` is not among them: it is a count a sequence, on the host.
    """
    for holder in (*cache.layers, *(layer.filled() for layer in cache.layers)):
        for name, value in vars(holder).items():
            if isinstance(value, Tensor) and name != "kept":
                yield value
