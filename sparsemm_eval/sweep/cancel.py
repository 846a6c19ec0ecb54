"""Jobs that were submitted, taken back: from this machine's queue and from Slurm's."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from sparsemm_eval.errors import UserError
from sparsemm_eval.sweep import slurm
from sparsemm_eval.sweep.attempt import GRACE
from sparsemm_eval.sweep.lock import holder
from sparsemm_eval.sweep.plan import lock_file
from sparsemm_eval.sweep.queue import QUEUE
from sparsemm_eval.sweep.records import (
    CANCELLED,
    DONE,
    LOCAL,
    QUEUED,
    RUNNING,
    SLURM,
    Record,
    read_ids,
    read_record,
)
from sparsemm_eval.sweep.status import SCORING, status

_PAUSE = 0.1


def cancel(out: Path) -> list[str]:
    """End all that was submitted for a sweep's folder and is not done; answers stay.

    Returns
    -------
    list of str
        Names of the jobs that were cancelled.

    Raises
    ------
    ValueError
        If their queue runs on another machine, or nothing was submitted.
    """
    before = _states(out)
    records = {name: record for name in before if (record := read_record(out, name))}
    if not records:
        raise UserError(f"{out}: nothing was submitted here that could be cancelled")
    cancelled = _cancel_slurm(out, records, before)
    _end_queue(out)
    local = [
        name
        for name, record in records.items()
        if record.executor == LOCAL and (record.state == QUEUED or before[name] == RUNNING)
    ]
    for name in local:
        if records[name].alive:
            _end(records[name])
    after = _states(out)
    for name in local:
        if after[name] != DONE:
            read_record(out, name).over(CANCELLED, "by `sparsemm-eval cancel`").write(out)
            cancelled.append(name)
    return cancelled


def _states(out: Path) -> dict[str, str]:
    said = status(out)
    return {job.job.name: job.state for job in said.jobs} | {SCORING: said.scoring_state[0]}


def _cancel_slurm(out: Path, records: Mapping[str, Record], states: Mapping[str, str]) -> list[str]:
    ids = read_ids(out)
    mine = [name for name, record in records.items() if record.executor == SLURM and name in ids]
    waiting = [name for name in mine if states[name] in (QUEUED, RUNNING)]
    slurm.cancel_jobs(ids[name] for name in waiting)
    for name in waiting:
        read_record(out, name).over(CANCELLED, "by `sparsemm-eval cancel`").write(out)
    return waiting


def _end_queue(out: Path) -> None:
    path = lock_file(out, QUEUE)
    other, queue = holder(path), read_record(out, QUEUE)
    if other is None:
        return
    if queue is None or not queue.alive:
        raise UserError(f"{out}: its queue is {other}, which cannot be ended from here")
    os.kill(queue.pid, signal.SIGTERM)
    end = time.monotonic() + GRACE + 10
    while holder(path) is not None and time.monotonic() < end:
        time.sleep(_PAUSE)


def _end(record: Record) -> None:
    """End a job whose queue was killed, and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(record.pid, signal.SIGTERM)
        end = time.monotonic() + GRACE
        while record.alive and time.monotonic() < end:
            time.sleep(_PAUSE)
        os.killpg(record.pid, signal.SIGKILL)
