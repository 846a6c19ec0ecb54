"""Jobs as processes of this machine: one attempt, a bounded queue of jobs, and what ends them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from sparsemm_eval.sweep.lock import PATIENCE, Locked, held, release, seize
from sparsemm_eval.sweep.resources import Slot
from sparsemm_eval.sweep.state import DONE, FAILED, QUEUED, STOPPED, Record, log_file, tail

# Slurm cancels and preempts with SIGTERM, and announces time limits with SIGUSR1 or SIGUSR2.
ENDING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# Seconds within which a second ending signal does not disturb the way out after the first; later
# it counts, as a library may have swallowed the first.
_AGAIN = 10.0
# Seconds that a job may take to leave when it is asked to; Slurm announces time limits 90 before.
GRACE = 30.0
# Seconds until the system has buried what was killed.
_LAST = 2.0
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
    """Raise `Stopped` on Ctrl-C or an ending signal, wherever the block is then; once is enough.

    The answers store writes all of a batch or nothing, so no moment is a bad one.
    """
    signals = (*ENDING, signal.SIGINT)
    raised: list[float] = []

    def leave(signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not raised or now - raised[-1] > _AGAIN:
            raised.append(now)
            raise Stopped(signum)

    with _handled(signals, leave):
        try:
            yield
        except Stopped:
            for ending in signals:  # nothing is to disturb the process' last words
                signal.signal(ending, signal.SIG_IGN)
            raise


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
        self.record = record.next_attempt(self._process.pid)
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


def run_queue(
    commands: Sequence[Command],
    slots: Sequence[Slot],
    retries: int,
    out: Path,
    tell: Callable[[Record], None] = lambda record: None,
    grace: float = GRACE,
) -> list[Record]:
    """Run all commands, each in a slot of its own while it runs.

    One that fails goes to the end of the queue, until it has failed once more than ``retries``;
    the others go on.

    Parameters
    ----------
    commands : sequence of Command
        Their names differ.
    slots : sequence of Slot
        At least one.
    retries : int
        How often a command that failed is tried again.
    out : Path
        The sweep's folder, for records and logs.
    tell : callable, optional
        Given every record that says running, done, failed or queued again.
    grace : float
        Seconds that commands are given to leave when the queue is stopped.

    Returns
    -------
    list of Record
        How each ended, in the order of the commands.

    Raises
    ------
    Stopped
        On Ctrl-C, SIGTERM, SIGUSR1 or SIGUSR2, after all commands have ended.
    """
    queue = _Queue(commands, slots, retries, out, tell)
    with noted() as signals:
        try:
            while queue.busy and not signals:
                queue.fill()
                queue.collect()
                time.sleep(_PAUSE)
        finally:
            queue.stop(_why(signals), grace)
    if signals:
        raise Stopped(signals[0])
    return [queue.over[command.name] for command in commands]


class _Queue:
    """Jobs that wait, run or are over, and free slots; each job and each slot is in one place."""

    def __init__(
        self,
        commands: Sequence[Command],
        slots: Sequence[Slot],
        retries: int,
        out: Path,
        tell: Callable[[Record], None],
    ) -> None:
        self.retries, self.out, self.tell = retries, out, tell
        self.words = {command.name: command.words for command in commands}
        self.waiting = deque(Record(name) for name in self.words)
        self.running: dict[Attempt, Slot] = {}
        self.over: dict[str, Record] = {}
        self.free = deque(slots)

    @property
    def busy(self) -> bool:
        """Whether a job waits or runs."""
        return bool(self.waiting or self.running)

    def fill(self) -> None:
        """Begin jobs while there are slots."""
        while self.waiting and self.free:
            slot, record = self.free.popleft(), self.waiting.popleft()
            words = (*slot.prefix(), *self.words[record.name])
            try:
                attempt = Attempt(record, words, self.out)
            except OSError as error:
                self.free.append(slot)
                self._settle(record.over(FAILED, f"it cannot be begun ({error})"))
                continue
            self.running[attempt] = slot
            self.tell(attempt.record)

    def collect(self) -> None:
        """Take back the slots of jobs that have ended; those that failed wait again."""
        for attempt in [attempt for attempt in self.running if attempt.ended()]:
            self.free.append(self.running.pop(attempt))
            record = attempt.record
            if record.ending == FAILED and record.attempts <= self.retries:
                again = f"attempt {record.attempts} failed: {record.reason}"
                record = record.over(QUEUED, again)
                record.write(self.out)
                self.waiting.append(record)
                self.tell(record)
            else:
                self._settle(record)

    def stop(self, why: str, grace: float) -> None:
        """End what runs, and write down that the rest was not begun."""
        for attempt in self.running:
            attempt.ask()
        end = time.monotonic() + grace
        for attempt in self.running:
            attempt.stop(why, max(0.0, end - time.monotonic()))
        for record in self.waiting:
            record.over(STOPPED, why).write(self.out)

    def _settle(self, record: Record) -> None:
        self.over[record.name] = record
        record.write(self.out)
        self.tell(record)


def end_orphan(record: Record, out: Path) -> bool:
    """End a job whose queue was killed, and all that it started.

    Returns
    -------
    bool
        Whether it is over. What left its process group may go on.
    """
    path = log_file(out, record.name)
    for number, seconds in ((signal.SIGTERM, GRACE), (signal.SIGKILL, _LAST)):
        if record.pid > 1 and not record.number_is_anothers:
            signal_group(record.pid, number)
        end = time.monotonic() + seconds
        while held(path) and time.monotonic() < end:
            time.sleep(_PAUSE)
    return not held(path)


def signal_group(pid: int, number: int) -> None:
    """Send a signal to all processes of a group; all of them may have ended."""
    with suppress(ProcessLookupError):
        os.killpg(pid, number)


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


def _why(signals: Sequence[int]) -> str:
    if not signals:
        return "its queue broke off"
    word = "Ctrl-C" if signals[0] == signal.SIGINT else signal.Signals(signals[0]).name
    return f"its queue was stopped by {word}"
