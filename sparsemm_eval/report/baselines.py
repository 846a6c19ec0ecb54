"""Which cells compete, in what order, and what each is compared with."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import pandas as pd

from sparsemm_eval.errors import UserError

BEST = "best"


def ranks(cells: pd.DataFrame) -> pd.Series:
    """Place of each cell among its rivals, 1 the best; ties share one, the next follows at once.

    Parameters
    ----------
    cells : DataFrame
        Of `results.load`, seeds joined.

    Returns
    -------
    Series
        By the index of `cells`; NaN for what has no rival.
    """
    found = pd.Series(float("nan"), index=cells.index)
    for _, rivals in _columns(cells):
        if len(rivals) > 1:
            found[rivals.index] = _gain(rivals).round(9).rank(method="dense", ascending=False)
    return found


def baselines(cells: pd.DataFrame, against: str = BEST) -> dict[Hashable, Hashable | None]:
    """The cell that each cell is compared with, or None.

    Parameters
    ----------
    cells : DataFrame
        Of `results.load`, seeds joined.
    against : str
        "best", "fullkv", or a method by name or label.

    Returns
    -------
    dict
        Labels of the index of `cells`, in its order.

    Raises
    ------
    ValueError
        If `against` is no method of the cells, or several at one budget.
    """
    found: dict[Hashable, Hashable | None] = dict.fromkeys(cells.index)
    if against == BEST:
        for here, rivals in _columns(cells):
            gains = _gain(rivals).sort_values(ascending=False, kind="stable")
            best = list(gains.index[:2])
            for cell in here.index:
                found[cell] = next((other for other in best if other != cell), None)
        return found
    chosen = cells["label"].eq(against)
    chosen = chosen if chosen.any() else cells["method"].eq(against)
    if not chosen.any():
        known = sorted(set(cells["method"]) | set(cells["label"]))
        raise UserError(f"against={against}: it must be {BEST} or one of {', '.join(known)}")
    for _, group in _groups(cells):
        candidates = group[chosen[group.index]]
        for cell, budget in group["budget"].items():
            there = candidates[candidates["budget"].isna() | candidates["budget"].eq(budget)]
            if len(there) > 1:
                several = ", ".join(there["label"])
                raise UserError(f"against={against}: it is several here, name one of {several}")
            if len(there) and there.index[0] != cell:
                found[cell] = there.index[0]
    return found


def _gain(cells: pd.DataFrame) -> pd.Series:
    """Scores, turned round where lower is better."""
    return cells["score"].where(cells["higher_is_better"], -cells["score"])


def _groups(cells: pd.DataFrame) -> Iterator[tuple[tuple, pd.DataFrame]]:
    """One model's cells on one task; the paper's are no rivals of what was measured."""
    measured = cells["source"].eq("measured").rename("measured")
    return iter(cells.groupby(["model", "benchmark", "task", measured], dropna=False, sort=False))


def _columns(cells: pd.DataFrame) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    """What compresses a model's cache on a task to one budget: all cells, rivals.

    Full KV and models of other tools are neither. A cell with fewer samples than the others is
    no rival of theirs.
    """
    compressed = cells[
        cells["budget"].notna() & cells["score"].notna() & cells["method"].ne("fullkv")
    ]
    for _, group in _groups(compressed):
        for _, here in group.groupby("budget"):
            samples = here["samples"]
            yield here, here[samples.isna() | samples.eq(samples.max())]
