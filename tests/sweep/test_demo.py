"""The demo on a few documents: whole, resumable, and honest about what was kept."""

import json
import sqlite3
from pathlib import Path

import pytest

from sparsemm_eval.sweep.demo import Demo, run_demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Demo, Path]:
    out = tmp_path_factory.mktemp("demo")
    return run_demo(out, samples=12, batch_size=6, budgets=(64, 12)), out


def answers(folder: Path) -> int:
    files = (folder / "answers").glob("*.sqlite")
    return sum(
        sqlite3.connect(file).execute("SELECT count(*) FROM answers").fetchone()[0]
        for file in files
    )


def test_every_cell_is_there_and_the_model_reads(demo: tuple[Demo, Path]) -> None:
    frame = demo[0].frame.set_index("method")
    assert len(frame) == 11
    assert frame.loc["fullkv", "score"] >= 0.9
    assert frame.loc["sparsemm"].set_index("budget").loc[64, "score"] > 0.5


def test_scores_fall_with_the_budget(demo: tuple[Demo, Path]) -> None:
    for method, cells in demo[0].frame.dropna(subset="budget").groupby("method"):
        small, large = cells.sort_values("budget")["score"]
        assert small <= large, method


def test_kept_tokens_are_stated_beside_the_budget(demo: tuple[Demo, Path]) -> None:
    frame = demo[0].frame
    full = frame[frame["method"] == "fullkv"].iloc[0]
    assert full.kept_tokens_per_head == full.prompt_tokens
    snap = frame[(frame["method"] == "snapkv") & (frame["budget"] == 64)].iloc[0]
    assert snap.kept_tokens_per_head == 64
    # 5 layers of 4 KV heads; 16 numbers of 4 bytes in each key and value.
    assert snap.kept_kv_bytes == 64 * 5 * 4 * 16 * 4 * 2


def test_files_say_how_they_were_made(demo: tuple[Demo, Path]) -> None:
    summary = json.loads((demo[1] / "summary.json").read_text())
    assert summary["command"] == "./run_eval.sh"
    assert len(summary["cells"]) == 11
    assert "| FullKV" in (demo[1] / "table.md").read_text()
    assert (demo[1] / "score_over_budget.png").stat().st_size > 10_000


def test_a_second_run_computes_nothing_and_says_the_same(demo: tuple[Demo, Path]) -> None:
    first, out = demo
    count = answers(out)
    again = run_demo(out, samples=12, batch_size=6, budgets=(64, 12))
    assert answers(out) == count == 11 * 12
    assert again.markdown == first.markdown


@pytest.mark.parametrize(("settings", "words"), [
    ({"samples": 0}, "samples=0"),
    ({"budgets": (8,)}, "budget=8"),
])  # fmt: skip
def test_bad_settings_are_named(settings: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        run_demo(tmp_path, **{"samples": 5, "batch_size": 5, **settings})
