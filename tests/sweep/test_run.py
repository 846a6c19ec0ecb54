"""A sweep on the embedded model: whole, resumable, refusing what cannot be."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from engine.fixtures import rows, sentence
from typer.testing import CliRunner

from sparsemm_eval.cli import app
from sparsemm_eval.engine import answer_file
from sparsemm_eval.engine.answers import Answer
from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.tasks import find_tasks, runnable
from sparsemm_eval.paths import tasks_folder
from sparsemm_eval.stored import checked, read_json
from sparsemm_eval.sweep import checks
from sparsemm_eval.sweep import sweep as runner
from sparsemm_eval.sweep.fidelity import fidelity
from sparsemm_eval.sweep.grid import Grid
from sparsemm_eval.sweep.lock import Locked, lock
from sparsemm_eval.sweep.status import status
from sparsemm_eval.sweep.sweep import Sweep, run_sweep
from sparsemm_eval.tiny import default_checkpoint

SAMPLES = 6
TASKS = ("docvqa_mini", "vqav2_mini")
GRID = f"""
models:
  - {{name: reader, pretrained: "embedded:qwen2vl", settings: {{dtype: float32}}}}
tasks: [{", ".join(TASKS)}]
methods: [fullkv, sparsemm, snapkv]
budgets: [64, 12]
window: 8
samples: {SAMPLES}
batch_size: 3
shards: {{docvqa_mini: 2}}
"""
CELLS = 5


def grid(**changes: Any) -> Grid:
    """The grid of these tests, with other values."""
    return Grid.model_validate({"name": "small", **yaml.safe_load(GRID), **changes})


@pytest.fixture(scope="module", autouse=True)
def _offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
        patch.setattr(answer_file, "_SECOND_LOOK", 0.0)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Sweep, Path]:
    """An undisturbed sweep."""
    out = tmp_path_factory.mktemp("sweep")
    return run_sweep(grid(), out, "sparsemm-eval sweep small.yaml"), out


@pytest.fixture
def copy(whole: tuple[Sweep, Path], tmp_path: Path) -> Path:
    """A copy of its folder, to be broken."""
    return shutil.copytree(whole[1], tmp_path / "copy")


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be computed."""
    monkeypatch.setattr(Checkpoint, "load", lambda _: pytest.fail("a model was loaded"))


def texts(out: Path) -> dict[str, str]:
    """Stored answers by key; none twice."""
    found = rows(out / "answers" / "reader")
    assert len({row.key for row in found}) == len(found)
    return {row.key: row.text for row in found}


def aside(out: Path) -> list[Path]:
    """What was set aside."""
    return sorted(out.rglob("*.broken"))


# --- a whole sweep ------------------------------------------------------------------------------


def test_every_cell_is_answered_and_scored(whole: tuple[Sweep, Path]) -> None:
    made, out = whole
    assert made.status.finished
    assert (made.failures, made.left_out) == ((), ())
    assert len(texts(out)) == CELLS * SAMPLES * len(TASKS)
    assert list(made.frame["task"]) == [task for task in TASKS for _ in range(CELLS)]
    for task in TASKS:
        folder = out / "cells" / "reader"
        assert len(list(folder.glob(f"{task}-*_results.json"))) == CELLS
        for path in folder.glob(f"{task}-*_samples_{task}.jsonl"):
            assert len(path.read_text().splitlines()) == SAMPLES
    assert made.markdown == (out / "table.md").read_text()
    summary = json.loads((out / "summary.json").read_text())
    assert summary["command"] == "sparsemm-eval sweep small.yaml"
    assert len(summary["cells"]) == len(made.frame)


def test_a_results_file_says_how_it_was_made(whole: tuple[Sweep, Path]) -> None:
    path = whole[1] / "cells" / "reader" / "docvqa_mini-snapkv-64-8_results.json"
    content = json.loads(path.read_text())
    assert content["config"]["model_args"] == (
        "pretrained=embedded:qwen2vl,dtype=float32,method=snapkv,budget=64,window=8"
    )
    made = content["sparsemm_eval"]
    assert (made["schema"], made["model"]) == (1, "reader")
    assert made["command"] == "sparsemm-eval sweep small.yaml"
    assert {"torch", "transformers", "lmms-eval"} <= set(made["versions"])
    assert made["hardware"]["name"]


@pytest.mark.usefixtures("no_weights")
def test_a_second_run_computes_nothing_scores_nothing_and_says_the_same(
    whole: tuple[Sweep, Path], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "score", lambda *_, **__: pytest.fail("a cell was scored again"))
    again = run_sweep(grid(), copy, "again")
    assert again.markdown == whole[0].markdown
    for name in ("table.md", "kept.md"):
        assert (copy / name).read_bytes() == (whole[1] / name).read_bytes()


def test_fidelity_is_that_of_the_stored_answers(whole: tuple[Sweep, Path]) -> None:
    made, out = whole
    found = rows(out / "answers" / "reader")
    of_task = [row for row in found if " docvqa_mini " in row.cell]
    full = {row.doc_id: row for row in of_task if "fullkv" in row.cell}
    for _, cell in made.frame[made.frame["task"] == "docvqa_mini"].iterrows():
        name = f"{cell['method']}("
        budget = "" if cell["method"] == "fullkv" else f"budget={cell['budget']:.0f},"
        own = [row for row in of_task if name in row.cell and budget in row.cell]
        assert len(own) == SAMPLES
        same = [row.text == full[row.doc_id].text for row in own]
        assert cell["same_answer"] == sum(same) / SAMPLES
        assert cell["compared"] == SAMPLES
    assert "same answer" in made.markdown


def test_fidelity_of_tokens_and_divergence() -> None:
    def made(*of: tuple[str, list[int] | None, float | None]) -> dict[str, Answer]:
        return {
            str(n): Answer(str(n), "c", "t", f"test {n}", text, None, {"tokens": t, "kl_full": kl})
            for n, (text, t, kl) in enumerate(of)
        }

    full = made(("a", [1, 2, 3], 0.0), ("b", [1], 0.0), ("c", None, 0.0), ("d", [4, 4], 0.0))
    cell = made(("a", [1, 2, 4], 0.5), ("x", [1, 7], 1.5), ("c", None, None), ("d", [4, 4], None))
    assert fidelity(cell, full) == {
        "compared": 4, "same_answer": 0.75, "first_difference": 1.5, "kl_full": 1.0,
        "kl_missing": 1,
    }  # fmt: skip
    assert fidelity(cell, {}) == {
        "compared": 0, "same_answer": None, "first_difference": None, "kl_full": None,
        "kl_missing": 0,
    }  # fmt: skip
    unmeasured = {"1": Answer("1", "c", "t", "test 1", "x")}
    assert fidelity(unmeasured, unmeasured) == {
        "compared": 1, "same_answer": 1.0, "first_difference": None, "kl_full": None,
        "kl_missing": 0,
    }  # fmt: skip


def test_cells_that_differ_in_more_than_method_and_budget_are_told_apart(tmp_path: Path) -> None:
    changes = {"methods": ["sparsemm"], "budgets": [24], "ratio": [0.1, 0.6], "samples": 2}
    made = run_sweep(grid(**changes, tasks=["docvqa_mini"]), tmp_path, "x")
    assert list(made.frame["label"]) == ["SparseMM (ratio=0.1)", "SparseMM (ratio=0.6)"]
    assert list(made.frame["ratio"]) == [0.1, 0.6]
    assert "| SparseMM (ratio=0.6) |" in made.markdown
    # Without full KV there is nothing to be near to.
    assert made.frame["same_answer"].isna().all()


def test_full_kv_alone(tmp_path: Path) -> None:
    alone = {"methods": ["fullkv"], "budgets": None, "window": None, "tasks": ["vqav2_mini"]}
    values = yaml.safe_load(GRID) | alone | {"name": "small", "samples": 2, "shards": 1}
    values = {name: value for name, value in values.items() if value is not None}
    made = run_sweep(Grid.model_validate(values), tmp_path, "x")
    assert made.status.finished
    assert "| FullKV" in made.markdown


def test_texts_and_metrics_are_those_of_plain_runs(
    whole: tuple[Sweep, Path], tmp_path: Path
) -> None:
    """Of the same cells through ``python -m lmms_eval``, each in a process of its own."""
    for cell in ("method=sparsemm,budget=12,window=8", "method=snapkv,budget=64,window=8"):
        plain = tmp_path / cell.split(",")[0]
        arguments = f"pretrained={default_checkpoint()},answers={plain / 'answers'},{cell}"
        subprocess.run(
            [
                sys.executable, "-m", "lmms_eval", "--model", "qwen2vl_sparsemm",
                "--model_args", f"{arguments},dtype=float32", "--tasks", ",".join(TASKS),
                "--include_path", str(tasks_folder()), "--limit", str(SAMPLES),
                "--output_path", str(plain / "out"), "--log_samples",
            ],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            cwd=tmp_path, capture_output=True, check=True, timeout=300,
        )  # fmt: skip
        plain_texts = {row.key: row.text for row in rows(plain / "answers")}
        swept = texts(whole[1])
        assert len(plain_texts) == SAMPLES * len(TASKS)
        assert plain_texts.items() <= swept.items()
        (results,) = plain.rglob("*_results.json")
        scores = json.loads(results.read_text())["results"]
        name = "-".join(setting.split("=")[1] for setting in cell.split(","))
        folder = whole[1] / "cells" / "reader"
        for task in TASKS:
            own = json.loads((folder / f"{task}-{name}_results.json").read_text())["results"]
            assert numbers(own[task]) == numbers(scores[task])
            (theirs,) = plain.rglob(f"*_samples_{task}.jsonl")
            ours = folder / f"{task}-{name}_samples_{task}.jsonl"
            assert responses(ours) == responses(theirs)


def numbers(scores: dict[str, Any]) -> dict[str, float]:
    """All metrics and their errors."""
    return {name: value for name, value in scores.items() if isinstance(value, int | float)}


def responses(path: Path) -> dict[int, Any]:
    """What was scored, by document."""
    lines = map(json.loads, path.read_text().splitlines())
    return {line["doc_id"]: line["filtered_resps"] for line in lines}


# --- one job, failures --------------------------------------------------------------------------


def test_a_job_alone_answers_its_samples_and_scores_nothing(
    whole: tuple[Sweep, Path], tmp_path: Path
) -> None:
    name = "reader@docvqa_mini@2of2"
    done = run_sweep(grid(), tmp_path, "x", only_job=name)
    assert done.frame.empty
    assert not list(tmp_path.glob("cells/**/*.json"))
    numbers_ = {int(row.doc_id.split()[-1]) for row in rows(tmp_path / "answers" / "reader")}
    assert numbers_ == {1, 3, 5}
    (job,) = done.status.jobs
    assert (job.job.name, job.done, job.expected) == (name, 3 * CELLS, 3 * CELLS)
    # The rest later, to the same tables.
    assert run_sweep(grid(), tmp_path, "x").markdown == whole[0].markdown
    assert texts(tmp_path) == texts(whole[1])
    with pytest.raises(ValueError, match=r"job='no': it must be one of reader@docvqa_mini@1of2"):
        run_sweep(grid(), tmp_path, "x", only_job="no")


def test_ranks_share_a_jobs_samples(whole: tuple[Sweep, Path], tmp_path: Path) -> None:
    """Two processes answer together; a plain run finds all of it and makes the tables."""
    path, out = tmp_path / "small.yaml", tmp_path / "out"
    path.write_text(GRID)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
        "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "--no_python",
        str(Path(sys.executable).parent / "sparsemm-eval"), "sweep", str(path), "--out", str(out),
    ]  # fmt: skip
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not list(out.glob("cells/*/*"))
    by_file: dict[str, set[str]] = {}
    for row in rows(out / "answers" / "reader"):
        by_file.setdefault(row.file.split("-")[-1], set()).add(row.key)
    # Shards of 3, 3 and 6 samples, of each the first rank has the first.
    assert sorted(map(len, by_file.values())) == [5 * CELLS, 7 * CELLS]
    assert texts(out) == texts(whole[1])
    assert run_sweep(grid(), out, "x").markdown == whole[0].markdown


def test_no_tasks_failure_loses_anothers_scores(
    whole: tuple[Sweep, Path], copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(copy / "cells")
    score = runner.score

    def failing(model: Any, cell: Any, task: str, *rest: Any, **more: Any) -> Path:
        if task == "docvqa_mini":
            raise KeyError("anls")
        return score(model, cell, task, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "score", failing)
        done = run_sweep(grid(), copy, "x")
    assert done.failures == (
        "reader docvqa_mini: 5 of 5 cells have no score, first: KeyError: 'anls'",
    )
    assert set(done.frame["task"]) == {"vqav2_mini"}
    assert [cell.scored for cell in done.status.cells] == [False] * CELLS + [True] * CELLS
    assert json.loads((copy / "summary.json").read_text())["failures"] == list(done.failures)
    assert run_sweep(grid(), copy, "x").markdown == whole[0].markdown


def test_samples_that_fail_are_named_and_the_others_safe(
    whole: tuple[Sweep, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lmms_eval.tasks.docvqa.utils as docvqa

    visual = docvqa.docvqa_doc_to_visual

    def broken(document: Any) -> Any:
        if document["questionId"] == "1":
            raise OSError("the page was lost")
        return visual(document)

    with monkeypatch.context() as patch:
        patch.setattr(docvqa, "docvqa_doc_to_visual", broken)
        done = run_sweep(grid(), tmp_path, "x")
    assert set(done.frame["task"]) == {"vqav2_mini"}
    assert done.failures == (
        "reader docvqa_mini: 5 of 5 cells have no score, first: answers are missing",
    )
    (failed,) = done.status.failures
    assert failed == (
        "reader docvqa_mini: 1 samples, first validation 1: OSError: the page was lost"
    )
    jobs = {job.job.name: (job.done, job.failed, job.expected) for job in done.status.jobs}
    assert jobs["reader@docvqa_mini@2of2"] == (2 * CELLS, CELLS, 3 * CELLS)
    assert not done.status.finished
    again = run_sweep(grid(), tmp_path, "x")
    assert again.markdown == whole[0].markdown
    assert again.status.failures == ()


def test_cells_are_scored_without_the_samples_that_may_fail(
    whole: tuple[Sweep, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if they were not among the documents; tables and results say how many are missing."""
    import lmms_eval.tasks.docvqa.utils as docvqa

    visual = docvqa.docvqa_doc_to_visual

    def broken(document: Any) -> Any:
        if document["questionId"] in ("1", "4"):
            return visual({**document, "image": None})
        return visual(document)

    with monkeypatch.context() as patch:
        patch.setattr(docvqa, "docvqa_doc_to_visual", broken)
        few = run_sweep(grid(), tmp_path, "x", allow_failed=1)
        assert "reader docvqa_mini: 2 samples, first validation 1: " in few.status.failures[0]
        assert set(few.frame["task"]) == {"vqav2_mini"}
        done = run_sweep(grid(), tmp_path, "x", allow_failed=2)
    assert (done.failures, done.status.failures) == ((), ())
    assert done.status.finished
    assert len(done.status.left_out) == 1
    assert "left out, failed: reader docvqa_mini: 2 samples" in str(status(tmp_path))
    scored = done.frame[done.frame["task"] == "docvqa_mini"]
    assert scored["samples"].tolist() == [4] * CELLS
    assert scored["failed"].tolist() == [2] * CELLS
    for path in (tmp_path / "cells/reader").glob("docvqa_mini-*_samples_docvqa_mini.jsonl"):
        name = path.relative_to(tmp_path)
        ours, theirs = (read_samples(folder / name) for folder in (tmp_path, whole[1]))
        assert ours == {doc: line for doc, line in theirs.items() if doc not in (1, 4)}
    assert "† Without 2 samples that failed and have no answer." in done.markdown
    assert "†" not in whole[0].markdown
    # Without the option nothing is scored that lacks an answer.
    with monkeypatch.context() as patch:
        patch.setattr(docvqa, "docvqa_doc_to_visual", broken)
        none = run_sweep(grid(), tmp_path, "x")
    assert none.status.failures
    assert set(none.frame["task"]) == {"vqav2_mini"}
    assert run_sweep(grid(), tmp_path, "x").markdown == whole[0].markdown


def read_samples(path: Path) -> dict[int, Any]:
    """Lines of a samples file by document."""
    lines = map(json.loads, path.read_text().splitlines())
    return {line["doc_id"]: (line["filtered_resps"], line["target"]) for line in lines}


@pytest.mark.parametrize("error", [RuntimeError("odd"), StopIteration(), SystemError("odd")])
def test_whatever_a_metric_raises_takes_its_own_score_alone(
    whole: tuple[Sweep, Path], copy: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    shutil.rmtree(copy / "cells")
    score = runner.score

    def failing(model: Any, cell: Any, task: str, *rest: Any, **more: Any) -> Path:
        if task == "docvqa_mini":
            raise error
        return score(model, cell, task, *rest, **more)

    monkeypatch.setattr(runner, "score", failing)
    done = run_sweep(grid(), copy, "x")
    assert type(error).__name__ in done.failures[0]
    assert set(done.frame["task"]) == {"vqav2_mini"}
    assert "in failing" in (copy / "log.txt").read_text()


@pytest.mark.parametrize("words", [["sweep"], ["submit"]])
def test_how_many_may_fail_is_a_number(tmp_path: Path, words: list[str]) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(GRID)
    more = [str(path), "--out", str(tmp_path / "out"), "--allow-failed", "-1"]
    done = CliRunner().invoke(app, [*words, *more])
    assert done.exit_code == 1
    assert "allow-failed=-1: it must be an integer of at least 0" in done.output


# --- broken files -------------------------------------------------------------------------------


def test_a_broken_answers_file_is_set_aside_and_computed_again(
    whole: tuple[Sweep, Path], copy: Path
) -> None:
    path = sorted((copy / "answers" / "reader").glob("*.sqlite"))[0]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2 + 77])
    said = status(copy)
    assert len(said.broken) == 1
    assert said.broken[0].startswith(f"{path}: ")
    assert 0 < sum(job.done for job in said.jobs) < CELLS * SAMPLES * len(TASKS)
    done = run_sweep(grid(), copy, "x")
    assert done.markdown == whole[0].markdown
    assert aside(copy) == [path.with_name(f"{path.name}.broken")]
    assert texts(copy) == texts(whole[1])
    assert done.status.broken == ()


@pytest.mark.parametrize("which", ["results", "samples"])
@pytest.mark.parametrize("how", ["cut", "changed", "emptied", "a folder"])
@pytest.mark.usefixtures("no_weights")
def test_a_broken_results_or_samples_file_is_made_again(
    whole: tuple[Sweep, Path], copy: Path, which: str, how: str
) -> None:
    folder = copy / "cells" / "reader"
    results = folder / "docvqa_mini-snapkv-64-8_results.json"
    samples = folder / "docvqa_mini-snapkv-64-8_samples_docvqa_mini.jsonl"
    path = results if which == "results" else samples
    text = path.read_text()
    changed = re.sub(r"0\.\d+", "0.999", text, count=1) if "0." in text else text.replace("a", "b")
    if how == "a folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_text({"cut": text[:-99], "changed": changed, "emptied": ""}[how])
        assert path.read_text() != text
    (broken,) = status(copy).broken
    assert broken.startswith(f"{path}: ")
    done = run_sweep(grid(), copy, "x")
    assert done.markdown == whole[0].markdown
    assert done.status.finished
    assert {one.name for one in aside(copy)} == {f"{results.name}.broken", f"{samples.name}.broken"}


def test_results_of_other_answers_are_made_again(whole: tuple[Sweep, Path], copy: Path) -> None:
    """Finished answers were lost by hand, and come again: the results file is not theirs."""
    import sqlite3

    from sparsemm_eval.engine.answer_file import digest_of

    for path in (copy / "answers" / "reader").glob("*.sqlite"):
        with sqlite3.connect(path) as file:
            file.create_function("digest_of", 8, lambda *values: digest_of(values))
            file.execute(
                "UPDATE answers SET text = 'other', "
                "digest = digest_of(key, cell, task, doc_id, 'other', error, record, written) "
                "WHERE cell LIKE '%snapkv(budget=64%'"
            )
        file.close()
    done = run_sweep(grid(), copy, "x").frame
    before = whole[0].frame
    changed = (done["method"] == "snapkv") & (done["budget"] == 64)
    assert (done.loc[changed, "score"] == 0).all()
    assert (done.loc[~changed, "score"] == before.loc[~changed, "score"]).all()


# --- refused ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_weights")
def test_another_grids_folder_is_refused(copy: Path) -> None:
    with pytest.raises(ValueError, match="another grid") as caught:
        run_sweep(grid(budgets=[64]), copy, "x")
    assert str(copy) in sentence(caught)


@pytest.mark.usefixtures("no_weights")
def test_a_folder_of_other_weights_is_refused(copy: Path) -> None:
    plan = checked(read_json(copy / "plan.json"))
    plan["cells"][0]["key"] = "that of other weights"
    (copy / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ValueError, match="other weights") as caught:
        run_sweep(grid(), copy, "x")
    assert str(copy) in sentence(caught)


@pytest.mark.parametrize("name", ["reader@vqav2_mini", "scoring"])
@pytest.mark.usefixtures("no_weights")
def test_a_second_sweep_is_refused(copy: Path, name: str) -> None:
    with lock(copy / "locks" / f"{name}.lock"):
        with pytest.raises(Locked, match="another sweep, process") as caught:
            run_sweep(grid(), copy, "x")
        assert str(copy) in sentence(caught)
        assert f"process {os.getpid()}" in str(status(copy))
    assert "not running" in str(status(copy))


@pytest.mark.usefixtures("no_weights")
def test_a_small_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=12_300)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"and 12\.3 kB are free") as caught:
        run_sweep(grid(), tmp_path / "out", "x")
    assert "60 answers and their results need about 360 kB" in sentence(caught)
    assert not (tmp_path / "out" / "plan.json").exists()


def test_without_java_textcaps_is_refused_or_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)
    both = grid(tasks=["textcaps_val", "vqav2_mini"], shards=1)
    with pytest.raises(ValueError, match="textcaps_val needs java") as caught:
        run_sweep(both, tmp_path, "x")
    assert "java runtime" in sentence(caught).lower()
    manager = find_tasks(both.tasks)
    kept, left = runnable(manager, both.tasks, skip=True)
    assert kept == ["vqav2_mini"]
    assert [(lost.task, "java" in lost.cause) for lost in left] == [("textcaps_val", True)]
    with pytest.raises(ValueError, match="needs java"):
        runnable(manager, ["textcaps_val"], skip=True)


def test_data_that_is_not_here_is_named_where_the_hub_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "_resolve_hf_datasets_cache_dir", lambda: str(tmp_path))
    monkeypatch.setattr(checks.hub, "HF_HOME", "/a/cache")

    files = {
        "docvqa_val": stock("docvqa/docvqa_val.yaml"),
        "gqa": stock("gqa/gqa.yaml"),
        "docvqa_mini": tasks_folder() / "docvqa_mini.yaml",
    }
    index = {task: {"yaml_path": str(path)} for task, path in files.items()}
    manager = SimpleNamespace(task_index=index)
    with pytest.raises(ValueError, match="HF_HOME=/a/cache") as caught:
        checks.check_data(manager, ["docvqa_val", "docvqa_mini", "gqa"])
    words = sentence(caught)
    assert "the data of docvqa_val, gqa is not in" in words
    assert "load_dataset('lmms-lab-encoder/DocVQA', 'DocVQA')" in words
    assert "load_dataset('lmms-lab-encoder/GQA', 'testdev_balanced_images')" in words
    checks.check_data(manager, ["docvqa_mini"])


def stock(name: str) -> Path:
    """A task file of lmms-eval's own."""
    import lmms_eval.tasks

    return Path(lmms_eval.tasks.__path__[0]) / name


@pytest.mark.usefixtures("no_weights")
def test_a_model_that_is_not_here_is_named(tmp_path: Path) -> None:
    models = [{"name": "big", "pretrained": "someone/a-model"}]
    with pytest.raises(ValueError, match="model big") as caught:
        run_sweep(grid(models=models), tmp_path, "x")
    assert "`hf download someone/a-model`" in sentence(caught)


def test_a_full_disk_is_one_sentence_and_goes_on_after(
    whole: tuple[Sweep, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(GRID)
    words = ["sweep", str(path), "--out", str(tmp_path / "out")]
    connect = answer_file.sqlite3.connect

    def small(*args: Any, **kwargs: Any) -> Any:
        connection = connect(*args, **kwargs)
        connection.execute("PRAGMA max_page_count=7")
        return connection

    with monkeypatch.context() as patch:
        patch.setattr(answer_file.sqlite3, "connect", small)
        stopped = CliRunner().invoke(app, words)
    assert stopped.exit_code == 1
    assert "could not be written (database or disk is full)" in stopped.output
    before = texts(tmp_path / "out")
    assert 0 < len(before) < len(texts(whole[1]))
    with monkeypatch.context() as patch:

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(runner, "write_checksums", full)
        stopped = CliRunner().invoke(app, words)
    assert stopped.exit_code == 1
    assert "the disk is full" in stopped.output
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "table.md").read_text() == whole[0].markdown
    assert before.items() <= texts(tmp_path / "out").items()
