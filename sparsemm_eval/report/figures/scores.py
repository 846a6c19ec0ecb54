"""Score over budget, or over what was really kept: small multiples, the paper's curves behind."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsemm_eval.errors import UserError
from sparsemm_eval.report.figures.style import (
    CHARACTER,
    COLUMN,
    LINE,
    PAGE,
    PAPER_LINE,
    add_legend,
    blank_grid,
    house_style,
    line_styles,
    power_ticks,
    scale_tokens,
    scale_values,
    wrapped,
)
from sparsemm_eval.report.names import distinct, labels_in_order
from sparsemm_eval.report.paper import STUDIES

AXES = {
    "budget": "budget (tokens per KV head, log scale)",
    "kept_tokens_per_head": "really kept (mean tokens per KV head, log scale)",
}
Z = 1.96  # standard errors to either side of a 95% interval
_MOST_COLUMNS = 5
_HEIGHTS = {1: 2.3, 2: 1.9, 3: 1.55, 4: 1.3, 5: 1.25}  # inches of a panel, by columns


@dataclass(frozen=True, eq=False)
class Panel:
    """One model on one benchmark.

    Parameters
    ----------
    model, title : str
        What is drawn.
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


def score_curves(cells: pd.DataFrame, over: str = "budget", zoom: bool = False) -> Figure:
    """Draw a panel a model and benchmark, a line a method (the paper's Figures 4 and 5).

    A method without a budget, such as full KV, is a level. What was measured is drawn in full
    lines with 95% intervals as bands; the paper's cells are dashed behind it where model and
    benchmark are the same, or in full lines where nothing was measured at all.

    Parameters
    ----------
    cells : DataFrame
        As `sparsemm_eval.report.results.load` gives them, seeds joined. Where it has the columns
        low and high of `sparsemm_eval.report.statistics.add_statistics` these are the bands,
        elsewhere 1.96 standard errors.
    over : {"budget", "kept_tokens_per_head"}
        The horizontal axis, in tokens per KV head.
    zoom : bool
        Fit the vertical axes to the data; else they go from 0 to 1, CIDEr's as far as it must.

    Raises
    ------
    ValueError
        If there is nothing to draw, or ``over`` is no such axis.
    """
    if over not in AXES:
        raise UserError(f"over={over!r}: it must be one of {', '.join(AXES)}")
    panels = _panels(cells, over)
    columns, places = _places(panels)
    rows = 1 + max(row for row, _ in places)
    own, behind = (
        pd.concat([getattr(panel, part) for panel in panels]) for part in ("own", "paper")
    )
    styles = line_styles(labels_in_order(pd.concat([own, behind])))
    width, height = COLUMN if columns == 1 else PAGE, _HEIGHTS[columns]
    models = list(dict.fromkeys(panel.model for panel in panels))
    notes = [AXES[over], *wrapped(_notes(own, behind), width)]
    everywhere = pd.concat([panel.tokens(over) for panel in panels])
    with house_style():
        figure, grid = blank_grid(rows, columns)
        for axes in grid.flat:
            axes.set_visible(False)
        for panel, (row, column) in zip(panels, places, strict=True):
            axes = grid[row, column]
            axes.set_visible(True)
            _draw(axes, panel, over, styles)
            _scale_score(axes, panel, zoom)
            # A model of which only a level is known has no points of its own.
            tokens = everywhere if panel.tokens(over).empty else panel.tokens(over)
            ends = float(tokens.min()), float(tokens.max())
            scale_tokens(axes, _ticks(tokens, over), ends, 0.8 * width / columns)
            axes.set_title(panel.title if columns < 4 else panel.title.replace(" (", "\n(", 1))
            if column == 0:
                model = f"{panel.model}\n" if len(models) > 1 else ""
                axes.set_ylabel(f"{_folded(model, height)}score")
        _drop_repeated_labels(grid)
        figure.align_ylabels(grid[:, 0])
        figure.supxlabel("\n".join(notes))
        levels = own.groupby("label")["budget"].count().eq(0)
        shown = {
            label: {**style, "marker": "None"} if levels.get(label, default=True) else style
            for label, style in styles.items()
        }
        more = {"paper": PAPER_LINE} if len(behind) else {}
        title = models[0] if len(models) == 1 else None
        lines = add_legend(figure, shown, set(own["label"]), more, width, title)
        words = LINE * (lines + len(notes) + 1)
        figure.set_size_inches(width, rows * (height + (3 if columns > 3 else 2) * LINE) + words)
    return figure


def _panels(cells: pd.DataFrame, over: str) -> list[Panel]:
    """Model by model, each benchmark or task of it; UserError if nothing is left to draw."""
    cells = cells[~cells["source"].isin(STUDIES) & cells["score"].notna()]
    if cells.empty:
        raise UserError(
            "there is no cell to draw: give results, and filters that leave some of them"
        )
    cells = _with_intervals(cells[cells["budget"].isna() | cells[over].notna()])
    measured = cells["source"] == "measured"
    own, paper = (cells[measured], cells[~measured]) if measured.any() else (cells, cells[:0])
    panels = []
    for model in distinct(own, "model"):
        for name in distinct(own, "benchmark"):
            here = own[(own["model"] == model) & (own["benchmark"] == name)]
            behind = paper[(paper["model"] == model) & (paper["benchmark"] == name)]
            tasks = distinct(here, "task")
            for task in tasks:
                of_task = here[here["task"] == task]
                column = name if len(tasks) == 1 else task
                title = f"{column} ({of_task['metric_label'].iloc[0]})"
                panels.append(Panel(model, title, column, of_task, behind))
    if all(panel.tokens(over).empty for panel in panels):
        lack = "a budget" if over == "budget" else f"a budget and {over}"
        raise UserError(f"none of the cells has {lack}: there is no curve to draw")
    return panels


def _with_intervals(cells: pd.DataFrame) -> pd.DataFrame:
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


def _places(panels: Sequence[Panel]) -> tuple[int, list[tuple[int, int]]]:
    """Columns, and row and column of each panel: every model begins a row of its own."""
    names = list(dict.fromkeys(panel.benchmark for panel in panels))
    of_model: dict[str, list[str]] = {}
    for panel in panels:
        of_model.setdefault(panel.model, []).append(panel.benchmark)
    if len(names) <= _MOST_COLUMNS:
        # One row a model, and what a model lacks leaves a gap.
        of_model = dict.fromkeys(of_model, names)
    columns = max(-(-len(own) // -(-len(own) // _MOST_COLUMNS)) for own in of_model.values())
    first, rows = {}, 0
    for model, own in of_model.items():
        first[model] = rows
        rows += -(-len(own) // columns)
    places = []
    for panel in panels:
        line, column = divmod(of_model[panel.model].index(panel.benchmark), columns)
        places.append((first[panel.model] + line, column))
    return columns, places


def _draw(axes: Axes, panel: Panel, over: str, styles: Mapping[str, dict[str, Any]]) -> None:
    for cells, behind in ((panel.paper, True), (panel.own, False)):
        for label in (label for label in styles if (cells["label"] == label).any()):
            line = {**styles[label], **(PAPER_LINE if behind else {})}
            points = cells[cells["label"] == label].sort_values(over)
            if points["budget"].isna().all():
                axes.axhline(points["score"].iloc[0], label=label, **{**line, "marker": "None"})
                continue
            axes.plot(points[over], points["score"], label=label, **line)
            if behind:
                continue
            band = {"color": line["color"], "alpha": 0.15, "linewidth": 0}
            axes.fill_between(points[over], points["low"], points["high"], **band)
            digitised = points[points["source"].str.contains("digitised")]
            if len(digitised):
                hollow = {"markerfacecolor": "white", "linestyle": "None", "zorder": 2.5}
                axes.plot(digitised[over], digitised["score"], **{**line, **hollow})


def _scale_score(axes: Axes, panel: Panel, zoom: bool) -> None:
    both = pd.concat([panel.own, panel.paper])
    lowest, highest = (
        np.nanmin([both["score"].min(), both["low"].min()]),
        np.nanmax([both["score"].max(), both["high"].max()]),
    )
    margin = max(0.05 * (highest - lowest), 0.005)
    if zoom:
        scale_values(axes, lowest - margin, highest + margin)
    else:
        scale_values(axes, 0, 1.05 * highest if panel.open_ended else 1.03)


def _ticks(values: pd.Series, over: str) -> list[float]:
    """The budgets; of kept tokens powers of two, or the ends where these lie between two."""
    if over == "budget":
        return sorted(values.unique())
    return power_ticks(values)


def _drop_repeated_labels(grid: np.ndarray) -> None:
    """A panel whose scale is that of the one to its left needs no numbers of its own."""
    for row in grid:
        for left, axes in pairwise(row):
            if left.get_visible() and left.get_ylim() == axes.get_ylim():
                axes.tick_params(labelleft=False)


def _notes(own: pd.DataFrame, behind: pd.DataFrame) -> list[str]:
    """What the bands are, and where the paper's values are from."""
    kinds = set(own["interval"]) - {""}
    lines = []
    bands = {
        "bootstrap": "95% intervals, bootstrap over samples",
        "stderr": f"±{Z} standard errors",
    }
    if kinds:
        words = "; where samples are not known, ".join(bands[k] for k in bands if k in kinds)
        lines.append(f"Bands: {words}.")
    paper = behind if len(behind) else own[own["source"] != "measured"]
    if len(paper):
        digitised = paper.loc[paper["source"].str.contains("digitised"), "benchmark"]
        words = "Dashed: SparseMM's paper" if len(behind) else "SparseMM's paper"
        words += ", as printed"
        if len(digitised):
            hollow = "" if len(behind) else " (hollow)"
            of = ", ".join(dict.fromkeys(digitised))
            words += f"; some values of {of} read off its figure{hollow}"
        lines.append(f"{words}.")
    return lines


def _folded(name: str, inches: float) -> str:
    return "\n".join([*textwrap.wrap(name, int(inches / CHARACTER)), ""])
