"""The budget of each KV head, computed and drawn: a row a layer, a column a KV head.

A config, or a score file alone, is enough: no weight is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from transformers import AutoConfig

from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.errors import UserError, check_int, one_line
from sparsemm_eval.methods import (
    FROM_FILES,
    HeadScores,
    ModelShape,
    Sensitivity,
    canonical_settings,
    make_method,
    method_settings,
    read_head_scores,
    shown_name,
    tokens_per_head,
)
from sparsemm_eval.report.cell_text import budget_text
from sparsemm_eval.report.figures import DrawnFiles
from sparsemm_eval.report.figures.style import (
    COLUMN,
    LINE,
    PAGE,
    blank_grid,
    house_style,
    save,
    wrapped,
)
from sparsemm_eval.report.inputs import check_formats
from sparsemm_eval.report.names import last_part, method_label
from sparsemm_eval.tiny import default_checkpoint, find_checkpoint

_COLOURS = "viridis"
_MOST_COLUMNS = 4
_HEIGHTS = {1: 2.4, 2: 2.0, 3: 1.7, 4: 1.5}  # inches of a panel, by columns


@dataclass(frozen=True, eq=False)
class HeadBudgets:
    """What one method keeps at one budget.

    Parameters
    ----------
    label : str
        Name of the method, with its settings.
    budget : float
        Mean tokens per KV head, as asked for.
    kept : ndarray
        [L, H], tokens that each KV head keeps.
    """

    label: str
    budget: float
    kept: np.ndarray


def draw_budgets(
    out: Path,
    formats: Sequence[str],
    model: str | None,
    head_scores: Path | None,
    kv_heads: int | None,
    methods: Sequence[str],
    budgets: Sequence[int],
    tokens: int,
    settings: Mapping[str, Any],
) -> DrawnFiles:
    """Draw the budget of each KV head as ``OUT/budget_per_head``, a panel a method and budget.

    Parameters
    ----------
    out : Path
        The folder.
    formats : sequence of str
        One or both of "svg" and "png".
    model, head_scores, kv_heads, methods, budgets, tokens, settings
        As for `head_budgets`.

    Raises
    ------
    FileNotFoundError, UserError
        As from `head_budgets`, and for a format that is none.
    """
    check_formats(formats)
    name, panels = head_budgets(model, head_scores, kv_heads, methods, budgets, tokens, settings)
    figure = budget_maps(panels, f"{name}, prompt of {tokens} tokens")
    return DrawnFiles((*save(figure, out / "budget_per_head", formats),))


def head_budgets(
    model: str | None,
    head_scores: Path | None,
    kv_heads: int | None,
    methods: Sequence[str],
    budgets: Sequence[int],
    tokens: int,
    settings: Mapping[str, Any],
) -> tuple[str, list[HeadBudgets]]:
    """What each method keeps of a prompt at each budget, and what the model is called.

    Parameters
    ----------
    model : str or None
        A folder, a hub repository (only its config is read) or ``embedded:qwen2vl``. None: as many
        layers and heads as the score file has, or the embedded default.
    head_scores : Path or None
        Score file; None: the checkpoint's own.
    kv_heads : int or None
        KV heads a layer, where there is a score file and no model; None: as many as query heads.
    methods : sequence of str
        As registered.
    budgets : sequence of int
        Mean tokens per KV head, window included.
    tokens : int
        Length of the prompt.
    settings : mapping
        Other settings, such as ratio; each method takes those it reads.

    Raises
    ------
    FileNotFoundError, UserError
        In one sentence, if the model, a method, a budget or a setting cannot be.
    """
    if kv_heads is not None and (model is not None or head_scores is None):
        raise UserError(
            f"kv_heads={kv_heads}: it goes with a score file alone; a model states its own"
        )
    known = {name: _read_by(name, settings) for name in methods}
    name, shape, scores = _subject(model, head_scores, kv_heads)
    wanted = {name for method in methods for name in method_settings(method)} & {*FROM_FILES}
    files = {} if scores is None else {"head_scores": scores}
    files |= {name: _own(model, name) for name in sorted(wanted - {*files})}
    panels = []
    for method, own in known.items():
        given = {name: files[name] for name in wanted if name in method_settings(method)}
        for budget in budgets if "budget" in method_settings(method) else [None]:
            nominal = {} if budget is None else {"budget": budget}
            kept = tokens_per_head(make_method(method, shape, **nominal, **own, **given), tokens)
            label = method_label(shown_name(method), own)
            panels.append(HeadBudgets(label, tokens if budget is None else budget, kept))
    return name, panels


def _read_by(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    for name in ("budget", *FROM_FILES):
        if name in settings:
            raise UserError(f"settings: {name} has an option of its own")
    return canonical_settings(method, settings)


def _subject(
    model: str | None, head_scores: Path | None, kv_heads: int | None
) -> tuple[str, ModelShape, HeadScores | None]:
    if model is None and head_scores is not None:
        scores = read_head_scores(head_scores)
        layers, query_heads = scores.values.shape
        if kv_heads is not None:
            check_int("kv_heads", kv_heads, least=1)
        return head_scores.name, ModelShape(layers, query_heads, kv_heads or query_heads), scores
    source = find_checkpoint(model or str(default_checkpoint()))
    shape = _shape(source)
    scores = None if head_scores is None else read_head_scores(head_scores, shape)
    return last_part(source), shape, scores


def _shape(source: str) -> ModelShape:
    """From the config alone: a hub repository's weights need not be here."""
    try:
        return ModelShape.from_config(AutoConfig.from_pretrained(source, trust_remote_code=False))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"model={source}: its config.json cannot be read ({one_line(error)}); give a folder, "
            "a repository that is reachable or cached, or a score file alone"
        ) from error


def _own(model: str | None, setting: str) -> HeadScores | Sensitivity:
    """What lies beside a checkpoint, or where its command leaves it, for a setting."""
    source = find_checkpoint(model or str(default_checkpoint()))
    if not Path(source).is_dir():
        raise UserError(
            f"model={model} is a hub repository: download it first, and give its folder, or leave "
            f"out methods that read its {setting}"
        )
    checkpoint = Checkpoint(source)
    return checkpoint.head_scores() if setting == "head_scores" else checkpoint.sensitivity()


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
    UserError
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
        figure, grid = blank_grid(rows, columns)
        figure.set_size_inches(*size)
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
            words = (
                f"{panel.label}\nbudget {budget_text(panel.budget)}, kept {panel.kept.mean():.1f}"
            )
            axes.set_title(words, parse_math=False)
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
