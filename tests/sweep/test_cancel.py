"""What status says of jobs whose queue runs, was stopped or killed; and how they are ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from engine.fixtures import sentence
from sweep.waiting import is_gone, wait_until
from typer.testing import CliRunner

from sparsemm_eval.cli import app
from sparsemm_eval.errors import UserError
from sparsemm_eval.sweep import jobs, process, slurm
from sparsemm_eval.sweep.jobs import cancel
from sparsemm_eval.sweep.lock import begun_at, holder, lock, process_here
from sparsemm_eval.sweep.plan import Plan, PlannedCell, PlannedJob, lock_file
from sparsemm_eval.sweep.process import Attempt, Command, Stopped
from sparsemm_eval.sweep.resources import Resources
from sparsemm_eval.sweep.state import QUEUE as QUEUE_LOCK
from sparsemm_eval.sweep.state import Record, log_file, read_ids, read_record, tail, write_ids
from sparsemm_eval.sweep.status import Status, status

NAMES = ("a", "b", "c")
QUEUE = """
import sys
from pathlib import Path
from sparsemm_eval.sweep.process import run_queue
from sparsemm_eval.sweep.lock import begun_at, holder, lock, process_here
from sparsemm_eval.sweep.plan import lock_file
from sparsemm_eval.sweep.process import Command
from sparsemm_eval.sweep.resources import Slot
from sparsemm_eval.sweep.state import QUEUE
out, seconds = Path(sys.argv[1]), sys.argv[2]
work = (sys.executable, "-I", "-S", "-c", f"import time; time.sleep({seconds})")
with lock(lock_file(out, QUEUE)):
    run_queue([Command(name, work) for name in "abc"], [Slot()] * 2, 0, out)
"""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A planned sweep of three jobs of one cell."""
    jobs = tuple(PlannedJob(name, "m", "t", n, 3, 1) for n, name in enumerate(NAMES))
    Plan(jobs, (PlannedCell("m", "t", "cell", "key", {}, 3, "x.json"),)).write(tmp_path)
    return tmp_path


@contextmanager
def queue(out: Path, seconds: float = 600) -> Iterator[subprocess.Popen]:
    """A queue with two slots in a process of its own, two jobs running."""
    with subprocess.Popen([sys.executable, "-c", QUEUE, str(out), str(seconds)]) as child:
        wait_until(lambda: states(out) == ["running", "running", "queued"])
        yield child
        child.kill()


def states(out: Path) -> list[str]:
    """Of the jobs."""
    return [job.state for job in status(out).jobs]


def reasons(said: Status) -> list[str]:
    """Of the jobs."""
    return [job.reason for job in said.jobs]


def test_nothing_was_submitted(out: Path) -> None:
    assert states(out) == ["open"] * 3
    assert not status(out).under_way
    done = CliRunner().invoke(app, ["cancel", str(out)])
    assert done.exit_code == 1
    assert "nothing was submitted here that could be cancelled" in done.output
    assert done.output.count("\n") == 1


def test_a_queue_is_cancelled_whole(out: Path) -> None:
    with queue(out) as child:
        pids = [read_record(out, name).pid for name in "ab"]
        said = status(out)
        assert reasons(said)[0].startswith(f"process {pids[0]} on ")
        assert said.under_way
        done = CliRunner().invoke(app, ["cancel", str(out)])
        assert done.exit_code == 0, done.output
        assert done.output == "cancelled: a, b, c, scoring\n"
        child.wait(10)
    assert all(map(is_gone, pids))
    assert states(out) == ["cancelled"] * 3
    assert not status(out).under_way
    assert cancel(out) == []


def test_what_a_killed_queue_left_is_seen_and_ended(out: Path) -> None:
    with queue(out) as child:
        pids = [read_record(out, name).pid for name in "ab"]
        child.kill()
        child.wait()
        # Its jobs go on.
        assert states(out) == ["running", "running", "stopped"]
        assert reasons(status(out))[2] == "its queue was killed; submit again to go on"
        os.kill(pids[0], signal.SIGKILL)
        wait_until(lambda: states(out)[0] == "failed")
        assert "died without a word" in reasons(status(out))[0]
        record = read_record(out, "b")
        replace(record, host="elsewhere").write(out)
        with pytest.raises(ValueError, match="on elsewhere, which cannot be ended from here"):
            cancel(out)
        assert states(out) == ["failed", "running", "stopped"]
        record.write(out)
        assert cancel(out) == ["b", "c", "scoring"]
    assert all(map(is_gone, pids))
    assert states(out) == ["failed", "cancelled", "cancelled"]


def test_another_process_of_an_orphans_number_is_left_alone(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What counts is when the kernel began it, not what a clock said that may have been set."""
    monkeypatch.setattr(process, "GRACE", 0.1)
    monkeypatch.setattr(process, "_LAST", 0.1)
    with queue(out) as child:
        child.kill()
        child.wait()
        record = read_record(out, "b")
        assert record.begun == begun_at(record.pid)
        before, ticks = record.begun.split()
        replace(record, begun=f"{before} {int(ticks) - 1}").write(out)
        with pytest.raises(UserError, match="b goes on, a process that it started") as caught:
            cancel(out)
        sentence(caught)
        assert not is_gone(record.pid)
        assert states(out) == ["cancelled", "running", "cancelled"]
        replace(record, begun=f"another-boot {ticks}").write(out)
        with pytest.raises(UserError, match="which cannot be ended from here"):
            cancel(out)
        assert not is_gone(record.pid)
        # A record of an older version, which does not say when its process began.
        path = out / "jobs" / "b.json"
        older = {key: value for key, value in asdict(record).items() if key != "begun"}
        path.write_text(json.dumps(older))
        assert cancel(out) == ["b"]
    wait_until(lambda: is_gone(record.pid))


def test_what_leaves_a_jobs_processes_is_not_said_to_be_cancelled(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_LAST", 0.1)
    sleep = "import time; time.sleep(600)"
    script = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {sleep!r}], start_new_session=True)\n"
        "print(child.pid, flush=True)\n"
        f"{sleep}"
    )
    job = Attempt(Record("a"), (sys.executable, "-c", script), out)
    wait_until(lambda: bool(tail(log_file(out, "a"))))
    monkeypatch.setattr(process, "GRACE", 0.5)
    try:
        with pytest.raises(UserError, match="a goes on, a process that it started writes to"):
            cancel(out)
        assert read_record(out, "a").ending == ""
    finally:
        os.kill(int(tail(log_file(out, "a"))[0]), signal.SIGKILL)
    wait_until(job.ended)


def test_a_lock_names_its_process_by_when_it_began(out: Path) -> None:
    path = lock_file(out, QUEUE_LOCK)
    with lock(path):
        words = path.read_text()
        assert process_here(path) == os.getpid()
        assert holder(path) == words.splitlines()[0]
        path.write_text(f"{words}0")  # a later process of the same number
        assert process_here(path) is None
        path.write_text(words.splitlines()[0])  # as older versions wrote it
        assert process_here(path) == os.getpid()


def test_a_queue_on_another_machine_is_not_ended_from_here(out: Path) -> None:
    with queue(out):
        path = lock_file(out, QUEUE_LOCK)
        words = path.read_text()
        path.write_text("process 1 on elsewhere")
        with pytest.raises(ValueError, match="cannot be ended from here") as caught:
            cancel(out)
        sentence(caught)
        assert states(out) == ["running", "running", "queued"]
        # Nor is it doubted where a lock of a job's log is not seen from here.
        Record("c", host="elsewhere", pid=1).write(out)
        assert reasons(status(out))[2] == "process 1 on elsewhere, by its queue"
        path.write_text(words)
        cancel(out)


def test_who_holds_a_jobs_lock_is_on_it_whatever_the_record_says(out: Path) -> None:
    Record("a", "failed", "a reason").write(out)
    with lock(lock_file(out, "a")):
        assert states(out) == ["running", "open", "open"]
    job, *_ = status(out).jobs
    assert (job.state, job.reason) == ("failed", "a reason")
    assert "a reason" in str(status(out))


def test_without_slurm_its_jobs_are_as_they_were_last_written(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    write_ids(out, {"a": "7_0", "b": "7_1"})
    Record("b", host="elsewhere", pid=5).write(out)
    said = status(out)
    assert [job.state for job in said.jobs] == ["queued", "running", "open"]
    assert all("Slurm does not answer here" in reason for reason in reasons(said)[:2])


def test_a_submission_to_slurm_that_is_asked_to_end_writes_down_its_jobs(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def submit_jobs(commands: list[Command], last: Command, *rest: object) -> dict[str, str]:
        os.kill(os.getpid(), signal.SIGTERM)  # as `cancel` does that finds the queue's lock held
        return {command.name: f"7_{n}" for n, command in enumerate([*commands, last])}

    monkeypatch.setattr(slurm, "submit_jobs", submit_jobs)
    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        jobs._give_to_slurm(
            out,
            [Command("a", ())],
            Command("scoring", ()),
            Resources("slurm", time="9"),
            0,
            (),
            "x",
        )
    assert read_ids(out) == {"a": "7_0", "scoring": "7_1"}


def test_watching_ends_when_nothing_waits_or_runs(out: Path) -> None:
    with queue(out, seconds=1.5):
        done = CliRunner().invoke(app, ["status", str(out), "--watch", "--seconds", "0.2"])
        assert done.exit_code == 0, done.output
        assert not status(out).under_way
    assert "its queue" not in done.output
    # Into a pipe: a line as it begins, and all of it at the end.
    assert done.output.startswith("answers 0 of 3, cells scored 0 of 1; running, a: process ")
    assert "\nanswers 0 of 3, cells scored 0 of 1; not running\n\njob " in done.output
