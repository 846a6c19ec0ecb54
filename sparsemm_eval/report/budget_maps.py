"""Tokens that each KV head keeps, as heat maps: a row a layer, a column a KV head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from sparsemm_eval.errors import UserError
from sparsemm_eval.report.styles import COLUMN, LINE, PAGE, house_style, wrapped

_COLOURS = "viridis"
_MOST_COLUMNS = 4
_HEIGHTS = {1: 2.4, 2: 2.0, 3: 1.7, 4: 1.5}  # inches of a panel, by columns


@dataclass(frozen=True, eq=False)
class HeadBudgets:
    """What one method keeps at one budget.

    Parameters
    ----------
    label : str
        Of the method.
    budget : float
        Mean tokens per KV head, as asked for.
    kept : ndarray
        [L, H], tokens that each KV head keeps.
    """

    label: str
    budget: float
    kept: np.ndarray


def budget_maps(panels: Sequence[HeadBudgets], title: str) -> Figure:
    """Draw a panel a method and budget, all on one scale of logarithms.

    Parameters
    ----------
    panels : sequence of HeadBudgets
        Those of one label one after the other: they stand beside each other.
    title : str
        Such as the model's name and the prompt's tokens.

    Raises
    ------
    ValueError
        If there is nothing to draw.
    """
    if not panels:
        raise UserError("there is no budget to draw: give one or more methods and budgets")
    columns, places = _places(panels)
    rows = 1 + max(row for row, _ in places)
    width = COLUMN if columns == 1 else PAGE
    lowest = max(1, min(int(panel.kept.min()) for panel in panels))
    highest = max(lowest + 1, *(int(panel.kept.max()) for panel in panels))
    words = wrapped([title], width)
    with house_style():
        size = (width, rows * (_HEIGHTS[columns] + 2.5 * LINE) + LINE * (len(words) + 2))
        figure = Figure(figsize=size, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.03, h_pad=0.04, wspace=0.02, hspace=0.02)
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.set_visible(False)
        for panel, (row, column) in zip(panels, places, strict=True):
            axes = grid[row, column]
            axes.set_visible(True)
            layers, heads = panel.kept.shape
            # A mesh and not an image: an SVG of it stays sharp.
            mesh = axes.pcolormesh(
                np.arange(heads + 1) - 0.5,
                np.arange(layers + 1) - 0.5,
                np.maximum(panel.kept, lowest),
                cmap=_COLOURS,
                norm=LogNorm(lowest, highest),
                edgecolors="face",
                linewidth=0.2,
            )
            axes.set_ylim(layers - 0.5, -0.5)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(5, integer=True))
            axes.set_title(f"{panel.label}\nbudget {panel.budget:g}, kept {panel.kept.mean():.1f}")
            axes.set_xlabel("KV head")
            if column == 0:
                axes.set_ylabel("layer")
        bar = figure.colorbar(mesh, ax=grid, pad=0.01, aspect=30)
        bar.solids.set_rasterized(False)
        _scale(bar.ax, lowest, highest, size[1])
        bar.set_label("tokens kept per KV head (log scale)")
        figure.suptitle("\n".join(words), parse_math=False)
    return figure


def _places(panels: Sequence[HeadBudgets]) -> tuple[int, list[tuple[int, int]]]:
    """Columns, and row and column of each panel: a method's budgets begin a row of their own."""
    of_label: dict[str, int] = {}
    for panel in panels:
        of_label[panel.label] = of_label.get(panel.label, 0) + 1
    if max(of_label.values()) == 1:
        columns = min(len(panels), _MOST_COLUMNS)
        return columns, [divmod(i, columns) for i in range(len(panels))]
    columns = min(max(of_label.values()), _MOST_COLUMNS)
    places, row = [], 0
    for count in of_label.values():
        places += [(row + i // columns, i % columns) for i in range(count)]
        row += -(-count // columns)
    return columns, places


def _scale(axes: Axes, lowest: int, highest: int, inches: float) -> None:
    """Ticks at powers of two between the ends, and at the ends."""
    inner = [2**power for power in range(1, 40) if lowest * 1.3 < 2**power < highest / 1.3]
    step = max(1, -(-len(inner) // max(1, int(inches / 0.4))))
    axes.set_yticks([lowest, *inner[::step], highest])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())
