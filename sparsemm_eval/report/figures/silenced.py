"""Curves: score over silenced heads."""

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def score_over_silenced(frame: pd.DataFrame, total: int, path: Path) -> None:
    """Draw score over the share of silenced heads, a panel a (task, metric).

    Parameters
    ----------
    frame : DataFrame
        task, metric, silenced ("none", "visual" or "random"), mode, heads, score. Random heads
        are drawn as the mean of their seeds in a band from lowest to highest.
    total : int
        Query heads of the model.
    path : Path
        Where it goes; the ending chooses the format.
    """
    panels = list(frame.groupby(["task", "metric"], sort=False))
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.4 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, ((task, metric), cells) in zip(grid, panels, strict=False):
        _silenced_panel(axes, cells, total)
        axes.set_title(f"{task}: {metric}", fontsize=10, parse_math=False)
    for axes in list(grid)[len(panels) :]:
        axes.set_visible(False)
    figure.savefig(path, dpi=200)


def _silenced_panel(axes: Axes, cells: pd.DataFrame, total: int) -> None:
    """One line a mode and kind of heads, each from the whole model on."""
    whole = cells[cells["silenced"] == "none"]
    for mode, of_mode in cells[cells["mode"].notna()].groupby("mode", sort=False):
        line = {"linestyle": "-" if mode == "query" else "--", "linewidth": 1.6, "markersize": 4.5}
        for kind, colour, marker in (("visual", "#D55E00", "o"), ("random", "#777777", "x")):
            drawn = pd.concat([whole, of_mode[of_mode["silenced"] == kind]])
            scores = drawn.groupby("heads")["score"]
            low, mean, high = scores.min(), scores.mean(), scores.max()
            share = 100 * mean.index / total
            label = f"{kind} heads ({mode})"
            axes.plot(share, mean, color=colour, marker=marker, label=label, **line)
            axes.fill_between(share, low, high, color=colour, alpha=0.15, lw=0)
    axes.set_xlabel("silenced query heads in %")
    axes.set_ylabel("score")
    axes.set_ylim(0, max(1.03, 1.03 * cells["score"].max()))
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False, handlelength=4)
