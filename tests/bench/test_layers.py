"""What is measured: lengths as promised, and the bytes that must move."""

import pytest
import torch

from sparsemm_eval.bench.layers import (
    LAYERS,
    Case,
    Layers,
    bytes_moved,
    draw_lengths,
    layer_shape,
    top_sequences,
)
from sparsemm_eval.methods import ModelShape

ROWS = (1, 4, 31)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("mean", [64, 256, 1024, 4096])
@pytest.mark.parametrize("shape", LAYERS)
def test_heavy_heads_have_the_mean_and_the_tail(shape: str, mean: int, rows: int) -> None:
    lengths = Case(shape, mean, "heavy", rows, "float32").lengths()
    assert len(lengths) == rows * layer_shape(shape).kv_heads
    assert sum(lengths) == mean * len(lengths)
    top = top_sequences(len(lengths))
    longest = sorted(lengths, reverse=True)
    assert sum(longest[:top]) == pytest.approx(0.55 * sum(lengths), abs=1)
    if len(lengths) >= 8:
        assert longest[top - 1] > longest[top]
    assert longest[-1] >= 0.2 * mean * 0.45
    assert lengths != longest  # not in order


@pytest.mark.parametrize(("sequences", "top"), [(4, 1), (8, 1), (32, 2), (128, 6), (992, 50)])
def test_top_heads_are_a_twentieth_and_at_least_one(sequences: int, top: int) -> None:
    assert top_sequences(sequences) == top


def test_lengths_are_the_same_every_time() -> None:
    case = Case("vicuna", 256, "heavy", 4, "float16")
    assert case.lengths() == case.lengths()


def test_uniform_heads_are_alike() -> None:
    assert Case("qwen2vl", 64, "uniform", 1, "float16").lengths() == [64] * 4


def test_a_lone_sequence_has_all() -> None:
    assert draw_lengths("heavy", 1, 100) == [100]


def test_bytes_by_hand() -> None:
    """Two sequences of 3 and 5 tokens, 2 query heads each, head size 4, 2 bytes a number."""
    read = 2 * (4 + 6)  # keys and values of what is there then, the new token included
    written = 2 * 2  # its key and value in both
    queries = outputs = 2 * 2
    assert (
        bytes_moved([3, 5], ModelShape(1, 4, 2, head_dim=4), 2)
        == (read + written + queries + outputs) * 8
    )


def test_layers_are_those_of_the_papers_models() -> None:
    """Query heads, KV heads and a head's numbers."""
    shapes = {name: layer_shape(name) for name in LAYERS}
    assert {name: (s.query_heads, s.kv_heads, s.head_dim) for name, s in shapes.items()} == {
        "vicuna": (32, 32, 128), "mistral": (32, 8, 128), "qwen2vl": (28, 4, 128),
    }  # fmt: skip


def test_slots_are_where_tokens_lie_and_free_ones_behind() -> None:
    layers = Layers(Case("qwen2vl", 5, "heavy", 1, "float32"), 1, torch.device("cpu"))
    starts = layers.stores[0].offsets.tolist()
    for free in (0, 1):
        assert layers.slots(free).tolist() == [
            slot
            for start, length in zip(starts, layers.lengths, strict=False)
            for slot in range(start, start + length + free)
        ]
