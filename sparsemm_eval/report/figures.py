"""Curves: score over budget, score over silenced heads."""

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from sparsemm_eval.report.benchmarks import benchmark_of
from sparsemm_eval.report.tables import METHOD_NAMES, method_order

# Okabe and Ito's colours: told apart by colour-blind readers too.
_STYLES = {
    "fullkv": {"color": "#000000", "linestyle": "--"},
    "sparsemm": {"color": "#D55E00", "marker": "o"},
    "snapkv": {"color": "#0072B2", "marker": "s"},
    "pyramidkv": {"color": "#009E73", "marker": "^"},
    "adakv": {"color": "#CC79A7", "marker": "D"},
    "random": {"color": "#777777", "marker": "x"},
    "local": {"color": "#56B4E9", "marker": "v"},
    "streaming": {"color": "#E69F00", "marker": "P"},
}


def score_panels(frame: pd.DataFrame, over: str, title: str, path: Path) -> None:
    """Draw score over budget, or over what was really kept: a panel a task, a line a method.

    Parameters
    ----------
    frame : DataFrame
        Of one model, as `main_scores` gives it: task, method, budget, kept_tokens_per_head,
        score, stderr. One standard error is a band; full KV is a level.
    over : {"budget", "kept_tokens_per_head"}
        The horizontal axis.
    title : str
        Of the figure.
    path : Path
        Where it goes; the ending chooses the format.
    """
    tasks = list(dict.fromkeys(frame["task"]))
    columns = min(len(tasks), 4)
    rows = -(-len(tasks) // columns)
    size = (2.9 * columns, 2.5 * rows + 0.7) if len(tasks) > 1 else (5.2, 3.9)
    figure = Figure(figsize=size, layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, task in zip(grid, tasks, strict=False):
        _score_panel(axes, frame[frame["task"] == task], over)
        benchmark = benchmark_of(task)
        axes.set_title(f"{benchmark.title} ({benchmark.label})", fontsize=9.5)
    for axes in grid[len(tasks) :]:
        axes.set_visible(False)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=6 if columns > 2 else 3,
        fontsize=8.5, frameon=False,
    )  # fmt: skip
    what = "budget" if over == "budget" else "what was really kept"
    figure.suptitle(f"{title}\nover {what}: tokens per KV head, log scale", fontsize=10.5)
    figure.savefig(path, dpi=160)


def _score_panel(axes: Axes, frame: pd.DataFrame, over: str) -> None:
    for method in method_order(list(set(frame["method"]))):
        points = frame[frame["method"] == method].sort_values(over)
        style = {"markersize": 4, "linewidth": 1.5, **_STYLES.get(method, {"marker": "."})}
        name = METHOD_NAMES.get(method, method)
        if points["budget"].isna().all():
            axes.axhline(points["score"].iloc[0], label=name, **style)
            continue
        axes.plot(points[over], points["score"], label=name, **style)
        low, high = (points["score"] + sign * points["stderr"] for sign in (-1, 1))
        axes.fill_between(points[over], low, high, color=style.get("color"), alpha=0.12, lw=0)
    budgets = sorted(frame["budget"].dropna().unique())
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, [f"{budget:.0f}" for budget in budgets])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=8)
    axes.set_ylim(0, 1.03 * max(1.0, frame["score"].max()))
    axes.grid(alpha=0.25)


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
        axes.set_title(f"{task}: {metric}", fontsize=10)
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
