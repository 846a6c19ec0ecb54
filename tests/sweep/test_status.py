"""How far a sweep is, from its files: no model, no benchmark, no lmms-eval."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from engine.fixtures import sentence
from hostile import hostile, spoilt
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from sparsemm_eval.cli import app
from sparsemm_eval.engine.answers import Answer, AnswerStore, answer_key
from sparsemm_eval.errors import UserError
from sparsemm_eval.stored import checked, read_json, with_checksum
from sparsemm_eval.sweep.checksum import answers_hash, write_checksums
from sparsemm_eval.sweep.lock import lock
from sparsemm_eval.sweep.plan import Plan, PlannedCell, PlannedJob, answers_folder, lock_file
from sparsemm_eval.sweep.state import Record
from sparsemm_eval.sweep.status import samples_file, status

SAMPLES = 7
CELLS = ("fullkv()", "snapkv(budget=64)")
MODELS = ("small", "large")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A planned sweep of two models of one family, in two shards."""
    jobs = [
        PlannedJob(f"{model}@t@{n + 1}of2", model, "t", n, 2, len(range(n, SAMPLES, 2)))
        for model in MODELS
        for n in range(2)
    ]
    cells = [
        PlannedCell(
            model, "t", f"qwen t {cell}", "key", {"method": cell.split("(")[0], "budget": 64},
            SAMPLES, f"cells/{model}/t-{place}_results.json",
        )
        for model in MODELS
        for place, cell in enumerate(CELLS)
    ]  # fmt: skip
    Plan(tuple(jobs), tuple(cells)).write(tmp_path)
    return tmp_path


def write(
    out: Path,
    model: str,
    cell: str,
    *numbers: int,
    error: str | None = None,
    seconds: float | None = None,
) -> None:
    """Store answers, or failures."""
    record = {} if seconds is None else {"seconds": seconds}
    store = AnswerStore(answers_folder(out, model))
    store.write(
        Answer(
            answer_key({"cell": cell, "n": n, "error": error}), f"qwen t {cell}", "t",
            f"test {n}", None if error else "text", error, record,
        )
        for n in numbers
    )  # fmt: skip
    store.close()


def test_a_plan_is_read_back(out: Path) -> None:
    plan = Plan.read(out)
    plan.write(out)
    assert Plan.read(out) == plan
    assert Plan.read(out / "nowhere") is None


def test_answers_are_counted_by_job_and_by_cell(out: Path) -> None:
    write(out, "small", CELLS[0], *range(SAMPLES))
    write(out, "small", CELLS[1], 0, 2, 3)
    write(out, "large", CELLS[1], 1)
    write(out, "small", CELLS[1], 2)  # found twice, counted once
    said = status(out)
    assert [(job.job.name, job.done, job.expected) for job in said.jobs] == [
        ("small@t@1of2", 6, 8), ("small@t@2of2", 4, 6),
        ("large@t@1of2", 0, 8), ("large@t@2of2", 1, 6),
    ]  # fmt: skip
    assert [cell.done for cell in said.cells] == [7, 3, 0, 1]
    assert [cell.complete for cell in said.cells] == [True, False, False, False]
    assert not said.finished
    assert str(said).startswith("answers 11 of 28, cells scored 0 of 4; not running\n")


def test_failures_are_counted_until_they_are_answered(out: Path) -> None:
    write(out, "large", CELLS[0], 5, 3, 4, error="OSError: lost")
    write(out, "large", CELLS[0], 4)
    said = status(out)
    assert [(job.done, job.failed) for job in said.jobs] == [(0, 0), (0, 0), (1, 0), (0, 2)]
    assert said.failures == ("large t: 2 samples, first test 3: OSError: lost",)
    assert "failed: large t: 2 samples" in str(said)


def test_who_is_on_it_is_named(out: Path) -> None:
    with lock(lock_file(out, "large@t@1of2")):
        said = status(out)
        assert [job.state for job in said.jobs] == ["open", "open", "running", "open"]
        assert "running, large@t@1of2: process" in str(said)
    with lock(lock_file(out, "scoring")):
        assert "running, scoring: process" in str(status(out))
    assert "not running" in str(status(out))


def test_time_left_is_what_answers_of_the_task_took(out: Path) -> None:
    write(out, "small", CELLS[0], *range(5))
    assert status(out).time_left == "", "nothing was timed"
    write(out, "small", CELLS[1], *range(4), seconds=60.0)
    write(out, "small", CELLS[1], *range(4, 6), seconds=120.0)
    # Three answers at 80 seconds; nothing is known of the other model.
    words = "time left: about 4 min for 3 answers, measured on 6, with 1 job at once"
    assert str(status(out)).splitlines()[1] == f"{words}; 14 more are of tasks not begun"
    write(out, "large", CELLS[0], 0, error="OSError: lost", seconds=1.0)
    assert "14 more" in status(out).time_left, "a failure measures nothing"
    write(out, "large", CELLS[0], 0, seconds=1200.0)
    with (
        lock(lock_file(out, "large@t@1of2")),
        lock(lock_file(out, "large@t@2of2")),
        lock(lock_file(out, "scoring")),
    ):
        assert status(out).time_left == (
            "time left: about 2.2 h for 16 answers, measured on 7, with 2 jobs at once"
        )
    for model in MODELS:
        for cell in CELLS:
            write(out, model, cell, *range(SAMPLES), seconds=1.0)
    assert status(out).time_left == ""
    assert str(status(out)).splitlines()[1] == ""


def test_what_takes_no_time_is_said_to_take_a_second(out: Path) -> None:
    write(out, "small", CELLS[0], 0, seconds=0.001)
    assert status(out).time_left.startswith("time left: about 1 s for 13 answers, measured on 1,")


def test_scored_cells_and_broken_files(out: Path) -> None:
    results = out / "cells/small/t-0_results.json"
    results.parent.mkdir(parents=True)
    samples = samples_file(results, "t")
    results.write_text(json.dumps({"results": {"t": {"score": 0.5}}}))
    samples.write_text("{}\n")
    assert not status(out).cells[0].scored, "killed before its checksums were written"
    write_checksums(results, samples, answers_hash({}))
    assert [cell.scored for cell in status(out).cells] == [True, False, False, False]
    assert json.loads(results.read_text())["results"] == {"t": {"score": 0.5}}
    samples.write_text("")
    said = status(out)
    assert not said.cells[0].scored
    assert said.broken == (f"{samples}: this samples file was cut off or changed",)
    write(out, "small", CELLS[0], 1)
    (path,) = answers_folder(out, "small").glob("*.sqlite")
    path.write_bytes(path.read_bytes()[:5000])
    assert str(path) in status(out).broken[0]
    assert path.exists(), "to look is not to touch"


def test_a_folder_without_a_sweep(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no sweep was begun here") as caught:
        status(tmp_path)
    assert str(tmp_path) in sentence(caught)
    (tmp_path / "plan.json").write_text('{"jobs": [{}]')
    with pytest.raises(ValueError, match=r"plan\.json: not a readable plan") as caught:
        status(tmp_path)
    sentence(caught)


def test_the_command_line_says_it(out: Path, tmp_path: Path) -> None:
    write(out, "small", CELLS[1], 0)
    said = CliRunner().invoke(app, ["status", str(out)])
    assert said.exit_code == 0
    assert "answers 1 of 28" in said.output
    assert "snapkv budget=64" in said.output
    nothing = CliRunner().invoke(app, ["status", str(tmp_path / "nothing")])
    assert nothing.exit_code == 1
    assert "no sweep was begun here" in nothing.output


def test_nothing_heavy_is_imported(out: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from sparsemm_eval.sweep.status import status; "
        "from sparsemm_eval.sweep.jobs import cancel; "
        "print(status(Path(sys.argv[1]))); "
        "print({'torch', 'transformers', 'lmms_eval', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(out)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"pid": "5"}', '{"name": 3}', '{"name": "x", "pid": -1}', "[" * 9999]
)
def test_a_record_that_is_not_understood_is_shown_beside_the_rest(out: Path, text: str) -> None:
    write(out, "small", CELLS[0], *range(SAMPLES))
    (out / "jobs" / "slurm").mkdir(parents=True)
    (out / "jobs" / "small@t@1of2.json").write_text(text)
    (out / "jobs" / "slurm" / "ids.json").write_text('{"small@t@1of2": 12}')
    (out / "cells" / "large").mkdir(parents=True)
    (out / "cells" / "large" / "t-0_results.json").write_text(text)
    said = status(out)
    state, reason = said.states["small@t@1of2"]
    assert state == "failed"
    assert "not a readable record of a job" in reason
    assert said.states["small@t@2of2"][0] == "open"
    assert sum("ids.json" in line for line in said.broken) == 1
    assert "answers 7 of 28" in str(said)


def test_a_record_of_a_newer_version_is_read(out: Path) -> None:
    Record("small@t@1of2", "failed", "out of \x1b[31mmemory").write(out)
    path = out / "jobs" / "small@t@1of2.json"
    newer = checked(read_json(path)) | {"ticks": 5}
    path.write_text(json.dumps(with_checksum(newer)))
    assert status(out).states["small@t@1of2"] == ("failed", "out of \x1b[31mmemory")
    assert "\x1b" not in str(status(out))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"shards": 0}, "there is no such job"),
        ({"shard": -1}, "there is no such job"),
        ({"samples": "7"}, "jobs.0.samples='7'"),
        ({"name": "../../x"}, "must be its name alone"),
        ({"model": ""}, "must be its name alone"),
        ({"task": None}, "jobs.0.task=None"),
    ],
)
def test_a_plan_of_other_types_is_one_sentence(out: Path, changed: dict, reason: str) -> None:
    path = out / "plan.json"
    plan = checked(read_json(path))
    plan["jobs"][0] |= changed
    path.write_text(json.dumps(plan))
    with pytest.raises(UserError, match="not a readable plan of a sweep") as caught:
        status(out)
    assert reason in str(caught.value)


@pytest.mark.parametrize("results", ["/etc/passwd", "../x_results.json", "cells//x", "a\0b"])
def test_a_plan_names_files_of_its_own_folder(out: Path, results: str) -> None:
    path = out / "plan.json"
    plan = checked(read_json(path))
    plan["cells"][0]["results"] = results
    path.write_text(json.dumps(plan))
    with pytest.raises(UserError, match="must be its name alone"):
        status(out)


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_file_of_a_sweep_is_shown_or_is_one_sentence(out: Path, data: st.DataObject) -> None:
    if not (out / "jobs").exists():
        write(out, "small", CELLS[0], *range(SAMPLES))
    files = {
        "plan.json": checked(read_json(out / "plan.json")),
        "jobs/small@t@1of2.json": asdict(Record("small@t@1of2", "failed", "why", 1, "h", 5)),
        "jobs/slurm/ids.json": {"small@t@2of2": "12_3"},
        "cells/small/t-0_results.json": {"results": {}, "sparsemm_eval": {"answers": "a"}},
    }
    name = data.draw(st.sampled_from([*files]))
    for place, value in files.items():
        (out / place).parent.mkdir(parents=True, exist_ok=True)
        (out / place).write_text(json.dumps(value))
    if data.draw(st.booleans()):
        (out / name).write_text(json.dumps(data.draw(hostile(files[name]))))
    else:
        (out / name).write_bytes(data.draw(spoilt(json.dumps(files[name]).encode())))
    try:
        shown = str(status(out))
    except UserError as error:
        shown = str(error)
        assert name == "plan.json", error  # noqa: PT017
    finally:
        (out / "plan.json").write_text(json.dumps(files["plan.json"]))
    assert "\x1b" not in shown
    assert "small" in shown or name == "plan.json"
