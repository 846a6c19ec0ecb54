"""What is refused, before anything is computed, in one sentence with the value and a way out."""

import re
from typing import Any

import numpy as np
import pytest
import torch

from sparsemm_eval.methods import HeadScores, ModelShape, make_method, method_names

SHAPE = ModelShape(layers=2, query_heads=4, kv_heads=2)
SCORES = HeadScores(np.ones((2, 4)))
BUILT_IN = ("fullkv", "snapkv", "pyramidkv", "adakv", "sparsemm", "random", "local", "streaming")
WINDOWED = ("snapkv", "pyramidkv", "adakv", "sparsemm", "random")


def refused(name: str, **settings: Any) -> str:
    """Return the one sentence with which a method is refused."""
    if name == "sparsemm":
        settings.setdefault("head_scores", SCORES)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - each test looks at the message
        make_method(name, SHAPE, **settings)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def assert_names(message: str, *words: object) -> None:
    """Check that each word or number stands in the message by itself."""
    for word in words:
        assert re.search(rf"(?<![\w.]){re.escape(str(word))}(?![\w])", message), (word, message)


def test_built_in_methods_are_listed() -> None:
    assert set(BUILT_IN) <= set(method_names())


@pytest.mark.parametrize("name", ["snapkvv", "SnapKV", "", "full kv"])
def test_unknown_method(name: str) -> None:
    message = refused(name, budget=64)
    assert repr(name) in message
    assert_names(message, *BUILT_IN)


@pytest.mark.parametrize("name", BUILT_IN)
def test_unknown_setting(name: str) -> None:
    settings = {} if name == "fullkv" else {"budget": 64}
    message = refused(name, **settings, windows=8)
    assert_names(message, "windows", 8, name)
    if name in WINDOWED:
        known = ["budget", "window", "kernel_size", "pooling", "group_reduction", "allocation"]
        assert_names(message, *known)


@pytest.mark.parametrize(
    ("name", "setting", "value", "known"),
    [
        ("fullkv", "budget", 64, []),
        ("local", "window", 8, ["budget"]),
        ("local", "kernel_size", 5, ["budget"]),
        ("streaming", "window", 8, ["budget", "sinks"]),
        ("snapkv", "ratio", 0.1, ["budget", "window"]),
        ("snapkv", "sinks", 4, ["budget", "window"]),
        ("adakv", "ratio", 0.1, ["floor"]),
        ("pyramidkv", "floor", 0.2, ["budget", "window"]),
        ("sparsemm", "floor", 0.2, ["ratio", "head_scores"]),
        ("sparsemm", "seed", 1, ["ratio", "head_scores"]),
        ("random", "head_scores", SCORES, ["ratio", "seed"]),
    ],
)
def test_settings_of_other_methods(name: str, setting: str, value: Any, known: list[str]) -> None:
    settings = {} if name == "fullkv" else {"budget": 64}
    message = refused(name, **(settings | {setting: value}))
    assert_names(message, setting, name, *known)


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name != "fullkv"])
def test_budget_missing(name: str) -> None:
    assert_names(refused(name), "budget", name)


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize(
    ("budget", "window", "least"), [(32, None, 33), (7, None, 33), (12, 12, 13), (0, 4, 5)]
)
def test_budget_within_the_window(name: str, budget: int, window: int | None, least: int) -> None:
    settings = {"budget": budget} | ({} if window is None else {"window": window})
    message = refused(name, **settings)
    assert_names(message, budget)
    # What is allowed: the least, or more than the window.
    assert re.search(rf"\b({least - 1}|{least})\b", message), message
    make_method("snapkv", SHAPE, **(settings | {"budget": least}))


@pytest.mark.parametrize(("budget", "sinks"), [(4, None), (3, None), (9, 9), (1, 8)])
def test_budget_within_the_sinks(budget: int, sinks: int | None) -> None:
    settings = {} if sinks is None else {"sinks": sinks}
    message = refused("streaming", budget=budget, **settings)
    least = (4 if sinks is None else sinks) + 1
    assert_names(message, budget, "sinks")
    assert re.search(rf"\b({least - 1}|{least})\b", message)
    make_method("streaming", SHAPE, budget=least, **settings)


@pytest.mark.parametrize("name", ["local", "streaming"])
@pytest.mark.parametrize("budget", [0, -3])
def test_budget_of_nothing(name: str, budget: int) -> None:
    assert str(budget) in refused(name, budget=budget)


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("kernel_size", [4, 2, 0, -1, -3])
def test_kernel_even_or_none(name: str, kernel_size: int) -> None:
    message = refused(name, budget=64, kernel_size=kernel_size)
    assert_names(message, "kernel_size", kernel_size)
    assert re.search("odd|at least 1", message)


@pytest.mark.parametrize(
    ("name", "setting"), [("sparsemm", "ratio"), ("random", "ratio"), ("adakv", "floor")]
)
@pytest.mark.parametrize("value", [-0.1, 1.01, 2, -1, float("nan"), float("inf")])
def test_shares_outside_0_to_1(name: str, setting: str, value: float) -> None:
    message = refused(name, budget=64, **{setting: value})
    assert_names(message, setting, value, 0, 1)
    for edge in (0, 1, 0.0, 1.0):
        extra = {"head_scores": SCORES} if name == "sparsemm" else {}
        make_method(name, SHAPE, budget=64, **{setting: edge}, **extra)


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("pooling", "median", ["avg", "max"]),
        ("pooling", "mean", ["avg", "max"]),
        ("group_reduction", "avg", ["mean", "max"]),
        ("allocation", "Exact", ["paper", "exact"]),
    ],
)
def test_choices(name: str, setting: str, value: str, allowed: list[str]) -> None:
    message = refused(name, budget=64, **{setting: value})
    assert_names(message, setting, value, *allowed)


def test_sparsemm_without_head_scores() -> None:
    with pytest.raises(ValueError, match="head_scores") as caught:
        make_method("sparsemm", SHAPE, budget=64)
    assert "\n" not in str(caught.value)
    assert "head_scores" in refused("sparsemm", budget=64, head_scores=None)


@pytest.mark.parametrize("shape", [(2, 8), (3, 4), (2, 2), (1, 1)])
def test_head_scores_of_another_model(shape: tuple[int, int]) -> None:
    message = refused("sparsemm", budget=64, head_scores=HeadScores(np.ones(shape)))
    assert_names(message, *shape, 2, 4)


@pytest.mark.parametrize(("query_heads", "kv_heads"), [(6, 4), (2, 4), (7, 2)])
def test_query_heads_that_do_not_divide(query_heads: int, kv_heads: int) -> None:
    with pytest.raises(ValueError, match=str(query_heads)) as caught:
        make_method("snapkv", ModelShape(2, query_heads, kv_heads), budget=64)
    assert_names(str(caught.value), query_heads, kv_heads)


# --- in keep ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("length", [1, 7, 9, 39, 41])
def test_query_neither_window_nor_whole(name: str, length: int) -> None:
    extra = {"head_scores": SCORES} if name == "sparsemm" else {}
    method = make_method(name, SHAPE, budget=16, window=8, **extra)
    query, key = torch.randn(1, 4, length, 4), torch.randn(1, 2, 40, 4)
    with pytest.raises(ValueError, match=rf"\b{length}\b") as caught:
        method.keep(query, key, 0)
    assert_names(str(caught.value), 8, 40)


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("tokens", [6, 40])
@pytest.mark.parametrize("hole", ["right", "middle"])
def test_valid_that_is_not_left_padding(name: str, tokens: int, hole: str) -> None:
    """In the second row of two, and for prompts within the budget as well."""
    settings: dict[str, Any] = {} if name == "fullkv" else {"budget": 16}
    if name in WINDOWED:
        settings["window"] = 4
    if name == "sparsemm":
        settings["head_scores"] = SCORES
    method = make_method(name, SHAPE, **settings)
    valid = torch.ones(2, tokens, dtype=torch.bool)
    valid[1, -1 if hole == "right" else 2] = False
    with pytest.raises(ValueError, match=r"(?i)left"):
        method.keep(torch.randn(2, 4, tokens, 4), torch.randn(2, 2, tokens, 4), 0, valid=valid)
