"""Attention as pixels."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsemm_eval.heads.maps import density, score_maps


def test_cells_of_whole_pixels_are_filled_evenly() -> None:
    weights = np.random.default_rng(0).random((2, 3, 6))
    y, x = np.mgrid[0:2, 0:3].reshape(2, -1)
    boxes = np.stack([x * 4, y * 5, x * 4 + 4, y * 5 + 5], -1).astype(float)
    grid = weights.reshape(2, 3, 2, 3)
    expected = grid.repeat(5, -2).repeat(4, -1) / 20
    np.testing.assert_allclose(density(weights, boxes, 12, 10), expected, rtol=1e-6)


def test_a_pixel_gets_its_share_of_a_region() -> None:
    found = density(np.array([1.0]), np.array([[0.5, 0.0, 2.0, 1.0]]), 3, 2)
    np.testing.assert_allclose(found, [[1 / 3, 2 / 3, 0], [0, 0, 0]], rtol=1e-6)


def test_tokens_without_a_region_are_not_drawn() -> None:
    boxes = np.array([[np.nan] * 4, [1, 1, 1, 2], [0, 0, 1, 1]])
    found = density(np.ones(3), boxes, 2, 2)
    np.testing.assert_array_equal(found, [[1, 0], [0, 0]])


coordinate = st.floats(0, 1, width=32)


@given(
    st.lists(st.tuples(coordinate, coordinate, coordinate, coordinate), min_size=1, max_size=5),
    st.integers(1, 9),
    st.integers(1, 9),
)
def test_no_weight_is_lost_wherever_regions_overlap(
    corners: list[tuple], width: int, height: int
) -> None:
    x = np.sort([corner[:2] for corner in corners]) * width
    y = np.sort([corner[2:] for corner in corners]) * height
    boxes = np.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], -1)
    sides = np.stack([x[:, 1] - x[:, 0], y[:, 1] - y[:, 0]])
    drawn = (sides > 1e-3).all(0)
    weights = np.arange(1.0, len(corners) + 1)
    found = density(weights[drawn], boxes[drawn], width, height)
    assert found.shape == (height, width)
    assert found.min() >= 0
    assert found.sum() == pytest.approx(weights[drawn].sum(), rel=1e-4)


def test_the_same_numbers_draw_the_same_svg(tmp_path: Path) -> None:
    scores = np.random.default_rng(0).random((3, 4))
    for name in ("one.svg", "two.svg"):
        score_maps(scores, scores.reshape(3, 2, 2).sum(-1), "scores", tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
