"""Tables in the shape of the paper's, of any cells: what ``sparsemm-eval table`` writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from sparsemm_eval.errors import UserError
from sparsemm_eval.report.cell_text import (
    MISSING,
    SHOWN,
    budget_text,
    cell_texts,
    checked_shown,
    evened,
    with_paper,
    with_scale,
)
from sparsemm_eval.report.cells import Filters, join_seeds
from sparsemm_eval.report.inputs import RANKING
from sparsemm_eval.report.layouts import LAYOUTS, Layout, checked_layout, chosen_cells, placed
from sparsemm_eval.report.markup import BOLD, ITALIC, UNDERLINE, Table, checked_format
from sparsemm_eval.report.names import METHOD_NAMES
from sparsemm_eval.report.ranking import TOLERANCE, rank_methods
from sparsemm_eval.report.ranking_table import ranking_table
from sparsemm_eval.report.resampling import RESAMPLES
from sparsemm_eval.report.results import gather, not_read
from sparsemm_eval.report.samples import score_samples
from sparsemm_eval.report.statistics import BEST, COMPARED, LEVEL, add_statistics, strata
from sparsemm_eval.report.tables import calibration_lines, empty_line, side_by_side

NO_SCORES = pd.DataFrame({"cell": [], "doc_id": [], "score": []})
_RAW = (
    "benchmark", "task", "metric_label", "model", "method", "label", "budget", "ratio", "score",
    "low", "high", "spread", "seeds", "samples", "expected", "rank", "mark", "baseline",
    "difference", "difference_low", "difference_high", "pairs", "p", "p_corrected", "test",
    "paper_score", "paper_source", "kept_tokens_per_head", "kept_kv_bytes", "source",
)  # fmt: skip
_NOT_REPEATED = ("benchmark", "budget", "model")
_KNOWN = (
    "**Bold**: best at its budget, and significantly better than the next; *italic*: best, but not "
    "significantly; <u>underlined</u>: second."
)
_UNKNOWN = (
    "**Bold**: best at its budget; <u>underlined</u>: second; whether the difference is "
    "significant is not known, for want of scores by sample."
)
_TESTS = {
    "McNemar": "McNemar's exact test (right or wrong)",
    "permutation": "permutation of signs (graded scores)",
}


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
    metric: str | None = None,
    within: float = TOLERANCE,
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
        As of `paper_table`; or ``like="ranking"``, of which show, long and against are no options.
    metric : str, optional
        As of `sparsemm_eval.report.results.gather`.
    within : float
        The tolerance of `sparsemm_eval.report.ranking.rank_methods`.

    Raises
    ------
    UserError
        If an option is wrong, before anything is read, or there is nothing to show.
    """
    write = checked_format(form)
    shown = checked_shown(show)
    if like != RANKING:
        checked_layout(like)
    elif shown != ("score",) or long or against != BEST:
        raise UserError("like=ranking shows what it shows: leave show, long and against out")
    read = gather(results, metric)
    chosen = filters.with_full_kv() if like == RANKING else filters
    cells = chosen.apply(join_seeds(read.cells))
    scored = score_samples(cells)
    if like == RANKING:
        ranking = rank_methods(cells, scored.frame, within)
        table = ranking_table(ranking, digits, bool(percent), calibration_lines(cells))
    else:
        even = form == "latex"
        table = paper_table(cells, scored.frame, like, shown, long, against, digits, percent, even)
    notes = (*not_read(read.unreadable), *scored.notes, *filter(None, [empty_line(cells)]))
    return WrittenTable(write(table), notes)


def applicable(cells: pd.DataFrame) -> list[str]:
    """Names of the paper's tables that these cells fill, at least in part.

    Parameters
    ----------
    cells : DataFrame
        As `results.load` gives them, seeds joined.
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
    even: bool = False,
) -> Table:
    """Build a table in the shape of one of the paper's.

    Parameters
    ----------
    cells : DataFrame
        As `results.load` gives them, seeds joined; the paper's own may be among them.
    scores : DataFrame
        From `samples.score_samples`, for statistics over exactly the cells shown.
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
    even : bool
        One number of decimals in a column, the fewest of its cells: for LaTeX, which is printed.

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
    caption = _captions(ranked, shown, against, compared)
    valued = ranked.assign(**{name: compared[name] for name in COMPARED})
    scaled = with_scale(with_paper(valued, like), like, digits, percent)
    valued = placed(evened(scaled) if even else scaled, layout)
    return (_long if long else _wide)(valued, layout, shown, caption)


def _marked(cells: pd.DataFrame) -> pd.DataFrame:
    """Best and second; the best in bold unless it is known not to be significantly better."""
    mark = cells["rank"].map({1: BOLD, 2: UNDERLINE}).fillna("")
    unproven = cells["p_corrected"].notna() & ~cells["better"]
    return cells.assign(mark=mark.mask(mark.eq(BOLD) & unproven, ITALIC))


def _captions(
    cells: pd.DataFrame, shown: Sequence[str], against: str, compared: pd.DataFrame
) -> tuple[str, ...]:
    """What stands below a table, in lines: its marks; its samples and tests; which cells were
    calibrated on what they are scored on.

    Parameters
    ----------
    cells : DataFrame
        With statistics against the best other method, and `mark`.
    shown : sequence of str
        What the table shows of each.
    against : str
        What the differences shown are from.
    compared : DataFrame
        The same cells with statistics against that.
    """
    lines = (_marks_explained(cells), _tests_explained(cells, shown, against, compared))
    return (*filter(None, lines), *calibration_lines(cells))


def _marks_explained(cells: pd.DataFrame) -> str:
    first = cells[cells["rank"].eq(1)]
    known = first["p_corrected"].notna()
    parts = []
    if known.any():
        parts.append(_KNOWN)
        if not known.all():
            parts.append("Where there are no scores by sample, bold is the best all the same.")
    elif len(first):
        parts.append(_UNKNOWN)
    if strata(cells[cells["rank"].notna()]).nunique() > 1:
        parts.append("Methods that never see the question are marked among themselves.")
    if cells["source"].str.endswith("_digitised").any():
        parts.append("≈: read off a figure of the paper, to about 0.002.")
    if cells["failed"].gt(0).any():
        parts.append(f"{MISSING}: without samples that failed and have no answer.")
    return " ".join(parts)


def _tests_explained(
    cells: pd.DataFrame, shown: Sequence[str], against: str, compared: pd.DataFrame
) -> str:
    parts = []
    counts = cells["samples"].dropna()
    if len(counts):
        low, high = f"{counts.min():,.0f}", f"{counts.max():,.0f}"
        whole = cells["expected"].dropna().unique()
        partial = low == high and len(whole) == 1 and counts.max() < whole[0]
        of = f" of {whole[0]:,.0f}" if partial else ""
        parts.append(f"n = {low}{of}" if low == high else f"n = {low} to {high}")
    tests = [words for name, words in _TESTS.items() if cells["test"].eq(name).any()]
    if tests:
        parts.append(
            f"{' and '.join(tests)} on paired samples, Holm's correction for "
            f"{_comparisons(cells)}, level {1 - LEVEL:.2g}"
        )
    if cells["low"].notna().any() and {"interval", "difference"} & set(shown):
        parts.append(f"intervals: {LEVEL:.0%}, paired bootstrap, {RESAMPLES:,} resamples")
    if {"difference", "p"} & set(shown) and compared["baseline"].ne("").any():
        if against == BEST:
            parts.append("differences are from the best other method at the same budget")
        else:
            name = METHOD_NAMES.get(against, against)
            parts.append(f"differences are from {name}, p corrected for {_comparisons(compared)}")
    line = "; ".join(parts)
    return f"{line[0] if line[0] == 'n' else line[0].upper()}{line[1:]}." if line else ""


def _comparisons(cells: pd.DataFrame) -> str:
    """How many comparisons p was corrected for: two cells may be each other's baseline."""
    known = cells[cells["p"].notna()]
    count = known["comparison"].nunique()
    return f"{count} comparison{'' if count == 1 else 's'}"


def _wide(
    cells: pd.DataFrame, layout: Layout, shown: tuple[str, ...], caption: tuple[str, ...]
) -> Table:
    """One row a row of the paper's; what is the same in all of them goes into the title."""
    values = set(cells[layout.column].dropna())
    side = sorted(values, reverse=layout.column == "budget") or [np.nan]
    words = budget_text if layout.column == "budget" else "{:g}".format
    heads = {value: "all tokens" if pd.isna(value) else words(value) for value in side}
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
        side_by_side(cells, layout.rows, name, layout.column, heads, values)
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
