"""Checkpoints that are built or loaded once, and models made on them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine.llava_checkpoints import build_llava

from sparsemm_eval.engine import checkpoint
from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.lmms import LlavaSparseMM, Qwen2VLSparseMM
from sparsemm_eval.tiny import default_checkpoint
from sparsemm_eval.tiny.training.family import Qwen2VLFamily, export


@pytest.fixture(autouse=True)
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty user cache, and no hub."""
    folder = tmp_path / "user-cache"
    monkeypatch.setattr(checkpoint, "cache_folder", lambda: folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return folder


@pytest.fixture(scope="session")
def reader() -> Checkpoint:
    """The trained tiny Qwen2-VL, in float32."""
    return Checkpoint(default_checkpoint(), "qwen2_vl", dtype="float32")


@pytest.fixture(scope="session", params=["llama", "mistral"])
def llava(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A LLaVA-NeXT with random weights, on each backbone in turn."""
    folder = build_llava(request.param, tmp_path_factory.mktemp("llava") / request.param)
    return Checkpoint(folder, "llava_next", dtype="float32")


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Qwen2-VL with random weights."""
    folder = tmp_path_factory.mktemp("untrained") / "qwen2vl"
    family = Qwen2VLFamily()
    export(family, family.build_model(seed=3), folder, "# Untrained\n")
    return folder


@pytest.fixture
def folder(untrained: Path, tmp_path: Path) -> Path:
    """A copy of it, to be broken."""
    return shutil.copytree(untrained, tmp_path / "model")


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    """Where this test's answers lie."""
    return tmp_path / "answers"


@pytest.fixture
def qwen(reader: Checkpoint, answers: Path) -> Callable[..., Qwen2VLSparseMM]:
    """Make a model on the shared reader; full KV unless the settings say otherwise."""

    def make(**settings: Any) -> Qwen2VLSparseMM:
        given = {"checkpoint": reader, "method": "fullkv", "answers": answers}
        return Qwen2VLSparseMM(**given | settings)

    return make


@pytest.fixture
def llava_model(llava: Checkpoint, answers: Path) -> Callable[..., LlavaSparseMM]:
    """Make a model on the shared LLaVA-NeXT; full KV unless the settings say otherwise."""

    def make(**settings: Any) -> LlavaSparseMM:
        given = {"checkpoint": llava, "method": "fullkv", "answers": answers}
        return LlavaSparseMM(**given | settings)

    return make


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading weights is an error."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(checkpoint.AutoModelForImageTextToText, "from_pretrained", fail)
