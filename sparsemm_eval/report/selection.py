"""Cells by model, benchmark, method and budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from sparsemm_eval.errors import UserError

# A word names a cell if it is what any of these columns holds.
_COLUMNS = {
    "models": ("model",),
    "benchmarks": ("benchmark", "task"),
    "methods": ("method", "label"),
}


@dataclass(frozen=True)
class Filters:
    """Which cells are shown; no names keep all.

    Parameters
    ----------
    models, benchmarks, methods : sequence of str
        Models; benchmarks or tasks; methods or labels, in whatever case.
    budgets : sequence of float
        Tokens per KV head; what has no budget, such as full KV, is kept in any case.
    """

    models: Sequence[str] = ()
    benchmarks: Sequence[str] = ()
    methods: Sequence[str] = ()
    budgets: Sequence[float] = ()

    def apply(self, cells: pd.DataFrame) -> pd.DataFrame:
        """Keep the cells named.

        Parameters
        ----------
        cells : DataFrame
            Of `results.load`.

        Returns
        -------
        DataFrame
            Rows of `cells`, with its index.

        Raises
        ------
        UserError
            If a name is none of the cells', or none fits all of them.
        """
        kept = pd.Series(True, index=cells.index)
        for name in _COLUMNS:
            if words := getattr(self, name):
                kept &= _named(cells, name, words)
        for budget in self.budgets:
            if not cells["budget"].eq(budget).any():
                known = ", ".join(f"{b:g}" for b in sorted(set(cells["budget"].dropna())))
                raise UserError(
                    f"budgets={budget:g}: it must be of {known or 'none, there is none'}"
                )
        if self.budgets:
            kept &= cells["budget"].isna() | cells["budget"].isin(self.budgets)
        if not kept.any():
            given = [*self.models, *self.benchmarks, *self.methods]
            given += [f"{budget:g}" for budget in self.budgets]
            raise UserError(f"{', '.join(given)}: no cell is all of it; name fewer")
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
