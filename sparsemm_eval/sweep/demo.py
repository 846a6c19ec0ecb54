"""The demo: both embedded models, eight benchmarks, every method over budgets; offline."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from sparsemm_eval.bench.machine import device_name
from sparsemm_eval.engine.answers import SampleFailures
from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.tasks import visuals
from sparsemm_eval.errors import UserError
from sparsemm_eval.heads.draw import concentration, draw
from sparsemm_eval.heads.scene import drawn_scene
from sparsemm_eval.methods import MASK_MODES, HeadScores, Plugin
from sparsemm_eval.report.figures.ranking import ranking_curves
from sparsemm_eval.report.figures.scores import score_curves
from sparsemm_eval.report.figures.style import save
from sparsemm_eval.report.markup import to_format
from sparsemm_eval.report.names import top_score
from sparsemm_eval.report.page import write_page
from sparsemm_eval.report.paper_tables import applicable, paper_table
from sparsemm_eval.report.ranking import rank_methods
from sparsemm_eval.report.ranking_table import ranking_table
from sparsemm_eval.report.results import load
from sparsemm_eval.report.samples import score_samples
from sparsemm_eval.report.statistics import add_statistics
from sparsemm_eval.report.tables import (
    calibration_lines,
    notes_below,
    overview_table,
    score_tables,
    to_markdown,
)
from sparsemm_eval.sweep.grid import Grid
from sparsemm_eval.sweep.mask import run_masking
from sparsemm_eval.sweep.studies import check_demo_samples, masking_study
from sparsemm_eval.sweep.sweep import run_sweep, scored_files
from sparsemm_eval.sweep.tables import chance_of, write_tables
from sparsemm_eval.tiny import embedded_checkpoints

MASKING_SEEDS = 5
TITLE = "The embedded models on the miniature benchmarks"
# Of the table that shows all benchmarks at once.
OVERVIEW = 32


@dataclass(frozen=True)
class Demo:
    """What the demo made.

    Parameters
    ----------
    frame : DataFrame
        One row a (model, task, cell).
    markdown : str
        Its tables.
    files : tuple of Path
        What was written.
    """

    frame: pd.DataFrame
    markdown: str
    files: tuple[Path, ...]


def run_demo(
    out: Path,
    grid: Grid,
    masked: int = 40,
    command: str = "./run_eval.sh",
    plugins: Sequence[Plugin] = (),
    allow_failed: int = 0,
) -> Demo:
    """Run all cells on the embedded models, score them with lmms-eval, draw tables and curves.

    Parameters
    ----------
    out : Path
        Folder for everything: answers, results of each cell, tables, curves. A second run finds
        the answers there and computes only what is missing.
    grid : Grid
        By `sparsemm_eval.sweep.studies.demo_grid`.
    masked : int
        Documents of the masking study, at most 200; 0 leaves it out.
    command : str
        What makes it again, for the record.
    plugins : sequence of Plugin
        Those that registered methods of the user's own.
    allow_failed : int
        So many samples of a cell may fail; it is scored without them.

    Raises
    ------
    UserError
        For settings that cannot be, before a model is loaded.
    SampleFailures
        If a cell has no score.
    """
    start = time.perf_counter()
    check_demo_samples("masked", masked, least=0)
    done = run_sweep(grid, out, command, plugins=plugins, replace=True, allow_failed=allow_failed)
    if failures := done.status.failures + done.failures:
        raise SampleFailures("; ".join(failures))
    files: list[Path] = []
    for spec in grid.models:
        folder = out / spec.name
        if masked:
            study = masking_study(
                spec.pretrained,
                settings=spec.settings,
                modes=MASK_MODES,
                seeds=MASKING_SEEDS,
                samples=masked,
                batch_size=grid.batch_size,
            )
            files += run_masking(study, folder / "mask", command=command).files
        checkpoint = Checkpoint(spec.pretrained, **spec.settings, device_map=device_name())
        files += draw(checkpoint, drawn_scene(), folder / "heads").files
    files += _report(scored_files(out), out)
    frame, chance = done.frame, chance_of(grid.tasks)
    metric_of = frame.groupby("task")["metric"].first()
    about = {
        "seconds": round(time.perf_counter() - start, 1),
        "chance": {
            task: score / top_score(task, metric_of[task], None)
            for task, (_, score) in chance.items()
        },
    }
    markdown = _tables(frame, chance, grid.axes["window"][0])
    return Demo(frame, markdown, (*write_tables(markdown, frame, out, command, about), *files))


def _report(paths: Sequence[Path], out: Path) -> Iterator[Path]:
    """Curves of each model, the ranking, tables in the paper's shape, and the page of all."""
    results = load(paths)
    scores = score_samples(results.cells).frame
    for name, cells in add_statistics(results.cells, scores).groupby("model", sort=False):
        for over, file in (("budget", "budget"), ("kept_tokens_per_head", "kept")):
            yield from save(score_curves(cells, over), out / name / f"score_over_{file}", ("png",))
    try:
        ranking = rank_methods(results.cells, scores)
    except UserError as error:  # full KV is at chance on so few samples; the page says so, too
        (out / "ranking.md").write_text(f"There is no ranking: {error}.\n", "utf-8")
    else:
        (out / "ranking.md").write_text(to_format(ranking_table(ranking), "markdown"), "utf-8")
        yield from save(ranking_curves(ranking), out / "ranking", ("png",))
    yield out / "ranking.md"
    for like in applicable(results.cells):
        path = out / f"{like}.md"
        path.write_text(to_format(paper_table(results.cells, scores, like), "markdown"), "utf-8")
        yield path
    yield write_page(results, out / "report", TITLE, visuals=visuals)


def _tables(frame: pd.DataFrame, chance: Mapping[str, tuple[str, float]], window: int) -> str:
    """All benchmarks of a model at one budget, then each over all budgets, as Markdown."""
    folders = embedded_checkpoints()
    parts = [
        f"# {TITLE}",
        f"{frame['samples'].max():.0f} drawn samples a benchmark, float32, window {window}. "
        "Columns are budgets: mean tokens of the prompt kept per KV head. Chance is the best "
        "constant answer.",
    ]
    for name, of_model in frame.groupby("model", sort=False):
        heads = HeadScores.read(folders[name] / "head_scores.json")
        parts += [f"## {name}", f"Visual heads: {concentration(heads)}."]
        budgets = sorted(of_model["budget"].dropna().unique())
        shown = OVERVIEW if OVERVIEW in budgets else budgets[len(budgets) // 2]
        parts.append(to_markdown(overview_table(of_model, int(shown), chance)))
        parts += calibration_lines(of_model)
        by_task = of_model.groupby("task", sort=False)
        for (title, table), (_, cells) in zip(score_tables(of_model, chance), by_task, strict=True):
            parts += [f"### {title}", to_markdown(table), *notes_below(cells)]
    return "\n\n".join(parts) + "\n"
