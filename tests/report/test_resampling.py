"""Intervals and tests against scipy and statsmodels, and on data with known answers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as their_mcnemar
from statsmodels.stats.multitest import multipletests

from sparsemm_eval.report.resampling import bootstrap, holm, mcnemar, sign_flips


def test_the_interval_is_scipys() -> None:
    scores = np.random.default_rng(1).beta(2, 1, size=(300, 3))
    low, high = bootstrap(scores)
    for column in range(3):
        theirs = stats.bootstrap(
            (scores[:, column],), np.mean, n_resamples=10_000, method="percentile", rng=2
        ).confidence_interval
        # Two draws of 10,000: an end's own error is a 40th of the width.
        width = theirs.high - theirs.low
        assert low[column] == pytest.approx(theirs.low, abs=width / 15)
        assert high[column] == pytest.approx(theirs.high, abs=width / 15)


def test_the_interval_of_a_difference_is_scipys_paired_one() -> None:
    generator = np.random.default_rng(3)
    one = generator.random(250)
    two = one + generator.normal(0.02, 0.05, 250)
    (low,), (high,) = bootstrap((one - two)[:, None])
    theirs = stats.bootstrap(
        (one, two), lambda a, b, axis: (a - b).mean(axis=axis), paired=True, vectorized=True,
        n_resamples=10_000, method="percentile", rng=4,
    ).confidence_interval  # fmt: skip
    width = theirs.high - theirs.low
    assert low == pytest.approx(theirs.low, abs=width / 15)
    assert high == pytest.approx(theirs.high, abs=width / 15)
    # Paired: the scores themselves spread far more than their difference.
    (alone,), (above,) = bootstrap(one[:, None])
    assert above - alone > 3 * (high - low)


def test_the_interval_covers_the_truth() -> None:
    """400 experiments of 100 samples; a binomial count of 380 with a deviation of 4.4."""
    truth = 0.7
    draws = np.random.default_rng(5).random((100, 400)) < truth
    low, high = bootstrap(draws.astype(float), resamples=2_000)
    # Percentile intervals of a share are a little narrow at this size: 93 to 96%.
    assert 360 <= ((low <= truth) & (truth <= high)).sum() <= 392


def test_intervals_of_known_ends() -> None:
    low, high = bootstrap(np.column_stack([np.ones(50), np.zeros(50)]))
    assert low.tolist() == high.tolist() == [1, 0]


@pytest.mark.parametrize("scores", [np.ones(3), np.ones((0, 2)), np.array([[1.0], [np.nan]])])
def test_incomplete_scores_are_refused(scores: np.ndarray) -> None:
    with pytest.raises(ValueError, match="without NaN"):
        bootstrap(scores)


@given(
    arrays(float, (12, 2), elements=st.floats(0, 1, width=16)),
    st.floats(-2, 2, width=16),
)
@settings(max_examples=25, deadline=None)
def test_a_constant_moves_the_interval(scores: np.ndarray, constant: float) -> None:
    ends = np.array(bootstrap(scores, resamples=200))
    moved = np.array(bootstrap(scores + constant, resamples=200))
    np.testing.assert_allclose(moved, ends + constant, atol=1e-9)
    assert (ends[0] <= ends[1]).all()


@given(st.lists(st.integers(-1, 1), min_size=1, max_size=80))
@settings(max_examples=60, deadline=None)
def test_mcnemar_is_statsmodels(signs: list[int]) -> None:
    more, less = signs.count(1), signs.count(-1)
    theirs = their_mcnemar([[0, more], [less, 0]], exact=True).pvalue if more + less else 1.0
    assert mcnemar(np.array(signs, dtype=float)[:, None])[0] == pytest.approx(theirs)


def test_signs_of_few_differences_are_all_tried() -> None:
    """As scipy enumerates them, where zeros and ties are among them."""
    differences = np.array([0.5, 0.25, 0.25, -0.25, 0, 0.75, 0, 0.5, -0.25])
    theirs = stats.permutation_test(
        (differences,), np.sum, permutation_type="samples", n_resamples=np.inf
    ).pvalue
    assert sign_flips(differences[:, None])[0] == pytest.approx(theirs)
    # Four of one sign: 2 of 16 patterns are as extreme.
    assert sign_flips(np.full((4, 1), 0.3))[0] == 2 / 16
    assert sign_flips(np.zeros((4, 1)))[0] == 1


def test_signs_of_many_differences_are_drawn() -> None:
    generator = np.random.default_rng(6)
    differences = generator.normal(0.012, 0.1, (200, 4))
    ours = sign_flips(differences)
    for column in range(4):
        theirs = stats.permutation_test(
            (differences[:, column],), np.mean, permutation_type="samples", n_resamples=10_000,
            rng=7,
        ).pvalue  # fmt: skip
        # Scipy's is twice the smaller tail; ours counts both tails.
        assert ours[column] == pytest.approx(theirs, abs=0.02)


def test_a_sure_difference_is_not_held_back_by_the_number_of_draws() -> None:
    """10,000 draws would end at p = 1e-4, which no correction for many comparisons survives."""
    p = sign_flips(np.full((100, 1), 0.1))
    assert p[0] == pytest.approx(1 / 50_001)


def test_p_is_uniform_where_nothing_differs() -> None:
    differences = np.random.default_rng(8).normal(0, 1, (30, 300))
    assert stats.kstest(sign_flips(differences), "uniform").pvalue > 0.01


def test_a_p_does_not_depend_on_what_else_is_compared() -> None:
    differences = np.random.default_rng(9).normal(0.02, 0.1, (60, 5))
    together, alone = sign_flips(differences), sign_flips(differences[:, 2:3])
    assert alone[0] == together[2]
    assert sign_flips(-differences).tolist() == together.tolist()


@pytest.mark.parametrize("count", [1, 2, 40])
def test_holm_is_statsmodels(count: int) -> None:
    p = np.random.default_rng(count).random(count) ** 3
    p[count // 2 :] = p[count // 2]
    np.testing.assert_allclose(holm(p), multipletests(p, method="holm")[1])


def test_holm_by_hand() -> None:
    assert holm(np.array([0.04, 0.01, 0.03])).tolist() == pytest.approx([0.06, 0.03, 0.06])
    assert holm(np.array([])).tolist() == []
    assert holm(np.array([0.7, 0.6])).tolist() == [1, 1]
