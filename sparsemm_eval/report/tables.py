"""Tables of cells: in the shape of the paper's, and a sweep's own."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from sparsemm_eval.errors import UserError
from sparsemm_eval.report.baselines import BEST
from sparsemm_eval.report.captions import captions
from sparsemm_eval.report.cell_text import (
    SHOWN,
    budget_text,
    cell_texts,
    checked_shown,
    with_paper,
    with_scale,
)
from sparsemm_eval.report.cells import join_seeds
from sparsemm_eval.report.layouts import LAYOUTS, Layout, checked_layout, chosen_cells, placed
from sparsemm_eval.report.markup import (
    BOLD,
    ITALIC,
    UNDERLINE,
    Table,
    checked_format,
    to_markdown,
)
from sparsemm_eval.report.names import distinct, in_order, labels_in_order, top_score
from sparsemm_eval.report.results import gather
from sparsemm_eval.report.samples import score_samples
from sparsemm_eval.report.selection import Filters
from sparsemm_eval.report.statistics import COMPARED, add_statistics

__all__ = [
    "WrittenTable", "applicable", "fidelity_table", "kept_table", "overview_table", "paper_table",
    "score_tables", "silenced_table", "to_markdown", "written_table",
]  # fmt: skip

NO_SCORES = pd.DataFrame({"cell": [], "doc_id": [], "score": []})
_RAW = (
    "benchmark", "task", "metric_label", "model", "method", "label", "budget", "ratio", "score",
    "low", "high", "spread", "seeds", "samples", "expected", "rank", "mark", "baseline",
    "difference", "difference_low", "difference_high", "pairs", "p", "p_corrected", "test",
    "paper_score", "paper_source", "kept_tokens_per_head", "kept_kv_bytes", "source",
)  # fmt: skip
_NOT_REPEATED = ("benchmark", "budget", "model")
Chance = Mapping[str, tuple[str, float]]


# --- from results files ---------------------------------------------------------------------------


@dataclass(frozen=True)
class WrittenTable:
    """A table as text.

    Parameters
    ----------
    text : str
        The table in the format asked for.
    notes : tuple of str
        A sentence each: files that could not be read, samples without scores.
    """

    text: str
    notes: tuple[str, ...]


def written_table(
    results: Sequence[str],
    filters: Filters,
    form: str = "markdown",
    like: str | None = None,
    show: Sequence[str] = ("score",),
    long: bool = False,
    against: str = BEST,
    digits: int | None = None,
    percent: bool | None = None,
) -> WrittenTable:
    """Read results and write them as a table.

    Parameters
    ----------
    results : sequence of str
        Results files, folders, ``paper``.
    filters : Filters
        Which cells are in it.
    form : str
        As of `sparsemm_eval.report.markup.to_format`.
    like, show, long, against, digits, percent
        As of `paper_table`.

    Raises
    ------
    UserError
        If an option is wrong, before anything is read, or there is nothing to show.
    """
    write = checked_format(form)
    checked_layout(like)
    shown = checked_shown(show)
    read = gather(results)
    cells = filters.apply(join_seeds(read.cells))
    scored = score_samples(cells)
    table = paper_table(cells, scored.frame, like, shown, long, against, digits, percent)
    return WrittenTable(write(table), (*read.notes, *scored.notes))


# --- in the shape of the paper's ------------------------------------------------------------------


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
        Of `samples.score_samples`, for statistics over exactly the cells shown.
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
    UserError
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
    caption = captions(ranked, shown, against, compared)
    valued = ranked.assign(**{name: compared[name] for name in COMPARED})
    valued = placed(with_scale(with_paper(valued, like), like, digits, percent), layout)
    return (_long if long else _wide)(valued, layout, shown, caption)


def _marked(cells: pd.DataFrame) -> pd.DataFrame:
    """Best and second; the best in bold unless it is known not to be significantly better."""
    mark = cells["rank"].map({1: BOLD, 2: UNDERLINE}).fillna("")
    unproven = cells["p_corrected"].notna() & ~cells["better"]
    return cells.assign(mark=mark.mask(mark.eq(BOLD) & unproven, ITALIC))


def _wide(
    cells: pd.DataFrame, layout: Layout, shown: tuple[str, ...], caption: tuple[str, ...]
) -> Table:
    """One row a row of the paper's; what is the same in all of them goes into the title."""
    values = set(cells[layout.column].dropna())
    side = sorted(values, reverse=layout.column == "budget") or [np.nan]
    heads = {value: budget_text(value, none="all tokens") for value in side}
    first = cells["row"].iloc[0]
    folded = {
        name: f"budget {first[level]}" if name == "budget" else first[level]
        for level, name in enumerate(layout.rows)
        if name in layout.folded and cells["row"].str[level].nunique() == 1
    }
    left = [name for name in layout.rows if name not in folded]
    marks = pd.DataFrame("", index=cells.index, columns=list(shown))
    if "score" in shown:
        marks["score"] = cells["mark"]
    text, marks, plain = (
        _side_by_side(cells, layout.rows, name, layout.column, heads, values)
        for name, values in (
            ("row", cell_texts(cells, shown)),
            ("row", marks),
            ("key", cell_texts(cells, shown, plain=True)),
        )
    )
    marks[list(layout.rows)] = ""
    hidden = [(name, "") for name in folded]
    return Table(
        text.drop(columns=hidden),
        names=len(left),
        sparse=sum(name in _NOT_REPEATED for name in left),
        title=": ".join(filter(None, [layout.title, ", ".join(folded.values())])),
        caption=caption,
        marks=marks.drop(columns=hidden),
        plain=plain,
    )


def _side_by_side(
    cells: pd.DataFrame,
    names: Sequence[str],
    row: str,
    column: str,
    heads: Mapping[Hashable, str],
    texts: pd.DataFrame,
) -> pd.DataFrame:
    """Texts of cells, [cells, shown], to where they stand: a row each name that is in `row`.

    Parameters
    ----------
    cells : DataFrame
        In order.
    names : sequence of str
        What the parts of a row's name are.
    row, column : str
        Columns of `cells` that hold the names of its row, a tuple, and of its column. Full KV,
        which has no budget, stands in every column.
    heads : mapping
        What stands over each column, by what `column` holds.
    texts : DataFrame
        [cells, shown].

    Raises
    ------
    UserError
        If two cells have one place.
    """
    known = texts.to_numpy()
    place: dict[tuple, Sequence[str]] = {}
    for where, value, shown in zip(cells[row], cells[column], known, strict=True):
        for each in heads if pd.isna(value) else [value]:
            if (where, each) in place:
                raise UserError(
                    f"{', '.join(filter(None, where))} at {column}={heads[each]}: there are two "
                    "such cells; leave one out, as by --models or --methods"
                )
            place[where, each] = shown
    empty = [""] * texts.shape[1]
    lines = [
        [*where, *(text for each in heads for text in place.get((where, each), empty))]
        for where in dict.fromkeys(cells[row])
    ]
    columns = [(name, "") for name in names]
    columns += [(head, SHOWN.get(name, name)) for head in heads.values() for name in texts]
    return pd.DataFrame(lines, columns=pd.MultiIndex.from_tuples(columns), dtype=object)


def _long(
    cells: pd.DataFrame, layout: Layout, shown: tuple[str, ...], caption: tuple[str, ...]
) -> Table:
    """One row a cell, and everything known of it."""
    names = cells[["benchmark", "model", "label"]].rename(columns={"label": "method"})
    names["budget"] = cells["budget"].map(budget_text)
    texts = cell_texts(cells, shown).rename(columns=SHOWN | {"score": "score"})
    text = pd.concat([names, texts, cells["source"]], axis="columns")
    marks = pd.DataFrame("", index=text.index, columns=text.columns)
    marks["score"] = cells["mark"]
    plain = cells[list(_RAW)].apply(lambda column: column.map(_raw))
    return Table(text, 3, title=layout.title, caption=caption, marks=marks, plain=plain)


def _raw(value: object) -> str:
    if isinstance(value, float):
        return "" if pd.isna(value) else f"{value:.8g}"
    return "" if pd.isna(value) else str(value)


# --- a sweep's own --------------------------------------------------------------------------------


def score_tables(frame: pd.DataFrame, chance: Chance) -> Iterator[tuple[str, Table]]:
    """Scores of one model, a table a task: by method and budget, the largest budget first.

    Parameters
    ----------
    frame : DataFrame
        Of one model: `sparsemm_eval.report.results.load`'s cells.
    chance : mapping
        Best constant answer and its score on the task's own scale, by task, where it is known.

    Yields
    ------
    tuple of str and Table
        Benchmark, metric and chance in words, and the table.
    """
    for task, cells in frame.groupby("task", sort=False):
        first = cells.iloc[0]
        title = f"{first['benchmark']}: {first['metric_label']}"
        if task in chance:
            answer, score = chance[task]
            score /= top_score(task, first["metric"], None)
            title += f" (chance {score:.3f}, answering “{answer}”)"
        ordered = in_order(cells, ("method", "label"))
        heads = {budget: f"{budget:g}" for budget in distinct(cells, "budget")}
        rows = [(label,) for label in ordered["label"]]
        yield title, _scores(ordered.assign(row=rows), "method", "budget", heads)


def overview_table(frame: pd.DataFrame, budget: int, chance: Chance) -> Table:
    """One row a benchmark: all methods at one budget, beside full KV and chance.

    Parameters
    ----------
    frame : DataFrame
        Of one model: `sparsemm_eval.report.results.load`'s cells.
    budget : int
        Which cells are shown.
    chance : mapping
        Best constant answer and its score on the task's own scale, by task.
    """
    cells = frame[frame["budget"].isna() | frame["budget"].eq(budget)]
    heads = {label: label for label in (*labels_in_order(cells), "chance")}
    constant = cells.drop_duplicates("task").assign(label="chance")
    constant["score"] = [
        chance[task][1] / top_score(task, metric, None)
        for task, metric in zip(constant["task"], constant["metric"], strict=True)
    ]
    both = pd.concat([cells, constant], ignore_index=True)
    titles = both["benchmark"] + " (" + both["metric_label"] + ")"
    rows = [(title,) for title in titles]
    return _scores(both.assign(row=rows), f"budget {budget}", "label", heads)


def _scores(cells: pd.DataFrame, name: str, column: str, heads: Mapping[Hashable, str]) -> Table:
    texts = cell_texts(with_scale(cells, None, None, None), ("score",), plain=True)
    return Table(_side_by_side(cells, [name], "row", column, heads, texts))


def kept_table(frame: pd.DataFrame) -> Table:
    """One row a cell: nominal budget, what was really kept, and the score."""
    kibibytes = frame.assign(kept_kv_kib=frame["kept_kv_bytes"] / 1024)
    columns = {
        "kept tokens/head": ("kept_tokens_per_head", ".1f"),
        "KV KiB/sample": ("kept_kv_kib", ".1f"),
        "score": ("score", ".4f"),
        "n": ("samples", ".0f"),
    }
    return _listed(kibibytes, columns)


def fidelity_table(frame: pd.DataFrame) -> Table:
    """One row a compressed cell: how near its answers are to full KV's.

    Parameters
    ----------
    frame : DataFrame
        Of one model and task: method, label, budget, compared, same_answer, first_difference,
        kl_full.
    """
    columns = {
        "same answer": ("same_answer", ".3f"),
        "first token that differs": ("first_difference", ".1f"),
        "KL (nats)": ("kl_full", ".2e"),
        "n": ("compared", ".0f"),
    }
    return _listed(frame[frame["budget"].notna()], columns)


def _listed(cells: pd.DataFrame, columns: Mapping[str, tuple[str, str]]) -> Table:
    """One row a cell: its method, its budget, and numbers of the frame, each in its format."""
    cells = in_order(cells, ("method", "label", "budget"))
    text = {"method": cells["label"], "budget": cells["budget"].map(budget_text)}
    for head, (name, form) in columns.items():
        text[head] = ["" if pd.isna(value) else format(value, form) for value in cells[name]]
    return Table(pd.DataFrame(text, dtype=object))


def silenced_table(frame: pd.DataFrame, total: int) -> Table:
    """Score by how many heads are silenced: visual ones beside as many random others.

    Parameters
    ----------
    frame : DataFrame
        Of one task and metric: silenced ("none", "visual" or "random"), share, mode, heads, score.
    total : int
        Query heads of the model.
    """
    whole = frame.loc[frame["silenced"] == "none", "score"].iloc[0]
    rows: list[dict[str, Any]] = [
        {"mode": "", "share": "none", "heads": f"0 of {total}", "visual": whole}
    ]
    masked = frame[frame["silenced"] != "none"]
    for (mode, share), cells in masked.groupby(["mode", "share"], sort=False):
        random = cells.loc[cells["silenced"] == "random", "score"]
        rows.append(
            {
                "mode": mode,
                "share": f"{share:.3g}",
                "heads": f"{cells['heads'].iloc[0]} of {total}",
                "visual": cells.loc[cells["silenced"] == "visual", "score"].iloc[0],
                "random, mean": random.mean(),
                "lowest": random.min(),
                "highest": random.max(),
            }
        )

    def text(value: Any) -> str:
        return value if isinstance(value, str) else "" if pd.isna(value) else f"{value:.3f}"

    return Table(pd.DataFrame(rows).map(text))
