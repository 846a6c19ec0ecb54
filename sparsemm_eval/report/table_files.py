"""From results to a table's text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparsemm_eval.report.baselines import BEST
from sparsemm_eval.report.cell_text import checked_shown
from sparsemm_eval.report.cells import join_seeds
from sparsemm_eval.report.layouts import checked_layout
from sparsemm_eval.report.markup import checked_format
from sparsemm_eval.report.paper_tables import paper_table
from sparsemm_eval.report.results import gather
from sparsemm_eval.report.samples import score_samples
from sparsemm_eval.report.selection import select


@dataclass(frozen=True)
class MadeTable:
    """What was made.

    Parameters
    ----------
    text : str
        The table in the format asked for.
    notes : tuple of str
        A sentence each: files that could not be read, samples without scores.
    """

    text: str
    notes: tuple[str, ...]


def make_table(
    results: Sequence[str],
    like: str | None = None,
    show: Sequence[str] = ("score",),
    long: bool = False,
    form: str = "markdown",
    against: str = BEST,
    models: Sequence[str] = (),
    benchmarks: Sequence[str] = (),
    methods: Sequence[str] = (),
    budgets: Sequence[float] = (),
    digits: int | None = None,
    percent: bool | None = None,
) -> MadeTable:
    """Read results and write them as a table.

    Parameters
    ----------
    results : sequence of str
        Results files, folders, ``paper``.
    like, show, long, against, digits, percent
        As of `sparsemm_eval.report.paper_tables.paper_table`.
    form : {"markdown", "latex", "csv", "html"}
        As of `sparsemm_eval.report.markup.to_format`.
    models, benchmarks, methods, budgets : sequence
        As of `sparsemm_eval.report.selection.select`.

    Raises
    ------
    ValueError
        If an option is wrong, before anything is read, or there is nothing to show.
    """
    write = checked_format(form)
    checked_layout(like)
    shown = checked_shown(show)
    found = gather(results)
    cells = select(join_seeds(found.cells), models, benchmarks, methods, budgets)
    scored = score_samples(cells)
    made = paper_table(cells, scored.frame, like, shown, long, against, digits, percent)
    unread = (f"not read: {file.path}: {file.reason}" for file in found.unreadable)
    return MadeTable(write(made), (*unread, *scored.notes))
