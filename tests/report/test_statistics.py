"""Intervals, ranks and comparisons of cells."""

import numpy as np
import pandas as pd
import pytest
from report.scored import NO_SCORES, cell, coins, frames

from sparsemm_eval.report.cells import cells_frame
from sparsemm_eval.report.resampling import bootstrap, mcnemar
from sparsemm_eval.report.statistics import add_statistics


def by_label(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.set_index("label")


@pytest.fixture
def two() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Full KV and three methods at one budget, right or wrong."""
    full, best, second, third = coins(1, 300, 0.9, 0.8, 0.7, 0.69)
    return frames(
        {
            ("fullkv", None): full,
            ("snapkv", 64): second,
            ("sparsemm", 64): best,
            ("adakv", 64): third,
        }
    )


def test_each_is_compared_with_the_best_other(two: tuple) -> None:
    valued = by_label(add_statistics(*two))
    assert valued["baseline"].to_dict() == {
        "FullKV": "", "SnapKV": "SparseMM", "SparseMM": "SnapKV", "AdaKV": "SparseMM"
    }  # fmt: skip
    assert valued["rank"].drop("FullKV").tolist() == [2, 1, 3]
    assert pd.isna(valued.loc["FullKV", "rank"])
    assert pd.isna(valued.loc["FullKV", "p"])
    assert valued["better"].tolist() == [False, False, True, False]
    assert valued["worse"].tolist() == [False, True, False, True]
    assert (valued["pairs"].dropna() == 300).all()


def test_methods_that_never_see_the_question_are_ranked_among_themselves() -> None:
    full, *others = coins(1, 300, 0.9, 0.8, 0.85, 0.7, 0.6)
    names = [("snapkv", 64), ("streaming", 64), ("adakv", 64), ("local", 64)]
    cells, scores = frames({("fullkv", None): full, **dict(zip(names, others, strict=True))})
    valued = by_label(add_statistics(cells, scores))
    assert valued["rank"].drop("FullKV").to_dict() == {
        "SnapKV": 1, "AdaKV": 2, "StreamingLLM": 1, "Local": 2
    }  # fmt: skip
    assert valued["baseline"]["Local"] == "StreamingLLM"
    # As results of a plugin's method say it; and one alone has no place.
    told = cells.assign(query_aware=[1.0, 1.0, 0.0, 1.0, 1.0])
    valued = by_label(add_statistics(told, scores))
    assert valued["rank"].drop("FullKV").dropna().to_dict() == {"SnapKV": 1, "AdaKV": 2, "Local": 3}


def test_numbers_are_those_of_the_samples(two: tuple) -> None:
    cells, scores = two
    valued = by_label(add_statistics(cells, scores))
    matrix = scores.pivot_table(index="doc_id", columns="cell", values="score")
    second, best = matrix[1].to_numpy(), matrix[2].to_numpy()
    row = valued.loc["SparseMM"]
    assert row["difference"] == pytest.approx(best.mean() - second.mean())
    assert row["p"] == mcnemar((best - second)[:, None])[0]
    assert row["test"] == "McNemar"
    (low,), (high,) = bootstrap((best - second)[:, None])
    assert (row["difference_low"], row["difference_high"]) == pytest.approx((low, high))
    (low,), (high,) = bootstrap(best[:, None])
    assert (row["low"], row["high"]) == pytest.approx((low, high))
    other = valued.loc["SnapKV"]
    assert other["difference"] == pytest.approx(-row["difference"])
    assert (other["difference_low"], other["difference_high"]) == pytest.approx(
        (-row["difference_high"], -row["difference_low"])
    )


def test_the_two_best_are_one_comparison(two: tuple) -> None:
    """Holm over two: the best with the second, and the third with the best."""
    valued = by_label(add_statistics(*two))
    p = valued["p"]
    assert valued["comparison"].nunique() == 2
    assert p["SparseMM"] == p["SnapKV"]
    small, large = sorted((p["SparseMM"], p["AdaKV"]))
    corrected = {small: 2 * small, large: max(2 * small, large)}
    for name in ("SparseMM", "AdaKV"):
        assert valued.loc[name, "p_corrected"] == pytest.approx(corrected[p[name]])


@pytest.mark.parametrize("against", ["fullkv", "FullKV"])
def test_against_full_kv(two: tuple, against: str) -> None:
    valued = by_label(add_statistics(*two, against))
    assert valued["baseline"].tolist() == ["", "FullKV", "FullKV", "FullKV"]
    assert valued["worse"].tolist() == [False, True, True, True]
    assert valued["comparison"].nunique() == 3


def test_against_a_method_is_at_the_same_budget() -> None:
    one, two, three = coins(2, 50, 0.4, 0.6, 0.8)
    cells, scores = frames(
        {("snapkv", 64): one, ("sparsemm", 64): two, ("sparsemm", 32): three, ("snapkv", 32): one}
    )
    valued = add_statistics(cells, scores, "snapkv")
    assert valued["baseline"].tolist() == ["", "SnapKV", "SnapKV", ""]
    assert valued["difference"].dropna().tolist() == pytest.approx(
        [two.mean() - one.mean(), three.mean() - one.mean()]
    )


def test_what_is_compared_with_must_be_there_once() -> None:
    cells = cells_frame(
        [cell("sparsemm", 64, 0.5, ratio=ratio) for ratio in (0.1, 0.2)] + [cell("snapkv", 64, 0.4)]
    )
    with pytest.raises(ValueError, match=r"against=h2o: it must be best or one of .*SnapKV"):
        add_statistics(cells, NO_SCORES, "h2o")
    with pytest.raises(ValueError, match=r"name one of SparseMM \(ratio=0.1\), SparseMM"):
        add_statistics(cells, NO_SCORES, "sparsemm")
    chosen = add_statistics(cells, NO_SCORES, "SparseMM (ratio=0.2)")
    assert chosen["baseline"].tolist() == ["SparseMM (ratio=0.2)", "", "SparseMM (ratio=0.2)"]


def test_graded_scores_are_permuted() -> None:
    generator = np.random.default_rng(3)
    one = generator.random(80)
    cells, scores = frames({("snapkv", 64): one, ("sparsemm", 64): one + 0.01})
    valued = by_label(add_statistics(cells, scores))
    assert set(valued["test"]) == {"permutation"}
    assert valued.loc["SparseMM", "better"]
    assert valued.loc["SparseMM", "difference"] == pytest.approx(0.01)


def test_cells_without_samples_have_ranks_and_plain_differences_alone() -> None:
    cells = cells_frame([cell("sparsemm", 64, 0.8), cell("snapkv", 64, 0.5)])
    valued = by_label(add_statistics(cells, NO_SCORES))
    assert valued["rank"].tolist() == [1, 2]
    assert valued["difference"].tolist() == pytest.approx([0.3, -0.3])
    assert valued[["low", "high", "p", "p_corrected", "difference_low"]].isna().all(axis=None)
    assert not valued[["better", "worse"]].any(axis=None)
    assert set(valued["test"]) == {""}


def test_where_lower_is_better_the_lowest_wins(two: tuple) -> None:
    cells, scores = two
    valued = by_label(add_statistics(cells.assign(higher_is_better=False), scores))
    assert valued["rank"].drop("FullKV").tolist() == [2, 3, 1]
    assert valued["baseline"].to_dict() == {
        "FullKV": "", "SnapKV": "AdaKV", "SparseMM": "AdaKV", "AdaKV": "SnapKV"
    }  # fmt: skip
    assert valued.loc["SparseMM", "worse"]
    assert not valued.loc["SparseMM", "better"]


def test_a_partial_run_is_compared_over_what_both_have() -> None:
    """It is no rival: its own score is of other samples."""
    full, part = coins(4, 100, 0.6, 0.9)
    part[40:] = np.nan
    cells, scores = frames({("snapkv", 64): full, ("sparsemm", 64): part, ("adakv", 64): full})
    valued = by_label(add_statistics(cells, scores))
    assert valued.loc["SparseMM", "pairs"] == 40
    assert valued.loc["SparseMM", "difference"] == pytest.approx(
        part[:40].mean() - full[:40].mean()
    )
    assert pd.isna(valued.loc["SparseMM", "rank"])
    assert valued["baseline"].to_dict() == {
        "SnapKV": "AdaKV", "SparseMM": "SnapKV", "AdaKV": "SnapKV"
    }  # fmt: skip
    assert valued.loc["SnapKV", ["rank", "difference", "p"]].tolist() == [1, 0, 1]
    alone = add_statistics(cells.iloc[:1], scores)
    assert alone[["low", "high"]].to_numpy().tolist() == [
        valued.loc["SnapKV", ["low", "high"]].tolist()
    ]


def test_seeds_count_by_their_mean() -> None:
    one, two, other = coins(5, 60, 0.5, 0.8, 0.3)
    cells, scores = frames({("random", 64): (one + two) / 2, ("snapkv", 64): other})
    of_random = [pd.DataFrame({"cell": 0, "doc_id": range(60), "score": s}) for s in (one, two)]
    seeds = pd.concat([*of_random, scores[scores["cell"].eq(1)]])
    pd.testing.assert_frame_equal(add_statistics(cells, seeds), add_statistics(cells, scores))


def test_the_order_of_samples_and_cells_does_not_matter(two: tuple) -> None:
    cells, scores = two
    valued = add_statistics(cells, scores)
    mixed = add_statistics(cells, scores.sample(frac=1, random_state=0))
    pd.testing.assert_frame_equal(valued, mixed)
    turned = add_statistics(cells.iloc[::-1], scores).loc[cells.index]
    kept = ["low", "high", "rank", "baseline", "difference", "difference_low", "p_corrected"]
    pd.testing.assert_frame_equal(valued[kept], turned[kept])


def test_models_tasks_and_the_paper_do_not_compete() -> None:
    cells = cells_frame(
        [
            cell("sparsemm", 64, 0.8),
            cell("snapkv", 64, 0.9, model="large"),
            cell("snapkv", 64, 0.9, task="gqa", benchmark="GQA"),
            cell("snapkv", 64, 0.9, task="docvqa", source="table3"),
            cell("snapkv", 32, 0.9),
        ]
    )
    valued = add_statistics(cells, NO_SCORES)
    assert set(valued["baseline"]) == {""}
    assert valued["rank"].isna().all()


def test_one_row_a_label() -> None:
    cells = cells_frame([cell("sparsemm", 64, 0.8)] * 2).set_axis([0, 0])
    with pytest.raises(ValueError, match="index has duplicates"):
        add_statistics(cells, NO_SCORES)
