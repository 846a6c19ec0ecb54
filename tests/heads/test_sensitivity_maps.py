"""Which heads serve which kind of prompts, drawn: from a few heads to a thousand."""

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sparsemm_eval.heads.sensitivity_maps import sensitivity_maps
from sparsemm_eval.methods import ModelShape, Sensitivity
from sparsemm_eval.methods.sensitivity import RULES, Kind


def example(
    layers: int, heads: int, kinds: tuple[str, ...], tables: tuple[int, ...] = (16, 32)
) -> Sensitivity:
    """A model whose head 0-1 serves the first kind alone, and each other kind a head of its own."""
    chance = np.random.default_rng(layers * heads)
    losses = chance.random((len(kinds), layers, heads)) * 1e-4
    for kind, loss in enumerate(losses):
        loss.flat[1 + kind] = 2.0
    counts = {}
    for budget in tables:
        counts[budget] = np.full((layers, heads), budget)
        counts[budget].flat[:2] += (1 - budget, budget - 1)
    return Sensitivity(
        ModelShape(layers, heads, heads),
        8,
        {name: Kind(loss, 3, 12) for name, loss in zip(kinds, losses, strict=True)},
        np.arange(layers * heads).reshape(layers, heads) % len(RULES),
        counts,
    )


def words(path: Path) -> list[str]:
    """Texts of an SVG, which its writer leaves beside their outlines."""
    return re.findall(r"<!-- (.*?) -->", path.read_text(encoding="utf-8"))


def test_each_kind_is_told_with_the_heads_that_serve_it(tmp_path: Path) -> None:
    path = tmp_path / "few.svg"
    sensitivity_maps(example(5, 4, ("reading", "captions", "$x$")), "few", path)
    said = "\n".join(words(path))
    for kind, head in (("reading", "0-1"), ("captions", "0-2"), ("$x$", "0-3")):
        assert kind in said
        assert f"{head} 9" in said  # of ninety-odd percent
    assert "mixture: root" in said
    # Tokens of the smallest table, and every rule, written.
    assert "budget of 16" in said
    assert all(str(rule) in said for rule in RULES)
    assert "no mark" not in said


def test_where_rules_cannot_be_written_there_is_a_legend_of_marks(tmp_path: Path) -> None:
    many = example(32, 32, ("a", "b"))
    sensitivity_maps(many, "many", tmp_path / "many.svg")
    said = words(tmp_path / "many.svg")
    assert sum(word.startswith("no mark: ") for word in said) == 1
    shown = {word.removeprefix("no mark: ") for word in said}
    assert {str(rule) for rule in RULES} <= shown
    # No text in a thousand cells.
    assert len(said) < 150


def test_without_tables_only_what_is_lost_is_drawn(tmp_path: Path) -> None:
    sensitivity_maps(example(5, 4, ("a",), ()), "plain", tmp_path / "plain.svg")
    said = words(tmp_path / "plain.svg")
    assert not any("budget" in word or "mixture" in word for word in said)


def test_a_chosen_mixture_is_the_one_drawn(tmp_path: Path) -> None:
    path = tmp_path / "one.svg"
    sensitivity_maps(example(5, 4, ("a", "b")), "", path, "share+b")
    said = words(path)
    assert "mixture: share+b" in said
    # The share is all of one head, where the root leaves it to more.
    assert "0-2 100%" in said


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 80), st.integers(1, 32), st.integers(1, 13), st.booleans())
def test_a_picture_of_any_model_has_a_pages_size(
    tmp_path_factory: pytest.TempPathFactory, layers: int, heads: int, kinds: int, tables: bool
) -> None:
    if layers * heads <= kinds:
        return
    path = tmp_path_factory.mktemp("any") / "any.png"
    names = tuple(f"kind {number}" for number in range(kinds))
    sensitivity_maps(example(layers, heads, names, (16,) * tables), "any", path)
    with Image.open(path) as image:
        assert 1200 < image.width < 1600
        assert 300 < image.height < 3000


def test_the_same_numbers_draw_the_same_svg(tmp_path: Path) -> None:
    for name in ("one.svg", "two.svg"):
        sensitivity_maps(example(9, 16, ("a", "b")), "same", tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
