"""Which KV heads serve which kind of prompts, drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, PowerNorm
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator, PercentFormatter

from sparsemm_eval.heads.maps import BAR, WIDTH, head_map, save_figure, titled_figure
from sparsemm_eval.methods import Sensitivity
from sparsemm_eval.methods.sensitivity import RULES

# Panels a row; letters that a panel's width holds.
_COLUMNS, _LETTERS = 4, 25
# How a head ranks, as a mark: whose queries, and over how many tokens they are pooled, as a part of
# its cell. A filled one looks ahead.
_SHAPES, _SIZES = {"window": "s", "last": "o", "none": "x"}, {1: 0.3, 5: 0.5, 9: 0.75}


def sensitivity_maps(
    sensitivity: Sensitivity, title: str, path: Path, mixture: str = "root"
) -> None:
    """Draw which KV heads serve which kind of prompts, and what they are given for it.

    A panel a kind: each head's share of the roots of what that kind loses, its first heads by name;
    one of a mixture of the kinds; and, where there are tables, one of the tokens of each head at
    the smallest budget, with the rule by which it ranks.

    Parameters
    ----------
    sensitivity : Sensitivity
        What is drawn.
    title : str
        Title of the figure.
    path : Path
        Where it goes; the ending chooses the format.
    mixture : str
        As for `Sensitivity.head_scores`.
    """
    panels = {
        # A kind that loses nothing has no share.
        name: sensitivity.share(weights={name: 1.0})
        if kind.divergence.any()
        else np.zeros_like(kind.divergence)
        for name, kind in sensitivity.kinds.items()
    }
    if len(panels) > 1 or mixture != "root":
        scores = sensitivity.head_scores(mixture)
        panels[f"mixture: {mixture}"] = scores.per_kv_head(sensitivity.shape.kv_heads)
    layers, heads = sensitivity.rules.shape
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    cell = (WIDTH - BAR - 0.5) / columns / heads
    panel = float(np.clip(layers * cell, 1.0, 2.0))
    wide = float(np.clip(0.36 * layers, 1.8, 6.0)) if sensitivity.tables else 0.0
    ratios = [panel + 0.55] * rows + [wide + 0.6] * bool(wide)
    figure = titled_figure(sum(ratios), title)
    grid = figure.add_gridspec(len(ratios), columns, height_ratios=ratios)
    # A scale of square roots, as in a large model all heads but a few have little.
    norm = PowerNorm(0.5, 0, max(share.max() for share in panels.values()))
    drawn = []
    for place, (name, share) in enumerate(panels.items()):
        row, column = divmod(place, columns)
        axes = figure.add_subplot(grid[row, column])
        shown = head_map(axes, share, norm, "KV head" if row == rows - 1 else "")
        if column:
            axes.set_ylabel("")
        words = name if len(name) <= _LETTERS else f"{name[: _LETTERS - 1]}…"
        axes.set_title(f"{words}\n{_first(share)}", fontsize=7, parse_math=False)
        if cell >= 0.15 and panel / layers >= 0.13:
            numbers = np.where(share >= 0.01, np.char.mod("%.0f", 100 * share), "")
            _write(axes, numbers, norm(share), 5.5)
        drawn.append(axes)
    bar = figure.colorbar(shown, ax=drawn, fraction=0.02, pad=0.01, format=PercentFormatter(1))
    bar.ax.tick_params(labelsize=7)
    bar.set_label("share of the roots of what is lost", fontsize=7)
    if wide:
        _given(figure.add_subplot(grid[rows, :]), sensitivity, wide)
    save_figure(figure, path)


def _first(share: np.ndarray) -> str:
    """Heads of the largest shares by name: those near the first's, as far as there is room."""
    order = [tuple(head) for head in np.argwhere(share >= max(share.max() / 4, 1e-9))]
    words = ""
    for layer, head in sorted(order, key=lambda head: -share[head]):
        named = f"{', ' if words else ''}{layer}-{head} {share[layer, head]:.0%}"
        if len(words + named) > _LETTERS:
            break
        words += named
    return words or "nothing is lost"


def _given(axes: Axes, sensitivity: Sensitivity, inches: float) -> None:
    """Tokens of each head at the smallest budget, and its rule: written, or as a mark."""
    budget = min(sensitivity.tables)
    table, rules = sensitivity.tables[budget], sensitivity.rules
    norm = LogNorm(1, max(2, table.max()))
    shown = head_map(axes, table, norm, "KV head")
    axes.set_title(f"tokens of each KV head at a budget of {budget}, and how it ranks", fontsize=8)
    bar = axes.figure.colorbar(shown, ax=axes, fraction=0.02, pad=0.01)
    ends = [1, *(2**power for power in range(1, 40) if 2**power < table.max() / 1.3), table.max()]
    bar.ax.set_yticks(ends[:: max(1, len(ends) // 6)])
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.tick_params(labelsize=7)
    layers, heads = table.shape
    longest = max(len(str(RULES[rule])) for rule in np.unique(rules))
    if inches / layers >= 0.28 and (WIDTH - BAR) / heads >= 0.052 * longest:
        words = [
            f"{tokens}\n{RULES[rule]}" for tokens, rule in zip(table.flat, rules.flat, strict=True)
        ]
        _write(axes, np.array(words).reshape(table.shape), norm(table), 5.5)
        return
    points = 72 * min(inches / layers, (WIDTH - BAR) / heads)
    usual = int(np.bincount(rules.flat).argmax())
    marks = [Line2D([], [], linestyle="none", label=f"no mark: {RULES[usual]}")]
    for rule in np.unique(rules[rules != usual]):
        one, (layer, head) = RULES[rule], np.nonzero(rules == rule)
        mark = {"marker": _SHAPES[one.queries], "linewidths": 0.5}
        colours = [_ink(value) for value in norm(table[layer, head])]
        for x, y, size, ink in ((head, layer, points, colours), ([], [], 10, "black")):
            filled = one.pooling == "ahead" or one.queries == "none"
            faces = {"c": ink} if filled else {"facecolors": "none", "edgecolors": ink}
            shown = axes.scatter(x, y, s=(size * _SIZES[one.width]) ** 2, **mark, **faces)
        shown.set_label(str(one))
        marks.append(shown)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.5 / inches)}
    axes.legend(handles=marks, ncols=6, frameon=False, fontsize=6.5, handletextpad=0.1, **below)


def _write(axes: Axes, words: np.ndarray, lightness: np.ndarray, size: float) -> None:
    """Text in every cell of a map."""
    for (layer, head), text in np.ndenumerate(words):
        style = {"ha": "center", "va": "center", "color": _ink(lightness[layer, head])}
        axes.text(head, layer, text, fontsize=size, **style)


def _ink(lightness: float) -> str:
    """What is read on a colour of the scale, 0 its dark end."""
    return "black" if lightness > 0.55 else "white"
