"""The demo on a few samples: whole, resumable, and honest about what was kept."""

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from sweep.small_demo import CELLS, TASKS

from sparsemm_eval.report.results import load
from sparsemm_eval.sweep.demo import Demo
from sparsemm_eval.sweep.demo import run_demo as run_demo_of
from sparsemm_eval.sweep.studies import demo_grid

SETTINGS = {"samples": 12, "batch_size": 6, "budgets": (64, 12), "tasks": TASKS, "masked": 8}


def run_demo(out: Path, masked: int = 40, **settings: Any) -> Demo:
    return run_demo_of(out, demo_grid(**settings), masked)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Demo, Path]:
    out = tmp_path_factory.mktemp("demo")
    return run_demo(out, **SETTINGS), out


def answers(folder: Path) -> int:
    files = folder.glob("answers/*/*.sqlite")
    return sum(
        sqlite3.connect(file).execute("SELECT count(*) FROM answers").fetchone()[0]
        for file in files
    )


def test_every_cell_is_there_and_the_models_read(demo: tuple[Demo, Path]) -> None:
    frame = demo[0].frame
    assert len(frame) == 2 * len(TASKS) * CELLS
    documents = frame[frame["task"] == "docvqa_mini"].set_index(["model", "method"])
    for model in ("qwen2vl", "llava_next"):
        full = documents.loc[(model, "fullkv"), "score"].item()
        assert full >= 0.8
        sparse = documents.loc[(model, "sparsemm")].set_index("budget")["score"]
        assert sparse.loc[64] > 0.5 * full


def test_kept_tokens_are_stated_for_each_task(demo: tuple[Demo, Path]) -> None:
    frame = demo[0].frame
    full = frame[frame["method"] == "fullkv"]
    assert (full["kept_tokens_per_head"] == full["prompt_tokens"]).all()
    assert full["prompt_tokens"].nunique() == len(full)
    snap = frame[(frame["method"] == "snapkv") & (frame["budget"] == 64)]
    assert (snap["kept_tokens_per_head"] == 64).all()
    # 5 layers of 4 or 8 KV heads; 16 numbers of 4 bytes in each key and value.
    heads = snap["model"].map({"qwen2vl": 4, "llava_next": 8})
    assert (snap["kept_kv_bytes"] == 64 * 5 * heads * 16 * 4 * 2).all()


def test_files_say_how_they_were_made(demo: tuple[Demo, Path]) -> None:
    made, out = demo
    summary = json.loads((out / "summary.json").read_text())
    assert summary["command"] == "./run_eval.sh"
    assert len(summary["cells"]) == len(made.frame)
    assert set(summary["chance"]) == set(TASKS)
    assert "### DocVQA: ANLS (chance" in (out / "table.md").read_text()
    for model in ("qwen2vl", "llava_next"):
        for name in ("score_over_budget", "score_over_kept", "heads/scores", "mask/masking"):
            assert (out / model / f"{name}.png").stat().st_size > 10_000
    assert "tokens (" in (out / "ranking.md").read_text()
    assert (out / "ranking.png").stat().st_size > 10_000
    for like, benchmark in (("table3", "DocVQA (ANLS)"), ("table4", "VQAv2 (VQA accuracy)")):
        assert f"| {benchmark} " in (out / f"{like}.md").read_text()
    page = (out / "report" / "index.html").read_text()
    assert str(out) not in page.split("<main")[0]
    assert "data:image/" in page
    assert all(path.is_file() for path in made.files)


def test_a_second_run_computes_nothing_and_says_the_same(demo: tuple[Demo, Path]) -> None:
    first, out = demo
    count = answers(out)
    again = run_demo(out, **SETTINGS)
    assert answers(out) == count
    assert again.markdown == first.markdown


def test_another_run_in_the_folder_uses_what_fits(demo: tuple[Demo, Path], tmp_path: Path) -> None:
    """Fewer samples and cells: nothing is computed again, and nothing beyond them counts."""
    out = shutil.copytree(demo[1], tmp_path / "out")
    count = answers(out)
    fewer = {"samples": 7, "budgets": (12,), "tasks": TASKS[:1], "models": ("qwen2vl",)}
    frame = run_demo(out, **{**SETTINGS, **fewer, "masked": 0}).frame
    assert answers(out) == count
    assert (frame["samples"] == 7).all()
    # Tables of the folder know nothing of what was there before.
    assert load([out]).cells["samples"].eq(7).sum() == 1 + CELLS // 2
    assert not list((out / "cells").rglob("*vqav2*"))
    assert len(frame) == 1 + CELLS // 2
    table = (out / "table.md").read_text()
    assert table.startswith("# The embedded models")
    assert "VQAv2" not in table


def test_cells_in_one_pass_equal_cells_alone(demo: tuple[Demo, Path], tmp_path: Path) -> None:
    """One prefill for all, against a run of two cells only."""
    alone = run_demo(
        tmp_path, **{**SETTINGS, "budgets": (12,), "models": ("llava_next",), "masked": 0}
    ).frame
    together = demo[0].frame
    columns = ["task", "method", "score", "kept_tokens_per_head", "kept_kv_bytes"]
    same = together["model"].eq("llava_next") & (
        together["budget"].isna() | together["budget"].eq(12)
    )
    pd.testing.assert_frame_equal(
        together[same][columns].reset_index(drop=True), alone[columns].reset_index(drop=True)
    )


@pytest.mark.parametrize(("settings", "words"), [
    ({"samples": 0}, "samples=0"),
    ({"masked": 201}, "masked=201"),
    ({"budgets": (8,)}, "budget=8"),
    ({"tasks": ("docvqa",)}, "task='docvqa': it must be one of docvqa_mini"),
    ({"models": ("gpt",)}, "model='gpt': it must be one of qwen2vl, llava_next"),
])  # fmt: skip
def test_bad_settings_are_named(settings: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        run_demo(tmp_path, **{"samples": 5, "batch_size": 5, **settings})


def test_models_are_named_as_checkpoints_too() -> None:
    grid = demo_grid(5, 5, models=["embedded:llava_next"])
    assert [model.name for model in grid.models] == ["llava_next"]
