"""A bounded queue of jobs over this machine's slots: GPUs, or parts of its CPU."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sparsemm_eval.errors import UserError
from sparsemm_eval.sweep.attempt import GRACE, Attempt
from sparsemm_eval.sweep.records import FAILED, LOCAL, QUEUED, STOPPED, Record
from sparsemm_eval.sweep.signals import Stopped, noted

# Its record tells `cancel` whom to ask, its lock `status` whether jobs still wait for it.
QUEUE = "queue"
_PAUSE = 0.05
# Numbers would be those of this process's own CUDA_VISIBLE_DEVICES; UUIDs are true everywhere.
_LIST_GPUS = (
    "import torch; "
    "[print(f'GPU-{torch.cuda.get_device_properties(n).uuid}') "
    "for n in range(torch.cuda.device_count())]"
)


@dataclass(frozen=True)
class Command:
    """A job's name, and the program and arguments that do it."""

    name: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Slot:
    """Room for one job at a time.

    Parameters
    ----------
    gpus : tuple of str
        What its jobs see as their GPUs; none: they run on the CPU.
    threads : int
        Of its jobs on the CPU.
    """

    gpus: tuple[str, ...] = ()
    threads: int = 1

    def prefix(self) -> tuple[str, ...]:
        """What stands before a command, so that it keeps to the slot."""
        threads = () if self.gpus else (f"OMP_NUM_THREADS={self.threads}",)
        return ("env", f"CUDA_VISIBLE_DEVICES={','.join(self.gpus)}", *threads)


def make_slots(
    gpus: Sequence[str], each: int | None, most: int | None, threads: int
) -> tuple[Slot, ...]:
    """Part a machine into slots.

    Parameters
    ----------
    gpus : sequence of str
        Those that are there.
    each : int, optional
        How many a job gets; default one where there are any, else none, which is the CPU.
    most : int, optional
        At most so many slots; default as many as there are GPUs for, on the CPU one.
    threads : int
        Of the CPU, for all slots together.

    Raises
    ------
    ValueError
        If a job is to have more GPUs than there are, or fewer than none.
    """
    each = min(1, len(gpus)) if each is None else each
    if not 0 <= each <= len(gpus):
        raise UserError(f"gpus={each}: a job can have 0 to {len(gpus)} of this machine's GPUs")
    if most is not None and most < 1:
        raise UserError(f"max-parallel={most}: it must be an integer of at least 1")
    if each == 0:
        count = most or 1
        return (Slot(threads=max(1, threads // count)),) * count
    parts = [tuple(gpus[n : n + each]) for n in range(0, len(gpus) - each + 1, each)]
    return tuple(map(Slot, parts[:most]))


def find_gpus() -> list[str]:
    """UUIDs of the GPUs this process may use; asked of another, which takes no memory on them."""
    said = subprocess.run(
        [sys.executable, "-c", _LIST_GPUS], capture_output=True, text=True, check=False
    )
    return said.stdout.split()


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
        self.waiting = deque(Record(name, LOCAL, QUEUED) for name in self.words)
        self.running: dict[Attempt, Slot] = {}
        self.over: dict[str, Record] = {}
        self.free = deque(slots)
        for record in self.waiting:
            record.write(out)

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
            if record.state == FAILED and record.attempts <= self.retries:
                again = f"attempt {record.attempts} failed: {record.reason}"
                record = replace(record, state=QUEUED, reason=again)
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
