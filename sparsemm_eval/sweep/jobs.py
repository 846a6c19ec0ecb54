"""A sweep's jobs: submitted to this machine's slots or to Slurm, and taken back."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparsemm_eval.errors import UserError, check_int
from sparsemm_eval.sweep import slurm
from sparsemm_eval.sweep.lock import Locked, held, holder, killed, lock, process_here
from sparsemm_eval.sweep.plan import lock_file
from sparsemm_eval.sweep.process import GRACE, Command, Stopped, end_orphan, noted, run_queue
from sparsemm_eval.sweep.resources import SLURM, Resources, Slot
from sparsemm_eval.sweep.state import (
    CANCELLED,
    DONE,
    QUEUE,
    QUEUED,
    RUNNING,
    STOPPED,
    Record,
    log_file,
    read_ids,
    read_record,
    tail,
    take_record,
    write_ids,
)
from sparsemm_eval.sweep.status import SCORING, TABLE, Status, status

if TYPE_CHECKING:
    from sparsemm_eval.methods import Plugin
    from sparsemm_eval.sweep.grid import Grid

_PAUSE = 0.05


@dataclass(frozen=True)
class Submitted:
    """What was submitted.

    Parameters
    ----------
    jobs : tuple of str
        Names of the jobs, that which scores among them.
    skipped : tuple of str
        Names of jobs that are done, or on their way already.
    records : tuple of Record
        How each of ``jobs`` ended; empty for Slurm, which goes on alone.
    """

    jobs: tuple[str, ...]
    skipped: tuple[str, ...]
    records: tuple[Record, ...] = ()

    @property
    def failed(self) -> tuple[Record, ...]:
        """Jobs that were given up."""
        return tuple(record for record in self.records if record.ending != DONE)

    def lines(self, out: Path) -> list[str]:
        """What to say of it: of jobs that were given up, the end of their logs."""
        if not self.jobs:
            return [f"{out}: nothing to submit, {len(self.skipped)} jobs are done or on their way"]
        if self.records:
            table = out / TABLE
            wrote = [f"wrote {table}"] if table.is_file() else []
            return [*(_failure(out, record) for record in self.failed), *wrote]
        return [
            f"submitted {len(self.jobs)} jobs, {len(self.skipped)} are done or on their way; "
            f"`sparsemm-eval status {out} --watch` shows them"
        ]


def submit(
    grid: Grid,
    out: Path,
    resources: Resources,
    retries: int,
    skip_missing: bool,
    tell: Callable[[str], None],
    include_path: Sequence[Path] = (),
    plugins: Sequence[Plugin] = (),
    allow_failed: int = 0,
) -> Submitted:
    """Plan a sweep and submit those of its jobs that are not done.

    Parameters
    ----------
    grid : Grid
        What is to be measured.
    out : Path
        The sweep's folder, absolute.
    resources : Resources
        Where jobs run.
    retries : int
        How often a job that failed is tried again.
    skip_missing : bool
        Leave out tasks whose metrics cannot run here, instead of refusing the sweep.
    tell : callable
        Given a line whenever a job of this machine begins or ends, and one a task left out.
    include_path : sequence of Path
        Folders of the user's own task files, absolute; jobs get them with their command.
    plugins : sequence of Plugin
        Those that were loaded for methods of this grid; jobs get them with their command.
    allow_failed : int
        So many samples of a cell may fail; it is scored without them.

    Raises
    ------
    UserError, FileNotFoundError
        For what cannot be, before a model is loaded; in Slurm's words if it refuses.
    Stopped
        On Ctrl-C or an ending signal, after all jobs of this machine have ended.
    """
    check_submission(grid, out, resources, retries)
    from sparsemm_eval.sweep.sweep import plan_sweep  # heavy, and `cancel` is to start at once

    slots = () if resources.executor == SLURM else resources.slots()
    ids = read_ids(out)
    before, left_out = plan_sweep(grid, out, skip_missing, include_path, plugins, allow_failed)
    for lost in left_out:
        tell(f"left out: {lost.cause}")
    doors = (
        *(word for plugin in plugins for word in ("--plugin", plugin.name)),
        *(word for folder in include_path for word in ("--include_path", str(folder))),
        *(("--allow-failed", str(allow_failed)) if allow_failed else ()),
    )
    gpus = len(slots[0].gpus) if slots else resources.gpus_of_job
    done, todo, under_way = _sort(before)
    jobs = [job_command(out, name, gpus, doors) for name in todo if name != SCORING]
    last = scoring_command(out, skip_missing, doors)
    if resources.executor == SLURM:
        if not jobs and (not todo or SCORING in under_way):
            return Submitted((), (*done, *under_way))
        with _alone(out, ids):
            _give_to_slurm(out, jobs, last, resources, retries, under_way, f"sparsemm-{grid.name}")
        rest = tuple(name for name in (*done, *under_way) if name != SCORING)
        return Submitted((*(job.name for job in jobs), SCORING), rest)
    if under_way:
        raise UserError(
            f"{out}: {under_way[0]} is on its way already; wait for it (`sparsemm-eval status "
            f"{out} --watch`), or end it (`sparsemm-eval cancel {out}`)"
        )
    if not todo:
        return Submitted((), done)
    with _alone(out, ids):
        if ids:
            write_ids(out, {name: ids[name] for name in ids if name not in todo})
        records = _run_here(out, jobs, last, slots, retries, lambda record: tell(_line(record)))
    return Submitted(todo, done, records)


def check_submission(grid: Grid, out: Path, resources: Resources, retries: int) -> None:
    """Refuse what needs no look at models, tasks and GPUs.

    Parameters
    ----------
    grid, out, resources, retries
        As for `submit`.

    Raises
    ------
    UserError
        Naming the option, or whose the folder is.
    """
    from sparsemm_eval.sweep.folder import refuse_other_grid  # grids, which `cancel` does not need

    resources.check()
    check_int("retries", retries, least=0)
    _refuse_running(out)
    refuse_other_grid(grid, out)


def with_shards(grid: Grid, out: Path, shards: int | None) -> Grid:
    """The grid in so many jobs a task; by default as its folder has it already.

    Raises
    ------
    UserError
        If there cannot be so many.
    """
    from sparsemm_eval.sweep.grid import MOST_SHARDS
    from sparsemm_eval.sweep.grid_file import read_grid

    if shards is not None:
        check_int("shards", shards, least=1, most=MOST_SHARDS)
        return grid.model_copy(update={"shards": shards})
    path = out / "grid.yaml"
    if not path.is_file():
        return grid
    before = read_grid(path)
    same = grid.model_copy(update={"shards": before.shards})
    return same if same.resolved() == before.resolved() else grid


def _run_here(
    out: Path,
    jobs: Sequence[Command],
    last: Command,
    slots: Sequence[Slot],
    retries: int,
    tell: Callable[[Record], None],
) -> tuple[Record, ...]:
    """Run jobs in the slots of this machine, then the last one, whatever became of them."""
    for job in (*jobs, last):
        take_record(out, job.name)
    try:
        records = run_queue(jobs, slots, retries, out, tell)
    except Stopped:
        Record(last.name).over(STOPPED, "the jobs before it were stopped").write(out)
        raise
    return (*records, *run_queue([last], slots[:1], retries, out, tell))


def _give_to_slurm(
    out: Path,
    jobs: Sequence[Command],
    last: Command,
    resources: Resources,
    retries: int,
    under_way: Sequence[str],
    name: str,
) -> None:
    """Submit jobs to Slurm, and the last one after them and all that are under way there.

    If Slurm refuses, nothing is submitted.
    """
    ids = read_ids(out)
    ahead = [ids[job] for job in under_way if job in ids and job != last.name]
    # Between Slurm's yes and its numbers on disk nothing may end this process: jobs would run on
    # that nobody knows.
    with noted() as signals:
        with _records_taken(out, [job.name for job in (*jobs, last)]):
            numbers = slurm.submit_jobs(jobs, last, resources, retries, out, ahead, name)
        write_ids(out, {**ids, **numbers})
        if last.name in under_way:
            slurm.cancel_jobs([ids[last.name]])  # it would not wait for the new ones
    if signals:
        raise Stopped(signals[0])


def _line(record: Record) -> str:
    where = f"process {record.pid}" if record.state == RUNNING else record.reason
    return f"{record.state:8} {record.name}" + (f": {where}" if where else "")


def _failure(out: Path, record: Record) -> str:
    """Why a job was given up, with the end of its log."""
    path = log_file(out, record.name)
    lines = "".join(f"\n    {line}" for line in tail(path))
    return (
        f"{record.name} failed, attempt {record.attempts} was the last: {record.reason}; "
        f"{path} ends with{lines}"
    )


def _sort(before: Status) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Names of jobs that are done, that are to be submitted, and that are on their way."""
    states = before.states
    under_way = tuple(name for name, (state, _) in states.items() if state in (QUEUED, RUNNING))
    done = tuple(name for name, (state, _) in states.items() if state == DONE)
    return done, tuple(name for name in states if name not in (*under_way, *done)), under_way


def _refuse_running(out: Path) -> None:
    if (other := holder(lock_file(out, QUEUE))) is not None:
        raise UserError(
            f"{out}: its jobs are in the queue of {other}; wait for it (`sparsemm-eval status "
            f"{out} --watch`), or end it (`sparsemm-eval cancel {out}`)"
        )


@contextmanager
def _alone(out: Path, ids: Mapping[str, str]) -> Iterator[None]:
    """Hold the lock of the folder's queue, where Slurm's numbers are still those that were read."""
    try:
        with lock(lock_file(out, QUEUE)):
            if read_ids(out) != ids:
                raise UserError(
                    f"{out}: its jobs were given to Slurm by another submission just now; submit "
                    "again for the rest"
                )
            yield
    except Locked:
        _refuse_running(out)
        raise


@contextmanager
def _records_taken(out: Path, names: Sequence[str]) -> Iterator[None]:
    """Remove records before a new attempt can begin; put them back if Slurm refuses the jobs."""
    before = [take_record(out, name) for name in names]
    try:
        yield
    except BaseException:
        for record in filter(None, before):
            record.write(out)
        raise


def cancel(out: Path) -> list[str]:
    """End all that was submitted for a sweep's folder and is not done; answers stay.

    Returns
    -------
    list of str
        Names of the jobs that were cancelled.

    Raises
    ------
    UserError
        If they run on another machine, cannot be ended, or nothing was submitted.
    """
    before, ids = status(out).states, read_ids(out)
    queue = lock_file(out, QUEUE)
    records = any(read_record(out, name) for name in before)
    if not (records or ids or held(queue) or killed(queue)):
        raise UserError(f"{out}: nothing was submitted here that could be cancelled")
    in_slurm = [name for name in ids if name in before and before[name][0] in (QUEUED, RUNNING)]
    slurm.cancel_jobs(ids[name] for name in in_slurm)
    here = [
        name
        for name, (state, _) in before.items()
        if name not in ids and _is_submitted(out, name, state)
    ]
    _end_queue(out)
    going_on = []
    for name in here:
        record = read_record(out, name)
        if record is not None and held(log_file(out, name)):
            if not record.here:
                raise UserError(f"{out}: {name} is {record}, which cannot be ended from here")
            if not end_orphan(record, out):
                going_on.append(name)
    after = status(out).states
    ended = [name for name in here if name not in going_on]
    cancelled = [*in_slurm, *(name for name in ended if after[name][0] != DONE)]
    for name in cancelled:
        record = read_record(out, name) or Record(name)
        record.over(CANCELLED, "by `sparsemm-eval cancel`").write(out)
    if going_on:
        raise UserError(
            f"{out}: {going_on[0]} goes on, a process that it started writes to "
            f"{log_file(out, going_on[0])} and cannot be found from here: end it by hand and "
            "cancel again"
        )
    return cancelled


def _is_submitted(out: Path, name: str, state: str) -> bool:
    """Whether a job waits for a queue of this machine, runs in one, or was left by one."""
    if state == RUNNING:
        return read_record(out, name) is not None and held(log_file(out, name))
    record = read_record(out, name)
    never_ended = record is None or record.ending == QUEUED
    return state == QUEUED or (state == STOPPED and never_ended)


def _end_queue(out: Path) -> None:
    path = lock_file(out, QUEUE)
    other = holder(path)
    if other is None:
        return
    pid = process_here(path)
    if pid is None:
        raise UserError(f"{out}: its queue is {other}, which cannot be ended from here")
    with suppress(ProcessLookupError):  # it may have ended just now
        os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + GRACE + 10
    while held(path) and time.monotonic() < end:
        time.sleep(_PAUSE)
    if held(path):
        raise UserError(
            f"{out}: its queue, {other}, was asked to end and goes on; cancel again, or end it "
            f"with `kill -9 {pid}` and cancel what it leaves"
        )


def job_command(out: Path, name: str, gpus: int, doors: Sequence[str] = ()) -> Command:
    """What answers one job of a planned sweep: a rank a GPU, and their number asserted.

    Parameters
    ----------
    out : Path
        The sweep's folder.
    name : str
        The job's.
    gpus : int
        Its ranks; 0 is one, on the CPU.
    doors : sequence of str
        Words that it shares with all jobs, such as ``--plugin FILE``.
    """
    begin: tuple[str, ...] = (sys.executable, "-m")
    if gpus > 1:
        begin += ("torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus), "-m")
    ranks = ("--world-size", str(max(1, gpus)))
    return Command(name, (*begin, *_sweep(out), *doors, "--job", name, *ranks))


def scoring_command(out: Path, skip_missing: bool, doors: Sequence[str] = ()) -> Command:
    """What scores all that is answered, and writes the tables of a plain sweep."""
    skip = ("--skip-missing",) if skip_missing else ()
    return Command(SCORING, (sys.executable, "-m", *_sweep(out), *doors, "--only-scores", *skip))


def _sweep(out: Path) -> tuple[str, ...]:
    return "sparsemm_eval", "sweep", str(out / "grid.yaml"), "--out", str(out), "--wait"
