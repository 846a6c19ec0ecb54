"""Which tasks a sweep may run: any of one turn, and what else one needs is said before."""

from __future__ import annotations

from pathlib import Path

import pytest
from lmms_eval.tasks import TaskManager
from typer.testing import CliRunner

from sparsemm_eval.cli import app
from sparsemm_eval.engine import videos
from sparsemm_eval.engine.tasks import check_family, find_tasks, obstacle, runnable
from sparsemm_eval.errors import UserError
from sparsemm_eval.families import find_family
from sparsemm_eval.paths import tasks_folder


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    """Every task of lmms-eval, and ours."""
    return TaskManager("WARNING", include_path=str(tasks_folder()))


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "AZURE_OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("task", [
    "infovqa_val", "mmmu_val", "ai2d", "mme", "pope", "realworldqa", "scienceqa_img", "mmstar",
    "docvqa_val", "ocrbench", "textvqa_val", "chartqa", "mmbench_en_dev_static", "gqa",
    "vqav2_val", "docvqa_mini", "textcaps_mini", "mmbench_mini", "seedbench_ppl", "arc_easy",
])  # fmt: skip
def test_what_scores_by_sample_needs_nothing(manager: TaskManager, task: str) -> None:
    assert obstacle(manager, task) is None


@pytest.mark.parametrize(("task", "words"), [
    ("docvqa_test", "a file to submit elsewhere (submission)"),
    ("mmbench_en_test", "a file to submit elsewhere (submission)"),
    ("mmbench_en_dev", "is scored by a judge"),
    ("llava_in_the_wild", "is scored by a judge"),
    ("ovo_forward", "is of output_type generate_until_multi_round, which asks again with"),
    ("mmsearch_end2end", "takes no second turn: choose tasks of one turn"),
    ("tau2_bench_telecom", "is of output_type generate_until_agentic, which asks again with"),
    ("unig2u_illusionbench_arshia_in_shape_visual_cot", "_visual_cot, which is not"),
])  # fmt: skip
def test_what_else_a_task_needs_is_said(manager: TaskManager, task: str, words: str) -> None:
    cause = obstacle(manager, task)
    assert cause is not None
    assert words in cause
    assert task in cause
    with pytest.raises(ValueError, match=task):
        runnable(manager, ["docvqa_mini", task], skip=False)
    kept, left = runnable(manager, ["docvqa_mini", task], skip=True)
    assert kept == ["docvqa_mini"]
    assert [lost.task for lost in left] == [task]


def test_a_task_of_videos_needs_what_decodes_them(
    manager: TaskManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert obstacle(manager, "videomme") is None
    monkeypatch.setattr(videos, "find_spec", lambda name: None)
    assert "PyAV, which is not installed: pip install" in (obstacle(manager, "videomme") or "")
    assert obstacle(manager, "docvqa_val") is None


def test_a_task_of_videos_needs_a_family_that_reads_them(manager: TaskManager) -> None:
    with pytest.raises(UserError, match="videomme: a video is shown, and of a idefics3 model"):
        check_family(manager, "videomme", find_family("idefics3"))
    check_family(manager, "videomme", find_family("qwen3_vl"))
    check_family(manager, "docvqa_val", find_family("idefics3"))


def test_a_judge_with_a_key_is_no_obstacle(
    manager: TaskManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "not-a-key")
    assert obstacle(manager, "mmbench_en_dev") is None


def test_java_is_found_in_a_task_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.yaml").write_text(
        "task: own_captions\ndataset_path: json\ntest_split: train\noutput_type: generate_until\n"
        "process_results: !function own.results\n"
        "metric_list: [{metric: own, aggregation: mean, higher_is_better: true}]\n"
    )
    (tmp_path / "own.py").write_text(
        "from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer\n\n\n"
        "def tokens(text):\n    return PTBTokenizer().tokenize(text)\n\n\n"
        "def results(doc, answers):\n    return {'own': len(tokens(answers[0]))}\n"
    )
    monkeypatch.setattr("shutil.which", lambda _: None)
    own = find_tasks(["own_captions"], [tmp_path])
    assert "own_captions needs java" in (obstacle(own, "own_captions") or "")


def test_code_that_cannot_be_loaded_is_said(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        "task: own_broken\nprocess_results: !function own.results\noutput_type: generate_until\n"
    )
    (tmp_path / "own.py").write_text("import a_module_that_is_not_there\n")
    own = find_tasks(["own_broken"], [tmp_path])
    words = "own_broken: its code cannot be loaded (ModuleNotFoundError"
    assert words in (obstacle(own, "own_broken") or "")


def test_tasks_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no task docvqa_vla"):
        find_tasks(["docvqa_vla"])
    with pytest.raises(ValueError, match="name those of it that are wanted, of docvqa_val, ocrb"):
        find_tasks(["sparsemm_ocr_rich"])
    with pytest.raises(ValueError, match="there is no such folder"):
        find_tasks(["docvqa_mini"], [tmp_path / "none"])


@pytest.mark.parametrize("task", ["docvqa_test", "mmsearch_end2end", "docvqa_vla"])
def test_a_dry_run_refuses_what_the_sweep_refuses(task: str, tmp_path: Path) -> None:
    path = tmp_path / "g.yaml"
    path.write_text(
        f"models: [{{name: a, pretrained: 'embedded:qwen2vl'}}]\ntasks: [{task}]\n"
        "methods: [fullkv]\n"
    )
    words = ["sweep", str(path), "--out", str(tmp_path / "out")]
    dry, real = (CliRunner().invoke(app, [*words, *more]) for more in (["--dry-run"], []))
    assert dry.exit_code == real.exit_code == 1
    assert real.output.count("\n") == 1
    assert dry.output.splitlines()[-1] == real.output.strip()
