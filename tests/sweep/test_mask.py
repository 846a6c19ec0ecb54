"""The masking study on the embedded model: whole, resumable, and refused early."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from engine.fixtures import rows

from sparsemm_eval.engine import checkpoint as checkpoints
from sparsemm_eval.engine.answers import AnswerStore
from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.sweep.mask import Masking
from sparsemm_eval.sweep.mask import run_masking as run_masking_of
from sparsemm_eval.sweep.studies import masking_study
from sparsemm_eval.tiny import default_checkpoint

SAMPLES, SEEDS = 8, 2
MODEL = "embedded:qwen2vl"
STUDY = {
    "shares": (0.1,), "seeds": SEEDS, "samples": SAMPLES, "settings": {"dtype": "float32"},
}  # fmt: skip


def run_masking(model: str, out: Path, **settings: Any) -> Masking:
    return run_masking_of(masking_study(model, **settings), out)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint(default_checkpoint(), dtype="float32")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Masking, Path]:
    out = tmp_path_factory.mktemp("masking")
    return run_masking(MODEL, out, **STUDY), out


def test_reading_breaks_without_visual_heads_and_goes_on_without_others(
    study: tuple[Masking, Path],
) -> None:
    scores = study[0].frame.groupby("silenced")["score"]
    assert scores.max()["visual"] < 0.2
    assert scores.min()["random"] > scores.max()["visual"]
    assert scores.mean()["none"] >= scores.mean()["random"] > scores.mean()["visual"] + 0.3


def test_as_many_others_are_silenced(study: tuple[Masking, Path], checkpoint: Checkpoint) -> None:
    frame = study[0].frame
    shape = checkpoint.shape
    count = round(0.1 * shape.layers * shape.query_heads)
    assert frame["heads"].tolist() == [0, *[count] * (1 + SEEDS)]
    visual, *random = (set(names.split("+")) for names in frame["names"][1:])
    assert len(random) == SEEDS
    assert all(not visual & other for other in random)
    assert random[0] != random[1]


def test_files_say_what_was_silenced_and_how(study: tuple[Masking, Path]) -> None:
    made = json.loads((study[1] / "masking.json").read_text())
    assert made["command"] == "sparsemm-eval mask"
    assert [cell["silenced"] for cell in made["cells"]] == ["none", "visual", *["random"] * SEEDS]
    assert [str(cell["samples"]) for cell in made["cells"]] == [str(SAMPLES)] * (2 + SEEDS)
    assert "## docvqa_mini: anls" in (study[1] / "table.md").read_text()
    assert (study[1] / "masking.png").stat().st_size > 10_000


def test_a_second_run_computes_nothing_and_says_the_same(
    study: tuple[Masking, Path],
) -> None:
    first, out = study
    count = AnswerStore(out / "answers" / "model").count()
    again = run_masking(MODEL, out, **STUDY)
    assert AnswerStore(out / "answers" / "model").count() == count == SAMPLES * (2 + SEEDS)
    assert again.markdown == first.markdown


def test_shares_that_silence_the_same_heads_are_answered_once(tmp_path: Path) -> None:
    done = run_masking(MODEL, tmp_path, **{**STUDY, "shares": (0.01, 0.02), "samples": 3})
    assert done.frame["share"].nunique() == 3
    assert done.frame["heads"].tolist() == [0, *[1] * 2 * (1 + SEEDS)]
    assert len(rows(tmp_path / "answers" / "model")) == 3 * (2 + SEEDS)


def test_a_sweep_of_another_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "grid.yaml").write_text("name: dear\n")
    (tmp_path / "cells").mkdir()
    with pytest.raises(ValueError, match="it holds the sweep of another grid"):
        run_masking(MODEL, tmp_path, **STUDY)
    assert (tmp_path / "cells").is_dir()


@pytest.mark.parametrize(("settings", "words"), [
    ({"shares": (0.6,)}, "share of at most 0.5"),
    ({"shares": (0.1, 1.0)}, "mask_heads='visual:1'"),
    ({"shares": ()}, "shares is empty"),
    ({"tasks": ()}, "tasks is empty"),
    ({"tasks": ("docvqa_mimi",)}, "there is no task docvqa_mimi"),
    ({"seeds": 0}, "seeds=0"),
    ({"samples": 0}, "samples=0"),
    ({"modes": ("key",)}, "mode='key': it must be one of query, output"),
    ({"settings": {"head_scores": "no.json"}}, "head_scores=no.json: there is no such file"),
])  # fmt: skip
def test_what_cannot_be_is_refused_before_weights_load(
    settings: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(checkpoints.AutoModelForImageTextToText, "from_pretrained", fail)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as caught:
        run_masking(MODEL, tmp_path, **STUDY | settings)
    assert "\n" not in str(caught.value)


def test_another_family_is_named(tmp_path: Path) -> None:
    folder = shutil.copytree(default_checkpoint(), tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mllama"}))
    with pytest.raises(ValueError, match="no family is known for model_type=mllama: it must be"):
        run_masking(str(folder), tmp_path / "out", **STUDY)
