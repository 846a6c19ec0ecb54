"""The state of a job: its answers, its locks, its scheduler, and how its last attempt ended."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

from sparsemm_eval.errors import UserError
from sparsemm_eval.paths import write_whole
from sparsemm_eval.stored import NoFile, NotUnderstood, read_json_as, with_checksum
from sparsemm_eval.sweep.lock import begun_at, boot, held, holder, killed
from sparsemm_eval.sweep.plan import lock_file

T = TypeVar("T")
OPEN, QUEUED, RUNNING, DONE = "open", "queued", "running", "done"
FAILED, STOPPED, CANCELLED = "failed", "stopped", "cancelled"
# The lock of a process that runs jobs here; while it is held, jobs that were not begun wait for it.
QUEUE = "queue"
_WAITING = {
    "PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD",
    "SPECIAL_EXIT", "SUSPENDED", "STOPPED",
}  # fmt: skip
_UNDER_WAY = {"RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "RESIZING"}
# Seconds that Slurm is given to answer.
_SECONDS = 60


@dataclass(frozen=True)
class Record:
    """How the last attempt at a job began and ended, which its answers and locks cannot say.

    Whether it runs is not in it: a job's processes hold its log locked as long as one of them
    lives.

    Parameters
    ----------
    name : str
        The job's name in the grid, or ``scoring``.
    ending : str
        done (exit code 0), failed, queued (failed, and to be tried again), stopped (asked to end)
        or cancelled; empty if none was written.
    reason : str
        Why it ended so; empty if that needs no words.
    attempts : int
        How often it was begun.
    host : str
        Where its process runs or ran.
    pid : int
        The number of its process and process group; 0 if it was never begun.
    begun : str
        When its process began, by `sparsemm_eval.sweep.lock.begun_at`; "" in older records.
    """

    name: str
    ending: str = ""
    reason: str = ""
    attempts: int = 0
    host: str = ""
    pid: int = 0
    begun: str = ""

    def __post_init__(self) -> None:
        # A number below 1 would stand for groups of processes where a signal is sent.
        if self.pid < 0 or self.attempts < 0:
            raise UserError(
                f"{self.name}: process {self.pid}, attempt {self.attempts}: neither can be negative"
            )

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def state(self) -> str:
        """The ending, or running."""
        return self.ending or RUNNING

    @property
    def here(self) -> bool:
        """Whether its process is, or was, on this machine, since it was started last."""
        same_boot = self.begun.partition(" ")[0] in ("", boot())
        return self.host == socket.gethostname() and same_boot

    @property
    def number_is_anothers(self) -> bool:
        """Whether the number of its process is that of a later one by now."""
        return bool(self.begun) and begun_at(self.pid) not in ("", self.begun)

    def next_attempt(self, pid: int) -> Record:
        """The record of the next attempt, by a process of this machine that has just begun."""
        host, begun = socket.gethostname(), begun_at(pid)
        return Record(self.name, "", "", self.attempts + 1, host, pid, begun)

    def over(self, ending: str, reason: str = "") -> Record:
        """The record of the same attempt after its process has ended."""
        return replace(self, ending=ending, reason=reason)

    def write(self, out: Path) -> None:
        """Put it into a sweep's folder."""
        content = with_checksum(asdict(self))
        write_whole(_record_file(out, self.name), json.dumps(content, indent=1))


def read_record(out: Path, name: str) -> Record | None:
    """The record of one job; None if it was never begun.

    Raises
    ------
    UserError
        If the file is broken.
    """
    return _stored(_record_file(out, name), Record)


def take_record(out: Path, name: str) -> Record | None:
    """Read the record of a job and remove it, as the job is submitted anew; so is a broken one."""
    try:
        record = read_record(out, name)
    except UserError:
        record = None
    _record_file(out, name).unlink(missing_ok=True)
    return record


def log_file(out: Path, name: str) -> Path:
    """What a job says, one attempt after the other; locked while one of its processes lives."""
    return out / "jobs" / f"{name}.log"


def tail(path: Path, lines: int = 12) -> list[str]:
    """The last lines of a log, progress bars left out."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 20_000))
        text = file.read().decode(errors="replace")
    # A bar draws itself over and over in one line.
    drawn = (line.split("\r")[-1].rstrip() for line in text.split("\n"))
    return [line for line in drawn if line and "%|" not in line][-lines:]


class States:
    """What the jobs of a sweep's folder are doing now.

    A job is done when all it is to make is there, and runs while one of its locks is held: that of
    its answers, or that of its log. Of the others the scheduler knows, and how their last attempt
    ended.

    Parameters
    ----------
    out : Path
        The sweep's folder.

    Attributes
    ----------
    broken : list of str
        A sentence if Slurm's numbers cannot be read; jobs are then as if they were not Slurm's.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.broken: list[str] = []
        self.ids: dict[str, str] = {}
        try:
            self.ids = read_ids(out)
        except UserError as error:
            self.broken.append(str(error))
        queue = lock_file(out, QUEUE)
        self._queue, self._killed = holder(queue), killed(queue)
        self._slurm: Mapping[str, tuple[str, str]] | None = _ask_slurm(self.ids.values())

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
        try:
            record = read_record(self.out, name)
        except UserError as error:
            state = RUNNING if held(log_file(self.out, name)) else DONE if complete else FAILED
            return state, str(error)
        number = self.ids.get(name)
        if record is not None and held(log_file(self.out, name)):
            return RUNNING, f"{record}, Slurm's {number}" if number else str(record)
        if complete:
            return DONE, ""
        ending = QUEUED if record is None else record.ending
        if number and ending in ("", QUEUED, STOPPED):
            return self._in_slurm(record, number)
        if ending == QUEUED:
            return self._waiting(record)
        if ending == "":
            if self._queue is not None:
                return RUNNING, f"{record}, by its queue"
            return FAILED, f"{record} died without a word"
        if ending == DONE:
            return FAILED, "it ended well, and not all of it is there; submit again"
        return ending, record.reason

    def _waiting(self, record: Record | None) -> tuple[str, str]:
        if self._queue is not None:
            return QUEUED, "" if record is None else record.reason
        if self._killed or record is not None:
            return STOPPED, "its queue was killed; submit again to go on"
        return OPEN, ""

    def _in_slurm(self, record: Record | None, number: str) -> tuple[str, str]:
        state = QUEUED if record is None else record.state
        reason = "" if record is None else record.reason
        if self._slurm is None:
            return state, f"{reason} (as last written: Slurm does not answer here)".strip()
        word, place = self._slurm.get(number, ("", ""))
        if word in _WAITING:
            return QUEUED, f"Slurm's {number}: {place.strip('()').lower()}"
        if word in _UNDER_WAY:
            return RUNNING, f"Slurm's {number} on {place}"
        if word == "CANCELLED":
            return CANCELLED, f"Slurm's {number} was cancelled"
        if word:
            return FAILED, f"Slurm's {number}: {word.lower()} {reason}".strip()
        ended = FAILED if state == RUNNING else STOPPED
        return ended, f"Slurm's {number}: {reason or 'it left the queue unfinished'}"


def read_ids(out: Path) -> dict[str, str]:
    """Slurm's own numbers, such as 12_3, by job; of jobs that were last given to Slurm."""
    return _stored(_ids_file(out), dict[str, str]) or {}


def write_ids(out: Path, ids: Mapping[str, str]) -> None:
    """Put Slurm's numbers of all jobs that are its own into a sweep's folder."""
    write_whole(_ids_file(out), json.dumps(with_checksum(ids), indent=1))


def _stored(path: Path, kind: type[T]) -> T | None:
    """What a JSON file holds; None if there is no such file."""
    try:
        return read_json_as(path, kind)
    except NoFile:
        return None
    except NotUnderstood as error:
        raise UserError(
            f"{path}: not a readable record of a job ({error}); remove it, answers are elsewhere"
        ) from error


def _record_file(out: Path, name: str) -> Path:
    return out / "jobs" / f"{name}.json"


def _ids_file(out: Path) -> Path:
    return out / "jobs" / "slurm" / "ids.json"


def _ask_slurm(ids: Iterable[str]) -> Mapping[str, tuple[str, str]] | None:
    """States of jobs, as Slurm has them.

    Parameters
    ----------
    ids : iterable of str
        Slurm's numbers.

    Returns
    -------
    mapping of str to (str, str) or None
        State, and reason or node, by number; jobs that Slurm has forgotten, minutes after their
        end, are missing. None if there is no Slurm here, or it does not answer.
    """
    jobs = ",".join(sorted({number.split("_")[0] for number in ids}))
    if not jobs or shutil.which("squeue") is None:
        return None
    command = ["squeue", "-h", "-r", "-t", "all", "-o", "%i|%T|%R", "-j", jobs]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return None
    if answer.returncode and "Invalid job id" not in answer.stderr:
        return None
    lines = (line.split("|", 2) for line in answer.stdout.splitlines())
    return {number: (state, reason) for number, state, reason in lines}
