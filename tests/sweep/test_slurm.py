"""Jobs on a real Slurm of this one machine: killed, cancelled, preempted, and whole in the end."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from engine.fixtures import rows, sentence
from sweep.small_demo import CELLS, tables, write_small_demo
from sweep.waiting import wait_until
from typer.testing import CliRunner

from sparsemm_eval.cli import app
from sparsemm_eval.sweep.grid_file import read_grid
from sparsemm_eval.sweep.jobs import cancel
from sparsemm_eval.sweep.lock import held, holder
from sparsemm_eval.sweep.plan import Plan, PlannedCell, PlannedJob
from sparsemm_eval.sweep.process import Command
from sparsemm_eval.sweep.resources import Resources
from sparsemm_eval.sweep.slurm import submit_jobs
from sparsemm_eval.sweep.state import Record, States, log_file, read_ids, read_record, write_ids
from sparsemm_eval.sweep.status import status
from sparsemm_eval.sweep.sweep import run_sweep

SCRIPT = Path(__file__).parent.parent / "slurm" / "cluster.sh"
PYTHON = (sys.executable, "-I", "-S", "-c")
SLEEP = "import time; time.sleep({})"
LAST = Command("scoring", (*PYTHON, "pass"))
pytestmark = pytest.mark.skipif(
    shutil.which("slurmctld") is None or shutil.which("munged") is None or os.geteuid() != 0,
    reason="needs root and Slurm: tests/slurm/install.sh installs it where there is apt-get",
)


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Slurm, while these tests run."""
    folder = tmp_path_factory.mktemp("slurm")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1] // 2 * 2
    started = subprocess.run([SCRIPT, "start", folder, str(port)], capture_output=True, text=True)
    assert started.returncode == 0, started.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
        yield folder
    subprocess.run([SCRIPT, "stop", folder], check=True)


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """Jobs of a test that failed are not to disturb the next."""
    yield
    subprocess.run(["scancel", "--user", "root"], check=True)
    wait_until(lambda: in_queue() == "")


def begin(out: Path, *scripts: str, retries: int = 0, **options: object) -> dict[str, str]:
    """Submit Python scripts as jobs 0, 1, … of a planned sweep."""
    names = [str(n) for n in range(len(scripts))]
    jobs = tuple(PlannedJob(name, "m", "t", 0, 1, 1) for name in names)
    Plan(jobs, (PlannedCell("m", "t", "cell", "key", {}, 1, "x.json"),)).write(out)
    commands = [
        Command(name, (*PYTHON, script)) for name, script in zip(names, scripts, strict=True)
    ]
    given = Resources("slurm", **{"time": "10", "gpus": 0, **options})
    ids = submit_jobs(commands, LAST, given, retries, out, (), "test")
    write_ids(out, ids)
    return ids


def state(out: Path, name: str) -> str:
    """Of a job that has nothing to show but its record."""
    return States(out).of(name, False)[0]


def wait_for_record(out: Path, name: str, wanted: str) -> Record:
    def written() -> bool:
        record = read_record(out, name)
        return record is not None and record.state == wanted

    wait_until(written)
    return read_record(out, name)


def in_queue() -> str:
    said = subprocess.run(["squeue", "-h", "-o", "%i %T"], capture_output=True, text=True)
    return said.stdout


def run(*words: str | Path) -> tuple[int, str]:
    """Exit code and output of a command of ours."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.output


# --- small jobs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "words"), [
    ({"partition": "nope"}, "invalid partition specified: nope"),
    ({"gpus": 7}, "Requested node configuration is not available"),
    ({"sbatch": ("colour=red",)}, "unrecognized option '--colour=red'"),
])  # fmt: skip
def test_what_slurm_refuses_is_said_in_its_words(
    options: dict, words: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    with pytest.raises(ValueError, match="sbatch refused, nothing was submitted") as caught:
        begin(tmp_path, "pass", "pass", **options)
    assert words in sentence(caught)
    assert in_queue() == ""
    assert capfd.readouterr() == ("", "")


def test_if_the_last_job_is_refused_the_others_are_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Resources, "parameters", refuse_second(Resources.parameters))
    with pytest.raises(ValueError, match="invalid partition specified: nope"):
        begin(tmp_path, SLEEP.format(60), SLEEP.format(60))
    wait_until(lambda: in_queue() == "")


def refuse_second(parameters: Callable) -> Callable:
    """Parameters of which those of the scoring job name no partition that there is."""

    def changed(self: Resources, name: str) -> dict:
        more = {"partition": "nope"} if name.endswith(LAST.name) else {}
        return {**parameters(self, name), **more}

    return changed


def test_no_more_run_at_once_than_are_allowed(tmp_path: Path) -> None:
    timed = "import time; print(time.time()); time.sleep(1); print(time.time())"
    begin(tmp_path, *[timed] * 5, max_parallel=2)
    last = wait_for_record(tmp_path, LAST.name, "done")
    assert {read_record(tmp_path, str(n)).state for n in range(5)} == {"done"}
    spans = [
        [float(line) for line in log_file(tmp_path, str(n)).read_text().split()] for n in range(5)
    ]
    most = max(sum(begun <= at < ended for begun, ended in spans) for at, _ in spans)
    assert most == 2
    assert last.attempts == 1
    assert log_file(tmp_path, LAST.name).stat().st_mtime >= max(ended for _, ended in spans)


def test_jobs_see_their_gpus_and_processors(tmp_path: Path) -> None:
    show = "import os; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['SRUN_CPUS_PER_TASK'])"
    begin(tmp_path, show, gpus=2, sbatch=("cpus-per-task=2",), setup=("echo set up",))
    wait_for_record(tmp_path, LAST.name, "done")
    assert (tmp_path / "jobs" / "0.log").read_text() == "0,1 2\n"
    assert "set up" in "".join(p.read_text() for p in (tmp_path / "jobs/slurm").glob("*.out"))


def test_a_job_that_dies_is_tried_again_and_then_failed(tmp_path: Path) -> None:
    begin(tmp_path, "import os; os.kill(os.getpid(), 9)", "raise SystemExit('why')", retries=1)
    wait_for_record(tmp_path, LAST.name, "done")
    said = [States(tmp_path).of(name, False) for name in "01"]
    assert [word for word, _ in said] == ["failed", "failed"]
    assert "killed by SIGKILL" in said[0][1]
    assert "exit code 1: why" in said[1][1]
    assert [read_record(tmp_path, name).attempts for name in "01"] == [2, 2]


def test_a_job_that_cannot_write_down_its_end_is_seen(tmp_path: Path) -> None:
    """All that Slurm started for it is killed at once."""
    begin(tmp_path, SLEEP.format(600))
    record = wait_for_record(tmp_path, "0", "running")
    assert state(tmp_path, "0") == "running"
    assert state(tmp_path, LAST.name) == "queued"
    runner = psutil.Process(record.pid).parent()
    runner.kill()
    os.kill(record.pid, signal.SIGKILL)
    wait_until(lambda: state(tmp_path, "0") == "failed")
    assert read_record(tmp_path, "0").state == "running", "as it was last written"
    wait_for_record(tmp_path, LAST.name, "done")


def test_cancelled_by_us_and_by_slurm(tmp_path: Path) -> None:
    ids = begin(tmp_path, *[SLEEP.format(600)] * 3, max_parallel=2)
    for name in "01":
        wait_for_record(tmp_path, name, "running")
    subprocess.run(["scancel", ids["1"]], check=True)
    wait_until(lambda: state(tmp_path, "1") == "cancelled")
    assert set(cancel(tmp_path)) == {"0", "2", LAST.name}
    wait_until(lambda: in_queue() == "")
    assert {state(tmp_path, name) for name in ("0", "1", "2", LAST.name)} == {"cancelled"}
    assert not held(log_file(tmp_path, "0"))
    assert cancel(tmp_path) == []


@pytest.mark.parametrize("how", ["preempted", "SIGUSR1"])
def test_a_job_that_is_requeued_runs_again(tmp_path: Path, how: str) -> None:
    """It leaves when it is told to, and is begun again; the last job waits for that."""
    mark = tmp_path / "mark"
    script = (
        "import os, signal, sys, time\n"
        f"mark = {str(mark)!r}\n"
        "if os.path.exists(mark): sys.exit(0)\n"
        "def leave(number, frame): open(mark, 'w').write('left'); sys.exit(3)\n"
        "for number in (10, 12, 15): signal.signal(number, leave)\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)"
    )
    ids = begin(tmp_path, script)
    log = tmp_path / "jobs" / "0.log"
    wait_until(lambda: log.is_file() and "ready" in log.read_text())
    if how == "preempted":
        urgent = ["srun", "--partition", "urgent", "--exclusive", "sleep", "1"]
        subprocess.run(urgent, check=True, capture_output=True)
    else:
        subprocess.run(["scancel", f"--signal={how}", ids["0"]], check=True)
    wait_for_record(tmp_path, LAST.name, "done")
    assert mark.read_text() == "left"
    record = read_record(tmp_path, "0")
    assert (record.state, record.attempts) == ("done", 2)


# --- a whole grid -------------------------------------------------------------------------------


def test_a_grid_disturbed_in_every_way_ends_with_the_tables_of_a_plain_sweep(
    tmp_path: Path,
) -> None:
    """The grid of test_jobs.py, whose tables are the same for local jobs."""
    grid = write_small_demo(tmp_path / "demo.yaml")
    run_sweep(read_grid(grid), tmp_path / "plain", "x")
    out = tmp_path / "out"
    words = ["submit", grid, "-o", out, "--executor", "slurm", "--time", 60, "--gpus", 0]
    code, said = run(*words, "--retries", 0, "--partition", "nope")
    assert code == 1
    assert said.count("\n") == 1
    assert "invalid partition specified: nope" in said
    assert not read_ids(out)
    assert {job.state for job in status(out).jobs} == {"open"}

    code, said = run(*words, "--retries", 0, "--max-parallel", 4)
    assert code == 0, said
    assert "submitted 5 jobs" in said
    names = [job.job.name for job in status(out).jobs]
    killed, cancelled, requeued, _ = names
    ids = read_ids(out)
    # While one is under way, it is not submitted again.
    for name in (killed, requeued):
        wait_for_record(out, name, "running")
    # Its few answers would soon be there, while another's model loads.
    subprocess.run(["scancel", ids[cancelled]], check=True)
    wait_until(lambda: holder(out / "locks" / f"{killed}.lock") is not None)
    os.kill(read_record(out, killed).pid, signal.SIGKILL)
    subprocess.run(["scancel", "--signal=USR2", ids[requeued]], check=True)
    wait_until(lambda: not status(out).under_way, 170)
    found = {job.job.name: job for job in status(out).jobs}
    assert [found[name].state for name in names] == ["failed", "cancelled", "done", "done"]
    assert "killed by SIGKILL" in found[killed].reason
    assert read_record(out, requeued).attempts == 2
    assert status(out).scoring_state[0] == "failed"
    assert "## llava_next" in (out / "table.md").read_text()

    code, said = run(*words)
    assert code == 0, said
    assert "submitted 3 jobs, 2 are done" in said
    code, said = run(*words)
    assert "nothing to submit" in said, "all of it is on its way"
    code, said = run("status", out, "--watch", "--seconds", 1)
    assert code == 0
    assert status(out).finished
    assert tables(out) == tables(tmp_path / "plain")
    for model in ("qwen2vl", "llava_next"):
        stored = rows(out / "answers" / model)
        assert len({row.key for row in stored}) == CELLS * 3 * 2
        plain = rows(tmp_path / "plain" / "answers" / model)
        assert {(row.key, row.text) for row in stored} == {(r.key, r.text) for r in plain}
    wait_until(lambda: in_queue() == "")
