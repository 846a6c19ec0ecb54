"""Share of full KV's score kept over the bytes kept, with the Pareto front of each stratum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsemm_eval.errors import UserError
from sparsemm_eval.report.figures.style import (
    COLUMN,
    LINE,
    PAGE,
    add_legend,
    blank_grid,
    house_style,
    line_styles,
    power_ticks,
    scale_tokens,
    scale_values,
    wrapped,
)
from sparsemm_eval.report.names import STRATA, labels_in_order
from sparsemm_eval.report.ranking import Ranking, pareto_front
from sparsemm_eval.report.statistics import LEVEL

_MOST_COLUMNS = 3
_HEIGHTS = {1: 2.3, 2: 2.1, 3: 1.7}  # inches of a panel, by columns
_FRONTS = {
    STRATA[0]: {"color": "#BBBBBB", "linewidth": 5.0, "linestyle": "-"},
    STRATA[1]: {"color": "#BBBBBB", "linewidth": 3.0, "linestyle": (0, (1, 0.6))},
}


def ranking_curves(ranking: Ranking, zoom: bool = False) -> Figure:
    """Draw a panel a model, a line a method, and behind them the front of each stratum.

    Parameters
    ----------
    ranking : Ranking
        From `sparsemm_eval.report.ranking.rank_methods`. Rows that lack a task of their budget or
        whose bytes are not known are not drawn.
    zoom : bool
        Fit the vertical axes to the data; else they begin at 0.

    Raises
    ------
    UserError
        If there is nothing to draw.
    """
    drawn = ranking.comparable
    if drawn.empty:
        raise UserError("there is no method with known bytes and all tasks: nothing to draw")
    models = [*drawn["model"].unique()]
    styles = line_styles(labels_in_order(drawn))
    unit, name = (2**20, "MiB") if drawn["kept_kv_bytes"].min() >= 2**20 else (2**10, "KiB")
    columns = min(len(models), _MOST_COLUMNS)
    lines = -(-len(models) // columns)
    width, height = COLUMN if columns == 1 else PAGE, _HEIGHTS[columns]
    notes = [f"really kept ({name} of keys and values a prompt, log scale)",
             *wrapped(_notes(drawn), width)]  # fmt: skip
    with house_style():
        figure, grid = blank_grid(lines, columns)
        for axes in grid.flat[len(models) :]:
            axes.set_visible(False)
        for axes, model in zip(grid.flat, models, strict=False):
            here = drawn[drawn["model"].eq(model)]
            here = here.assign(size=here["kept_kv_bytes"] / unit)
            _draw(axes, here, ranking.full_bytes[model] / unit, styles)
            low = here[["share", "low"]].min(axis=None)
            high = max(here[["share", "high"]].max(axis=None), 1)
            scale_values(axes, low - 0.05 * (high - low) if zoom else min(low, 0), 1.03 * high)
            sizes = [*here["size"], *pd.Series(ranking.full_bytes[model] / unit).dropna()]
            ends = min(sizes), max(sizes)
            scale_tokens(axes, power_ticks(sizes), ends, 0.8 * width / columns)
            axes.set_title(f"{model}, {len(ranking.tasks[model])} tasks")
        for axes in grid[:, 0]:
            axes.set_ylabel("share of full KV's score")
        figure.supxlabel("\n".join(notes))
        fronts = {f"front, {name}": _FRONTS[name] for name in STRATA if name in {*drawn["stratum"]}}
        more = {"full KV": _FULL, **fronts}
        words = LINE * (add_legend(figure, styles, {*styles}, more, width) + len(notes) + 1)
        figure.set_size_inches(width, lines * (height + 2 * LINE) + words)
    return figure


_FULL = {"color": "#000000", "linestyle": "--", "linewidth": 0.9}


def _draw(
    axes: Axes, rows: pd.DataFrame, full_size: float, styles: Mapping[str, dict[str, Any]]
) -> None:
    for stratum, some in rows.groupby("stratum", sort=False):
        front = pareto_front(some)
        label = f"front, {stratum}"
        axes.plot(front["size"], front["share"], label=label, zorder=1, **_FRONTS[stratum])
    axes.axhline(1, zorder=1.5, label="full KV", **_FULL)
    if pd.notna(full_size):
        axes.plot([full_size], [1], marker="|", markersize=8, **_FULL)
    for label in (label for label in styles if rows["label"].eq(label).any()):
        points = rows[rows["label"].eq(label)].sort_values("size")
        axes.plot(points["size"], points["share"], label=label, **styles[label])
        band = {"color": styles[label]["color"], "alpha": 0.15, "linewidth": 0}
        axes.fill_between(points["size"], points["low"], points["high"], **band)


def _notes(rows: pd.DataFrame) -> list[str]:
    """What bands and fronts are."""
    lines = ["Fronts: what no other method of its kind exceeds with as few bytes."]
    if rows["low"].notna().any():
        lines.append(f"Bands: {LEVEL:.0%} intervals, bootstrap over the documents of each task.")
    return lines
