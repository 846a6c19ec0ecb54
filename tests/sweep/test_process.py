"""The local queue: every job ends as it should whatever is killed, and slots come back."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest
from engine.fixtures import sentence
from sweep.waiting import is_gone, wait_until

from sparsemm_eval.sweep.lock import held
from sparsemm_eval.sweep.process import Attempt, Command, run_queue
from sparsemm_eval.sweep.resources import Slot, find_gpus, make_slots
from sparsemm_eval.sweep.state import (
    Record,
    log_file,
    read_ids,
    read_record,
    tail,
    write_ids,
)

PYTHON = (sys.executable, "-I", "-S", "-c")
# Notes where it ran, works a moment, and dies as often as it is told to.
WORK = """
import os, sys, time
mark, deaths, pause = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
with open(mark, "a") as file:
    file.write(os.environ["CUDA_VISIBLE_DEVICES"] + f" {os.getpid()}\\n")
time.sleep(pause)
if len(open(mark).readlines()) <= deaths:
    os.kill(os.getpid(), 9) if deaths % 2 else sys.exit("this one dies")
"""
QUEUE = """
import sys
from pathlib import Path
from sparsemm_eval.sweep.process import run_queue
from sparsemm_eval.sweep.process import Command, Stopped
from sparsemm_eval.sweep.resources import Slot
out, words = Path(sys.argv[1]), tuple(sys.argv[2:])
try:
    run_queue([Command(str(n), words) for n in range(4)], [Slot()] * 2, 0, out, grace=1.0)
except Stopped as stopped:
    print(stopped)
"""
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


def test_two_hundred_jobs_and_random_kills(tmp_path: Path) -> None:
    """Some die by themselves, once or every time; others are killed from outside."""
    chance = random.Random(7)
    deaths = {str(n): chance.choice([0, 0, 0, 0, 1, 2, 9]) for n in range(200)}
    (tmp_path / "marks").mkdir()
    commands = [
        Command(
            name,
            (*PYTHON, WORK, str(tmp_path / "marks" / name), str(count), str(chance.random() / 30)),
        )
        for name, count in deaths.items()
    ]
    slots = [Slot((f"GPU-{n}",)) for n in range(4)]
    told: list[tuple[float, Record]] = []
    alive: dict[str, int] = {}
    killed: set[str] = set()

    def tell(record: Record) -> None:
        told.append((time.time(), record))
        alive.pop(record.name, None)
        if record.state == "running":
            alive[record.name] = record.pid
            # Now and then, and at most once each, so that what is to succeed can.
            if deaths[record.name] < 2 and record.name not in killed and chance.random() < 0.2:
                killed.add(record.name)
                threading.Timer(chance.random() / 20, kill, [record.name, record.pid]).start()

    def kill(name: str, pid: int) -> None:
        if alive.get(name) == pid:
            os.kill(pid, signal.SIGKILL)

    done = run_queue(commands, slots, retries=2, out=tmp_path, tell=tell)
    assert [record.name for record in done] == list(deaths)
    for record in done:
        hopeless = deaths[record.name] > 2
        assert record.state == ("failed" if hopeless else "done"), record
        if hopeless:
            assert record.attempts == 3
            assert record.reason == "killed by SIGKILL"
        assert read_record(tmp_path, record.name) == record
    outside = [r for _, r in told if r.name in killed and "SIGKILL" in r.reason]
    assert len(outside) > 5, "kills from outside have hit"
    # Every slot had one job at a time, and all were in use to the end.
    lines = [
        line for path in (tmp_path / "marks").iterdir() for line in path.read_text().split("\n")
    ]
    slot_of = {int(line.split()[1]): line.split()[0] for line in lines if line}
    spans = defaultdict(list)
    begun: dict[int, float] = {}
    for moment, record in told:
        if record.state == "running":
            begun[record.pid] = moment
        # One that was killed before it could say where it ran is in nobody's way.
        elif record.pid in slot_of:
            spans[slot_of[record.pid]].append((begun[record.pid], moment))
    assert set(spans) == {slot.gpus[0] for slot in slots}
    for times in spans.values():
        times.sort()
        assert all(end <= begin for (_, end), (begin, _) in pairwise(times))
    last = max(end for times in spans.values() for _, end in times)
    assert all(last - times[-1][1] < 5 for times in spans.values())


def test_a_job_that_fails_is_tried_again_and_its_log_says_why(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    again = Command("again", (*PYTHON, WORK, str(mark), "2", "0"))
    never = Command("never", (*PYTHON, "import sys; sys.exit('a reason')"))
    missing = Command("missing", ("/no/such/program",))
    done = run_queue([never, again, missing], [Slot()], 2, tmp_path)
    assert [(record.state, record.attempts) for record in done] == [
        ("failed", 3), ("done", 3), ("failed", 3)
    ]  # fmt: skip
    assert done[0].reason == "exit code 1: a reason"
    assert "No such file" in done[2].reason
    assert tail(log_file(tmp_path, "never")) == ["a reason"] * 3
    assert tail(log_file(tmp_path, "again")) == ["this one dies"] * 2


def test_what_a_dead_job_left_running_is_ended(tmp_path: Path) -> None:
    left = tmp_path / "left"
    script = (
        "import os, subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {STUBBORN!r}])\n"
        f"open({str(left)!r}, 'w').write(str(child.pid))\n"
        "os.kill(os.getpid(), 9)"
    )
    (record,) = run_queue([Command("x", (*PYTHON, script))], [Slot()], 0, tmp_path)
    assert record.reason == "killed by SIGKILL"
    wait_until(lambda: is_gone(int(left.read_text())))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("job", ["import time; time.sleep(600)", STUBBORN])
def test_a_queue_that_is_stopped_leaves_nothing_behind(
    tmp_path: Path, number: signal.Signals, job: str
) -> None:
    command = [sys.executable, "-c", QUEUE, str(tmp_path), *PYTHON, job]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as queue:
        running = running_pids(tmp_path)
        queue.send_signal(number)
        said, _ = queue.communicate(timeout=30)
    assert said == f"stopped by {number.name}\n"
    assert all(map(is_gone, running))
    records = [read_record(tmp_path, str(n)) for n in range(4)]
    assert {record.state for record in records} == {"stopped"}
    word = "Ctrl-C" if number == signal.SIGINT else number.name
    assert {record.reason for record in records} == {f"its queue was stopped by {word}"}
    # And again, to the end.
    again = [Command(str(n), (*PYTHON, "pass")) for n in range(4)]
    assert {r.state for r in run_queue(again, [Slot()], 0, tmp_path)} == {"done"}


def running_pids(out: Path) -> list[int]:
    """Wait for two running jobs."""

    def running() -> list[int]:
        records = [read_record(out, str(n)) for n in range(4)]
        return [record.pid for record in records if record and record.state == "running"]

    wait_until(lambda: len(running()) == 2)
    time.sleep(0.3)  # until a stubborn one ignores signals
    return running()


def test_a_job_runs_as_long_as_one_of_its_processes(tmp_path: Path) -> None:
    """Its log is locked until then, whatever its record says, and whoever else has its number."""
    Record("x").next_attempt(os.getpid()).write(tmp_path)
    assert not held(log_file(tmp_path, "x"))
    sleep = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', {!r}])"
    job = Attempt(Record("x"), (*PYTHON, sleep.format("import time; time.sleep(600)")), tmp_path)
    job._process.wait()
    assert held(log_file(tmp_path, "x"))
    with pytest.raises(OSError, match="processes of an earlier attempt still write to it"):
        Attempt(Record("x"), (*PYTHON, "pass"), tmp_path)
    threading.Timer(0.8, job.ended).start()
    later = Attempt(Record("x"), (*PYTHON, "pass"), tmp_path, patience=30)
    assert job.record.ending == "done"
    wait_until(later.ended)
    assert not held(log_file(tmp_path, "x"))
    assert read_record(tmp_path, "x") == later.record


def test_a_job_that_is_over_can_be_stopped(tmp_path: Path) -> None:
    """As one in Slurm is that fails at the SIGTERM of a preemption, before its runner stops it."""
    job = Attempt(Record("x"), (*PYTHON, "raise SystemExit(3)"), tmp_path)
    wait_until(job.ended)
    assert job.record.reason == "exit code 3"
    job.ask()
    job.stop("Slurm sent SIGTERM")
    assert (job.record.ending, job.record.reason) == ("stopped", "Slurm sent SIGTERM")
    assert read_record(tmp_path, "x") == job.record


def test_a_broken_record_is_named(tmp_path: Path) -> None:
    Record("x").write(tmp_path)
    (tmp_path / "jobs" / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.json: not a readable record") as caught:
        read_record(tmp_path, "x")
    sentence(caught)
    write_ids(tmp_path, {"x": "7_0"})
    (tmp_path / "jobs" / "slurm" / "ids.json").write_text("{")
    with pytest.raises(ValueError, match=r"ids\.json: not a readable record") as caught:
        read_ids(tmp_path)
    sentence(caught)


# --- slots --------------------------------------------------------------------------------------


def test_gpus_are_parted_into_slots() -> None:
    gpus = [f"GPU-{letter}" for letter in "abcde"]
    assert make_slots(gpus, None, None, 8) == tuple(Slot((gpu,)) for gpu in gpus)
    assert make_slots(gpus, 2, None, 8) == (Slot(("GPU-a", "GPU-b")), Slot(("GPU-c", "GPU-d")))
    assert make_slots(gpus, 1, 3, 8) == tuple(Slot((gpu,)) for gpu in gpus[:3])
    assert make_slots(gpus, 0, 3, 8) == (Slot((), 2),) * 3
    assert make_slots([], None, None, 8) == (Slot((), 8),)
    assert make_slots([], None, 16, 8) == (Slot((), 1),) * 16


@pytest.mark.parametrize(("each", "most", "words"), [
    (-1, None, "gpus=-1: a job can have 0 to 2"),
    (3, None, "gpus=3: a job can have 0 to 2"),
    (None, 0, "max-parallel=0: it must be an integer of at least 1"),
])  # fmt: skip
def test_slots_that_cannot_be(each: int | None, most: int | None, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        make_slots(["GPU-a", "GPU-b"], each, most, 8)
    sentence(caught)


def test_a_job_sees_its_slots_gpus_alone(tmp_path: Path) -> None:
    show = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ.get('OMP_NUM_THREADS'))"
    run_queue([Command("gpu", (*PYTHON, show))], [Slot(("GPU-a", "GPU-b"))], 0, tmp_path)
    run_queue([Command("cpu", (*PYTHON, show))], [Slot((), 3)], 0, tmp_path)
    assert tail(log_file(tmp_path, "gpu"))[0].startswith("GPU-a,GPU-b ")
    assert tail(log_file(tmp_path, "cpu")) == [" 3"]


@pytest.mark.gpu
def test_the_gpus_that_are_found_are_seen_by_their_names() -> None:
    gpus = find_gpus()
    count = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    for gpu in gpus:
        seen = subprocess.run([*Slot((gpu,)).prefix(), *count], capture_output=True, text=True)
        assert seen.stdout == "1\n"
