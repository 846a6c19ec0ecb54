"""What a task needs beyond Python is missed before anything is computed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine.fixtures import SHORT, requests
from lmms_eval import tasks as lmms_tasks
from lmms_eval.utils import load_yaml_config

from sparsemm_eval.engine.lmms import Qwen2VLSparseMM
from sparsemm_eval.engine.tasks import check_tasks
from sparsemm_eval.paths import tasks_folder

CAPTIONS = ("textcaps", "coco_cap", "flickr30k", "nocaps", "refcoco", "refcoco+", "screenspot")


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: None)


@pytest.mark.usefixtures("no_java")
def test_a_task_that_needs_java_is_named_in_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"^textcaps_val needs java .* or leave it out$"):
        check_tasks(["docvqa_val", "textcaps_val"])
    with pytest.raises(ValueError, match=r"^nocaps_val, textcaps_val need java .* leave them out$"):
        check_tasks(["textcaps_val", "nocaps_val", "textcaps_val"])


def test_with_java_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _: "/somewhere/java")
    assert check_tasks(["textcaps_val"]) is None


@pytest.mark.usefixtures("no_java")
def test_no_miniature_needs_java() -> None:
    names = [path.stem for path in tasks_folder().glob("*_mini.yaml")]
    assert "textcaps_mini" in names
    check_tasks(names)


@pytest.mark.usefixtures("no_java")
@pytest.mark.parametrize("folder", CAPTIONS)
def test_it_knows_lmms_evals_tasks_that_do(folder: str) -> None:
    """Those whose sums are made where the java tokenizer is; a submission is not tokenized."""
    found = 0
    for path in (Path(lmms_tasks.__path__[0]) / folder).glob("*.yaml"):
        config = load_yaml_config(str(path))
        if not isinstance(config.get("task"), str):
            continue
        needs = any(map(tokenizes, config["metric_list"]))
        found += needs
        if needs:
            with pytest.raises(ValueError, match="needs java"):
                check_tasks([config["task"]])
        else:
            check_tasks([config["task"]])
    assert found


def tokenizes(metric: dict[str, Any]) -> bool:
    function = metric["aggregation"]
    if not callable(function) or function.__name__.endswith("_test_aggregation_result"):
        return False
    return "PTBTokenizer" in function.__globals__


@pytest.mark.usefixtures("no_java", "unloaded")
def test_a_run_is_refused_before_its_first_sample(qwen: Callable[..., Qwen2VLSparseMM]) -> None:
    model = qwen()
    with pytest.raises(ValueError, match="textcaps_val needs java"):
        model.generate_until(requests(2, SHORT) + requests(1, SHORT, task="textcaps_val"))
