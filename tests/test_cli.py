"""The command line: what it makes, and how it ends."""

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
from loguru import logger
from typer.testing import CliRunner

from sparsemm_eval.cli import app
from sparsemm_eval.engine import checkpoint
from sparsemm_eval.errors import UserError
from sparsemm_eval.heads.calibration import documents_hash
from sparsemm_eval.methods import HeadScores, Sensitivity
from sparsemm_eval.sweep.process import ENDING
from sparsemm_eval.tiny import default_checkpoint

ROOT = Path(__file__).parent.parent


def test_chase_writes_scores_and_says_what_it_read(tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    model = "embedded:qwen2vl"
    done = CliRunner().invoke(app, ["chase", "--model", model, "-n", "3", "-o", str(output)])
    assert done.exit_code == 0, done.output
    assert "on 3 images" in done.output
    assert HeadScores.read(output).values.shape == (5, 8)


def test_sensitivity_writes_its_file_and_how_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a second run finds all there already: not even the weights are loaded."""
    output = tmp_path / "made" / "scores.json"
    words = ["sensitivity", "--data", "docvqa_mini,gqa_mini", "-n", "2", "--window", "8"]
    words += ["--budgets", "", "-o", str(output)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "prompts: 2 of 2 of docvqa_mini, 2 of 2 of gqa_mini; " in done.stdout
    assert f"wrote {output}" in done.stdout
    found = Sensitivity.read(output)
    beside = json.loads((output.parent / "scores.provenance.json").read_text())
    assert (beside["scores"], beside["data"]) == ("scores.json", "docvqa_mini,gqa_mini")
    assert (beside["window"], beside["budgets"], beside["dtype"]) == (8, [], "float32")
    assert beside["data_sha256"] == documents_hash(found.documents)
    assert beside["kinds"]["gqa_mini"] == {
        "documents": 2,
        "of": 2,
        "which": "2 drawn with seed 1; the benchmark's is 0",
        "answer_tokens": found.kinds["gqa_mini"].answer_tokens,
    }
    assert set(beside["versions"]) >= {"torch", "transformers", "lmms-eval"}
    before = output.read_text()
    output.unlink()
    fail = lambda *_, **__: pytest.fail("weights were loaded")  # noqa: E731
    monkeypatch.setattr(checkpoint.AutoModelForImageTextToText, "from_pretrained", fail)
    assert CliRunner().invoke(app, words).exit_code == 0
    assert output.read_text() == before


def test_sensitivity_goes_on_only_from_what_was_asked_alike(tmp_path: Path) -> None:
    """More prompts add to the records; other lengths of answers are computed anew, or refused."""
    output = tmp_path / "scores.json"
    records = tmp_path / "scores.records.jsonl"

    def made(*more: str) -> dict:
        words = ["sensitivity", "--data", "docvqa_mini", "--budgets", "", "-o", str(output), *more]
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, done.output
        return json.loads((tmp_path / "scores.provenance.json").read_text())["kinds"]["docvqa_mini"]

    short = made("-n", "2", "--window", "8", "--max-new-tokens", "3")
    assert short["answer_tokens"] == 4  # those after the first, of two answers
    before = records.read_text()
    whole = made("-n", "2", "--window", "8")
    assert whole["answer_tokens"] > 4
    assert records.read_text().startswith(before)
    assert made("-n", "2", "--window", "8", "--max-new-tokens", "3") == short
    assert made("-n", "3", "--window", "8")["documents"] == 3
    words = ["sensitivity", "--data", "docvqa_mini", "-o", str(output), "--window", "9"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1
    assert "holds records with another window" in done.output


def test_sensitivity_of_text_alone(tmp_path: Path) -> None:
    """Asked in a file, and read as head scores by a method."""
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(f'{{"question": "{n} + {n} is what?"}}\n' for n in range(3)))
    output = tmp_path / "scores.json"
    words = ["sensitivity", "--data", str(data), "--window", "2", "--budgets", "4"]
    done = CliRunner().invoke(app, [*words, "-o", str(output)])
    assert done.exit_code == 0, done.output
    assert "prompts: 3 of 3 of sums" in done.stdout
    assert list(Sensitivity.read(output).tables) == [4]


@pytest.mark.parametrize(("arguments", "words"), [
    (["demo", "--samples", "0"], "samples=0"),
    (["demo", "--budgets", "8"], "budget=8 is too small for window=8"),
    (["demo", "--budgets", "many"], "budgets='many'"),
    (["chase", "--model", "/nowhere"], "pretrained=/nowhere"),
    (["mask", "-o", "m", "--shares", "0.6"], "share of at most 0.5"),
    (["mask", "-o", "m", "--shares", "few"], "shares='few'"),
    (["mask", "-o", "m", "--mode", "key"], "mode='key': it must be one of query, output"),
    (["chase", "--model", str(default_checkpoint()), "--data", "books"], "data='books'"),
    (["sensitivity", "--data", "docvqa_vla"], "there is no task docvqa_vla"),
    (["sensitivity", "--data", "ovo_forward"], "is of output_type generate_until_multi_round"),
    (["draw", "--heads", "9-9"], "heads='9-9'"),
    (["draw", "--device", "cuda:99"], "device='cuda:99': it must be one of auto, cpu"),
    (["chase", "--model", "embedded:gpt"], "pretrained='embedded:gpt': it must be one of"),
    (["draw", "--question", "What?"], "a question or box without its image"),
    (["draw", "--video", "a.mp4"], "video=a.mp4 has no question: give question=TEXT"),
    (["draw", "--video", "a.mp4", "--question", "What?", "--frames", "0"], "frames=0: it must be"),
    (["draw", "--video", "a.mp4", "--box", "1,1,2,2"], "it is drawn alone, without image= or box="),
    (["draw", "--frames", "4"], "frames=4: they are of a video: give video=FILE too"),
])  # fmt: skip
def test_bad_input_is_one_sentence_and_exit_code_1(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert words in done.output
    assert done.output.count("\n") == 1


def shown_line(output: str) -> str:
    """The one line of JSON in a help."""
    (line,) = [line for line in output.splitlines() if line.strip().startswith("{")]
    return line


def test_the_help_of_sensitivity_shows_a_line_of_its_data_whole() -> None:
    done = CliRunner().invoke(app, ["sensitivity", "--help"], env={"COLUMNS": "80"})
    assert set(json.loads(shown_line(done.output))) == {"question", "image", "kind"}


def test_the_help_of_chase_shows_a_line_of_its_data_whole() -> None:
    """On a terminal of usual width, to be copied from there."""
    done = CliRunner().invoke(app, ["chase", "--help"], env={"COLUMNS": "80"})
    page = json.loads(shown_line(done.output))
    assert set(page) == {"image", "chunks"}
    assert {name for chunk in page["chunks"] for name in chunk} == {"text", "box"}


@pytest.fixture
def lmms_eval_that(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Put something in the place of lmms-eval's run, within its own way of handling errors."""

    def put(run: Callable[[], None]) -> None:
        def cli_evaluate(given: object) -> None:
            logger.remove()
            logger.add(lambda line: None, level="CRITICAL" if "CRITICAL" in sys.argv else "INFO")
            try:
                run()
            except Exception as error:  # noqa: BLE001 - as lmms-eval does
                traceback.print_exc()
                logger.error(f"Error during evaluation: {error}.")

        monkeypatch.setattr("lmms_eval.__main__.cli_evaluate", cli_evaluate)
        monkeypatch.setattr("sparsemm_eval.libraries.check_libraries", lambda: None)

    return put


EVAL = ["eval", "--model", "sparsemm", "--tasks", "docvqa_mini"]


def test_eval_says_what_can_be_mended_without_a_traceback(lmms_eval_that: Callable) -> None:
    def refuse() -> None:
        raise UserError("method='snapvk': it must be one of fullkv")

    lmms_eval_that(refuse)
    done = CliRunner().invoke(app, EVAL)
    assert done.exit_code == 1
    assert done.stderr.endswith("sparsemm-eval: method='snapvk': it must be one of fullkv\n")
    assert "Traceback" not in done.stderr
    debugged = CliRunner().invoke(app, ["--debug", *EVAL])
    assert debugged.exit_code == 1
    assert "Traceback" in debugged.stderr


@pytest.mark.parametrize("more", [[], ["--verbosity", "CRITICAL"], ["--verbosity=CRITICAL"]])
def test_eval_shows_the_traceback_of_a_bug(lmms_eval_that: Callable, more: list[str]) -> None:
    """And fails, however little of the log is to be seen."""
    lmms_eval_that(lambda: [][1])
    done = CliRunner().invoke(app, [*EVAL, *more])
    assert done.exit_code == 1
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("sparsemm-eval: list index out of range\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_eval_that_is_asked_to_end_says_so(
    lmms_eval_that: Callable, number: signal.Signals, code: int
) -> None:
    lmms_eval_that(lambda: os.kill(os.getpid(), number))
    before = {one: signal.getsignal(one) for one in (*ENDING, signal.SIGINT)}
    try:
        done = CliRunner().invoke(app, EVAL)
    finally:  # a process that is about to end takes no further signal, and this one goes on
        for one, handler in before.items():
            signal.signal(one, handler)
    assert done.exit_code == code
    assert f"sparsemm-eval: stopped by {number.name}; answers of this package's" in done.stderr


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
