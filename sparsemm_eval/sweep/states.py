"""A job's state, from what its runner wrote, who holds its lock, and what Slurm says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sparsemm_eval.sweep import slurm
from sparsemm_eval.sweep.lock import holder
from sparsemm_eval.sweep.plan import lock_file
from sparsemm_eval.sweep.queue import QUEUE
from sparsemm_eval.sweep.records import (
    CANCELLED,
    DONE,
    FAILED,
    OPEN,
    QUEUED,
    RUNNING,
    SLURM,
    STOPPED,
    Record,
    read_ids,
    read_record,
)

_WAITING = {
    "PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD",
    "SPECIAL_EXIT", "SUSPENDED", "STOPPED",
}  # fmt: skip
_UNDER_WAY = {"RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "RESIZING"}


class States:
    """What the jobs of a sweep's folder are doing now.

    Parameters
    ----------
    out : Path
        The sweep's folder.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.ids = read_ids(out)
        self._queue = holder(lock_file(out, QUEUE))
        self._slurm: Mapping[str, tuple[str, str]] | None = slurm.ask(self.ids.values())

    def of(self, name: str, complete: bool) -> tuple[str, str]:
        """State and reason of a job.

        Parameters
        ----------
        name : str
            The job's.
        complete : bool
            Whether all it is to make is there.

        Returns
        -------
        (str, str)
            One of open, queued, running, done, failed, stopped, cancelled; and why.
        """
        on_it = holder(lock_file(self.out, name))
        if on_it is not None:
            return RUNNING, on_it
        record = read_record(self.out, name)
        if complete:
            return DONE, ""
        if record is None:
            return OPEN, ""
        if record.executor == SLURM and record.state in (QUEUED, RUNNING, STOPPED):
            return self._in_slurm(record)
        if record.state == RUNNING:
            return self._running(record)
        if record.state == QUEUED and self._queue is None:
            return STOPPED, "its queue was killed; submit again to go on"
        if record.state == DONE:
            return FAILED, "it ended well, and not all of it is there; submit again"
        return record.state, record.reason

    def _running(self, record: Record) -> tuple[str, str]:
        if record.alive:
            return RUNNING, f"process {record.pid} on {record.host}"
        if not record.here and self._queue is not None:
            return RUNNING, f"process {record.pid} on {record.host}, by its queue"
        return FAILED, f"process {record.pid} on {record.host} died without a word"

    def _in_slurm(self, record: Record) -> tuple[str, str]:
        number = self.ids.get(record.name, "")
        if record.state == RUNNING and record.alive:
            return RUNNING, f"process {record.pid} on {record.host}, Slurm's {number}"
        if self._slurm is None:
            words = f"{record.reason} (as last written: Slurm does not answer here)"
            return record.state, words.strip()
        word, reason = self._slurm.get(number, ("", ""))
        if word in _WAITING:
            return QUEUED, f"Slurm's {number}: {reason.strip('()').lower()}"
        if word in _UNDER_WAY:
            return RUNNING, f"Slurm's {number} on {reason}"
        if word == "CANCELLED":
            return CANCELLED, f"Slurm's {number} was cancelled"
        if word:
            return FAILED, f"Slurm's {number}: {word.lower()} {record.reason}".strip()
        left = record.reason or "it left Slurm's queue unfinished"
        return (FAILED if record.state == RUNNING else STOPPED), f"Slurm's {number}: {left}"
