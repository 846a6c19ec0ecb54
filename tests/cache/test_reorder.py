"""Rows that are dropped, repeated or put in another order equal a cache built of those rows."""

from collections.abc import Callable

import pytest
import torch
from cache.sequences import assert_books_agree, assert_same_sequences, draw, feed
from torch import Tensor

from sparsemm_eval.cache import HeadBudgetCache
from sparsemm_eval.methods import Method, ModelShape, make_method

SHAPE = ModelShape(layers=2, query_heads=6, kv_heads=3)
TOKENS, DIM, STEPS = 50, 16, 20  # more steps than the least slack, so that layers grow
LENGTHS = torch.tensor([50, 31, 44, 9])
CHANGES: dict[str, tuple[Callable[[HeadBudgetCache], None], list[int]]] = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 3, 1])), [2, 0, 3, 1]),
    "beams": (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 0, 0])), [1, 1, 0, 0]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([3, 1])), [3, 1]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2, 3, 3]),
}
METHODS = {
    name: make_method(name, SHAPE, budget=12, window=4) for name in ("adakv", "random", "pyramidkv")
}
each_change = pytest.mark.parametrize(("change", "rows"), CHANGES.values(), ids=CHANGES.keys())


def read_prompt(methods: list[Method], samples: Tensor) -> HeadBudgetCache:
    """Feed a left-padded prompt of these samples through a fresh cache."""
    cache = HeadBudgetCache(methods)
    valid = torch.arange(TOKENS) >= TOKENS - LENGTHS[samples, None]
    mask = valid[:, None, None] & torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    for layer in range(SHAPE.layers):
        qkv = draw(4, (6, 3), TOKENS, DIM, seed=layer)
        feed(cache, layer, [x[samples] for x in qkv], mask)
    return cache


def decode(cache: HeadBudgetCache, rows: Tensor, start: int, stop: int) -> Tensor:
    """Feed tokens that every row draws for itself; the outputs of all steps and layers."""
    outputs = []
    for step in range(start, stop):
        for layer in range(SHAPE.layers):
            qkv = draw(8, (6, 3), 1, DIM, seed=100 + step * SHAPE.layers + layer)
            outputs.append(feed(cache, layer, [x[rows] for x in qkv]))
    return torch.stack(outputs) if outputs else torch.empty(0)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("at", [0, 5, STEPS])
@each_change
def test_equals_a_fresh_cache(
    change: Callable[[HeadBudgetCache], None], rows: list[int], at: int, name: str
) -> None:
    method = METHODS[name]
    chosen = torch.tensor(rows)
    cache = read_prompt([method], torch.arange(4))
    fresh = read_prompt([method], chosen)
    decode(cache, torch.arange(4), 0, at)
    decode(fresh, chosen, 0, at)
    change(cache)
    torch.testing.assert_close(
        decode(cache, chosen, at, at + STEPS), decode(fresh, chosen, at, at + STEPS)
    )
    for one, other in zip(cache.layers, fresh.layers, strict=True):
        assert_books_agree(one.filled())
        assert_same_sequences(one.filled(), other.filled())
    assert torch.equal(cache.kept(), fresh.kept())
    assert cache.prompt_lengths() == fresh.prompt_lengths()
    assert cache.get_seq_length() == fresh.get_seq_length()
    assert cache.batch_size == fresh.batch_size == len(rows)


@each_change
def test_rows_under_several_methods(
    change: Callable[[HeadBudgetCache], None], rows: list[int]
) -> None:
    """Rows are chosen, not samples: each is one sample under one method."""
    methods = [METHODS["adakv"], METHODS["random"]]
    cache = read_prompt(methods, torch.arange(2))
    whole = read_prompt(methods, torch.arange(2))
    decode(cache, torch.arange(4), 0, 3)
    decode(whole, torch.arange(4), 0, 3)
    change(cache)
    out = decode(cache, torch.tensor(rows), 3, 9)
    torch.testing.assert_close(out, decode(whole, torch.arange(4), 3, 9)[:, rows])
    assert torch.equal(cache.kept(), whole.kept()[rows])
    assert cache.prompt_lengths() == [whole.prompt_lengths()[row] for row in rows]


@each_change
def test_reset_after_a_change(change: Callable[[HeadBudgetCache], None], rows: list[int]) -> None:
    """The next prompt is not counted by the rows of the last one."""
    cache = read_prompt([METHODS["adakv"]], torch.arange(4))
    change(cache)
    cache.reset()
    assert cache.prompt_lengths() == []
    assert cache.batch_size == -1
    change(cache)  # nothing to change, and nothing goes wrong
    for layer in range(SHAPE.layers):
        feed(cache, layer, draw(2, (6, 3), TOKENS, DIM, seed=layer))
    assert cache.prompt_lengths() == [TOKENS, TOKENS]
