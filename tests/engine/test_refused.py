"""Settings that cannot be are refused in one sentence, before any weight is loaded."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine.fixtures import SPLIT, TASK, refused, requests, sentence
from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import _run_generate_until_agentic

from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.lmms import LlavaSparseMM, Qwen2VLSparseMM
from sparsemm_eval.errors import UserError
from sparsemm_eval.methods import HeadScores
from sparsemm_eval.tiny import default_checkpoint

pytestmark = pytest.mark.usefixtures("unloaded")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left in the working directory."""
    monkeypatch.chdir(tmp_path)


def test_no_checkpoint() -> None:
    assert "pretrained is missing" in refused(pretrained=None)


def test_no_method() -> None:
    message = refused(method=None)
    assert "method is missing" in message
    assert "sparsemm" in message
    assert "snapkv" in message


@pytest.mark.parametrize("method", ["snapkvv", "", 7, "SnapKV"])
def test_unknown_method(method: Any) -> None:
    message = refused(method=method)
    assert repr(method) in message
    assert "adakv" in message


@pytest.mark.parametrize("name", ["budgett", "conv_template", "use_flash_attention_2"])
def test_unknown_setting(name: str) -> None:
    message = refused(**{name: "x"})
    assert f"{name}='x'" in message
    known = ("pretrained", "method", "budget", "window", "head_scores", "answers", "dtype")
    assert all(setting in message for setting in (*known, "min_pixels", "max_pixels"))


def test_a_setting_of_another_family(llava: Checkpoint) -> None:
    with pytest.raises(ValueError, match="min_pixels=64: a llava_next") as caught:
        LlavaSparseMM(checkpoint=llava, method="fullkv", min_pixels=64)
    assert "max_pixels" not in sentence(caught)


@pytest.mark.parametrize("size", [0, -1, "auto", "auto:4", 1.5, -1.0, "", True, "2.5"])
def test_bad_batch_size(size: Any) -> None:
    message = refused(batch_size=size)
    assert f"batch_size={size!r}" in message
    assert "at least 1" in message


@pytest.mark.parametrize("backend", ["cuda99", "", "Torch", 1])
def test_unknown_backend(backend: Any) -> None:
    message = refused(backend=backend)
    assert f"backend={backend!r}" in message
    assert "auto" in message
    assert "torch" in message


@pytest.mark.parametrize(
    "settings",
    [
        {"budget": 8},
        {"budget": 32, "window": None},
        {"budget": None},
        {"budget": -1.0},
        {"budget": "many"},
        {"window": 0},
        {"kernel_size": 4},
        {"pooling": "median"},
        {"allocation": "fair"},
        {"method": "adakv", "floor": 2},
        {"method": "random", "ratio": -0.5},
    ],
    ids=str,
)
def test_a_method_that_cannot_be(settings: dict[str, Any]) -> None:
    name = next(name for name in settings if name != "method")
    assert name in refused(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"min_pixels": 0},
        {"max_pixels": -1.0},
        {"max_pixels": "large"},
        {"min_pixels": 2.5},
        {"min_pixels": 10_000, "max_pixels": 9_999},
        {"max_pixels": 1},
    ],
    ids=str,
)
def test_pixels_that_cannot_be(settings: dict[str, Any]) -> None:
    message = refused(**settings)
    assert all(f"{name}=" in message for name in settings)


def test_answers_where_no_folder_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = refused(answers=str(tmp_path / "file"))
    assert f"answers={tmp_path / 'file'}" in message


def test_dtype_and_checkpoint_are_passed_on() -> None:
    assert "dtype='int4'" in refused(dtype="int4")
    assert "pretrained=no/model" in refused(pretrained="no/model")
    assert "pretrained=no/model" in refused(pretrained="no/model", revision=3)


def test_head_scores(tmp_path: Path) -> None:
    given = {"method": "sparsemm", "head_scores": str(tmp_path / "scores.json")}
    assert "there is no such file" in refused(FileNotFoundError, **given)
    HeadScores(np.ones((2, 2))).write(tmp_path / "scores.json")
    assert "use scores chased on this model" in refused(**given)
    (tmp_path / "scores.json").write_text("[]")
    assert str(tmp_path / "scores.json") in refused(**given)


def test_no_head_scores_for_a_model_without(llava: Checkpoint) -> None:
    with pytest.raises(FileNotFoundError, match="sparsemm-eval chase") as caught:
        LlavaSparseMM(checkpoint=llava, method="sparsemm", budget=64)
    assert llava.pretrained in sentence(caught)


def test_no_second_turn(answers: Path) -> None:
    """Whether lmms-eval asks for it at once, later in the run, or as if it were a first one."""
    model = Qwen2VLSparseMM(str(default_checkpoint()), method="fullkv", answers=answers)
    asked = requests(1, {}, task="rounds")
    for request in asked:
        request.request_type = "generate_until_multi_round"
    with pytest.raises(UserError, match="rounds is of output_type generate_until_multi_round"):
        model.generate_until_multi_round(asked)
    model.task_dict = {TASK: {SPLIT: []}, "ovo_forward": {SPLIT: []}}
    with pytest.raises(UserError, match="ovo_forward is of output_type") as caught:
        model.generate_until(requests(1, {}))
    assert "takes no second turn" in sentence(caught)
    request = Instance(
        "generate_until_agentic", ("What?", {}, list, lambda *_, **__: "", 0, TASK, SPLIT), 0,
        {"task": TASK, "doc_id": 0, "repeats": 1},
    )  # fmt: skip
    model.task_dict = {TASK: {SPLIT: [{}]}}
    with pytest.raises(UserError, match="pages is of output_type generate_until_agentic"):
        _run_generate_until_agentic(model, [request])
