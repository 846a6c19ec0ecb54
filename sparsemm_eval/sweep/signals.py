"""Signals that ask a process to end: Slurm's at preemption and time limits, Ctrl-C, kill."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

# Slurm cancels and preempts with SIGTERM, and announces time limits with SIGUSR1 or SIGUSR2.
ENDING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


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
