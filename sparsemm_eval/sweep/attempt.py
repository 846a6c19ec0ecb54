"""One attempt at a job: its command as a process group of its own, its log, how it ended."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sparsemm_eval.sweep.records import DONE, FAILED, STOPPED, Record, log_file, tail

# Seconds that a job may take to leave when it is asked to; Slurm announces time limits 90 before.
GRACE = 30.0
_PAUSE = 0.05


class Attempt:
    """A job's command, begun; its record is written as it goes.

    Parameters
    ----------
    record : Record
        As it was before.
    command : sequence of str
        Program and arguments.
    out : Path
        The sweep's folder.

    Raises
    ------
    OSError
        If the command cannot be begun.
    """

    def __init__(self, record: Record, command: Sequence[str], out: Path) -> None:
        self._out = out
        path = log_file(out, record.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as log:
            # A session of its own: what it starts ends with it, and Ctrl-C comes from us alone.
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.record = record.begun(self._process.pid)
        self.record.write(out)

    def ended(self) -> bool:
        """Whether it is over; then its record says how."""
        if self._process.poll() is None:
            return False
        self._kill()  # what it left behind, such as ranks of a launcher that was killed
        code = self._process.returncode
        state, reason = (DONE, "") if code == 0 else (FAILED, self._why(code))
        self._settle(state, reason)
        return True

    def stop(self, reason: str, grace: float = GRACE) -> None:
        """Ask it to end, wait, and end it if it does not."""
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

    def _settle(self, state: str, reason: str) -> None:
        self.record = self.record.over(state, reason)
        self.record.write(self._out)

    def _why(self, code: int) -> str:
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        said = tail(log_file(self._out, self.record.name), 1)
        return f"exit code {code}" + (f": {said[0][:300]}" if said else "")

    def _kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # all of the group may have ended
            os.killpg(self._process.pid, number)
