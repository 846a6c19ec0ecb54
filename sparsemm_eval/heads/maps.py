"""Attention over an image: chosen heads, all heads, their visual scores, the image's tokens."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from sparsemm_eval.families import Box, Regions

_COLOURS = "viridis"
_OUTLINE = "#D55E00"  # Okabe and Ito's vermilion: told apart from all of viridis and from grey
_GRID, _FILL = "#0072B2", "#F0E442"
_COLUMNS = 3
WIDTH, BAR, _LINE = 6.6, 0.7, 0.17  # inches: figure, colour bar, line of a title
_DPI = 200
_HELD_IMAGE = 0.55  # how much of the image is left below the colours


def density(weights: np.ndarray, boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    """Spread the weight of every token evenly over its region; where regions overlap, they add.

    Parameters
    ----------
    weights : ndarray
        [..., tokens].
    boxes : ndarray
        [tokens, 4], region of each in pixels of the map, within it, fractions allowed. A token of
        no region (NaN, or an empty one) is not drawn.
    width, height : int
        Size of the map.

    Returns
    -------
    ndarray
        [..., height, width] float32, weight per pixel; its sum is the weight of the drawn tokens.
    """
    maps = np.zeros((*weights.shape[:-1], height, width), dtype=np.float32)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for token in np.flatnonzero(areas > 0):
        x0, y0, x1, y1 = boxes[token]
        columns, across = _covered(x0, x1)
        rows, down = _covered(y0, y1)
        share = np.outer(down, across) / areas[token]
        maps[..., rows, columns] += weights[..., token, None, None] * share
    return maps


def _covered(start: float, stop: float) -> tuple[slice, np.ndarray]:
    """Pixels that an interval touches, and how much of each."""
    first, last = int(np.floor(start)), int(np.ceil(stop))
    return slice(first, last), np.diff(np.clip(np.arange(first, last + 1), start, stop))


def chosen_heads(
    pixels: np.ndarray,
    maps: np.ndarray,
    captions: Sequence[str],
    title: str,
    box: Box | None,
    path: Path,
) -> None:
    """Lay the attention of some heads over the image, a panel a head, each on its own scale.

    Parameters
    ----------
    pixels : ndarray
        The image, [height, width] uint8, grey.
    maps : ndarray
        [heads, …, …], weight per pixel of a map; stretched over the image.
    captions : sequence of str
        One a panel.
    title : str
        Title of the figure.
    box : Box or None
        What is outlined, in pixels of the image.
    path : Path
        Where it goes; the ending chooses the format.
    """
    rows, columns = -(-len(maps) // _COLUMNS), min(_COLUMNS, len(maps))
    lines = 1 + max(caption.count("\n") for caption in captions)
    panel = (WIDTH - BAR) / columns * pixels.shape[0] / pixels.shape[1]
    figure = titled_figure(rows * (panel + lines * _LINE + 0.1), title)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, attention, caption in zip(grid.flat, maps, captions, strict=False):
        _show(axes, pixels)
        height, width = pixels.shape
        shown = axes.imshow(
            attention / max(attention.max(), np.finfo(np.float32).tiny),
            extent=(0, width, height, 0),
            cmap=_COLOURS,
            vmin=0,
            vmax=1,
            alpha=1 - _HELD_IMAGE,
            interpolation="nearest",
        )
        _outline(axes, box)
        axes.set_title(caption, fontsize=7.5)
    bar = figure.colorbar(shown, ax=grid, fraction=0.02, pad=0.01, ticks=[0, 1])
    bar.ax.set_yticklabels(["0", "head's\nmost"], fontsize=7)
    save_figure(figure, path)


def contact_sheet(maps: np.ndarray, title: str, box: Box | None, path: Path) -> None:
    """Draw the attention of all heads, a row a layer, on one scale of square roots.

    Parameters
    ----------
    maps : ndarray
        [L, Hq, height, width], weight per pixel of a map.
    title : str
        Title of the figure.
    box : Box or None
        What is outlined, in pixels of a map.
    path : Path
        Where it goes; the ending chooses the format.
    """
    layers, heads, height, width = maps.shape
    gap = max(2, width // 20)
    sheet = np.full((layers, height + gap, heads, width + gap), np.nan, dtype=np.float32)
    sheet[:, :height, :, :width] = maps.transpose(0, 2, 1, 3)
    sheet = sheet.reshape(layers * (height + gap), heads * (width + gap))
    across = WIDTH - BAR - 0.4
    figure = titled_figure(across * sheet.shape[0] / sheet.shape[1] + 0.4, title)
    axes = figure.add_subplot()
    shown = axes.imshow(
        sheet,
        extent=(0, sheet.shape[1], sheet.shape[0], 0),
        cmap=_COLOURS,
        norm=PowerNorm(0.5, vmin=0, vmax=max(float(maps.max()), np.finfo(np.float32).tiny)),
        interpolation="nearest",
    )
    if box is not None:
        place, *size = _around(box, width / 40)
        corners = np.mgrid[:layers, :heads].reshape(2, -1).T[:, ::-1] * (width + gap, height + gap)
        outlines = [Rectangle(place + corner, *size) for corner in corners]
        style = {"facecolor": "none", "edgecolor": _OUTLINE, "linewidth": min(0.7, 12 / heads)}
        axes.add_collection(PatchCollection(outlines, **style))
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=7)
    for axis, count, step in (
        (axes.xaxis, heads, width + gap),
        (axes.yaxis, layers, height + gap),
    ):
        every = range(0, count, -(-count // 16))
        axis.set_ticks([(place + 0.5) * step - gap / 2 for place in every], [*map(str, every)])
    axes.set_xlabel("query head", fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    bar = figure.colorbar(shown, ax=axes, fraction=0.02, pad=0.01, ticks=[0, maps.max()])
    bar.ax.set_yticklabels(["0", "most of\nany head"], fontsize=7)
    save_figure(figure, path)


def score_maps(
    scores: np.ndarray,
    per_kv_head: np.ndarray,
    title: str,
    path: Path,
    word: str = "visual score",
) -> None:
    """Draw the score of every query head and, where they differ, of every KV head.

    Parameters
    ----------
    scores : ndarray
        [L, Hq].
    per_kv_head : ndarray
        [L, H], sums over the query heads of each KV head.
    title : str
        Title of the figure.
    path : Path
        Where it goes; the ending chooses the format.
    word : str
        What the scores are.
    """
    panels = [(scores, "query head", f"{word} of each query head")]
    if scores.shape != per_kv_head.shape:
        panels.append((per_kv_head, "KV head", "of each KV head: sum over its query heads"))
    figure = titled_figure(2.6 if len(panels) == 2 else 3.4, title)
    for axes, (values, name, caption) in zip(
        np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True
    ):
        shown = head_map(axes, values, Normalize(0), name)
        axes.set_title(caption, fontsize=8)
        bar = figure.colorbar(shown, ax=axes, fraction=0.06, pad=0.02)
        bar.ax.tick_params(labelsize=7)
    save_figure(figure, path)


def head_map(axes: Axes, values: np.ndarray, norm: Normalize, name: str) -> AxesImage:
    """Draw values [layers, heads] as an image, with axes that count them."""
    shown = axes.imshow(values, cmap=_COLOURS, norm=norm, aspect="auto", interpolation="nearest")
    axes.set_xlabel(name, fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    axes.tick_params(labelsize=7)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    return shown


def token_regions(
    pixels: np.ndarray, regions: Regions, title: str, box: Box | None, path: Path
) -> None:
    """Outline the region of every image token, and fill those on a box.

    Base image and tiles, where a family has both, have a panel each.

    Parameters
    ----------
    pixels : ndarray
        The image, [height, width] uint8, grey.
    regions : Regions
        Where the tokens lie on it.
    title : str
        Title of the figure.
    box : Box or None
        What is outlined strongly, in pixels of the image.
    path : Path
        Where it goes; the ending chooses the format.
    """
    filled = np.zeros(regions.count, dtype=bool)
    if box is not None:
        filled[regions.tokens(box)] = True
    views = {"tile": f"the {regions.shown}"}
    if "base" in regions.parts:
        views = {"base": "base image", "tile": "tiles"}
    panel = WIDTH / len(views) * pixels.shape[0] / pixels.shape[1]
    figure = titled_figure(panel + _LINE + 0.1, title)
    panels = np.atleast_1d(figure.subplots(1, len(views)))
    for axes, (part, name) in zip(panels, views.items(), strict=True):
        axes.set_axis_off()
        _show(axes, pixels)
        here = regions.parts == part
        outlines = [Rectangle((x0, y0), x1 - x0, y1 - y0) for x0, y0, x1, y1 in regions.boxes[here]]
        stressed = [one for one, on_box in zip(outlines, filled[here], strict=True) if on_box]
        for some, style in (
            (stressed, {"facecolor": _FILL, "edgecolor": "none", "alpha": 0.4}),
            (outlines, {"facecolor": "none", "edgecolor": _GRID, "linewidth": 0.4, "alpha": 0.7}),
        ):
            axes.add_collection(PatchCollection(some, **style))
        _outline(axes, box)
        words = f"{name}: {len(outlines)} tokens"
        axes.set_title(words if box is None else f"{words}, {len(stressed)} on the box", fontsize=8)
    save_figure(figure, path)


def titled_figure(height: float, title: str) -> Figure:
    """An empty figure with room below its title for what is `height` inches high."""
    lines = [textwrap.shorten(line, 240, placeholder=" …") for line in title.split("\n")]
    words = "\n".join(textwrap.fill(line, 98) for line in lines)
    height += (words.count("\n") + 1) * _LINE + 0.2
    # A receipt is many times as high as it is wide; its panels become narrower instead.
    figure = Figure(figsize=(WIDTH, min(height, 2 * WIDTH)), layout="compressed")
    # No mathtext: a question may hold dollar signs.
    figure.suptitle(words, fontsize=9, parse_math=False)
    return figure


def _show(axes: Axes, pixels: np.ndarray) -> None:
    height, width = pixels.shape
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0))


def _outline(axes: Axes, box: Box | None) -> None:
    if box is not None:
        place, *size = _around(box, abs(np.diff(axes.get_xlim())[0]) / 150)
        axes.add_patch(Rectangle(place, *size, fill=False, edgecolor=_OUTLINE, linewidth=1.3))


def _around(box: Box, pad: float) -> tuple[np.ndarray, float, float]:
    """Corner, width and height just outside a box, so that what stands in it can be read."""
    x0, y0, x1, y1 = box
    return np.array([x0 - pad, y0 - pad]), x1 - x0 + 2 * pad, y1 - y0 + 2 * pad


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure; the ending of its path chooses the format."""
    # The same numbers make the same file: no date, no random names in an SVG.
    metadata = {"Date": None} if path.suffix == ".svg" else {}
    with mpl.rc_context({"svg.hashsalt": "sparsemm-eval"}):
        figure.savefig(path, dpi=_DPI, metadata=metadata, bbox_inches="tight", pad_inches=0.06)
