"""Curves: score over budget."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

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


def score_over_budget(frame: pd.DataFrame, title: str, label: str, path: Path) -> None:
    """Draw score over budget, a line a method, with one standard error as a band.

    Parameters
    ----------
    frame : DataFrame
        Of one task and metric: method, budget, score, stderr.
    title, label : str
        Of the figure and of the score's axis.
    path : Path
        Where it goes; the ending chooses the format.
    """
    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for method in method_order(list(set(frame["method"]))):
        points = frame[frame["method"] == method].sort_values("budget")
        style = {"markersize": 4.5, "linewidth": 1.6, **_STYLES.get(method, {"marker": "."})}
        name = METHOD_NAMES.get(method, method)
        if points["budget"].isna().all():
            axes.axhline(points["score"].iloc[0], label=name, **style)
            continue
        axes.plot(points["budget"], points["score"], label=name, **style)
        low, high = (points["score"] + sign * points["stderr"] for sign in (-1, 1))
        axes.fill_between(points["budget"], low, high, color=style.get("color"), alpha=0.12, lw=0)
    budgets = sorted(frame["budget"].dropna().unique())
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, [f"{budget:.0f}" for budget in budgets])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("budget: mean tokens kept per KV head (log scale)")
    axes.set_ylabel(label)
    axes.set_ylim(0, 1.03)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=200)
