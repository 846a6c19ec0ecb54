"""Cells by model, benchmark, method and budget."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from sparsemm_eval.errors import UserError

# A word names a cell if it is what any of these columns holds.
_COLUMNS = {
    "models": ("model",),
    "benchmarks": ("benchmark", "task"),
    "methods": ("method", "label"),
}


def select(
    cells: pd.DataFrame,
    models: Sequence[str] = (),
    benchmarks: Sequence[str] = (),
    methods: Sequence[str] = (),
    budgets: Sequence[float] = (),
) -> pd.DataFrame:
    """Keep the cells named; no names keep all.

    Parameters
    ----------
    cells : DataFrame
        Of `results.load`.
    models, benchmarks, methods : sequence of str
        Models; benchmarks or tasks; methods or labels, in whatever case.
    budgets : sequence of float
        Tokens per KV head; what has no budget, such as full KV, is kept in any case.

    Returns
    -------
    DataFrame
        Rows of `cells`, with its index.

    Raises
    ------
    ValueError
        If a name is none of the cells', or none fits all of them.
    """
    kept = pd.Series(True, index=cells.index)
    for name, words in (("models", models), ("benchmarks", benchmarks), ("methods", methods)):
        if words:
            kept &= _named(cells, name, words)
    for budget in budgets:
        if not cells["budget"].eq(budget).any():
            known = ", ".join(f"{b:g}" for b in sorted(set(cells["budget"].dropna())))
            raise UserError(f"budgets={budget:g}: it must be of {known or 'none, there is none'}")
    if budgets:
        kept &= cells["budget"].isna() | cells["budget"].isin(budgets)
    if not kept.any():
        given = ", ".join(f"{word:g}" if isinstance(word, float) else str(word)
                          for word in (*models, *benchmarks, *methods, *budgets))  # fmt: skip
        raise UserError(f"{given}: no cell is all of it; name fewer")
    return cells[kept]


def _named(cells: pd.DataFrame, name: str, words: Sequence[str]) -> pd.Series:
    found = pd.Series(False, index=cells.index)
    for word in words:
        here = pd.Series(False, index=cells.index)
        for column in _COLUMNS[name]:
            here |= cells[column].str.casefold().eq(word.casefold())
        if not here.any():
            known = sorted({str(v) for column in _COLUMNS[name] for v in cells[column].dropna()})
            raise UserError(f"{name}={word}: it must be of {', '.join(known)}")
        found |= here
    return found
