"""Which cells stand together in a panel, and what their bands are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from sparsemm_eval.errors import UserError
from sparsemm_eval.report.names import BENCHMARKS, MODEL_NAMES

Z = 1.96  # standard errors to either side of a 95% interval
# They vary one setting at one budget, or parts of the cache: no curves of a method.
_ABLATIONS = ("table1", "table2")


@dataclass(frozen=True, eq=False)
class Panel:
    """One model on one benchmark.

    Parameters
    ----------
    model, title : str
        Of what.
    benchmark : str
        Its column, where several models stand below each other.
    own : DataFrame
        Cells drawn in full lines.
    paper : DataFrame
        Cells drawn dashed behind them.
    """

    model: str
    title: str
    benchmark: str
    own: pd.DataFrame
    paper: pd.DataFrame

    def tokens(self, over: str) -> pd.Series:
        """Where the points of its curves stand."""
        return pd.concat([self.own, self.paper]).dropna(subset="budget")[over]

    @property
    def open_ended(self) -> bool:
        """Whether its scale does not end at 1: CIDEr, or a task whose scale is not known."""
        scores = pd.concat([self.own["score"], self.paper["score"]])
        return bool((self.own["metric_label"] == "CIDEr").any() or scores.max() > 1 + 1e-9)


def panels(cells: pd.DataFrame, over: str = "budget") -> list[Panel]:
    """Model by model, benchmarks in the paper's order, ones of one's own behind them.

    Raises
    ------
    ValueError
        If nothing is left to draw.
    """
    cells = cells[~cells["source"].isin(_ABLATIONS) & cells["score"].notna()]
    if cells.empty:
        raise UserError(
            "there is no cell to draw: give results, and filters that leave some of them"
        )
    levels = cells["budget"].isna()
    cells = cells[levels | cells[over].notna()]
    cells = with_intervals(cells)
    measured = cells["source"] == "measured"
    own, paper = (cells[measured], cells[~measured]) if measured.any() else (cells, cells[:0])
    known = [benchmark.title for benchmark in BENCHMARKS.values()]
    names = sorted(
        dict.fromkeys(own["benchmark"]),
        key=lambda name: known.index(name) if name in known else len(known),
    )
    found = []
    models = sorted(
        dict.fromkeys(own["model"]),
        key=lambda name: MODEL_NAMES.index(name) if name in MODEL_NAMES else len(MODEL_NAMES),
    )
    for model in models:
        for name in names:
            here = own[(own["model"] == model) & (own["benchmark"] == name)]
            behind = paper[(paper["model"] == model) & (paper["benchmark"] == name)]
            tasks = list(dict.fromkeys(here["task"]))
            for task in tasks:
                of_task = here[here["task"] == task]
                title = f"{name} ({of_task['metric_label'].iloc[0]})"
                if len(tasks) > 1:
                    title = f"{task} ({of_task['metric_label'].iloc[0]})"
                column = name if len(tasks) == 1 else task
                found.append(Panel(model, title, column, of_task, behind))
    if all(panel.tokens(over).empty for panel in found):
        lack = "a budget" if over == "budget" else f"a budget and {over}"
        raise UserError(f"none of the cells has {lack}: there is no curve to draw")
    return found


def with_intervals(cells: pd.DataFrame) -> pd.DataFrame:
    """Fill low and high where they are not known, and say in ``interval`` what they are."""
    unknown = pd.Series(np.nan, index=cells.index)
    low, high = (cells.get(name, unknown).astype(float) for name in ("low", "high"))
    error = pd.to_numeric(cells["stderr"])
    kind = np.where(low.notna(), "bootstrap", np.where(error.notna(), "stderr", ""))
    return cells.assign(
        low=low.fillna((cells["score"] - Z * error).clip(lower=0)),
        high=high.fillna(cells["score"] + Z * error),
        interval=kind,
    )
