"""A sweep's jobs, given to this machine's slots or to Slurm."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sparsemm_eval.errors import UserError, check_choice, check_int
from sparsemm_eval.methods import Plugin
from sparsemm_eval.sweep import slurm
from sparsemm_eval.sweep.commands import job_command, scoring_command
from sparsemm_eval.sweep.grid import Grid, parse_grid
from sparsemm_eval.sweep.lock import Locked, holder, lock
from sparsemm_eval.sweep.plan import lock_file
from sparsemm_eval.sweep.queue import QUEUE, Slot, run_queue
from sparsemm_eval.sweep.records import (
    DONE,
    LOCAL,
    QUEUED,
    RUNNING,
    SLURM,
    STOPPED,
    Record,
    log_file,
    read_ids,
    read_record,
    tail,
    write_ids,
)
from sparsemm_eval.sweep.room import Room
from sparsemm_eval.sweep.sbatch import Options
from sparsemm_eval.sweep.signals import Stopped
from sparsemm_eval.sweep.status import SCORING, TABLE, Status
from sparsemm_eval.sweep.sweep import plan_sweep


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
        return tuple(record for record in self.records if record.state != DONE)

    def lines(self, out: Path) -> list[str]:
        """What to say of it: of jobs that were given up, the end of their logs."""
        if not self.jobs:
            return [f"{out}: nothing to submit, {len(self.skipped)} jobs are done or on their way"]
        if self.records:
            table = out / TABLE
            made = [f"wrote {table}"] if table.is_file() else []
            return [*(_failure(out, record) for record in self.failed), *made]
        return [
            f"submitted {len(self.jobs)} jobs, {len(self.skipped)} are done or on their way; "
            f"`sparsemm-eval status {out} --watch` shows them"
        ]


def submit(
    grid: Grid,
    out: Path,
    room: Room,
    retries: int,
    skip_missing: bool,
    tell: Callable[[str], None],
    include_path: Sequence[Path] = (),
    plugins: Sequence[Plugin] = (),
) -> Submitted:
    """Plan a sweep and submit those of its jobs that are not done.

    Parameters
    ----------
    grid : Grid
        What is to be measured.
    out : Path
        The sweep's folder, absolute.
    room : Room
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

    Raises
    ------
    ValueError, FileNotFoundError
        For what cannot be, before a model is loaded; in Slurm's words if it refuses.
    Stopped
        On Ctrl-C or an ending signal, after all jobs of this machine have ended.
    """
    check_choice("executor", room.executor, (LOCAL, SLURM))
    check_int("retries", retries, least=0)
    chosen = room.slots() if room.executor == LOCAL else room.options()
    _refuse_running(out)
    said, left_out = plan_sweep(grid, out, skip_missing, include_path, plugins)
    doors = (
        *(word for plugin in plugins for word in ("--plugin", plugin.name)),
        *(word for folder in include_path for word in ("--include_path", str(folder))),
    )
    for lost in left_out:
        tell(f"left out: {lost.cause}")
    if room.executor == SLURM:
        return submit_slurm(out, said, chosen, retries, skip_missing, grid.name, doors)
    return submit_local(
        out, said, chosen, retries, skip_missing, lambda job: tell(_line(job)), doors
    )


def with_shards(grid: Grid, out: Path, shards: int | None) -> Grid:
    """The grid in so many jobs a task; by default as its folder has it already.

    Raises
    ------
    ValueError
        If there cannot be so many.
    """
    if shards is not None:
        check_int("shards", shards, least=1)
        return grid.model_copy(update={"shards": shards})
    path = out / "grid.yaml"
    if not path.is_file():
        return grid
    before = parse_grid(path.read_text(encoding="utf-8"), path)
    same = grid.model_copy(update={"shards": before.shards})
    return same if same.resolved() == before.resolved() else grid


def submit_local(
    out: Path,
    said: Status,
    slots: Sequence[Slot],
    retries: int,
    skip_missing: bool,
    tell: Callable[[Record], None] = lambda record: None,
    doors: Sequence[str] = (),
) -> Submitted:
    """Run all jobs of a planned sweep that are not done on this machine, then score.

    Parameters
    ----------
    out : Path
        The sweep's folder, of `plan_sweep`.
    said : Status
        How far it is.
    slots : sequence of Slot
        Where jobs run, one at a time each.
    retries : int
        How often a job that failed is tried again.
    skip_missing : bool
        As for `run_sweep`.
    tell : callable, optional
        As for `run_queue`.
    doors : sequence of str
        As for `job_command`.

    Raises
    ------
    ValueError
        If some of its jobs are on their way already.
    Stopped
        On Ctrl-C or an ending signal, after all jobs have ended.
    """
    done, todo, under_way = _sort(said)
    if under_way:
        raise UserError(
            f"{out}: {under_way[0]} is on its way already; wait for it (`sparsemm-eval status "
            f"{out} --watch`), or end it (`sparsemm-eval cancel {out}`)"
        )
    if not todo:
        return Submitted((), done)
    size = len(slots[0].gpus)
    jobs = [job_command(out, name, size, doors) for name in todo if name != SCORING]
    last = scoring_command(out, skip_missing, doors)
    with _alone(out):
        Record(QUEUE, LOCAL, QUEUED).begun(os.getpid()).write(out)
        scoring = Record(SCORING, LOCAL, QUEUED)
        scoring.write(out)
        try:
            records = run_queue(jobs, slots, retries, out, tell)
        except Stopped:
            scoring.over(STOPPED, "the jobs before it were stopped").write(out)
            raise
        records += run_queue([last], slots[:1], retries, out, tell)
    return Submitted(todo, done, tuple(records))


def submit_slurm(
    out: Path,
    said: Status,
    options: Options,
    retries: int,
    skip_missing: bool,
    name: str,
    doors: Sequence[str] = (),
) -> Submitted:
    """Submit all jobs of a planned sweep that are neither done nor in Slurm's queue.

    Parameters
    ----------
    out, said, retries, skip_missing, doors
        As for `submit_local`.
    options : Options
        What is asked of Slurm.
    name : str
        The grid's, for Slurm's lists.

    Raises
    ------
    ValueError
        In Slurm's words if it refuses; nothing is submitted then.
    """
    done, todo, under_way = _sort(said)
    jobs = tuple(job for job in todo if job != SCORING)
    if not jobs and (not todo or SCORING in under_way):
        return Submitted((), (*done, *under_way))
    ids = read_ids(out)
    ahead = [ids[job] for job in under_way if job in ids and job != SCORING]
    commands = [job_command(out, job, options.gpus, doors) for job in jobs]
    names = (*jobs, SCORING)
    with _alone(out):
        with _queued(out, names):
            numbers = slurm.submit_jobs(
                commands, scoring_command(out, skip_missing, doors), options, retries, out, ahead,
                f"sparsemm-{name}",
            )  # fmt: skip
        if SCORING in under_way:
            slurm.cancel_jobs([ids[SCORING]])  # it would not wait for the new ones
        write_ids(out, numbers)
    rest = tuple(job for job in (*done, *under_way) if job != SCORING)
    return Submitted(names, rest)


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


def _sort(said: Status) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Names of jobs that are done, that are to be submitted, and that are on their way."""
    found = {job.job.name: job.state for job in said.jobs} | {SCORING: said.scoring_state[0]}
    under_way = tuple(name for name, state in found.items() if state in (QUEUED, RUNNING))
    done = tuple(name for name, state in found.items() if state == DONE)
    return done, tuple(name for name in found if name not in (*under_way, *done)), under_way


def _refuse_running(out: Path) -> None:
    if (other := holder(lock_file(out, QUEUE))) is not None:
        raise UserError(
            f"{out}: its jobs are in the queue of {other}; wait for it (`sparsemm-eval status "
            f"{out} --watch`), or end it (`sparsemm-eval cancel {out}`)"
        )


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    try:
        with lock(lock_file(out, QUEUE)):
            yield
    except Locked:
        _refuse_running(out)
        raise


@contextmanager
def _queued(out: Path, names: Sequence[str]) -> Iterator[None]:
    """Write jobs down as queued, before one of them can begin; not if they are refused."""
    before = {name: read_record(out, name) for name in names}
    for name in names:
        Record(name, SLURM, QUEUED).write(out)
    try:
        yield
    except BaseException:
        for name, record in before.items():
            if record is None:
                (out / "jobs" / f"{name}.json").unlink()
            else:
                record.write(out)
        raise
