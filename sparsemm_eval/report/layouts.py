"""Shapes of tables: which cells they are of, what names their rows, and in what order."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from sparsemm_eval.errors import UserError
from sparsemm_eval.report.inputs import RANKING
from sparsemm_eval.report.names import DEFAULTS, GENERAL, OCR_RICH, in_order
from sparsemm_eval.report.paper import STUDIES

_PARTS = ("local window", "uniform", "score-preferred")


@dataclass(frozen=True)
class Layout:
    """The shape of a table.

    Parameters
    ----------
    title : str
        What stands over it.
    rows : tuple of str
        What names a row, outermost first.
    column : {"budget", "ratio"}
        What stands side by side.
    order : tuple of str
        Columns of cells that rows are sorted by, within a benchmark.
    needs : str
        What its cells must be, in words.
    benchmarks : tuple of str
        It is of these alone; () of all.
    folded : tuple of str
        Names of rows that go into the title where they are the same in all.
    """

    title: str
    rows: tuple[str, ...]
    column: str
    order: tuple[str, ...]
    needs: str
    benchmarks: tuple[str, ...] = ()
    folded: tuple[str, ...] = ()


_METHODS = {
    "rows": ("benchmark", "model", "method"),
    "column": "budget",
    "order": ("model", "method", "label", "source"),
}
OWN = Layout("Scores by budget", **_METHODS, needs="results")
LAYOUTS = {
    "table1": Layout(
        "Share of the budget that all heads get alike, as Table 1 of SparseMM",
        rows=("benchmark", "budget", "model"),
        column="ratio",
        order=("budget", "model", "source"),
        needs="sparsemm with several ratios at one budget",
        folded=("benchmark", "budget"),
    ),
    "table2": Layout(
        "Parts of the cache by budget, as Table 2 of SparseMM",
        rows=("benchmark", "model", *_PARTS),
        column="budget",
        order=("model", "source", "part", "ratio"),
        needs="at least two of local, sparsemm with ratio=1 and sparsemm with another ratio",
        folded=("benchmark", "model"),
    ),
    "table3": Layout(
        "OCR-rich benchmarks by budget, as Table 3 of SparseMM",
        **_METHODS,
        needs=f"results on {', '.join(OCR_RICH)}",
        benchmarks=OCR_RICH,
    ),
    "table4": Layout(
        "General benchmarks by budget, as Table 4 of SparseMM",
        **_METHODS,
        needs=f"results on {', '.join(GENERAL)}",
        benchmarks=GENERAL,
    ),
}


def checked_layout(like: str | None) -> Layout:
    """The shape of a table of the paper, or of one's own.

    Raises
    ------
    ValueError
        If the paper has no such table.
    """
    if like is not None and like not in LAYOUTS:
        raise UserError(f"like={like}: it must be one of {', '.join(LAYOUTS)}, {RANKING}")
    return OWN if like is None else LAYOUTS[like]


def chosen_cells(cells: pd.DataFrame, like: str | None) -> pd.DataFrame:
    """The cells of a table; may be none. A study's ratio is the default where a run states none.

    The paper's two studies repeat settings of its other tables with other values, so its cells
    are taken from the table itself.

    Parameters
    ----------
    cells : DataFrame
        As `results.load` gives them, seeds joined.
    like : str or None
        One of `LAYOUTS`.
    """
    if like in STUDIES:
        ours = cells["method"].eq("sparsemm")
        cells = cells.assign(ratio=cells["ratio"].fillna(DEFAULTS["ratio"]).where(ours))
        cells = cells[cells["source"].isin(("measured", like))]
    elif not cells["source"].isin(STUDIES).all():
        cells = cells[~cells["source"].isin(STUDIES)]
    place = ["model", "benchmark", "task", "source"]
    if like == "table1":
        cells = cells[cells["method"].eq("sparsemm")]
        groups = cells.groupby([*place, "budget"], dropna=False)
        return cells[groups["ratio"].transform("nunique") > 1]
    if like == "table2":
        cells = cells[cells["method"].isin(("local", "sparsemm"))]
        cells = _one_ratio(cells.assign(part=_part(cells)), place)
        return cells[cells.groupby(place, dropna=False)["part"].transform("nunique") > 1]
    benchmarks = () if like is None else LAYOUTS[like].benchmarks
    return cells[cells["benchmark"].isin(benchmarks)] if benchmarks else cells


def _one_ratio(cells: pd.DataFrame, place: list[str]) -> pd.DataFrame:
    """All parts at the default ratio alone, where it was run: Table 1 is of the others."""
    default = cells["part"].eq(len(_PARTS)) & cells["ratio"].eq(DEFAULTS["ratio"])
    has = cells.assign(default=default).groupby(place, dropna=False)["default"].transform("any")
    return cells[default | cells["part"].lt(len(_PARTS)) | ~has]


def _part(cells: pd.DataFrame) -> pd.Series:
    """How many parts of the cache: 1 the local window, 2 and the uniform one, 3 all."""
    return 1 + cells["method"].ne("local").astype(int) + cells["ratio"].lt(1).astype(int)


def placed(cells: pd.DataFrame, layout: Layout) -> pd.DataFrame:
    """Cells in the order of the table, with `row`, what its row is called, and `key`, the same for
    machines.

    Parameters
    ----------
    cells : DataFrame
        Those that `chosen_cells` left.
    layout : Layout
        The table's.
    """
    tasks = cells[cells["source"].eq("measured")].groupby("benchmark")["task"].nunique()
    several = cells["benchmark"].map(tasks).gt(1)
    cells = cells.assign(shown_task=cells["task"].where(several, ""))
    cells = in_order(cells, ("benchmark", "shown_task", *layout.order))
    return cells.assign(row=_row_names(cells, layout), key=_row_names(cells, layout, plain=True))


def _row_names(cells: pd.DataFrame, layout: Layout, plain: bool = False) -> list[tuple[str, ...]]:
    """What each cell's row is called."""
    beside = cells["source"].ne("measured").nunique() > 1
    ratios = cells.loc[cells["ratio"].lt(1), "ratio"].nunique()
    has, lacks = ("1", "0") if plain else ("✓", "")
    names = []
    for row in cells.to_dict("records"):
        metric = "" if plain else f" ({row['metric_label']})"
        task = f", {row['shown_task']}" if row["shown_task"] else ""
        source = " (paper)" if beside and row["source"] != "measured" else ""
        by_method = "method" in layout.rows
        named = {
            "benchmark": row["benchmark"] + metric + task,
            "budget": f"{row['budget']:g}",
            "method": row["label"] + source,
            "model": row["model"] + ("" if by_method else _settings(row["label"]) + source),
        }
        for number, part in enumerate(_PARTS):
            named[part] = has if row.get("part", 0) > number else lacks
        if row.get("part") == len(_PARTS) and ratios > 1:
            named[_PARTS[-1]] += f" ratio={row['ratio']:g}"
        names.append(tuple(named[name] for name in layout.rows))
    return names


def _settings(label: str) -> str:
    """A label's settings but for the ratio, in brackets."""
    words = label.partition(" (")[2].removesuffix(")").split(", ")
    left = [word for word in words if word and not word.startswith("ratio=")]
    return f" ({', '.join(left)})" if left else ""
