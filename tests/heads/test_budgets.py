"""The budget of each KV head: of a checkpoint, of a config, of a score file; and its heat maps."""

import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.heads.budgets import HeadBudgets, budget_maps, draw_budgets, head_budgets
from sparsemm_eval.methods import HeadScores
from sparsemm_eval.report.figures.style import save
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
    ({"model": "embedded:gpt"}, "pretrained='embedded:gpt': it must be one of embedded:qwen2vl"),
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


def panel(label: str, budget: int, shape: tuple[int, int] = (3, 4)) -> HeadBudgets:
    return HeadBudgets(label, budget, np.arange(1, 1 + np.prod(shape)).reshape(shape) * budget)


def places(figure) -> list[tuple[int, int]]:
    grid = [axes for axes in figure.axes if axes.get_visible() and axes.get_title()]
    specs = [axes.get_subplotspec() for axes in grid]
    return [(spec.rowspan.start, spec.colspan.start) for spec in specs]


def test_a_panel_shows_each_heads_tokens_on_one_scale() -> None:
    panels = [panel("SparseMM", 64), panel("SparseMM", 32)]
    figure = budget_maps(panels, "a model")
    meshes = [axes.collections[0] for axes in figure.axes[:2]]
    for mesh, one in zip(meshes, panels, strict=True):
        assert np.array_equal(mesh.get_array().reshape(3, 4), one.kept)
        assert (mesh.norm.vmin, mesh.norm.vmax) == (32, 64 * 12)
    assert figure.axes[0].get_title() == "SparseMM\nbudget 64, kept 416.0"
    assert figure.axes[0].get_xlabel() == "KV head"
    assert figure.axes[0].get_ylabel() == "layer"
    top, bottom = figure.axes[0].get_ylim()[::-1]
    assert top < bottom, "the first layer stands on top"


def test_a_method_has_a_row_and_single_panels_share_one() -> None:
    two = [panel(label, budget) for label in ("a", "b") for budget in (64, 32)]
    assert places(budget_maps(two, "t")) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    single = [panel(label, 64) for label in ("a", "b", "c")]
    assert places(budget_maps(single, "t")) == [(0, 0), (0, 1), (0, 2)]
    many = [panel("a", budget) for budget in (8, 16, 32, 64, 128)] + [panel("b", 8)]
    assert places(budget_maps(many, "t")) == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (2, 0)]


def test_heads_that_all_keep_the_same_are_drawn(tmp_path: Path) -> None:
    for kept in (np.full((2, 2), 7), np.zeros((1, 1))):
        (path,) = save(budget_maps([HeadBudgets("a", 7, kept)], "t"), tmp_path / "m", ["png"])
        assert path.stat().st_size > 1000


def test_the_svg_is_made_of_paths_and_the_same_each_time(tmp_path: Path) -> None:
    first, second = [
        save(budget_maps([panel("a", 64, (32, 32))], "t"), tmp_path / name, ["svg"])[0]
        for name in ("a", "b")
    ]
    tags = {element.tag.rpartition("}")[2] for element in ElementTree.parse(first).iter()}
    assert "image" not in tags
    assert first.read_bytes() == second.read_bytes()


def test_nothing_to_draw_is_one_sentence() -> None:
    with pytest.raises(ValueError, match="there is no budget to draw"):
        budget_maps([], "t")
