"""What became of each job that was submitted: a small file a job, written whole."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from sparsemm_eval.errors import UserError
from sparsemm_eval.paths import write_whole

OPEN, QUEUED, RUNNING, DONE = "open", "queued", "running", "done"
FAILED, STOPPED, CANCELLED = "failed", "stopped", "cancelled"
LOCAL, SLURM = "local", "slurm"


@dataclass(frozen=True)
class Record:
    """A job as its runner last wrote it down.

    One process at a time writes a job's record: who submits it, then who runs it.

    Parameters
    ----------
    name : str
        The job's name in the grid, or ``scoring``.
    executor : {"local", "slurm"}
        What runs it.
    state : str
        queued, running, done, failed, stopped (asked to end) or cancelled.
    reason : str
        Why it is in that state; empty if that needs no words.
    attempts : int
        How often it was started.
    host : str
        Where its process runs or ran.
    pid : int
        Of its process; 0 before the first.
    born : float
        When that process began, as the system has it: a number that was given out again is
        another process.
    started, ended : float
        Of its last attempt, seconds since 1970; 0 if not yet.
    """

    name: str
    executor: str
    state: str
    reason: str = ""
    attempts: int = 0
    host: str = ""
    pid: int = 0
    born: float = 0.0
    started: float = 0.0
    ended: float = 0.0

    def write(self, out: Path) -> None:
        """Put it into a sweep's folder."""
        path = _path(out, self.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(asdict(self), indent=1))

    def begun(self, pid: int) -> Record:
        """The same job in a process of its own, which has just begun."""
        return replace(
            self, state=RUNNING, reason="", attempts=self.attempts + 1, pid=pid,
            host=socket.gethostname(), born=_born(pid) or 0.0, started=time.time(), ended=0.0,
        )  # fmt: skip

    def over(self, state: str, reason: str = "") -> Record:
        """The same job after its process has ended."""
        return replace(self, state=state, reason=reason, ended=time.time())

    @property
    def here(self) -> bool:
        """Whether its process is, or was, on this machine."""
        return self.host == socket.gethostname()

    @property
    def alive(self) -> bool:
        """Whether its process still runs on this machine."""
        return self.here and self.pid > 0 and _born(self.pid) == self.born


def read_record(out: Path, name: str) -> Record | None:
    """Of one job; None if it was never submitted.

    Raises
    ------
    ValueError
        If the file is broken.
    """
    stored = _read(_path(out, name))
    return None if stored is None else Record(**stored)


def read_ids(out: Path) -> dict[str, str]:
    """Slurm's own numbers, such as 12_3, by job; of the last submission that had the job."""
    return _read(_ids(out)) or {}


def write_ids(out: Path, ids: Mapping[str, str]) -> None:
    """Add Slurm's numbers of jobs."""
    write_whole(_ids(out), json.dumps({**read_ids(out), **ids}, indent=1))


def log_file(out: Path, name: str) -> Path:
    """What a job says, one attempt after the other."""
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


def _path(out: Path, name: str) -> Path:
    return out / "jobs" / f"{name}.json"


def _ids(out: Path) -> Path:
    return out / "jobs" / "slurm" / "ids.json"


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(
            f"{path}: not a readable record of a job ({error}); remove it, answers are elsewhere"
        ) from error


def _born(pid: int) -> float | None:
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None
