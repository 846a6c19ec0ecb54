"""Score over budget, or over what was really kept: small multiples, the paper's curves behind."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from sparsemm_eval.errors import UserError
from sparsemm_eval.report.panels import Panel, Z, panels
from sparsemm_eval.report.styles import (
    CHARACTER,
    COLUMN,
    LINE,
    PAGE,
    PAPER_LINE,
    add_legend,
    house_style,
    label_order,
    line_styles,
    scale_tokens,
    wrapped,
)

AXES = {
    "budget": "budget (tokens per KV head, log scale)",
    "kept_tokens_per_head": "really kept (mean tokens per KV head, log scale)",
}
_MOST_COLUMNS = 5
_HEIGHTS = {1: 2.3, 2: 1.9, 3: 1.55, 4: 1.3, 5: 1.25}  # inches of a panel, by columns


def score_curves(cells: pd.DataFrame, over: str = "budget", zoom: bool = False) -> Figure:
    """Draw a panel a model and benchmark, a line a method (the paper's Figures 4 and 5).

    A method without a budget, such as full KV, is a level. What was measured is drawn in full
    lines with 95% intervals as bands; the paper's cells are dashed behind it where model and
    benchmark are the same, or in full lines where nothing was measured at all.

    Parameters
    ----------
    cells : DataFrame
        Of `sparsemm_eval.report.results.load`, seeds joined. Where it has the columns low and high
        of `sparsemm_eval.report.statistics.add_statistics` these are the bands, elsewhere 1.96
        standard errors.
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
    found = panels(cells, over)
    columns, places = _places(found)
    rows = 1 + max(row for row, _ in places)
    methods = {
        label: method
        for panel in found
        for part in (panel.own, panel.paper)
        for label, method in zip(part["label"], part["method"], strict=True)
    }
    styles = line_styles(label_order(methods))
    width, height = COLUMN if columns == 1 else PAGE, _HEIGHTS[columns]
    models = list(dict.fromkeys(panel.model for panel in found))
    notes = [AXES[over], *wrapped(_notes(found), width)]
    everywhere = pd.concat([panel.tokens(over) for panel in found])
    with house_style():
        figure = Figure(layout="constrained")
        figure.get_layout_engine().set(w_pad=0.03, h_pad=0.04, wspace=0.02, hspace=0.02)
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_visible(False)
        for panel, (row, column) in zip(found, places, strict=True):
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
        title = models[0] if len(models) == 1 else None
        lines = add_legend(figure, _handles(found, styles), width, title)
        words = LINE * (lines + len(notes) + 1)
        figure.set_size_inches(width, rows * (height + (3 if columns > 3 else 2) * LINE) + words)
    return figure


def _places(found: Sequence[Panel]) -> tuple[int, list[tuple[int, int]]]:
    """Columns, and row and column of each panel: every model begins a row of its own."""
    names = list(dict.fromkeys(panel.benchmark for panel in found))
    of_model: dict[str, list[str]] = {}
    for panel in found:
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
    for panel in found:
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
    if zoom:
        margin = max(0.05 * (highest - lowest), 0.005)
        axes.set_ylim(lowest - margin, highest + margin)
    else:
        axes.set_ylim(0, 1.05 * highest if panel.open_ended else 1.03)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(visible=True)


def _ticks(values: pd.Series, over: str) -> list[float]:
    """The budgets; of kept tokens powers of two, or the ends where these lie between two."""
    if over == "budget":
        return sorted(values.unique())
    low, high = float(values.min()), float(values.max())
    powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    return [2.0**power for power in powers] or sorted({round(low), round(high)})


def _drop_repeated_labels(grid: np.ndarray) -> None:
    """A panel whose scale is that of the one to its left needs no numbers of its own."""
    for row in grid:
        for left, axes in pairwise(row):
            if left.get_visible() and left.get_ylim() == axes.get_ylim():
                axes.tick_params(labelleft=False)


def _notes(found: Sequence[Panel]) -> list[str]:
    """What the bands are, and where the paper's values are from."""
    own = pd.concat([panel.own for panel in found])
    kinds = set(own["interval"]) - {""}
    lines = []
    bands = {
        "bootstrap": "95% intervals, bootstrap over samples",
        "stderr": f"±{Z} standard errors",
    }
    if kinds:
        words = "; where samples are not known, ".join(bands[k] for k in bands if k in kinds)
        lines.append(f"Bands: {words}.")
    behind = pd.concat([panel.paper for panel in found])
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


def _handles(found: Sequence[Panel], styles: Mapping[str, dict[str, Any]]) -> list[Line2D]:
    """Every curve once."""
    own, behind = (
        pd.concat([getattr(panel, part) for panel in found]) for part in ("own", "paper")
    )
    handles = []
    for label, style in styles.items():
        line = style if (own["label"] == label).any() else {**style, **PAPER_LINE}
        if own.loc[own["label"] == label, "budget"].isna().all():
            line = {**line, "marker": "None"}
        handles.append(Line2D([], [], label=label, **line))
    if len(behind):
        handles.append(Line2D([], [], color="#555555", label="paper", **PAPER_LINE))
    return handles
