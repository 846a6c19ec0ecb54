"""In which order cells stand, and what a reader chooses them by."""

from __future__ import annotations

import pandas as pd

from sparsemm_eval.report.names import BENCHMARKS
from sparsemm_eval.report.tables import method_order

CHOICES = ("model", "benchmark", "method", "budget")
_NO_BUDGET = "all"  # full KV keeps them all
_BENCHMARKS = [benchmark.title for benchmark in BENCHMARKS.values()]


def in_order(cells: pd.DataFrame) -> pd.DataFrame:
    """Sort cells: measured ones first, benchmarks and methods as in the paper, large budgets first.

    Parameters
    ----------
    cells : DataFrame
        Of `sparsemm_eval.report.results.load`.
    """
    methods = method_order(sorted(set(cells["method"])))
    ranked = pd.DataFrame(
        {
            "printed": cells["source"].ne("measured"),
            "model": cells["model"],
            "benchmark": cells["benchmark"].map(_benchmark_rank),
            "task": cells["task"],
            "budget": -cells["budget"].fillna(float("inf")),
            "method": cells["method"].map(methods.index),
            "label": cells["label"],
        }
    )
    return cells.loc[ranked.sort_values(list(ranked.columns), kind="stable").index]


def _benchmark_rank(title: str) -> tuple[int, str]:
    known = title in _BENCHMARKS
    return (_BENCHMARKS.index(title) if known else len(_BENCHMARKS), title)


def choices(cells: pd.DataFrame) -> pd.DataFrame:
    """Name cells by `CHOICES`, as text, with the index of `cells`.

    A benchmark that a model ran as several tasks is named with each.
    """
    several = cells.groupby(["model", "benchmark"])["task"].transform("nunique").gt(1)
    named = cells["benchmark"] + ", " + cells["task"]
    budgets = [_NO_BUDGET if pd.isna(value) else f"{value:g}" for value in cells["budget"]]
    return pd.DataFrame(
        {
            "model": cells["model"],
            "benchmark": named.where(several, cells["benchmark"]),
            "method": cells["label"],
            "budget": pd.Series(budgets, index=cells.index, dtype=object),
        }
    )


def distinct(cells: pd.DataFrame, named: pd.DataFrame) -> dict[str, tuple[str, ...]]:
    """What each of `CHOICES` offers, in the order of `in_order`."""
    by_budget = cells["budget"].fillna(float("inf")).sort_values(ascending=False, kind="stable")
    methods = method_order(sorted(set(cells["method"])))
    by_method = cells.assign(rank=cells["method"].map(methods.index)).sort_values(
        ["rank", "label"], kind="stable"
    )
    orders = {
        "model": cells.index, "benchmark": cells.index,
        "method": by_method.index, "budget": by_budget.index,
    }  # fmt: skip
    return {name: tuple(dict.fromkeys(named.loc[orders[name], name])) for name in CHOICES}
