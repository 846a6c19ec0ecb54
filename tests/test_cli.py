"""The command line: what it makes, and how it ends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparsemm_eval.cli import app
from sparsemm_eval.methods import HeadScores
from sparsemm_eval.tiny import default_checkpoint

ROOT = Path(__file__).parent.parent


def test_chase_writes_scores_and_says_what_it_read(tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    model = "embedded:qwen2vl"
    done = CliRunner().invoke(app, ["chase", "--model", model, "-n", "3", "-o", str(output)])
    assert done.exit_code == 0, done.output
    assert "on 3 images" in done.output
    assert HeadScores.read(output).values.shape == (5, 8)


@pytest.mark.parametrize(("arguments", "words"), [
    (["demo", "--samples", "0"], "samples=0"),
    (["demo", "--budgets", "8"], "budget=8 is too small for window=8"),
    (["demo", "--budgets", "many"], "budgets='many'"),
    (["chase", "--model", "/nowhere"], "pretrained=/nowhere"),
    (["mask", "-o", "m", "--shares", "0.6"], "share of at most 0.5"),
    (["mask", "-o", "m", "--shares", "few"], "shares='few'"),
    (["mask", "-o", "m", "--mode", "key"], "mode='key': it must be one of query, output"),
    (["chase", "--model", str(default_checkpoint()), "--data", "books"], "data='books'"),
    (["draw", "--heads", "9-9"], "heads='9-9'"),
    (["draw", "--device", "cuda:99"], "device='cuda:99': it must be one of auto, cpu"),
    (["chase", "--model", "embedded:gpt"], "pretrained='embedded:gpt': it must be one of"),
    (["draw", "--question", "What?"], "a question or box without its image"),
])  # fmt: skip
def test_bad_input_is_one_sentence_and_exit_code_1(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert words in done.output
    assert done.output.count("\n") == 1


def test_the_help_of_chase_shows_a_line_of_its_data_whole() -> None:
    done = CliRunner().invoke(app, ["chase", "--help"], env={"COLUMNS": "400"})
    assert '{"image": path, "chunks": [{"text": …, "box": [x0, y0, x1, y1]}]}' in done.output


def test_draw_says_where_heads_look_and_what_it_wrote(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["draw", "--heads", "4-0", "-o", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "answer: " in done.output
    assert "head 4-0 · " in done.output
    assert f"wrote {tmp_path / 'attention.png'}" in done.output


def test_the_front_door_fails_when_a_run_fails(tmp_path: Path) -> None:
    """lmms-eval exits 0 then; run_eval.sh does not."""
    if not (ROOT / ".venv" / "installed").is_file():
        pytest.skip("not set up by run_eval.sh")
    model_args = f"pretrained={default_checkpoint()},method=snapkv,budget=8,window=8"
    done = subprocess.run(
        ["./run_eval.sh", "--", "--model", "qwen2vl_sparsemm", "--tasks", "docvqa_mini",
         "--model_args", model_args, "--output_path", str(tmp_path)],
        cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "budget=8 is too small for window=8" in done.stdout + done.stderr
    assert not list(tmp_path.rglob("*_results.json"))


def test_what_was_left_whole_is_said_once_for_all_cells(tmp_path: Path) -> None:
    """Not a warning a cell: in a process of its own, where lmms-eval sets its logger up."""
    words = [
        "demo",
        "--samples",
        "2",
        "--models",
        "qwen2vl",
        "--tasks",
        "gqa_mini",
        "--masked",
        "0",
    ]
    command = [sys.executable, "-m", "sparsemm_eval", *words, "--masked", "0"]
    command += ["--budgets", "256", "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "samples uncompressed" not in done.stdout + done.stderr
    assert done.stderr.count("are mostly full KV") == 1
