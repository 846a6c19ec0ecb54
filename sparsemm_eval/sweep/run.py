"""A sweep: every job's answers, then lmms-eval's scores cell by cell, then tables."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd
import torch
from accelerate import PartialState
from loguru import logger

from sparsemm_eval.errors import UserError, check_choice, one_line
from sparsemm_eval.methods import Plugin
from sparsemm_eval.sweep.grid import Grid, Job
from sparsemm_eval.sweep.lock import busy, holder, lock
from sparsemm_eval.sweep.plan import (
    lock_file,
)
from sparsemm_eval.sweep.runner import Runner
from sparsemm_eval.sweep.status import SCORING, Status, status
from sparsemm_eval.sweep.tables import write_tables
from sparsemm_eval.sweep.tasks import LeftOut, find_tasks, runnable


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

    Raises
    ------
    ValueError, FileNotFoundError
        For what cannot be, before a model is loaded: another sweep's folder, a disk that is too
        small, data, a model or java that is not there.
    OSError
        If another sweep is on the folder, or the disk is full.
    """
    start = time.perf_counter()
    jobs = grid.jobs()
    if only_job is not None:
        check_choice("job", only_job, [job.name for job in jobs])
        jobs = [job for job in jobs if job.name == only_job]
    _refuse_other_grid(grid, out)
    ranks = PartialState(cpu=not torch.cuda.is_available())
    if world_size not in (None, ranks.num_processes):
        raise UserError(
            f"world-size={world_size}: {ranks.num_processes} run together; begin it with "
            f"`torchrun --standalone --nproc_per_node {world_size} -m sparsemm_eval sweep …`"
        )
    if not wait and ranks.is_main_process:
        _refuse_other_sweep(jobs, out)
    manager = find_tasks(grid.tasks, include_path)
    tasks, left_out = runnable(manager, list(dict.fromkeys(job.task for job in jobs)), skip_missing)
    jobs = [job for job in jobs if job.task in tasks]
    with _disk(out):
        runner = Runner(grid, out, jobs, manager, wait, command, plugins)
        with _log(out):
            if not only_scores:
                runner.answer()
            made = _Made()
            if only_job is None and ranks.num_processes == 1:
                with lock(lock_file(out, SCORING), wait):
                    made = _write(runner, runner.score(), command, left_out, start)
    return Sweep(status(out), made.frame, made.markdown, made.files, made.failures, tuple(left_out))


def plan_sweep(
    grid: Grid,
    out: Path,
    skip_missing: bool = False,
    include_path: Sequence[Path] = (),
    plugins: Sequence[Plugin] = (),
) -> tuple[Status, tuple[LeftOut, ...]]:
    """Check all that a sweep needs and write down what its folder is to hold; answer nothing.

    Parameters
    ----------
    grid, out, skip_missing, include_path, plugins
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
    _refuse_other_grid(grid, out)
    manager = find_tasks(grid.tasks, include_path)
    tasks, left_out = runnable(manager, grid.tasks, skip_missing)
    jobs = [job for job in grid.jobs() if job.task in tasks]
    PartialState(cpu=not torch.cuda.is_available())
    with _disk(out), _log(out):
        Runner(grid, out, jobs, manager, wait=False, command="", plugins=plugins)
    return status(out), tuple(left_out)


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


def _write(
    runner: Runner,
    rows: Sequence[pd.DataFrame],
    command: str,
    left_out: Sequence[LeftOut],
    start: float,
) -> _Made:
    """Tables of what was scored."""
    cells = len(runner.cells)
    failures = tuple(
        f"{model} {task}: {len(causes)} of {cells} cells have no score, first: {causes[0]}"
        for (model, task), causes in runner.failures.items()
    )
    if not rows:
        return _Made(failures=failures)
    frame = pd.concat(rows, ignore_index=True)
    about = {
        "seconds": round(time.perf_counter() - start, 1),
        "grid": runner.grid.name,
        "left_out": [asdict(lost) for lost in left_out],
        "failures": failures,
    }
    return _Made(frame, *write_tables(frame, runner.grid, runner.out, command, about), failures)


def _refuse_other_grid(grid: Grid, out: Path) -> None:
    path = out / "grid.yaml"
    if path.is_file() and path.read_text(encoding="utf-8") != grid.resolved():
        raise UserError(
            f"{out}: it holds the sweep of another grid, {path}; choose another folder, or run "
            f"that one on with `sparsemm-eval sweep {path} --out {out}`"
        )


def _refuse_other_sweep(jobs: Sequence[Job], out: Path) -> None:
    for name in (*(job.name for job in jobs), SCORING):
        if (other := holder(lock_file(out, name))) is not None:
            raise busy(out, name, other)


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
