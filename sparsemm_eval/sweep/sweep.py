"""A sweep: every job's answers, then lmms-eval's scores cell by cell, then tables."""

from __future__ import annotations

import errno
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from accelerate import PartialState
from lmms_eval.tasks import TaskManager
from loguru import logger
from tenacity import RetryError
from tqdm import tqdm

from sparsemm_eval.bench.machine import find_device, provenance_on
from sparsemm_eval.engine.answers import Answer, SampleFailures, tally
from sparsemm_eval.engine.cell import Cell
from sparsemm_eval.engine.lmms import CellModel, make_runner, results_path, score
from sparsemm_eval.engine.runner import Runner, raise_failures
from sparsemm_eval.engine.tasks import (
    LeftOut,
    check_family,
    find_tasks,
    is_scored,
    requests_of,
    runnable,
)
from sparsemm_eval.errors import UserError, check_int, one_line
from sparsemm_eval.methods import Plugin
from sparsemm_eval.paths import write_whole
from sparsemm_eval.report.names import method_label
from sparsemm_eval.report.results import load
from sparsemm_eval.stored import with_checksum_line
from sparsemm_eval.sweep.checks import check_data, check_models, check_space, count_documents
from sparsemm_eval.sweep.checksum import (
    Broken,
    answers_hash,
    scored_answers,
    set_aside,
    write_checksums,
)
from sparsemm_eval.sweep.fidelity import fidelity
from sparsemm_eval.sweep.folder import (
    chosen_jobs,
    is_other_grid,
    refuse_other_grid,
    refuse_other_sweep,
)
from sparsemm_eval.sweep.grid import Grid, Job
from sparsemm_eval.sweep.lock import lock
from sparsemm_eval.sweep.plan import (
    Plan,
    PlannedCell,
    answers_folder,
    lock_file,
    planned_jobs,
)
from sparsemm_eval.sweep.status import SCORING, Status, samples_file, status
from sparsemm_eval.sweep.tables import sweep_tables, write_tables


@dataclass(frozen=True)
class Sweep:
    """What a sweep made.

    Parameters
    ----------
    status : Status
        How far it is.
    frame : DataFrame
        One row a scored cell; empty if none was scored.
    markdown : str
        Its tables.
    files : tuple of Path
        Tables and summary.
    failures : tuple of str
        A line a task and model with cells that have no score, with the first cause.
    left_out : tuple of LeftOut
        Tasks that cannot run here.
    """

    status: Status
    frame: pd.DataFrame
    markdown: str
    files: tuple[Path, ...]
    failures: tuple[str, ...]
    left_out: tuple[LeftOut, ...]


def run_sweep(
    grid: Grid,
    out: Path,
    command: str,
    only_job: str | None = None,
    wait: bool = False,
    skip_missing: bool = False,
    only_scores: bool = False,
    world_size: int | None = None,
    include_path: Sequence[Path] = (),
    plugins: Sequence[Plugin] = (),
    replace: bool = False,
    allow_failed: int = 0,
) -> Sweep:
    """Answer all jobs of a grid, score all cells, write tables; goes on where one was stopped.

    Ranks that run together (torchrun) share each job's samples and only answer: scores and tables
    are made by the same command in one process.

    Parameters
    ----------
    grid : Grid
        What is to be measured.
    out : Path
        Folder of this sweep: answers, results and samples file of each cell, tables.
    command : str
        What makes it again, for the record.
    only_job : str, optional
        Name of one job: its answers alone are made, and nothing is scored.
    wait : bool
        Wait for another sweep that is on a job, instead of refusing.
    skip_missing : bool
        Leave out tasks whose metrics cannot run here, instead of refusing the sweep.
    only_scores : bool
        Score what is answered, and answer nothing.
    world_size : int, optional
        How many ranks are to run together; a launcher that starts another number is refused.
    include_path : sequence of Path
        Folders of the user's own task files.
    plugins : sequence of Plugin
        Those that were loaded for methods of this grid; the plan records them.
    replace : bool
        Let this grid take the place of another of its name in its folder, whose answers are used
        where they fit, instead of refusing.
    allow_failed : int
        So many samples of a cell may fail; it is scored without them.

    Raises
    ------
    ValueError, FileNotFoundError
        For what cannot be, before a model is loaded: another sweep's folder, a disk that is too
        small, data, a model or java that is not there.
    OSError
        If another sweep is on the folder, or the disk is full.
    """
    start = time.perf_counter()
    check_int("allow-failed", allow_failed, least=0)
    jobs = chosen_jobs(grid, only_job)
    refuse_other_grid(grid, out, replace)
    ranks = PartialState(cpu=not torch.cuda.is_available())
    if world_size not in (None, ranks.num_processes):
        raise UserError(
            f"world-size={world_size}: {ranks.num_processes} run together; begin it with "
            f"`torchrun --standalone --nproc_per_node {world_size} -m sparsemm_eval sweep …`"
        )
    if not wait and ranks.is_main_process:
        refuse_other_sweep(jobs, out)
    manager = find_tasks(grid.tasks, include_path)
    tasks, left_out = runnable(manager, list(dict.fromkeys(job.task for job in jobs)), skip_missing)
    jobs = [job for job in jobs if job.task in tasks]
    with _disk(out):
        process = _Process(grid, out, jobs, manager, wait, command, plugins, replace, allow_failed)
        with _log(out):
            if not only_scores:
                process.answer()
            made = _Made()
            if only_job is None and ranks.num_processes == 1:
                with lock(lock_file(out, SCORING), wait):
                    made = _write(process, process.score(), command, left_out, start)
    return Sweep(status(out), made.frame, made.markdown, made.files, made.failures, tuple(left_out))


def plan_sweep(
    grid: Grid,
    out: Path,
    skip_missing: bool = False,
    include_path: Sequence[Path] = (),
    plugins: Sequence[Plugin] = (),
    allow_failed: int = 0,
) -> tuple[Status, tuple[LeftOut, ...]]:
    """Check all that a sweep needs and write down what its folder is to hold; answer nothing.

    Parameters
    ----------
    grid, out, skip_missing, include_path, plugins, allow_failed
        As for `run_sweep`.

    Returns
    -------
    Status and tuple of LeftOut
        How far the sweep is, and tasks that cannot run here.

    Raises
    ------
    ValueError, FileNotFoundError
        As `run_sweep`.
    """
    check_int("allow-failed", allow_failed, least=0)
    refuse_other_grid(grid, out)
    manager = find_tasks(grid.tasks, include_path)
    tasks, left_out = runnable(manager, grid.tasks, skip_missing)
    jobs = [job for job in grid.jobs() if job.task in tasks]
    PartialState(cpu=not torch.cuda.is_available())
    with _disk(out), _log(out):
        _Process(grid, out, jobs, manager, False, "", plugins, allow_failed=allow_failed)
    return status(out), tuple(left_out)


def scored_files(out: Path) -> list[Path]:
    """Results files of a sweep's folder, of the cells of its plan, in their order."""
    plan = Plan.read(out)
    paths = [] if plan is None else [out / cell.results for cell in plan.cells]
    return [path for path in paths if path.is_file()]


def leave_ranks() -> None:
    """Part from the other ranks, if there are any, as the last thing a process does.

    One that ends without it may be aborted on its way out, and torchrun then ends the others.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@dataclass(frozen=True)
class _Made:
    """What scoring made; nothing if there was none."""

    frame: pd.DataFrame = field(default_factory=pd.DataFrame)
    markdown: str = ""
    files: tuple[Path, ...] = ()
    failures: tuple[str, ...] = ()


class _Process:
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
        replace: bool = False,
        allow_failed: int = 0,
    ) -> None:
        self.grid, self.out, self.wait = grid, out, wait
        self.manager, self.allow_failed = manager, allow_failed
        self.plugins = {plugin.name: plugin.digest for plugin in plugins}
        provenance = provenance_on(find_device(), command)
        self.about = {spec.name: {**provenance, "model": spec.name} for spec in grid.models}
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
        for checkpoint, task in product(checkpoints.values(), tasks):
            check_family(manager, task, checkpoint.family)
        counts = count_documents(manager, tasks, grid.samples)
        self.jobs = [job for job in jobs if job.shard < counts[job.task]]
        check_space(out, sum(counts.values()) * len(self.cells) * len(specs) - _answers(out))
        self.runners = {
            spec.name: make_runner(
                checkpoints[spec.name],
                self.cells,
                answers_folder(out, spec.name),
                grid.batch_size,
                {**spec.settings, "allow_failed": allow_failed},
            )
            for spec in specs
        }
        self.plan = self._plan(counts)
        self.ranks = PartialState()
        if self.ranks.is_main_process:
            if replace:
                self._replace()
            self._begin(replace)
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
                runner, cell = self._cell(planned)
                stored = runner.store.read(planned.words)
                answers = {key: one for key, one in stored.items() if planned.asks(one.doc_id)}
                if cell.method.budget is None and cell.mask is None:
                    full[at] = answers
                documents = {one.doc_id for one in answers.values()}
                model = CellModel(
                    runner, cell, documents, is_simple=is_scored(self.manager, planned.task)
                )
                if (path := self._score(planned, model, answers)) is not None:
                    try:
                        row = load([path]).cells
                    except UserError as error:  # it holds no score that can be shown
                        self._fail(planned, one_line(error))
                        continue
                    near = fidelity(answers, full.get(at, {}))
                    rows.append(
                        row.assign(model=planned.model, **self._names(planned, cell), **near)
                    )
        return rows

    def _answer(self, job: Job, bar: tqdm) -> None:
        runner, ranks = self.runners[job.model.name], self.ranks
        with self._lock(job):
            here = next(one for one in status(self.out).jobs if one.job.name == job.name)
            # No rank writes before all have looked, else they would not agree.
            ranks.wait_for_everyone()
            if here.done < here.expected:
                part = (job.shard, job.shards, ranks.process_index, ranks.num_processes)
                requests = requests_of(job.task, self.manager, self.grid.samples, *part)
                answered = runner.answer(
                    requests, progress=lambda count: bar.update(count * ranks.num_processes)
                )
                try:
                    raise_failures(answered, runner.store, ranks.num_processes, self.allow_failed)
                except SampleFailures as error:
                    logger.error(f"{job.name}: {error}")
        rest = self.jobs[self.jobs.index(job) + 1 :]
        if not any(other.model == job.model for other in rest):
            runner.checkpoint.release()

    @contextmanager
    def _lock(self, job: Job) -> Iterator[None]:
        """Hold a job's lock, the first of several ranks for all of them."""
        path = lock_file(self.out, job.name)
        with lock(path, self.wait) if self.ranks.is_main_process else nullcontext():
            self.ranks.wait_for_everyone()
            yield
            self.ranks.wait_for_everyone()

    def _score(
        self, planned: PlannedCell, model: CellModel, answers: Mapping[str, Answer]
    ) -> Path | None:
        """The cell's results file, made unless it is there and of these answers."""
        path = self.out / planned.results
        samples = samples_file(path, planned.task)
        made_of = answers_hash(answers)
        try:
            if scored_answers(path, samples) == made_of:
                return path
        except Broken as error:
            set_aside(path, samples, error)
        try:
            score(
                model,
                {**self.stated[planned.model], **planned.settings},
                planned.task,
                self.grid.samples,
                self.manager,
                path,
                self.about[planned.model],
            )
        # A metric is the task's own code: whatever it raises takes this score alone, not others'.
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                raise
            cause = error.last_attempt.exception() if isinstance(error, RetryError) else error
            logger.opt(exception=cause).error(f"{planned.words} cannot be scored")
            self._fail(planned, f"{type(cause).__name__}: {one_line(cause)}")
            return None
        write_checksums(path, samples, made_of)
        return path

    def _fail(self, planned: PlannedCell, cause: str) -> None:
        logger.error(f"{planned.model} {planned.words} has no score: {cause}")
        self.failures.setdefault((planned.model, planned.task), []).append(cause)

    def _cell(self, planned: PlannedCell) -> tuple[Runner, Cell]:
        runner = self.runners[planned.model]
        place = self.cells.index(dict(planned.settings))
        return runner, runner.cells[place]

    def _names(self, planned: PlannedCell, cell: Cell) -> dict[str, Any]:
        """What a table's row is called: the method with the settings that vary in this grid."""
        method = cell.method
        # A file by its name, not by the digest of what is in it.
        stated = {**method.settings, **planned.settings}
        settings = {name: stated[name] for name in self.grid.varied() if name in stated}
        budget = method.budget or float("nan")
        return {"label": method_label(method.name, settings), "budget": budget, **settings}

    def _plan(self, counts: Mapping[str, int]) -> Plan:
        cells = tuple(
            PlannedCell(
                name,
                task,
                runner.words(cell, task),
                runner.key(cell, {}),
                settings,
                counts[task],
                str(results_path(Path("cells") / name, task, settings)),
            )
            for name, runner in self.runners.items()
            for task in counts
            for cell, settings in zip(runner.cells, self.cells, strict=True)
        )
        jobs = planned_jobs(self.jobs, counts)
        return Plan(jobs, cells, self.plugins, self.allow_failed)

    def _replace(self) -> None:
        """Let go of another grid's results: answers are what is dear, scores come from them."""
        if is_other_grid(self.grid, self.out):
            logger.warning(
                f"{self.out}: this run takes the place of another one there; answers that fit are "
                "used, its results files go"
            )
            shutil.rmtree(self.out / "cells", ignore_errors=True)

    def _begin(self, replace: bool) -> None:
        """Write down what this folder is to hold, unless that is there already."""
        self.out.mkdir(parents=True, exist_ok=True)
        write_whole(self.out / "grid.yaml", with_checksum_line(self.grid.resolved()))
        # A job alone, or a sweep without the tasks that cannot run here, knows but a part.
        with lock(lock_file(self.out, "plan"), wait=True):
            before = (None if replace else Plan.read(self.out)) or Plan((), ())
            if (cell := before.unlike(self.plan)) is not None:
                raise UserError(
                    f"{self.out}: it holds a sweep of {cell.model} with other weights, head "
                    f"scores, data, plugin or version of sparsemm-eval ({cell.words}); choose "
                    "another folder"
                )
            before.joined(self.plan).write(self.out)


def _answers(out: Path) -> int:
    """How many answers are there already."""
    folders = (out / "answers").glob("*/")
    return sum(len(cell.done) for folder in folders for cell in tally(folder)[0].values())


def _write(
    process: _Process,
    rows: Sequence[pd.DataFrame],
    command: str,
    left_out: Sequence[LeftOut],
    start: float,
) -> _Made:
    """Tables of what was scored."""
    cells = len(process.cells)
    failures = tuple(
        f"{model} {task}: {len(causes)} of {cells} cells have no score, first: {causes[0]}"
        for (model, task), causes in process.failures.items()
    )
    if not rows:
        return _Made(failures=failures)
    frame = pd.concat(rows, ignore_index=True)
    about = {
        "seconds": round(time.perf_counter() - start, 1),
        "grid": process.grid.name,
        "left_out": [asdict(lost) for lost in left_out],
        "failures": failures,
    }
    markdown = sweep_tables(frame, process.grid.name)
    files = write_tables(markdown, frame, process.out, command, about)
    return _Made(frame, markdown, files, failures)


@contextmanager
def _log(out: Path) -> Iterator[None]:
    """What lmms-eval and this program say on the way goes to the folder's log.txt."""
    path = out / "log.txt"
    sink = logger.add(path, level="INFO")
    try:
        with path.open("a", encoding="utf-8") as file, redirect_stderr(file):
            yield
    finally:
        logger.remove(sink)


@contextmanager
def _disk(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(
            f"{out}: the disk is full ({one_line(error)}); what was finished is safe, make room "
            "and run again to go on"
        ) from error
