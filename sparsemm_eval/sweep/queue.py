"""A bounded queue of jobs over this machine's slots."""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

from sparsemm_eval.sweep.process import (
    FAILED,
    GRACE,
    QUEUED,
    STOPPED,
    Attempt,
    Command,
    Record,
    Stopped,
    noted,
)
from sparsemm_eval.sweep.resources import Slot

_PAUSE = 0.05


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


def _why(signals: Sequence[int]) -> str:
    if not signals:
        return "its queue broke off"
    word = "Ctrl-C" if signals[0] == signal.SIGINT else signal.Signals(signals[0]).name
    return f"its queue was stopped by {word}"
