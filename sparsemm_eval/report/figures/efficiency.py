"""Decode time and peak memory over input tokens: the paper's efficiency figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsemm_eval.errors import UserError
from sparsemm_eval.report.efficiency import MEASURES
from sparsemm_eval.report.figures.style import (
    COLUMN,
    LINE,
    PAGE,
    PAPER_LINE,
    add_legend,
    blank_grid,
    house_style,
    line_styles,
    scale_tokens,
    scale_values,
    wrapped,
)
from sparsemm_eval.report.names import distinct, labels_in_order

_UNITS = {"decode_ms_per_token": "decode (ms per token)", "peak_memory_gb": "peak memory (GiB)"}
_BOUND = {"linestyle": (0, (1, 1.5)), "linewidth": 0.8, "marker": "None", "zorder": 1.2}
_HEIGHTS = {1: 1.9, 2: 1.8, 3: 1.55}  # inches of a panel, by columns
_MOST_COLUMNS = 4


def efficiency_curves(rows: pd.DataFrame) -> Figure:
    """Draw a column a model: decode time above, peak memory below, a line a way to decode.

    What was measured is drawn in full lines, its byte bound dotted, and the paper's curves dashed
    behind; where nothing was measured the paper's are drawn in full lines.

    Parameters
    ----------
    rows : DataFrame
        From `sparsemm_eval.report.efficiency.gather_efficiency`.

    Raises
    ------
    ValueError
        If there is nothing to draw, or models are more than fit side by side.
    """
    measured = rows["source"] == "measured"
    models = distinct(rows[measured] if measured.any() else rows, "model")
    rows = rows[rows["model"].isin(models)]
    measured = rows["source"] == "measured"
    own, paper = (rows[measured], rows[~measured]) if measured.any() else (rows, rows[:0])
    drawn = [name for name in MEASURES if own[name].notna().any()]
    if not drawn:
        raise UserError(
            "there is no measurement to draw: give efficiency results, and filters that leave some"
        )
    if len(models) > _MOST_COLUMNS:
        raise UserError(
            f"{len(models)} models: {_MOST_COLUMNS} fit side by side; choose among "
            f"{', '.join(models)}"
        )
    styles = line_styles(labels_in_order(rows))
    width = COLUMN if len(models) == 1 else PAGE
    notes = ["input tokens (log scale)", *wrapped(_notes(own, paper), width)]
    height = _HEIGHTS[min(len(models), 3)] + LINE
    with house_style():
        figure, grid = blank_grid(len(drawn), len(models), sharex="col")
        for line, measure in zip(grid, drawn, strict=True):
            for axes, model in zip(line, models, strict=True):
                here = (part[part["model"] == model] for part in (own, paper))
                _draw(axes, *here, measure, styles)
                axes.tick_params(labelleft=True)
            line[0].set_ylabel(_UNITS[measure])
        for axes, model in zip(grid[0], models, strict=True):
            axes.set_title(model)
        for axes, model in zip(grid[-1], models, strict=True):
            ticks = sorted(rows.loc[rows["model"] == model, "input_tokens"].unique())
            scale_tokens(axes, ticks, (ticks[0], ticks[-1]), 0.8 * width / len(models))
        figure.align_ylabels(grid[:, 0])
        figure.supxlabel("\n".join(notes))
        more = {"byte bound": _BOUND} if own["bound_ms_per_token"].notna().any() else {}
        more |= {"paper": PAPER_LINE} if len(paper) else {}
        lines = add_legend(figure, styles, set(own["label"]), more, width)
        figure.set_size_inches(width, len(drawn) * height + LINE * (lines + len(notes) + 2))
    return figure


def _draw(
    axes: Axes,
    own: pd.DataFrame,
    paper: pd.DataFrame,
    measure: str,
    styles: Mapping[str, dict[str, Any]],
) -> None:
    bounded = measure == "decode_ms_per_token"
    for label, style in styles.items():
        for part, line in ((paper, PAPER_LINE), (own, {})):
            points = part[(part["label"] == label) & part[measure].notna()]
            points = points.sort_values("input_tokens")
            if len(points):
                axes.plot(points["input_tokens"], points[measure], label=label, **{**style, **line})
            if bounded and line == {} and points["bound_ms_per_token"].notna().any():
                known = points.dropna(subset="bound_ms_per_token")
                dotted = {**style, **_BOUND}
                axes.plot(known["input_tokens"], known["bound_ms_per_token"], **dotted)
    highest = pd.concat([own[measure], paper[measure]]).max()
    if pd.notna(highest):  # of another model it may have been measured
        scale_values(axes, 0, 1.06 * highest)


def _notes(own: pd.DataFrame, paper: pd.DataFrame) -> list[str]:
    lines = []
    if own["bound_ms_per_token"].notna().any():
        lines.append("Dotted: the bytes that a step must read, over the memory's bandwidth.")
    if len(paper):
        lines.append("Dashed: SparseMM's paper, read off its figure; its GPU is not named.")
    elif (own["source"] != "measured").all():
        lines.append("SparseMM's paper, read off its figure; its GPU is not named.")
    return lines
