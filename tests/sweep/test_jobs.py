"""Jobs on this machine: the tables of a plain sweep, whatever fails, stops or comes again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine.fixtures import rows, sentence
from sweep.small_demo import CELLS, tables, write_small_demo
from typer.testing import CliRunner

from sparsemm_eval.cli import app
from sparsemm_eval.paths import write_whole
from sparsemm_eval.sweep.grid_file import read_grid
from sparsemm_eval.sweep.jobs import job_command, submit, with_shards
from sparsemm_eval.sweep.process import run_queue
from sparsemm_eval.sweep.resources import Resources, Slot
from sparsemm_eval.sweep.state import read_ids, read_record, write_ids
from sparsemm_eval.sweep.status import Status, status
from sparsemm_eval.sweep.sweep import plan_sweep, run_sweep

SIGNALLED = """
import sys, time
from sparsemm_eval.sweep.process import Stopped, leaving
try:
    with leaving():
        print("here", flush=True)
        try:
            time.sleep(60)
        except Exception:
            print("an error of a sample")
except Stopped as stopped:
    print(stopped)
"""
WRITER = """
import sys
from pathlib import Path
from sparsemm_eval.paths import write_whole
for n in range(300):
    write_whole(Path(sys.argv[1]), sys.argv[2] * 5000)
"""


@pytest.fixture(scope="module", autouse=True)
def _offline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
        yield


def run(*words: str | Path) -> tuple[int, str]:
    """Exit code and output of a command of ours."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.output


def test_local_jobs_make_the_tables_of_a_plain_sweep(tmp_path: Path) -> None:
    grid = write_small_demo(tmp_path / "demo.yaml")
    run_sweep(read_grid(grid), tmp_path / "plain", "x")
    out = tmp_path / "out"
    code, said = run("submit", grid, "-o", out, "--max-parallel", 2)
    assert code == 0, said
    assert f"wrote {out / 'table.md'}" in said
    assert tables(out) == tables(tmp_path / "plain")
    found = status(out)
    assert found.finished
    assert not found.under_way
    assert [job.state for job in found.jobs] == ["done"] * 4
    assert found.scoring_state == ("done", "")
    # Again: nothing is to do, and nothing is begun.
    attempts = {job.job.name: read_record(out, job.job.name) for job in found.jobs}
    code, said = run("submit", grid, "-o", out)
    assert code == 0, said
    assert "nothing to submit, 5 jobs are done" in said
    assert {name: read_record(out, name) for name in attempts} == attempts
    # Results are lost, answers not: scores alone are made again.
    shutil.rmtree(out / "cells")
    code, said = run("submit", grid, "-o", out)
    assert code == 0, said
    assert {name: read_record(out, name) for name in attempts} == attempts
    assert tables(out) == tables(tmp_path / "plain")


def test_a_job_that_dies_is_reported_and_the_others_go_on(tmp_path: Path) -> None:
    """One job is killed whenever it begins."""
    changes = {"tasks": ["vqav2_mini"], "samples": 2, "methods": ["fullkv", "snapkv"]}
    grid = write_small_demo(tmp_path / "demo.yaml", **changes)
    out = tmp_path / "out"
    told = []

    def tell(line: str) -> None:
        told.append(line)
        if line.startswith("running  llava_next@"):
            os.kill(int(line.split()[-1]), signal.SIGKILL)

    made = submit(read_grid(grid), out, Resources("local", max_parallel=2), 1, False, tell)
    name = "llava_next@vqav2_mini"
    (lost,) = [record for record in made.failed if record.name != "scoring"]
    assert (lost.name, lost.attempts, lost.reason) == (name, 2, "killed by SIGKILL")
    (words, *_) = made.lines(out)
    assert words.startswith(f"{name} failed, attempt 2 was the last: killed by SIGKILL; {out}")
    assert f"queued   {name}: attempt 1 failed: killed by SIGKILL" in told
    found = {job.job.name: (job.state, job.done) for job in status(out).jobs}
    assert found == {"qwen2vl@vqav2_mini": ("done", 6), name: ("failed", 0)}
    assert "killed by SIGKILL" in run("status", out)[1]
    assert "## qwen2vl" in (out / "table.md").read_text()
    assert "## llava_next" not in (out / "table.md").read_text()
    # And in the end all of it.
    code, said = run("submit", grid, "-o", out)
    assert code == 0, said
    assert "## llava_next" in (out / "table.md").read_text()


def test_of_two_submissions_at_once_the_second_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first gives its jobs to Slurm, and is gone, while the second still plans."""
    grid = read_grid(write_small_demo(tmp_path / "demo.yaml"))
    out = tmp_path / "out"

    def plan(*given: object) -> tuple[Status, list]:
        planned = plan_sweep(*given)
        write_ids(out, {"qwen2vl@vqav2_mini": "7_0", "scoring": "8"})
        return planned

    monkeypatch.setattr("sparsemm_eval.sweep.sweep.plan_sweep", plan)
    with pytest.raises(ValueError, match="given to Slurm by another submission just now") as caught:
        submit(grid, out, Resources("local"), 0, False, print)
    sentence(caught)
    assert read_ids(out) == {"qwen2vl@vqav2_mini": "7_0", "scoring": "8"}


def test_ranks_of_a_job_are_counted(tmp_path: Path) -> None:
    grid = write_small_demo(tmp_path / "demo.yaml", tasks=["vqav2_mini"], methods=["fullkv"],
                            budgets=None, window=None)  # fmt: skip
    text = "\n".join(line for line in grid.read_text().splitlines() if not line.endswith("null"))
    grid.write_text(text)
    out = tmp_path / "out"
    plan_sweep(read_grid(grid), out)
    name = "qwen2vl@vqav2_mini"
    (done,) = run_queue([job_command(out, name, 2)], [Slot()], 0, out)
    assert done.state == "done", (out / "jobs" / f"{name}.log").read_text()
    assert len({row.file for row in rows(out / "answers" / "qwen2vl")}) == 2, "both ranks answered"
    # Begun by a launcher that started one.
    code, said = run("sweep", grid, "-o", out, "--world-size", 2)
    assert code == 1
    assert "world-size=2: 1 run together" in said


def test_a_sweep_that_is_asked_to_end_leaves_and_goes_on_later(tmp_path: Path) -> None:
    changes = {"tasks": ["docvqa_mini"], "samples": 60, "batch_size": 1}
    grid = write_small_demo(tmp_path / "demo.yaml", **changes)
    out = tmp_path / "out"
    name = "qwen2vl@docvqa_mini"
    words = [sys.executable, "-m", "sparsemm_eval", "sweep", grid, "-o", out, "--job", name]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        while not (out / "plan.json").is_file() or not status(out).jobs[0].done:
            assert job.poll() is None
            time.sleep(0.1)
        job.send_signal(signal.SIGUSR1)
        _, said = job.communicate(timeout=60)
    assert job.returncode == 128 + signal.SIGUSR1, said
    last = said.splitlines()[-1]
    assert last.endswith("stopped by SIGUSR1; every finished answer is safe, run it again to go on")
    (found,) = (job for job in status(out).jobs if job.job.name == name)
    assert 0 < found.done < found.expected
    assert found.done % CELLS == 0, "all cells of a prompt, or none"
    assert found.state == "open"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_ending_signals_are_no_errors_of_samples(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SIGNALLED], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline() == "here\n"
        child.send_signal(number)
        child.send_signal(number)
        assert child.stdout.read() == f"stopped by {number.name}\n"
    assert child.returncode == 0


def test_processes_that_write_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    """As jobs do that begin at once."""
    path = tmp_path / "grid.yaml"
    children = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(path), letter]) for letter in "abc"
    ]
    while any(child.poll() is None for child in children):
        if path.is_file():
            text = path.read_text()
            assert len(text) == 5000
            assert len(set(text)) == 1
        time.sleep(0.001)
    assert [child.returncode for child in children] == [0, 0, 0]
    assert list(tmp_path.iterdir()) == [path]
    write_whole(path, "end")
    assert path.read_text() == "end"


def test_a_folder_keeps_its_shards(tmp_path: Path) -> None:
    grid = read_grid(write_small_demo(tmp_path / "demo.yaml"))
    assert with_shards(grid, tmp_path, None) == grid
    four = with_shards(grid, tmp_path, 4)
    assert len(four.jobs()) == 4 * len(grid.jobs())
    (tmp_path / "grid.yaml").write_text(four.resolved())
    assert with_shards(grid, tmp_path, None).resolved() == four.resolved()
    assert with_shards(grid, tmp_path, 2).shards == 2
    other = read_grid(write_small_demo(tmp_path / "demo.yaml", samples=5))
    assert with_shards(other, tmp_path, None) == other
    with pytest.raises(ValueError, match="shards=0: it must be an integer of at least 1"):
        with_shards(grid, tmp_path, 0)


@pytest.mark.parametrize(("words", "message"), [
    (["--executor", "cloud"], "executor='cloud': it must be one of local, slurm"),
    (["--retries", "-1"], "retries=-1: it must be an integer of at least 0"),
    (["--gpus", "-2"], "gpus=-2: a job can have 0 to"),
    (["--max-parallel", "0"], "max-parallel=0"),
    (["--shards", "0"], "shards=0"),
    (["--partition", "long"], "partition: it is Slurm's, and executor is local"),
    (["--executor", "slurm", "--time", "60"], "executor=slurm: there is no sbatch here"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_anything(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    which = shutil.which
    none = {"sbatch", "srun"}
    monkeypatch.setattr(shutil, "which", lambda name: None if name in none else which(name))
    code, said = run("submit", "demo", "-o", tmp_path / "out", *words)
    assert code == 1
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("given", "message"), [
    ({"time": None}, "time is missing"),
    ({"time": "0"}, "time=0: Slurm takes it for no limit"),
    ({"time": "0-00:00"}, "time=0-00:00: Slurm takes it for no limit"),
    ({"time": "soon"}, "time='soon': give minutes, HH:MM:SS or D-HH:MM:SS"),
    ({"gpus": -1}, "gpus=-1: it must be an integer of at least 0"),
    ({"max_parallel": 0}, "max-parallel=0"),
    ({"sbatch": ("--mem=3",)}, "sbatch='--mem=3': give sbatch's long options without dashes"),
])  # fmt: skip
def test_what_slurm_cannot_be_asked(
    given: dict, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    with pytest.raises(ValueError, match=message) as caught:
        Resources("slurm", **{"time": "60", **given}).check()
    sentence(caught)


@pytest.mark.parametrize(("time", "minutes"), [
    ("90", 90), ("1:30", 2), ("01:30:00", 90), ("2-0", 2880), ("1-02:03", 1563), ("0:30", 1),
    ("1-00:00:01", 1441),
])  # fmt: skip
def test_time_limits_are_read_as_slurm_does(time: str, minutes: int) -> None:
    assert Resources("slurm", time=time).minutes() == minutes
