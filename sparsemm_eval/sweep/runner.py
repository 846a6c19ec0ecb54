"""The jobs of a sweep in one process: their answers, and their cells' scores."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate import PartialState
from lmms_eval.tasks import TaskManager
from loguru import logger
from tqdm import tqdm

from sparsemm_eval.engine.answers import Answer, SampleFailures, tally
from sparsemm_eval.engine.evaluate import answer, make_models, results_path, score
from sparsemm_eval.engine.wrapper import SparseMMModel
from sparsemm_eval.errors import UserError, one_line
from sparsemm_eval.methods import Plugin
from sparsemm_eval.paths import write_whole
from sparsemm_eval.report.names import method_label
from sparsemm_eval.report.results import load
from sparsemm_eval.sweep.checks import (
    check_data,
    check_models,
    check_space,
    count_documents,
)
from sparsemm_eval.sweep.fidelity import fidelity
from sparsemm_eval.sweep.grid import Grid, Job
from sparsemm_eval.sweep.lock import lock
from sparsemm_eval.sweep.made import made_by
from sparsemm_eval.sweep.plan import (
    Plan,
    PlannedCell,
    PlannedJob,
    answers_folder,
    lock_file,
)
from sparsemm_eval.sweep.seal import (
    Broken,
    answers_hash,
    seal,
    sealed_answers,
    set_aside,
)
from sparsemm_eval.sweep.status import samples_file, status

# What one task's metric may raise; another task's scores are not lost to it.
_SCORING_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError,
    RuntimeError, TypeError, ValueError,
)  # fmt: skip


class Runner:
    """The jobs of one sweep in this process."""

    def __init__(
        self,
        grid: Grid,
        out: Path,
        jobs: Sequence[Job],
        manager: TaskManager,
        wait: bool,
        command: str,
        plugins: Sequence[Plugin] = (),
    ) -> None:
        self.grid, self.out, self.jobs, self.wait = grid, out, jobs, wait
        self.manager = manager
        self.plugins = {plugin.name: plugin.digest for plugin in plugins}
        self.about = {spec.name: made_by(command, spec.name) for spec in grid.models}
        self.stated = {
            spec.name: {"pretrained": spec.pretrained, **spec.settings} for spec in grid.models
        }
        # What lmms-eval writes to stderr goes to a file, progress stays on the screen.
        self.screen = sys.stderr
        self.cells = grid.cells()
        self.failures: dict[tuple[str, str], list[str]] = {}
        tasks = list(dict.fromkeys(job.task for job in jobs))
        specs = list(dict.fromkeys(job.model for job in jobs))
        check_data(manager, tasks)
        checkpoints = check_models(specs)
        counts = count_documents(manager, tasks, grid.samples)
        check_space(out, sum(counts.values()) * len(self.cells) * len(specs) - _answers(out))
        self.models = {
            spec.name: make_models(
                checkpoints[spec.name],
                self.cells,
                batch_size=grid.batch_size,
                answers=answers_folder(out, spec.name),
                **spec.settings,
            )
            for spec in specs
        }
        self.plan = self._plan(counts)
        self.ranks = PartialState()
        if self.ranks.is_main_process:
            self._begin()
        self.ranks.wait_for_everyone()

    def answer(self) -> None:
        """Make every answer that is missing; samples that fail are left to the status."""
        status_ = status(self.out)
        mine = {job.name for job in self.jobs}
        jobs = [job for job in status_.jobs if job.job.name in mine]
        bar = tqdm(
            total=sum(job.expected for job in jobs),
            initial=sum(job.done for job in jobs),
            desc="answers",
            unit="",
            file=self.screen,
            disable=not self.ranks.is_main_process,
        )
        with bar:
            for place, job in enumerate(self.jobs):
                bar.set_postfix_str(f"job {place + 1} of {len(self.jobs)}: {job.name}")
                self._answer(job, bar)

    def score(self) -> list[pd.DataFrame]:
        """Score every cell that is complete; one row a cell, with its fidelity."""
        complete = {
            (cell.cell.model, cell.cell.task, cell.cell.words)
            for cell in status(self.out).cells
            if cell.complete
        }
        rows = []
        cells = self.plan.cells
        full: dict[tuple[str, str], Mapping[str, Answer]] = {}
        with tqdm(cells, desc="cells scored", unit="", file=self.screen) as bar:
            for planned in bar:
                at = planned.model, planned.task
                if (*at, planned.words) not in complete:
                    self._fail(planned, "answers are missing")
                    continue
                model = self._model(planned)
                answers = model.store.read(planned.words)
                if model.method.budget is None and model.mask is None:
                    full[at] = answers
                if (path := self._score(planned, model, answers)) is not None:
                    try:
                        row = load([path]).cells
                    except UserError as error:  # it holds no score that can be shown
                        self._fail(planned, one_line(error))
                        continue
                    near = fidelity(answers, full.get(at, {}))
                    rows.append(
                        row.assign(model=planned.model, **self._names(planned, model), **near)
                    )
        return rows

    def _answer(self, job: Job, bar: tqdm) -> None:
        models = self.models[job.model.name]
        ranks = self.ranks.num_processes
        with self._lock(job):
            found = next(one for one in status(self.out).jobs if one.job.name == job.name)
            # No rank writes before all have looked, else they would not agree.
            self.ranks.wait_for_everyone()
            if found.done < found.expected:
                try:
                    answer(
                        models,
                        job.task,
                        self.grid.samples,
                        job.shard,
                        job.shards,
                        progress=lambda count: bar.update(count * ranks),
                        manager=self.manager,
                    )
                except SampleFailures as error:
                    logger.error(f"{job.name}: {error}")
        rest = self.jobs[self.jobs.index(job) + 1 :]
        if not any(other.model == job.model for other in rest):
            models[0].checkpoint.release()

    @contextmanager
    def _lock(self, job: Job) -> Iterator[None]:
        """Hold a job's lock, the first of several ranks for all of them."""
        path = lock_file(self.out, job.name)
        with lock(path, self.wait) if self.ranks.is_main_process else nullcontext():
            self.ranks.wait_for_everyone()
            yield
            self.ranks.wait_for_everyone()

    def _score(
        self, planned: PlannedCell, model: SparseMMModel, answers: Mapping[str, Answer]
    ) -> Path | None:
        """The cell's results file, made unless it is there and of these answers."""
        path = self.out / planned.results
        samples = samples_file(path, planned.task)
        made_of = answers_hash(answers)
        try:
            if sealed_answers(path, samples) == made_of:
                return path
        except Broken as error:
            set_aside(path, samples, error)
        try:
            score(
                model,
                planned.settings,
                planned.task,
                self.grid.samples,
                self.manager,
                path.parent,
                log_samples=True,
                stated=self.stated[planned.model],
                about=self.about[planned.model],
            )
        except _SCORING_ERRORS as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            self._fail(planned, f"{type(error).__name__}: {one_line(error)}")
            return None
        seal(path, samples, made_of)
        return path

    def _fail(self, planned: PlannedCell, cause: str) -> None:
        logger.error(f"{planned.model} {planned.words} has no score: {cause}")
        self.failures.setdefault((planned.model, planned.task), []).append(cause)

    def _model(self, planned: PlannedCell) -> SparseMMModel:
        return next(
            model
            for model in self.models[planned.model]
            if model.cell_of(planned.task) == planned.words
        )

    def _names(self, planned: PlannedCell, model: SparseMMModel) -> dict[str, Any]:
        """What a table's row is called: the method with the settings that vary in this grid."""
        method = model.method
        stated = {**planned.settings, **method.settings}
        settings = {name: stated[name] for name in self.grid.varied() if name in stated}
        budget = method.budget or float("nan")
        return {"label": method_label(method.name, settings), "budget": budget, **settings}

    def _plan(self, counts: Mapping[str, int]) -> Plan:
        jobs = tuple(
            PlannedJob(
                job.name,
                job.model.name,
                job.task,
                job.shard,
                job.shards,
                len(range(job.shard, counts[job.task], job.shards)),
            )
            for job in self.jobs
        )
        cells = tuple(
            PlannedCell(
                name,
                task,
                model.cell_of(task),
                model.key_of_parts({}),
                cell,
                counts[task],
                str(results_path(Path("cells") / name, task, cell)),
            )
            for name, models in self.models.items()
            for task in counts
            for model, cell in zip(models, self.cells, strict=True)
        )
        return Plan(jobs, cells, self.plugins)

    def _begin(self) -> None:
        """Write down what this folder is to hold, unless that is there already."""
        self.out.mkdir(parents=True, exist_ok=True)
        write_whole(self.out / "grid.yaml", self.grid.resolved())
        # A job alone, or a sweep without the tasks that cannot run here, knows but a part.
        with lock(lock_file(self.out, "plan"), wait=True):
            before = Plan.read(self.out) or Plan((), ())
            self._refuse_other_answers(before)
            jobs = {job.name: job for job in (*before.jobs, *self.plan.jobs)}
            cells = {(c.model, c.words): c for c in (*before.cells, *self.plan.cells)}
            plugins = {**before.plugins, **self.plan.plugins}
            Plan(tuple(jobs.values()), tuple(cells.values()), plugins).write(self.out)

    def _refuse_other_answers(self, before: Plan) -> None:
        known = {(c.model, c.words): (c.key, c.samples) for c in before.cells}
        for cell in self.plan.cells:
            made_of = cell.key, cell.samples
            if known.get((cell.model, cell.words), made_of) != made_of:
                raise UserError(
                    f"{self.out}: it holds a sweep of {cell.model} with other weights, head "
                    f"scores, data, plugin or version of sparsemm-eval ({cell.words}); choose "
                    "another folder"
                )


def _answers(out: Path) -> int:
    """How many answers are there already."""
    folders = (out / "answers").glob("*/")
    return sum(len(cell.done) for folder in folders for cell in tally(folder)[0].values())
