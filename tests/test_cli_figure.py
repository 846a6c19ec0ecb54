"""``sparsemm-eval figure``: what it writes, and how it ends."""

from pathlib import Path

import pytest
from report.result_files import write_grid
from typer.testing import CliRunner

from sparsemm_eval.cli import app


def figure(*arguments: str):
    return CliRunner().invoke(app, ["figure", *arguments])


def test_score_over_budget_and_over_kept(tmp_path: Path) -> None:
    write_grid(tmp_path / "runs")
    (tmp_path / "runs" / "cut_results.json").write_text("{")
    for kind in ("budget", "kept"):
        done = figure(str(tmp_path / "runs"), "--kind", kind, "-o", str(tmp_path), "--zoom")
        assert done.exit_code == 0, done.output
        assert "cut_results.json" in done.output
        for form in ("svg", "png"):
            path = tmp_path / f"score_over_{kind}.{form}"
            assert f"wrote {path}" in done.output
            assert path.stat().st_size > 1000


def test_the_papers_own_figures(tmp_path: Path) -> None:
    only = ("--format", "svg", "--models", "Qwen2-VL-7B-Instruct", "--methods", "sparsemm")
    done = figure("paper", "--kind", "budget", "--benchmarks", "GQA", *only, "-o", str(tmp_path))
    assert done.exit_code == 0, done.output
    done = figure("paper", "--kind", "efficiency", *only, "-o", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert {path.name for path in tmp_path.iterdir()} == {"score_over_budget.svg", "efficiency.svg"}


def test_the_budget_of_each_head(tmp_path: Path) -> None:
    done = figure(
        "--kind", "heads", "--model", "embedded:llava_next", "--budgets", "64,32", "--tokens",
        "339", "--settings", "window=8,allocation=exact", "--format", "png", "-o", str(tmp_path),
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert done.output == f"wrote {tmp_path / 'budget_per_head.png'}\n"


@pytest.mark.parametrize(("arguments", "words"), [
    (["paper", "--kind", "scores"], "kind='scores': it must be one of budget, kept, ranking"),
    (["--kind", "budget"], "kind=budget: give results files, folders, or the word paper"),
    (["paper", "--kind", "budget", "--format", "bmp"], "format='bmp'"),
    (["paper", "--kind", "budget", "--models", "x"], "models=x: it must be of"),
    (["paper", "--kind", "budget", "--budgets", "7"], "budgets=7: it must be of"),
    (["paper", "--kind", "budget", "--budgets", "few"], "budgets='few'"),
    (["paper", "--kind", "ranking"], "a ranking needs full KV and methods"),
    (["paper", "--kind", "ranking", "--paper"], "paper with kind=ranking"),
    (["paper", "--kind", "kept"], "none of the cells has a budget and kept_tokens_per_head"),
    (["paper", "--kind", "kept", "--paper"], "the paper does not say what was really kept"),
    (["/nowhere", "--kind", "budget"], "/nowhere: there is no such file or folder"),
    (["/nowhere", "--kind", "efficiency"], "/nowhere: there is no such file or folder"),
    (["paper", "--kind", "heads", "--budgets", "64"], "kind=heads takes no results (paper)"),
    (["--kind", "heads"], "budgets=''"),
    (["--kind", "heads", "--budgets", "64", "--methods", "adakv"], "method=adakv: what its heads"),
])  # fmt: skip
def test_bad_input_is_one_sentence_and_exit_code_1(
    arguments: list[str], words: str, tmp_path: Path
) -> None:
    done = figure(*arguments, "-o", str(tmp_path / "out"))
    assert done.exit_code == 1
    assert words in done.output
    assert done.output.count("\n") == 1
    assert not (tmp_path / "out").exists()
