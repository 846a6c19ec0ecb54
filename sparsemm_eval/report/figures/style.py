"""How figures look: widths, fonts, colours; and files that the same numbers make again."""

from __future__ import annotations

import colorsys
import hashlib
import io
import math
import textwrap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import chain, product
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullLocator

from sparsemm_eval.report.inputs import check_formats

# Inches: a column and the text's width of a two-column page.
COLUMN, PAGE = 3.4, 7.0
FONT = 7.0  # points, the smallest that is set
CHARACTER, LINE = 0.56 * FONT / 72, 1.5 * FONT / 72  # inches: of its characters and lines
_DPI = 300

# Okabe and Ito's colours, the last Paul Tol's wine: told apart by colour-blind readers too.
METHOD_STYLES: Mapping[str, dict[str, Any]] = {
    "fullkv": {"color": "#000000", "linestyle": "--"},
    "sparsemm": {"color": "#D55E00", "marker": "o"},
    "snapkv": {"color": "#0072B2", "marker": "s"},
    "pyramidkv": {"color": "#009E73", "marker": "^"},
    "adakv": {"color": "#CC79A7", "marker": "D"},
    "random": {"color": "#777777", "marker": "x"},
    "local": {"color": "#56B4E9", "marker": "v"},
    "streaming": {"color": "#E69F00", "marker": "P"},
    "sensitivity": {"color": "#882255", "marker": "*"},
    "mixkv": {"color": "#332288", "marker": "<"},
    "criticalkv": {"color": "#AA4499", "marker": ">"},
    "lava": {"color": "#117733", "marker": "p"},
    "cake": {"color": "#999933", "marker": "h"},
    "vlcache": {"color": "#44AA99", "marker": "d"},
    "tgvkv": {"color": "#6699CC", "marker": "X"},
    "tova": {"color": "#661100", "marker": "H"},
    "expected": {"color": "#DDCC77", "marker": "8"},
    "keydiff": {"color": "#88CCEE", "marker": "<"},
    "knorm": {"color": "#AAAAAA", "marker": ">"},
}
_MARKERS = ("o", "s", "^", "D", "x", "v", "P", "*", "<", "p", ">", "h", "8", "d", "X", "H")
# Dashes are not among them: they tell the paper's curves, drawn behind one's own.
PAPER_LINE = {"linestyle": (0, (4, 2)), "linewidth": 0.9, "marker": "None", "zorder": 1.5}
_LINES: tuple[Any, ...] = ("-", (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (3, 1, 1, 1, 1, 1)))


def line_styles(methods: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line of each curve, no two of them alike.

    They come from its name alone, so that a curve looks the same whatever else is shown: a method
    of the paper has its own colour and marker, one of a user's has those of its name; settings
    keep the method's colour and have a marker and a line of their own. Only where two names fall
    on one style, the later has another.

    Parameters
    ----------
    methods : mapping of str to str
        Method by label, of `sparsemm_eval.report.names.labels_in_order`.

    Returns
    -------
    dict of str to dict
        ``color``, ``marker`` and ``linestyle`` by label.
    """
    styles: dict[str, dict[str, Any]] = {}
    # Those without settings first: no other curve takes their style from them.
    for label, method in sorted(methods.items(), key=lambda pair: "(" in pair[0]):
        own = {"marker": None, **(METHOD_STYLES.get(method) or _own_style(method))}
        first = {**own, "linestyle": "-"}
        settings = label.partition(" (")[2]
        turns = _variants(first, _number(f"{method} {settings}"))
        for style in turns if settings else chain([first], turns):
            if style not in styles.values():
                styles[label] = style
                break
    return {label: styles[label] for label in methods}


def _variants(style: dict[str, Any], begin: int) -> Iterator[dict[str, Any]]:
    """Other markers and lines of a curve's colour, begun at a number of its own.

    Always filled: a hollow one is a value that was read off a figure.
    """
    looks = [*product((mark for mark in _MARKERS if mark != "x"), _LINES)]
    for place in range(len(looks)):
        # A step that shares no divisor with their number, 90: neighbours look quite unlike.
        marker, line = looks[(begin + 97 * place) % len(looks)]
        if marker != style["marker"]:
            yield {**style, "marker": marker, "linestyle": line}


def _number(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _own_style(method: str) -> dict[str, Any]:
    """Colour and marker from the name alone: the same whatever else is drawn, never SparseMM's.

    Of names that are joined the first one's colour and the last one's marker.
    """
    if "+" in method:
        first, last = (METHOD_STYLES.get(one) or _own_style(one) for one in _ends(method))
        return {"color": first["color"], "marker": last["marker"]}
    digest = hashlib.sha256(method.encode()).digest()
    # From yellow over green and blue to magenta: SparseMM's vermilion is left out.
    hue = 0.15 + 0.78 * int.from_bytes(digest[:2], "big") / 2**16
    light = 0.35 + 0.2 * digest[2] / 255
    return {
        "color": to_hex(colorsys.hls_to_rgb(hue, light, 0.7)).upper(),
        "marker": _MARKERS[1 + digest[3] % (len(_MARKERS) - 1)],
    }


def _ends(method: str) -> tuple[str, str]:
    names = method.split("+")
    return names[0], names[-1]


def house_style() -> AbstractContextManager[None]:
    """Fonts and lines of every figure; to be entered before one is made."""
    return mpl.rc_context(
        {
            "text.parse_math": False,  # a $ in a name is a $
            "font.size": FONT,
            "axes.titlesize": FONT + 0.5,
            "axes.labelsize": FONT,
            "xtick.labelsize": FONT,
            "ytick.labelsize": FONT,
            "legend.fontsize": FONT,
            "legend.frameon": False,
            "figure.titlesize": FONT + 1.5,
            "figure.labelsize": FONT + 0.5,
            "axes.linewidth": 0.6,
            "xtick.major.width": 0.6,
            "ytick.major.width": 0.6,
            "xtick.major.size": 2.5,
            "ytick.major.size": 2.5,
            "lines.linewidth": 1.1,
            "lines.markersize": 3.2,
            "grid.linewidth": 0.5,
            "grid.alpha": 0.3,
        }
    )


def blank_grid(rows: int, columns: int, **options: Any) -> tuple[Figure, np.ndarray]:
    """A figure and its panels, [rows, columns], to be made inside of `house_style`."""
    figure = Figure(layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.04, wspace=0.02, hspace=0.02)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def add_legend(
    figure: Figure,
    styles: Mapping[str, dict[str, Any]],
    labels: Collection[str],
    more: Mapping[str, dict[str, Any]],
    width: float,
    title: str | None = None,
) -> int:
    """Put a legend, and a title over it, above all panels.

    Parameters
    ----------
    figure : Figure
        Whose panels are drawn.
    styles : mapping
        From `line_styles`.
    labels : collection of str
        Those of full lines; the paper's alone are dashed.
    more : mapping
        Style by name of what is no method, in grey.
    width : float
        Inches of the figure.
    title : str, optional
        Over the legend.

    Returns
    -------
    int
        How many lines high it is.
    """
    lines = {
        label: style if label in labels else {**style, **PAPER_LINE}
        for label, style in styles.items()
    }
    lines |= {name: {"color": "#555555", **style} for name, style in more.items()}
    handles = [Line2D([], [], label=label, **line) for label, line in lines.items()]
    longest = max(len(label) for label in lines)
    columns = max(1, min(len(handles), int(width / ((longest + 8) * CHARACTER))))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, title=title,
                  title_fontproperties={"weight": "bold", "size": FONT + 1}, columnspacing=1.2,
                  handlelength=2.4, borderaxespad=0.2)  # fmt: skip
    return -(-len(handles) // columns) + (title is not None)


def wrapped(lines: Sequence[str], width: float) -> list[str]:
    """Sentences in lines that fit into so many inches."""
    most = int(0.95 * width / CHARACTER)
    return [part for line in lines for part in textwrap.wrap(line, most)]


def scale_values(axes: Axes, low: float, high: float) -> None:
    """A vertical axis of few round numbers, with a grid."""
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(visible=True)


def scale_tokens(
    axes: Axes, ticks: Sequence[float], ends: tuple[float, float], inches: float
) -> None:
    """A horizontal axis of tokens or bytes, log scale, with labels where there is room.

    Parameters
    ----------
    axes : Axes
        A panel.
    ticks : sequence of float
        Tokens or bytes, ascending.
    ends : tuple of float
        Fewest and most that are drawn.
    inches : float
        About how wide the panel will be.
    """
    low, high = ends[0] / 1.12, ends[1] * 1.12
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    thousands = all(tick % 1024 == 0 for tick in ticks)
    names = [f"{tick / 1024:g}K" if thousands else f"{tick:g}" for tick in ticks]
    places = [inches * math.log(tick / low) / math.log(high / low) for tick in ticks]
    shown = set(_spaced(places, [CHARACTER * len(name) for name in names]))
    axes.set_xticks(ticks, [name if i in shown else "" for i, name in enumerate(names)])
    axes.xaxis.set_minor_locator(NullLocator())


def power_ticks(values: Iterable[float]) -> list[float]:
    """Powers of two that lie between values; the two ends where none does."""
    low, high = float(min(values)), float(max(values))
    powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    return [2.0**power for power in powers] or sorted({round(low), round(high)})


def _spaced(places: Sequence[float], widths: Sequence[float], gap: float = 0.06) -> list[int]:
    """Which labels fit side by side, from the last one down.

    Parameters
    ----------
    places : sequence of float
        Inches from the left, ascending: middle of each label.
    widths : sequence of float
        Inches of each.
    gap : float
        Inches left between two.

    Returns
    -------
    list of int
        Indices of those that are shown, ascending.
    """
    shown: list[int] = []
    left = float("inf")
    for index in reversed(range(len(places))):
        if places[index] + widths[index] / 2 + gap <= left:
            shown.append(index)
            left = places[index] - widths[index] / 2
    return shown[::-1]


def save(figure: Figure, stem: Path, formats: Sequence[str]) -> list[Path]:
    """Write a figure as ``stem.svg``, ``stem.png``; the same numbers make the same bytes.

    Raises
    ------
    ValueError
        For a format that is none of these, or none at all.
    """
    check_formats(formats)
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}.{form}") for form in formats]
    for path in paths:
        _write(figure, path, path.suffix[1:])
    return paths


def to_svg(figure: Figure) -> str:
    """The SVG element alone, to stand inside a page."""
    text = io.StringIO()
    _write(figure, text, "svg")
    return text.getvalue()[text.getvalue().index("<svg") :]


def _write(figure: Figure, target: Path | io.StringIO, form: str) -> None:
    # No date, and no random names of what an SVG refers to; letters stay letters in a PDF.
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    metadata = dates.get(form, {})
    with house_style(), mpl.rc_context({"svg.hashsalt": "sparsemm-eval", "pdf.fonttype": 42}):
        figure.savefig(target, format=form, dpi=_DPI, metadata=metadata)
