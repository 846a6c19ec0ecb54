"""A job's process: how it is begun, asked to end and recorded; signals that ask this one to end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType

from sparsemm_eval.errors import UserError
from sparsemm_eval.paths import write_whole
from sparsemm_eval.sweep.lock import PATIENCE, Locked, held, release, seize

OPEN, QUEUED, RUNNING, DONE = "open", "queued", "running", "done"
FAILED, STOPPED, CANCELLED = "failed", "stopped", "cancelled"
# Slurm cancels and preempts with SIGTERM, and announces time limits with SIGUSR1 or SIGUSR2.
ENDING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# Seconds that a job may take to leave when it is asked to; Slurm announces time limits 90 before.
GRACE = 30.0
_PAUSE = 0.05


class Stopped(BaseException):
    """This process was asked to end.

    Not an Exception: code that goes on after a sample's error must not go on after this.

    Parameters
    ----------
    signum : int
        The signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signum).name}"


@contextmanager
def leaving() -> Iterator[None]:
    """Raise `Stopped` on the first ending signal, wherever the block is then; ignore the rest.

    The answers store writes all of a batch or nothing, so no moment is a bad one.
    """

    def leave(signum: int, frame: FrameType | None) -> None:
        for ending in ENDING:
            signal.signal(ending, signal.SIG_IGN)
        raise Stopped(signum)

    with _handled(ENDING, leave):
        yield


@contextmanager
def noted() -> Iterator[list[int]]:
    """Note ending signals and Ctrl-C in the list that is given, and go on."""
    caught: list[int] = []
    with _handled((*ENDING, signal.SIGINT), lambda signum, frame: caught.append(signum)):
        yield caught


@dataclass(frozen=True)
class Command:
    """A job's name, and the program and arguments that do it."""

    name: str
    words: tuple[str, ...]


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
    """

    name: str
    ending: str = ""
    reason: str = ""
    attempts: int = 0
    host: str = ""
    pid: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def state(self) -> str:
        """The ending, or running."""
        return self.ending or RUNNING

    @property
    def here(self) -> bool:
        """Whether its process is, or was, on this machine."""
        return self.host == socket.gethostname()

    def begun(self, pid: int) -> Record:
        """The record of the next attempt, by a process of this machine that has just begun."""
        return Record(self.name, "", "", self.attempts + 1, socket.gethostname(), pid)

    def over(self, ending: str, reason: str = "") -> Record:
        """The record of the same attempt after its process has ended."""
        return replace(self, ending=ending, reason=reason)

    def write(self, out: Path) -> None:
        """Put it into a sweep's folder."""
        write_whole(_record_file(out, self.name), json.dumps(asdict(self), indent=1))


def read_record(out: Path, name: str) -> Record | None:
    """The record of one job; None if it was never begun.

    Raises
    ------
    UserError
        If the file is broken.
    """
    path = _record_file(out, name)
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path}: not a readable record of a job ({error}); remove it, answers are elsewhere"
        ) from error


def take_record(out: Path, name: str) -> Record | None:
    """Read the record of a job and remove it, as the job is submitted anew."""
    record = read_record(out, name)
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


class Attempt:
    """A job's command as a process group of its own, begun; its record is written as it goes.

    Parameters
    ----------
    record : Record
        The record of the attempt before, or an empty one.
    command : sequence of str
        Program and arguments.
    out : Path
        The sweep's folder.
    patience : float
        Seconds to wait until the processes of an earlier attempt are gone.

    Raises
    ------
    OSError
        If the command cannot be begun, or processes of an earlier attempt live.
    """

    def __init__(
        self, record: Record, command: Sequence[str], out: Path, patience: float = PATIENCE
    ) -> None:
        self._out = out
        path = log_file(out, record.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._log = path.open("ab")
        try:
            if not seize(self._log, patience):
                raise Locked(f"{path}: processes of an earlier attempt still write to it")
            # Standard output is the locked file itself, so that the lock lives as long as any
            # process that writes there. A session of its own: what it starts ends with it, and
            # Ctrl-C comes from us alone.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
                start_new_session=True,
            )  # fmt: skip
        except OSError:
            self._log.close()
            raise
        self.record = record.begun(self._process.pid)
        self.record.write(out)

    def ended(self) -> bool:
        """Whether it is over; then its record says how."""
        if self._process.poll() is None:
            return False
        self._kill()  # what it left behind, such as ranks of a launcher that was killed
        code = self._process.returncode
        self._settle(*((DONE, "") if code == 0 else (FAILED, self._why(code))))
        return True

    def stop(self, reason: str, grace: float = GRACE) -> None:
        """Ask it to end, wait, and end it if it does not; its record then gives the reason.

        One that failed before is recorded as stopped too: that it was asked may be why it failed.
        """
        self.ask()
        end = time.monotonic() + grace
        while self._process.poll() is None and time.monotonic() < end:
            time.sleep(_PAUSE)
        self._kill()
        code = self._process.wait()
        self._settle(*((DONE, "") if code == 0 else (STOPPED, reason)))

    def ask(self) -> None:
        """Send it SIGTERM."""
        self._signal(signal.SIGTERM)

    def _settle(self, ending: str, reason: str) -> None:
        self.record = self.record.over(ending, reason)
        self.record.write(self._out)
        if not self._log.closed:
            # For all that share the file, even processes that have left the group.
            release(self._log)
            self._log.close()

    def _why(self, code: int) -> str:
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        last = tail(log_file(self._out, self.record.name), 1)
        return f"exit code {code}" + (f": {last[0][:300]}" if last else "")

    def _kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if not self._log.closed:  # once it is over, its number may be another process's
            signal_group(self._process.pid, number)


def end_orphan(record: Record, out: Path) -> None:
    """End a job whose queue was killed, and all that it started."""
    signal_group(record.pid, signal.SIGTERM)
    end = time.monotonic() + GRACE
    while held(log_file(out, record.name)) and time.monotonic() < end:
        time.sleep(_PAUSE)
    signal_group(record.pid, signal.SIGKILL)


def signal_group(pid: int, number: int) -> None:
    """Send a signal to all processes of a group; all of them may have ended."""
    with suppress(ProcessLookupError):
        os.killpg(pid, number)


def _record_file(out: Path, name: str) -> Path:
    return out / "jobs" / f"{name}.json"


@contextmanager
def _handled(signals: Sequence[signal.Signals], handler: signal.Handlers) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, earlier in before.items():
            # Once it has been asked to end, a process is not to be disturbed while it does.
            if signal.getsignal(number) is handler:
                signal.signal(number, earlier)
