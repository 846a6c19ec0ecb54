"""The budget of each KV head: of a checkpoint, of a config, of a score file."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsemm_eval.heads.budgets import draw_budgets, head_budgets
from sparsemm_eval.methods import HeadScores
from sparsemm_eval.models.checkpoint import Checkpoint
from sparsemm_eval.tiny import default_checkpoint


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    """Of 2 layers of 4 query heads; the first sees nearly all."""
    path = tmp_path / "scores.json"
    HeadScores(np.array([[9, 1, 1, 1], [1, 1, 1, 1]])).write(path)
    return path


def budgets(**changes: Any):
    given = {
        "model": None, "head_scores": None, "kv_heads": None, "methods": ["sparsemm"],
        "budgets": [64], "tokens": 400, "settings": {"window": 8},
    }  # fmt: skip
    return head_budgets(**(given | changes))


def test_the_embedded_model_by_its_own_scores() -> None:
    name, (panel,) = budgets()
    shape = Checkpoint(default_checkpoint()).shape
    assert name == "qwen2vl"
    assert panel.kept.shape == (shape.layers, shape.kv_heads)
    assert panel.label == "SparseMM (window=8)"
    assert panel.kept.max() == 400, "its best heads hold the whole prompt"
    assert budgets(model="embedded:llava_next")[0] == "llava_next"


def test_a_score_file_alone_is_a_model(scores: Path) -> None:
    name, panels = budgets(head_scores=scores, budgets=[64, 32])
    assert name == "scores.json"
    assert [panel.budget for panel in panels] == [64, 32]
    assert panels[0].kept.shape == (2, 4)
    assert panels[0].kept.argmax() == 0
    assert budgets(head_scores=scores, kv_heads=2)[1][0].kept.shape == (2, 2)


def test_methods_without_scores_need_only_a_config(tmp_path: Path) -> None:
    """No weights, no score file."""
    shutil.copy(default_checkpoint() / "config.json", tmp_path)
    _, panels = budgets(
        model=str(tmp_path), methods=["snapkv", "pyramidkv", "fullkv"], settings={"ratio": 0.2}
    )
    assert [panel.kept.mean() for panel in panels] == pytest.approx([64, 64, 400], rel=0.1)
    assert [panel.label for panel in panels] == ["SnapKV", "PyramidKV", "FullKV"]
    with pytest.raises(ValueError, match="pretrained="):
        budgets(model=str(tmp_path))


@pytest.mark.parametrize(("changes", "message"), [
    ({"methods": ["adakv"]}, "method=adakv: what its heads keep depends on each prompt"),
    ({"methods": ["none"]}, "method='none': it must be one of"),
    ({"budgets": [8]}, "budget=8 is too small for window=8"),
    ({"tokens": 0}, "tokens=0"),
    ({"settings": {"budget": 3}}, "settings: budget has an option of its own"),
    ({"settings": {"windows": 3}}, "windows=3: method sparsemm knows"),
    ({"model": "embedded:gpt"}, "model=embedded:gpt: it must be one of embedded:qwen2vl"),
    ({"model": "/nowhere"}, "model=/nowhere: its config.json cannot be read"),
    ({"kv_heads": 2}, "kv_heads=2: it goes with a score file alone"),
])  # fmt: skip
def test_bad_input_is_one_sentence(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        budgets(**changes)


def test_scores_must_fit_the_model(scores: Path) -> None:
    with pytest.raises(ValueError, match="2 layers of 4 heads, but the model has"):
        budgets(model="embedded:qwen2vl", head_scores=scores)
    with pytest.raises(ValueError, match="no multiple of kv_heads=3"):
        budgets(head_scores=scores, kv_heads=3)


def test_it_is_drawn(scores: Path, tmp_path: Path) -> None:
    methods, formats = ["sparsemm", "random"], ["svg", "png"]
    done = draw_budgets(tmp_path / "new", formats, None, scores, None, methods, [64], 400, {})
    assert [path.name for path in done.files] == ["budget_per_head.svg", "budget_per_head.png"]
    assert all(path.stat().st_size > 1000 for path in done.files)
    with pytest.raises(ValueError, match="format='jpg'"):
        draw_budgets(tmp_path, ["jpg"], "/nowhere", scores, None, methods, [64], 400, {})
