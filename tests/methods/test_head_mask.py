"""Which heads are silenced, and how that is written."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsemm_eval.methods import (
    HeadMask,
    HeadScores,
    ModelShape,
    random_heads,
    read_head_mask,
    visual_heads,
)

SHAPE = ModelShape(layers=3, query_heads=4, kv_heads=2)
SCORES = HeadScores(np.array([[0, 1, 2, 3], [11, 10, 9, 8], [4, 5, 7, 7]]))


def read(text: object, mode: str = "query") -> HeadMask:
    return read_head_mask(text, mode, SHAPE, lambda: SCORES)


def test_a_list() -> None:
    mask = read("2-1+0-3+2-0", "output")
    assert mask == HeadMask(((0, 3), (2, 0), (2, 1)), "output")
    assert [mask.of_layer(layer) for layer in range(3)] == [[3], [], [0, 1]]
    assert mask.names == "0-3+2-0+2-1"


def test_a_list_needs_no_scores() -> None:
    def fail() -> HeadScores:
        raise AssertionError("scores were read")

    assert read_head_mask("1-0", "query", SHAPE, fail).heads == ((1, 0),)


@pytest.mark.parametrize(("share", "heads"), [
    ("0.01", [(1, 0)]),
    ("0.17", [(1, 0), (1, 1)]),
    ("5e-1", [(1, 0), (1, 1), (1, 2), (1, 3), (2, 2), (2, 3)]),
])  # fmt: skip
def test_the_best_heads(share: str, heads: list) -> None:
    assert list(read(f"visual:{share}").heads) == heads


def test_equal_scores_go_by_place() -> None:
    assert visual_heads(HeadScores(np.ones((2, 3))), 0.5) == ((0, 0), (0, 1), (0, 2))


layers_and_heads = st.tuples(st.integers(1, 6), st.integers(2, 8))


@given(layers_and_heads, st.floats(0.001, 0.5), st.integers(0, 10**6), st.integers(0, 99))
def test_random_heads_are_as_many_others(
    size: tuple[int, int], share: float, seed: int, scores_seed: int
) -> None:
    scores = HeadScores(np.random.default_rng(scores_seed).random(size))
    if 2 * round(share * scores.values.size) > scores.values.size:  # 2 of 3 are half of them
        with pytest.raises(ValueError, match="smaller share"):
            random_heads(scores, share, seed)
        return
    visual, drawn = visual_heads(scores, share), random_heads(scores, share, seed)
    assert len(set(drawn)) == len(drawn) == len(visual) == max(1, round(share * size[0] * size[1]))
    assert not set(drawn) & set(visual)
    assert drawn == random_heads(scores, share, seed)
    HeadMask(drawn).check_shape(ModelShape(*size, size[1]))


def test_every_other_head_is_drawn_as_often() -> None:
    counts = np.zeros(SCORES.values.shape)
    for seed in range(2000):
        for head in random_heads(SCORES, 0.25, seed):
            counts[head] += 1
    others = counts[counts > 0]
    assert len(others) == 9
    assert abs(others / 2000 - 3 / 9).max() < 0.05


def test_a_larger_share_of_one_seed_adds_heads() -> None:
    scores = HeadScores(np.arange(1.0, 201).reshape(10, 20))
    small, large = (random_heads(scores, share, 5) for share in (0.02, 0.1))
    assert set(small) <= set(large) | set(visual_heads(scores, 0.1))


def test_the_same_heads_are_one_setting() -> None:
    assert read("visual:0.1").settings == read("1-0").settings == read("visual:0.05").settings
    assert read("1-0").settings != read("1-0", "output").settings
    assert str(read("1-0")) != str(read("1-1"))


@pytest.mark.parametrize(
    "text",
    ["", "visual", "visual:", "visual:0.1:2", "visual:many", "random:0.1", "random:0.1:-1",
     "random:0.1:x", "best:0.1", "3", 3, 0.05, "3-1,4-0", "3-1+", "+3-1", "a-b", "-1-0", "1_3",
     "visual:0", "visual:1", "visual:1.5", "visual:-0.1", "visual:nan", "visual:inf",
     "random:0:1", "random:1:1"],
)  # fmt: skip
def test_what_is_no_mask_is_shown_what_is(text: object) -> None:
    with pytest.raises(ValueError, match=re.escape(f"mask_heads={text!r}")) as caught:
        read(text)
    assert "random:SHARE:SEED" in str(caught.value)
    assert "3-1+4-0" in str(caught.value)


@pytest.mark.parametrize(("text", "words"), [
    ("3-0", "no head 3-0; its heads are 0-0 to 2-3"),
    ("0-0+2-4", "no head 2-4; its heads are 0-0 to 2-3"),
    ("1-1+0-0+1-1", "head 1-1 is given twice"),
    ("random:0.6:1", "only 5 of 12 heads are left beside the 7 visual ones"),
])  # fmt: skip
def test_heads_that_cannot_be(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        read(text)


def test_no_head_and_no_such_mode() -> None:
    with pytest.raises(ValueError, match="mask_heads is empty"):
        HeadMask(())
    with pytest.raises(ValueError, match="mask_mode='key': it must be one of query, output"):
        HeadMask(((0, 0),), "key")
