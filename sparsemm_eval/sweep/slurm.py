"""Jobs on a Slurm cluster, through submitit: what runs in them, and how they are submitted."""

from __future__ import annotations

import io
import re
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from sparsemm_eval.errors import UserError
from sparsemm_eval.sweep.process import Attempt, Command
from sparsemm_eval.sweep.resources import Resources, find_submitit
from sparsemm_eval.sweep.state import DONE, Record, read_record

# A requeued job goes on where it was, so it may reach its time limit often; but not for ever, as
# one would whose model takes longer to load.
_TIMEOUTS = 100
_PAUSE = 0.2
# Seconds that a job waits to be killed after Slurm's SIGTERM; longer than any usual grace time.
_FAREWELL = 900
# Seconds until a file server notices that a node has died with its locks; Slurm requeues at once.
_LOST_NODE = 300


class SlurmJob:
    """A job inside Slurm: its command, tried again if it fails, stopped when Slurm says so.

    Called by submitit, in the process that Slurm started.

    Parameters
    ----------
    command : Command
        The job.
    out : Path
        The sweep's folder, absolute.
    retries : int
        How often a command that failed is tried again in one run of the job.
    """

    def __init__(self, command: Command, out: Path, retries: int) -> None:
        self.command, self.out, self.retries = command, out, retries
        self._attempt: Attempt | None = None
        self._asked_to_end = False

    def __call__(self) -> None:
        """Run the command to its end.

        Raises
        ------
        RuntimeError
            If it failed once too often; Slurm then says FAILED.
        """
        # In place of submitit's handler, which lets the job compute on until it is killed.
        signal.signal(signal.SIGTERM, self._end)
        # submitit requeues on SIGUSR2 alone; some clusters announce the end with SIGUSR1.
        signal.signal(signal.SIGUSR1, signal.getsignal(signal.SIGUSR2))
        name, words = self.command.name, self.command.words
        for _ in range(self.retries + 1):
            record = read_record(self.out, name) or Record(name)
            self._attempt = Attempt(record, words, self.out, _LOST_NODE)
            if self._asked_to_end:  # while it began
                self._attempt.ask()
            while not self._attempt.ended():
                time.sleep(_PAUSE)
            if self._attempt.record.ending == DONE:
                return
            if self._asked_to_end:
                self._attempt.stop("Slurm sent SIGTERM")
                self._await_the_kill()
        raise RuntimeError(self._attempt.record.reason)

    def checkpoint(self) -> Any:
        """Called by submitit when Slurm announces the time limit, before it requeues the job."""
        from submitit.helpers import DelayedSubmission

        if self._attempt is not None:
            self._attempt.stop("Slurm announced the job's end, and requeued it")
        return DelayedSubmission(SlurmJob(self.command, self.out, self.retries))

    def _end(self, signum: int, frame: FrameType | None) -> None:
        self._asked_to_end = True
        if self._attempt is not None:
            self._attempt.ask()

    def _await_the_kill(self) -> None:
        # Cancelled or preempted: which it is, Slurm knows. A job that ended by itself now would
        # be FAILED, and one that is to run again would not.
        end = time.monotonic() + _FAREWELL
        while time.monotonic() < end:
            time.sleep(_PAUSE)
        raise RuntimeError("it was sent SIGTERM, and not by Slurm")


def submit_jobs(
    commands: Sequence[Command],
    last: Command,
    resources: Resources,
    retries: int,
    out: Path,
    after: Iterable[str],
    name: str,
) -> dict[str, str]:
    """Submit an array of jobs, and one that follows all of them however they end.

    Parameters
    ----------
    commands : sequence of Command
        May be empty.
    last : Command
        Begun after these, and after all jobs of ``after``; it has no GPU.
    resources : Resources
        For all.
    retries : int
        Of each job.
    out : Path
        The sweep's folder, which all nodes see.
    after : iterable of str
        Slurm's numbers of jobs that are in its queue.
    name : str
        Of the jobs, in Slurm's lists.

    Returns
    -------
    dict of str to str
        Slurm's numbers by job.

    Raises
    ------
    UserError
        With sbatch's own words if it refuses; nothing is submitted then. Without submitit or
        Slurm, saying so.
    """
    submitit = find_submitit()
    executor = submitit.SlurmExecutor(out / "jobs" / "slurm", max_num_timeout=_TIMEOUTS)
    executor.update_parameters(**resources.parameters(name))
    jobs = [SlurmJob(command, out, retries) for command in commands]
    ids = dict(zip((c.name for c in commands), _submit(executor, jobs), strict=True))
    ahead = sorted({number.split("_")[0] for number in (*ids.values(), *after)})
    alone = submitit.SlurmExecutor(out / "jobs" / "slurm", max_num_timeout=_TIMEOUTS)
    alone.update_parameters(**replace(resources, gpus=0).parameters(f"{name}-{last.name}"))
    if ahead:
        alone.update_parameters(dependency=":".join(["afterany", *ahead]))
    try:
        (ids[last.name],) = _submit(alone, [SlurmJob(last, out, retries)])
    except UserError:
        cancel_jobs(ids.values())
        raise
    return ids


def cancel_jobs(ids: Iterable[str]) -> None:
    """Cancel jobs that wait or run.

    Raises
    ------
    OSError
        In Slurm's words, if it refuses.
    """
    if numbers := list(ids):
        done = subprocess.run(["scancel", *numbers], capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"scancel: {_words(done.stderr)}")


def _submit(executor: Any, jobs: Sequence[SlurmJob]) -> list[str]:
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    if not jobs:
        return []
    try:
        # submitit prints what it raises.
        with redirect_stderr(io.StringIO()):
            return [job.job_id for job in executor.submit_array(jobs)]
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"sbatch refused, nothing was submitted: {_words(str(error))}") from error


def _words(text: str) -> str:
    lines = (re.sub(r"^\w+: (error: )?", "", line.strip()) for line in text.splitlines())
    return "; ".join(line for line in lines if line)
