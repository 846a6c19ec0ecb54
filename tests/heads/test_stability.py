"""Whether scores of other images would rank the heads alike."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from sparsemm_eval.heads.stability import rank_correlation, stability


def noisy(images: int, noise: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.random((6, 8)) + noise * rng.standard_normal((images, 6, 8))


def test_equal_images_agree_from_the_first() -> None:
    found = stability(noisy(8, 0.0))
    assert (found.split_half, found.worst, found.needed) == (1, 1, 2)
    assert found.settled
    assert found.settling == ((1, 1), (2, 1), (4, 1), (8, 1))
    assert found.halves == ((1, 1), (2, 1), (4, 1))


def test_what_is_needed_is_foretold_before_it_is_there() -> None:
    few, many = stability(noisy(16, 1.5)), stability(noisy(512, 1.5))
    assert not few.settled
    assert many.settled
    assert few.worst <= few.split_half
    # From 16 images to within a factor of three of what many show.
    assert many.needed / 3 < few.needed < many.needed * 3


def test_noise_alone_never_settles() -> None:
    found = stability(np.random.default_rng(1).standard_normal((64, 6, 8)))
    assert abs(found.split_half) < 0.5
    assert found.needed is None or found.needed > 200


def test_one_image_says_nothing_of_others() -> None:
    found = stability(noisy(1, 1.0))
    assert (found.split_half, found.needed, found.settled) == (None, None, False)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=40))
def test_rank_correlation_is_spearmans(pairs: list[tuple[int, int]]) -> None:
    one, other = np.array(pairs, dtype=float).T
    expected = spearmanr(one, other).statistic if np.ptp(one) and np.ptp(other) else 0
    assert rank_correlation(one, other) == pytest.approx(expected, abs=1e-12)
