"""Whole runs through ``python -m lmms_eval``, on the miniature DocVQA with the tiny reader.

Starting lmms-eval takes longer than all its answers here: runs are few, and shared.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import lmms_eval.tasks.docvqa
import pytest
import yaml
from engine.fixtures import Row, rows
from lmms_eval.utils import load_yaml_config

from sparsemm_eval.engine.answers import AnswerStore
from sparsemm_eval.paths import tasks_folder
from sparsemm_eval.tiny import default_checkpoint

SAMPLES = 23  # odd: one of two ranks gets a sample less, and a clone of its last
BUDGET = 96
METHOD = f"method=adakv,budget={BUDGET},window=8,dtype=float32"
PYTHON = (sys.executable, "-m", "lmms_eval")
TWO_RANKS = (
    sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
    "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", "-m", "lmms_eval",
)  # fmt: skip
BROKEN_TASK = """
include: {mini}
task: docvqa_broken
doc_to_visual: !function broken.visual
"""
BROKEN_CODE = """
from lmms_eval.tasks.docvqa.utils import docvqa_doc_to_visual


def visual(document):
    if document["questionId"] == "1":
        raise OSError("the page was lost")
    return docvqa_doc_to_visual(document)
"""


@dataclass(frozen=True)
class Run:
    """What a run left behind."""

    folder: Path
    said: str

    @property
    def results(self) -> list[dict[str, Any]]:
        """The results files."""
        return [json.loads(path.read_text()) for path in self.folder.rglob("*_results.json")]

    @property
    def score(self) -> float:
        """ANLS of the one results file."""
        (result,) = self.results
        return result["results"]["docvqa_mini"]["anls,none"]

    @property
    def texts(self) -> dict[int, str]:
        """By document: the answers that were scored."""
        (path,) = self.folder.rglob("*_samples_docvqa_mini.jsonl")
        samples = map(json.loads, path.read_text().splitlines())
        return {sample["doc_id"]: sample["filtered_resps"] for sample in samples}

    @property
    def rows(self) -> list[Row]:
        """The stored answers."""
        return rows(self.folder / "answers")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Offline, on the CPU, with caches of its own."""
    caches = tmp_path_factory.mktemp("caches")
    return os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_DATASETS_CACHE": str(caches / "datasets"),
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(caches),
    }


def model_arguments(folder: Path, settings: str = METHOD) -> str:
    """--model_args of a run whose answers lie in its folder."""
    return f"pretrained={default_checkpoint()},answers={folder / 'answers'},{settings}"


def command(folder: Path, batch_size: int) -> list[str]:
    """The command line of a run."""
    return [
        *PYTHON, "--model", "qwen2vl_sparsemm", "--model_args", model_arguments(folder),
        "--tasks", "docvqa_mini", "--include_path", str(tasks_folder()), "--limit", str(SAMPLES),
        "--output_path", str(folder / "out"), "--log_samples", "--batch_size", str(batch_size),
    ]  # fmt: skip


def run(words: list[str], folder: Path, environment: dict[str, str]) -> Run:
    """Run to the end; lmms-eval exits with 0 whatever happens."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        words, env=environment, cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return Run(folder, said)


@pytest.fixture(scope="module")
def undisturbed(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One process, in batches, from the beginning to the end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return run(command(folder, batch_size=8), folder, environment)


def test_a_results_file_says_what_was_scored_and_what_was_kept(undisturbed: Run) -> None:
    (result,) = undisturbed.results
    assert result["n-samples"]["docvqa_mini"]["effective"] == SAMPLES
    assert 0 < undisturbed.score <= 1
    throughput = result["throughput"]
    records = [row.record for row in undisturbed.rows]
    assert throughput["avg_samples"] == len(records) == SAMPLES
    assert throughput["avg_nominal_tokens_per_head"] == BUDGET
    for name, stored in (
        ("avg_kept_tokens_per_head", "kept_per_head"),
        ("avg_kept_kv_bytes", "kept_bytes"),
        ("avg_prompt_tokens", "prompt_tokens"),
    ):
        mean = sum(record[stored] for record in records) / SAMPLES
        assert throughput[name] == pytest.approx(mean)
    # AdaKV's published rounding: near the budget, never the whole prompt.
    assert 0.8 * BUDGET < throughput["avg_kept_tokens_per_head"] < 1.2 * BUDGET
    assert throughput["avg_share_uncompressed"] == 0
    assert "method=adakv" in result["config"]["model_args"]


def test_logged_samples_are_the_stored_answers(undisturbed: Run) -> None:
    stored = {int(row.doc_id.split()[-1]): row.text for row in undisturbed.rows}
    assert undisturbed.texts == stored
    assert sorted(stored) == list(range(SAMPLES))


def test_killed_and_run_again_computes_nothing_twice(
    undisturbed: Run, environment: dict[str, str], tmp_path: Path
) -> None:
    words = command(tmp_path, batch_size=1)
    with subprocess.Popen(
        words, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as child:
        wait_until(lambda: AnswerStore(tmp_path / "answers").count() >= 3, child)
        child.send_signal(signal.SIGKILL)
        child.stdout.read()
    assert child.returncode == -signal.SIGKILL
    finished = AnswerStore(tmp_path / "answers").count()
    assert 3 <= finished < SAMPLES, "killed too late to show anything"
    assert not list(tmp_path.rglob("*_results.json"))
    before = rows(tmp_path / "answers")
    assert len(before) == finished
    again = run(words, tmp_path, environment)
    assert again.rows[:finished] == before
    assert len({row.key for row in again.rows}) == len(again.rows) == SAMPLES
    assert len({row.file for row in again.rows}) == 2
    assert f"{finished} answers of this cell are in" in again.said
    assert again.results[0]["throughput"]["avg_samples_found"] == finished
    assert again.score == undisturbed.score
    assert again.texts == undisturbed.texts


def wait_until(true: Callable[[], bool], child: subprocess.Popen) -> None:
    """Ask again and again while a process runs."""
    end = time.monotonic() + 200
    while not true():
        assert child.poll() is None, child.stdout.read().decode()
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.02)


def test_two_ranks_share_the_samples_and_one_failure_ends_both(
    undisturbed: Run, environment: dict[str, str], tmp_path: Path
) -> None:
    """Two evaluations one after the other in one start: a good one, then one with a lost page."""
    (tmp_path / "tasks").mkdir()
    mini = tasks_folder() / "docvqa_mini.yaml"
    (tmp_path / "tasks" / "broken.yaml").write_text(BROKEN_TASK.format(mini=mini))
    (tmp_path / "tasks" / "broken.py").write_text(BROKEN_CODE)
    good = configuration(tmp_path / "good", limit=SAMPLES)
    include = [str(tasks_folder()), str(tmp_path / "tasks")]
    lost = configuration(tmp_path / "lost", tasks="docvqa_broken", include_path=include)
    both = run([*TWO_RANKS, *written(tmp_path, good, lost)], tmp_path, environment)
    two = Run(tmp_path / "good", both.said)
    by_rank: dict[str, set[int]] = {}
    for row in two.rows:
        by_rank.setdefault(row.file, set()).add(int(row.doc_id.split()[-1]))
    assert sorted(map(len, by_rank.values())) == [SAMPLES // 2, SAMPLES // 2 + 1]
    assert set().union(*by_rank.values()) == set(range(SAMPLES))
    # The mean of the same numbers in another order.
    assert two.score == pytest.approx(undisturbed.score)
    assert two.texts == undisturbed.texts
    failed = Run(tmp_path / "lost", both.said)
    assert failed.results == []
    assert sorted((row.doc_id, row.error) for row in failed.rows if row.error) == [
        ("validation 1", "OSError: the page was lost")
    ]
    assert len([row for row in failed.rows if row.text is not None]) == 3
    raised = re.findall(r"SampleFailures: 1 samples failed.*the page was lost", both.said)
    assert len(raised) == 2, "both ranks raise, so that none waits for the other"


def configuration(folder: Path, settings: str = METHOD, **changes: Any) -> dict[str, Any]:
    """One evaluation of a configuration file."""
    common = {
        "model": "qwen2vl_sparsemm",
        "model_args": model_arguments(folder, settings),
        "tasks": "docvqa_mini",
        "include_path": str(tasks_folder()),
        "output_path": str(folder / "out"),
        "log_samples": True,
        "limit": 4,
        "batch_size": 2,
    }
    return common | changes


def written(folder: Path, *evaluations: dict[str, Any]) -> list[str]:
    """The option that makes lmms-eval do these evaluations one after the other."""
    path = folder / "evaluations.yaml"
    path.write_text(yaml.safe_dump(list(evaluations)))
    return ["--config", str(path)]


def test_bad_input_is_one_sentence_and_no_results_file(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """Each in its own evaluation; lmms-eval goes on to the next."""
    bad = {
        "budgett=64: qwen2vl_sparsemm has no such setting": "method=snapkv,budgett=64",
        "budget=8 is too small for window=8": "method=snapkv,budget=8,window=8",
        "pretrained=no/such is no folder": "method=fullkv,pretrained=no/such",
    }
    evaluations = [configuration(tmp_path, settings) for settings in bad.values()]
    done = run([*PYTHON, *written(tmp_path, *evaluations)], tmp_path, environment)
    said = re.findall(r"Error during evaluation: (.*)\. Please set `--verbosity=DEBUG`", done.said)
    assert len(said) == len(bad)
    for words, sentence in zip(bad, said, strict=True):
        assert words in sentence
    assert done.results == []
    assert done.rows == []


# --- the miniature ------------------------------------------------------------------------------


def test_the_miniature_is_docvqa_but_for_data_name_and_wording(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", environment["XDG_CACHE_HOME"])
    own = comparable(tasks_folder() / "docvqa_mini.yaml")
    theirs = comparable(Path(lmms_eval.tasks.docvqa.__path__[0]) / "docvqa_val.yaml")
    apart = {"task", "dataset_path", "dataset_kwargs", "lmms_eval_specific_kwargs"}
    assert {name for name in own | theirs if own.get(name) != theirs.get(name)} == apart
    wordings = (config["lmms_eval_specific_kwargs"]["default"] for config in (own, theirs))
    assert {frozenset(wording) for wording in wordings} == {
        frozenset({"pre_prompt", "post_prompt"})
    }


def comparable(path: Path) -> dict[str, Any]:
    """A task file with its functions as code, which is equal wherever it was loaded from."""
    config = load_yaml_config(str(path))
    return {name: code(value) if callable(value) else value for name, value in config.items()}


def code(function: Callable) -> CodeType:
    """What a function does."""
    return function.__code__
