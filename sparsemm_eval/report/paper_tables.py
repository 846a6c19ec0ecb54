"""Tables in the shape of the paper's, of any cells."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from sparsemm_eval.errors import UserError
from sparsemm_eval.report.baselines import BEST
from sparsemm_eval.report.captions import captions
from sparsemm_eval.report.cell_text import (
    SHOWN,
    cell_texts,
    checked_shown,
    with_paper,
    with_scale,
)
from sparsemm_eval.report.layouts import LAYOUTS, Layout, checked_layout, chosen_cells, placed
from sparsemm_eval.report.markup import BOLD, ITALIC, UNDERLINE, Table
from sparsemm_eval.report.statistics import COMPARED, add_statistics

NO_SCORES = pd.DataFrame({"cell": [], "doc_id": [], "score": []})
_RAW = (
    "benchmark", "task", "metric_label", "model", "method", "label", "budget", "ratio", "score",
    "low", "high", "spread", "seeds", "samples", "expected", "rank", "mark", "baseline",
    "difference", "difference_low", "difference_high", "pairs", "p", "p_corrected", "test",
    "paper_score", "paper_source", "kept_tokens_per_head", "kept_kv_bytes", "source",
)  # fmt: skip


def applicable(cells: pd.DataFrame) -> list[str]:
    """Names of the paper's tables that these cells fill, at least in part.

    Parameters
    ----------
    cells : DataFrame
        Of `results.load`, seeds joined.
    """
    return [like for like in LAYOUTS if len(chosen_cells(cells, like))]


def paper_table(
    cells: pd.DataFrame,
    scores: pd.DataFrame = NO_SCORES,
    like: str | None = None,
    show: Sequence[str] = ("score",),
    long: bool = False,
    against: str = BEST,
    digits: int | None = None,
    percent: bool | None = None,
) -> Table:
    """Build a table in the shape of one of the paper's.

    Parameters
    ----------
    cells : DataFrame
        Of `results.load`, seeds joined; the paper's own may be among them.
    scores : DataFrame
        Of `samples.sample_scores`, for statistics over exactly the cells shown.
    like : {"table1", "table2", "table3", "table4"}, optional
        Whose shape, cells, decimals and percent; default: all cells by benchmark, model, method.
    show : sequence of str
        What stands under each column: of `cell_text.SHOWN`.
    long : bool
        One row a cell, with all that is known of it; `show` is not looked at.
    against : str
        What differences are from: "best", "fullkv" or a method. Marks are against the next best.
    digits : int, optional
        Decimals of all scores.
    percent : bool, optional
        Whether scores that end at 1 are shown in percent.

    Raises
    ------
    ValueError
        If an option is unknown, no cell is of the table, or two cells have one place in it.
    """
    shown = tuple(SHOWN) if long else checked_shown(show)
    layout = checked_layout(like)
    chosen = chosen_cells(cells, like)
    if not len(chosen):
        there = ", ".join(dict.fromkeys((*cells["benchmark"], *cells["label"])))
        raise UserError(f"like={like}: it needs {layout.needs}; there is {there or 'nothing'}")
    ranked = _marked(add_statistics(chosen, scores))
    compared = ranked if against == BEST else add_statistics(chosen, scores, against)
    about = captions(ranked, shown, against, compared)
    valued = ranked.assign(**{name: compared[name] for name in COMPARED})
    valued = placed(with_scale(with_paper(valued, like), like, digits, percent), layout)
    return (_long if long else _wide)(valued, layout, shown, about)


def _marked(cells: pd.DataFrame) -> pd.DataFrame:
    """Best and second; the best in bold unless it is known not to be significantly better."""
    mark = cells["rank"].map({1: BOLD, 2: UNDERLINE}).fillna("")
    unproven = cells["p_corrected"].notna() & ~cells["better"]
    return cells.assign(mark=mark.mask(mark.eq(BOLD) & unproven, ITALIC))


def _wide(
    cells: pd.DataFrame, layout: Layout, shown: tuple[str, ...], about: tuple[str, ...]
) -> Table:
    """One row a row of the paper's; what has no budget stands in every column."""
    side = sorted(set(cells[layout.column].dropna()), reverse=layout.column == "budget")
    side = side or [np.nan]
    place: dict[tuple, int] = {}
    for number, (row, value) in enumerate(zip(cells["row"], cells[layout.column], strict=True)):
        for column in side if pd.isna(value) else [value]:
            if (row, column) in place:
                raise UserError(
                    f"{', '.join(filter(None, row))} at {layout.column}={column:g}: there are two "
                    "such cells; leave one out, as by --models or --methods"
                )
            place[row, column] = number
    rows = list(dict.fromkeys(cells["row"]))
    folded = [
        level
        for level, name in enumerate(layout.rows)
        if name in layout.folded and len({row[level] for row in rows}) == 1
    ]
    left = [level for level in range(len(layout.rows)) if level not in folded]
    index = pd.MultiIndex.from_tuples(
        [tuple(row[level] for level in left) for row in rows],
        names=[layout.rows[level] for level in left],
    )
    keys = pd.MultiIndex.from_tuples(dict.fromkeys(cells["key"]), names=layout.rows)
    heads = ["all tokens" if pd.isna(column) else f"{column:g}" for column in side]
    columns = pd.MultiIndex.from_product([heads, [SHOWN[name] for name in shown]])

    def spread_out(texts: pd.DataFrame, index: pd.MultiIndex) -> pd.DataFrame:
        """Texts of cells, [cells, shown], to where they stand."""
        known = texts.to_numpy()
        empty = [""] * len(shown)
        lines = [
            [
                text
                for column in side
                for text in (known[place[row, column]] if (row, column) in place else empty)
            ]
            for row in rows
        ]
        return pd.DataFrame(lines, index=index, columns=columns, dtype=object)

    marks = pd.DataFrame("", index=cells.index, columns=list(shown))
    if "score" in shown:
        marks["score"] = cells["mark"]
    named = [
        f"budget {rows[0][level]}" if layout.rows[level] == "budget" else rows[0][level]
        for level in folded
    ]
    return Table(
        title=": ".join(filter(None, [layout.title, ", ".join(named)])),
        caption=about,
        text=spread_out(cell_texts(cells, shown), index),
        marks=spread_out(marks, index),
        plain=spread_out(cell_texts(cells, shown, plain=True), keys),
        cells=cells,
    )


def _long(
    cells: pd.DataFrame, layout: Layout, shown: tuple[str, ...], about: tuple[str, ...]
) -> Table:
    """One row a cell, and everything known of it."""
    names = cells[["benchmark", "model", "label"]].rename(columns={"label": "method"})
    names["budget"] = cells["budget"].map(lambda budget: "" if pd.isna(budget) else f"{budget:g}")
    texts = cell_texts(cells, shown).rename(columns=SHOWN | {"score": "score"})
    text = pd.concat([names, texts, cells["source"]], axis="columns")
    marks = pd.DataFrame("", index=text.index, columns=text.columns)
    marks["score"] = cells["mark"]
    return Table(
        layout.title, about, text, marks, cells[list(_RAW)].apply(lambda of: of.map(_raw)), cells
    )


def _raw(value: object) -> str:
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.8g}"
    return "" if pd.isna(value) else str(value)
