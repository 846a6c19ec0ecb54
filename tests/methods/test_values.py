"""A method is a value: one name a cell, ties decided by position, numbers of any library."""

import numpy as np
import pytest
import torch

from sparsemm_eval.methods import HeadScores, ModelShape, canonical_settings, make_method

SHAPE = ModelShape(layers=2, query_heads=4, kv_heads=2)


@pytest.mark.parametrize("name", ["snapkv", "local", "streaming"])
def test_one_cell_has_one_name_where_rounding_makes_no_difference(name: str) -> None:
    paper, exact = (
        make_method(name, SHAPE, budget=64, allocation=rounding) for rounding in ("paper", "exact")
    )
    assert paper == exact
    assert "allocation" not in paper.settings


def test_a_methods_name_holds_all_it_reads_and_nothing_else() -> None:
    scores = HeadScores(np.ones((2, 4)))
    method = make_method("sparsemm", SHAPE, budget=64, head_scores=scores, ratio=0.2)
    assert list(method.settings) == [
        "allocation", "budget", "group_reduction", "head_scores", "kernel_size", "pooling",
        "ratio", "window",
    ]  # fmt: skip
    assert method.settings["head_scores"] == scores.digest
    assert make_method("fullkv", SHAPE).settings == {}


def test_settings_of_other_methods_are_dropped_from_a_cell_and_unknown_ones_refused() -> None:
    given = {"budget": 64, "ratio": 0.1, "seed": 3, "window": 16}
    assert canonical_settings("snapkv", given) == {"budget": 64, "window": 16}
    assert canonical_settings("fullkv", given) == {}
    with pytest.raises(ValueError, match="windows=16"):
        canonical_settings("snapkv", {"windows": 16})


@pytest.mark.parametrize("name", ["snapkv", "pyramidkv", "adakv", "random"])
@pytest.mark.parametrize("reduction", ["mean", "max"])
def test_equal_tokens_are_kept_from_the_left(name: str, reduction: str) -> None:
    """A query of zeros looks everywhere alike: no rounding may decide what is kept."""
    method = make_method(name, SHAPE, budget=20, window=7, group_reduction=reduction, kernel_size=1)
    query, key = torch.zeros(1, 4, 61, 4), torch.randn(1, 2, 61, 4)
    for mask in method.keep(query, key, 0)[0]:
        kept = mask.nonzero().flatten().tolist()
        assert kept == [*range(len(kept) - 7), *range(54, 61)]


def test_numbers_of_numpy_are_numbers() -> None:
    given = {"budget": np.int64(64), "window": np.int32(16), "ratio": np.float64(0.5)}
    assert make_method("random", SHAPE, **given) == make_method(
        "random", SHAPE, budget=64, window=16, ratio=0.5
    )


def test_an_array_in_place_of_scores_is_named() -> None:
    with pytest.raises(ValueError, match="head_scores is a ndarray"):
        make_method("sparsemm", SHAPE, budget=64, head_scores=np.ones((2, 4)))


def test_a_method_without_a_window_takes_a_query_of_any_length() -> None:
    key = torch.randn(1, 2, 61, 4)
    mask = make_method("local", SHAPE, budget=20).keep(torch.randn(1, 4, 7, 4), key, 0)
    assert mask.nonzero()[:, 2].unique().tolist() == list(range(41, 61))
