"""Results in, figures out: what ``sparsemm-eval figure`` draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from sparsemm_eval.errors import UserError
from sparsemm_eval.report.cells import Filters, join_seeds
from sparsemm_eval.report.efficiency import gather_efficiency
from sparsemm_eval.report.figures.efficiency import efficiency_curves
from sparsemm_eval.report.figures.ranking import ranking_curves
from sparsemm_eval.report.figures.scores import score_curves
from sparsemm_eval.report.figures.style import save
from sparsemm_eval.report.inputs import PAPER, RANKING, check_formats
from sparsemm_eval.report.paper import paper_cells
from sparsemm_eval.report.ranking import rank_methods
from sparsemm_eval.report.results import gather, not_read
from sparsemm_eval.report.samples import score_samples
from sparsemm_eval.report.statistics import add_statistics

OVER = {"budget": "budget", "kept": "kept_tokens_per_head"}
_ALL = Filters()


@dataclass(frozen=True)
class DrawnFiles:
    """What was written.

    Parameters
    ----------
    files : tuple of Path
        The figure in each format.
    notes : tuple of str
        A sentence each: files that could not be read, and what the figure had to do without.
    """

    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def draw_scores(
    results: Sequence[str],
    kind: str,
    out: Path,
    formats: Sequence[str] = ("svg", "png"),
    filters: Filters = _ALL,
    paper: bool = False,
    zoom: bool = False,
) -> DrawnFiles:
    """Draw score over budget or over what was kept, as ``OUT/score_over_KIND``.

    Parameters
    ----------
    results : sequence of str
        Files, folders, ``paper``.
    kind : {"budget", "kept"}
        The horizontal axis.
    out : Path
        The folder.
    formats : sequence of str
        "svg", "png", or both.
    filters : Filters
        Which cells are drawn.
    paper : bool
        Draw the paper's curves behind, dashed, where model and benchmark are its own.
    zoom : bool
        Fit the vertical axes to the data.

    Raises
    ------
    ValueError
        If there is nothing to draw, or an argument is wrong.
    """
    check_formats(formats)
    if paper and kind == "kept":
        raise UserError(
            "paper with kind=kept: the paper does not say what was really kept; leave it out, or "
            "take kind=budget"
        )
    read = gather(results)
    notes = [*not_read(read.unreadable)]
    cells = filters.apply(join_seeds(read.cells))
    scored = score_samples(cells)
    notes += scored.notes
    if len(scored.frame):
        cells = add_statistics(cells, scored.frame)
    if paper and PAPER not in results:
        behind = _behind(cells, filters)
        if behind.empty:
            notes.append("the paper has no curve of these models and benchmarks")
        else:
            cells = pd.concat([cells, behind], ignore_index=True)
    figure = score_curves(cells, OVER[kind], zoom)
    return DrawnFiles((*save(figure, out / f"score_over_{kind}", formats),), (*notes,))


def draw_ranking(
    results: Sequence[str],
    out: Path,
    formats: Sequence[str] = ("svg", "png"),
    filters: Filters = _ALL,
    zoom: bool = False,
) -> DrawnFiles:
    """Draw the share of full KV's score that is kept over the bytes kept, as ``OUT/ranking``.

    Parameters
    ----------
    results, out, formats, filters, zoom
        As of `draw_scores`; the paper's numbers, of unknown bytes, are not drawn.

    Raises
    ------
    UserError
        If there is nothing to draw, or an argument is wrong.
    """
    check_formats(formats)
    read = gather(results)
    cells = filters.with_full_kv().apply(join_seeds(read.cells))
    scored = score_samples(cells)
    ranking = rank_methods(cells, scored.frame)
    notes = (*not_read(read.unreadable), *scored.notes, *ranking.notes)
    return DrawnFiles((*save(ranking_curves(ranking, zoom), out / RANKING, formats),), notes)


def _behind(cells: pd.DataFrame, filters: Filters) -> pd.DataFrame:
    """The paper's cells of the models and benchmarks drawn, and of the methods asked for."""
    behind = pd.concat([paper_cells("table3"), paper_cells("table4")], ignore_index=True)
    here = set(zip(cells["model"], cells["benchmark"], strict=True))
    pairs = zip(behind["model"], behind["benchmark"], strict=True)
    behind = behind[[pair in here for pair in pairs]]
    if filters.methods:
        behind = behind[behind["method"].isin(cells["method"])]
    return behind


def draw_efficiency(
    results: Sequence[str],
    out: Path,
    formats: Sequence[str] = ("svg", "png"),
    filters: Filters = _ALL,
    paper: bool = False,
) -> DrawnFiles:
    """Draw decode time and peak memory over input tokens, as ``OUT/efficiency``.

    Parameters
    ----------
    results, out, formats, filters, paper
        As of `draw_scores`; results are those of `sparsemm_eval.report.efficiency`.

    Raises
    ------
    ValueError
        If there is nothing to draw, or an argument is wrong.
    """
    check_formats(formats)
    if filters.benchmarks:
        raise UserError(
            f"benchmarks={','.join(filters.benchmarks)}: kind=efficiency knows none; leave it out"
        )
    words = [*results, PAPER] if paper and PAPER not in results else results
    read = gather_efficiency(words)
    figure = efficiency_curves(filters.apply(read.rows))
    return DrawnFiles((*save(figure, out / "efficiency", formats),), not_read(read.unreadable))
