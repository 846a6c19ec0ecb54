"""Answers of several folders in one: all of them, each once, what differs shown."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine.fixtures import rows, sentence
from sweep.small_demo import tables, write_small_demo
from typer.testing import CliRunner

from sparsemm_eval.cli import app
from sparsemm_eval.engine.answers import Answer, AnswerStore
from sparsemm_eval.sweep.grid_file import read_grid
from sparsemm_eval.sweep.merge import merge_sweeps
from sparsemm_eval.sweep.plan import Plan, PlannedCell, answers_folder
from sparsemm_eval.sweep.status import status
from sparsemm_eval.sweep.sweep import run_sweep

CELLS = ("fullkv()", "snapkv(budget=64)")
SAMPLES = 6


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)


def folder(path: Path, texts: dict[tuple[str, int], str | None], **changes: object) -> Path:
    """A planned sweep of one model and task, with answers by cell and document."""
    path.mkdir()
    small = {"tasks": ["vqav2_mini"], "methods": ["fullkv", "snapkv"], "budgets": [64]}
    key = changes.pop("key", "key")
    grid = read_grid(write_small_demo(path / "given.yaml", **{**small, **changes}))
    (path / "grid.yaml").write_text(grid.resolved())
    (path / "given.yaml").unlink()
    cells = tuple(
        PlannedCell("qwen2vl", "vqav2_mini", cell, key, {"method": cell}, SAMPLES, f"{n}.json")
        for n, cell in enumerate(CELLS)
    )
    Plan((), cells).write(path)
    store = AnswerStore(answers_folder(path, "qwen2vl"))
    store.write(
        Answer(f"{cell} {n}", cell, "vqav2_mini", f"test {n}", text, None if text else "lost")
        for (cell, n), text in texts.items()
    )
    store.close()
    return path


def texts(out: Path) -> dict[str, str]:
    """Stored answers by key; none twice."""
    found = rows(out / "answers" / "qwen2vl")
    assert len({row.key for row in found}) == len(found)
    return {row.key: row.text for row in found}


def test_every_answer_is_kept_once_and_conflicts_are_shown(tmp_path: Path) -> None:
    full, snap = CELLS
    a = folder(tmp_path / "a", {(full, 0): "x", (full, 1): "y", (snap, 0): "z"})
    b = folder(tmp_path / "b", {(full, 1): "other", (full, 2): "w", (snap, 0): "z"}, shards=3)
    merged = merge_sweeps([a, b], tmp_path / "c")
    assert texts(tmp_path / "c") == {
        f"{full} 0": "x", f"{full} 1": "y", f"{full} 2": "w", f"{snap} 0": "z"
    }  # fmt: skip
    assert merged.answers == {a: (3, 3), b: (3, 1)}
    assert merged.conflicts == (f"{full}, test 1: 'y' ({a}, kept), 'other' ({b})",)
    said = list(merged.lines())
    assert f"conflict: {merged.conflicts[0]}" in said
    assert said[-1].startswith(f"{tmp_path / 'c'}: 4 of 12 answers, 1 conflicts; ")
    assert read_grid(tmp_path / "c" / "grid.yaml").shards == 1
    found = status(tmp_path / "c")
    assert [(job.done, job.expected) for job in found.jobs] == [(4, 12)]
    # The other way round the other answer is kept; and the sources are as they were.
    merge_sweeps([b, a], tmp_path / "d")
    assert texts(tmp_path / "d")[f"{full} 1"] == "other"
    assert len(status(tmp_path / "d").jobs) == 3
    assert len(texts(a)) == len(texts(b)) == 3


def test_failures_are_not_answers(tmp_path: Path) -> None:
    full, _ = CELLS
    a = folder(tmp_path / "a", {(full, 0): None, (full, 1): "y"})
    b = folder(tmp_path / "b", {(full, 0): "x", (full, 1): None})
    merged = merge_sweeps([a, b], tmp_path / "c")
    assert texts(tmp_path / "c") == {f"{full} 0": "x", f"{full} 1": "y"}
    assert merged.conflicts == ()


def test_a_broken_file_is_named_and_left_out(tmp_path: Path) -> None:
    full, _ = CELLS
    a = folder(tmp_path / "a", {(full, 0): "x"})
    b = folder(tmp_path / "b", {(full, 1): "y"})
    (path,) = (b / "answers" / "qwen2vl").glob("*.sqlite")
    path.write_bytes(path.read_bytes()[:5000])
    merged = merge_sweeps([a, b], tmp_path / "c")
    assert merged.broken[0].startswith(f"{path}: ")
    assert texts(tmp_path / "c") == {f"{full} 0": "x"}


@pytest.mark.parametrize(("changes", "words"), [
    ({"samples": 5}, "its grid is another than that of"),
    ({"key": "another"}, "head scores, data, plugin or version of sparsemm-eval than"),
])  # fmt: skip
def test_what_does_not_belong_together_is_refused(
    changes: dict, words: str, tmp_path: Path
) -> None:
    a, b = folder(tmp_path / "a", {}), folder(tmp_path / "b", {}, **changes)
    with pytest.raises(ValueError, match=words) as caught:
        merge_sweeps([a, b], tmp_path / "c")
    assert str(b) in sentence(caught)
    assert not (tmp_path / "c").exists()


def test_folders_that_cannot_be(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", {})
    for words, folders, out in (
        ("it is not empty", [a], a),
        ("no sweep was begun here", [a, tmp_path / "nothing"], tmp_path / "c"),
    ):
        done = CliRunner().invoke(app, ["merge", *map(str, folders), "-o", str(out)])
        assert done.exit_code == 1
        assert words in done.output
        assert done.output.count("\n") == 1


def test_jobs_of_two_machines_make_the_tables_of_one(tmp_path: Path) -> None:
    small = {"tasks": ["vqav2_mini"], "methods": ["fullkv", "snapkv"], "shards": 2}
    grid = read_grid(write_small_demo(tmp_path / "demo.yaml", **small))
    run_sweep(grid, tmp_path / "plain", "x")
    places = [tmp_path / "a", tmp_path / "b"]
    for place, job in enumerate(grid.jobs()):
        run_sweep(grid, places[place % 2], "x", only_job=job.name)
    out = tmp_path / "c"
    done = CliRunner().invoke(app, ["merge", *map(str, places), "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert "18 of 18 answers, 0 conflicts" in done.output
    assert all(job.state == "done" for job in status(out).jobs)
    made = run_sweep(grid, out, "x", only_scores=True)
    assert made.status.finished
    assert tables(out) == tables(tmp_path / "plain")
    # What was measured beside the texts has come along.
    with sqlite3.connect(next((out / "answers" / "qwen2vl").glob("*.sqlite"))) as file:
        records = [json.loads(record) for (record,) in file.execute("SELECT record FROM answers")]
    assert all(record["kept_per_head"] for record in records)
