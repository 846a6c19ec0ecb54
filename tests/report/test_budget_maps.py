"""Heat maps of the budget of each KV head."""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from sparsemm_eval.report.budget_maps import HeadBudgets, budget_maps
from sparsemm_eval.report.styles import save


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
