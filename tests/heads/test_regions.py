"""Which image tokens a box lies on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemm_eval.heads.regions import Qwen2VLRegions
from sparsemm_eval.models.checkpoint import Checkpoint
from sparsemm_eval.tiny import default_checkpoint

CELL = 16


@st.composite
def grids_and_boxes(draw: st.DrawFn) -> tuple[int, int, tuple[int, int, int, int]]:
    rows, columns = draw(st.integers(2, 12)), draw(st.integers(2, 12))
    x0 = draw(st.integers(0, columns * CELL - 1))
    y0 = draw(st.integers(0, rows * CELL - 1))
    x1 = draw(st.integers(x0 + 1, columns * CELL))
    y1 = draw(st.integers(y0 + 1, rows * CELL))
    return rows, columns, (x0, y0, x1, y1)


@given(grids_and_boxes())
def test_tokens_are_those_whose_cell_shares_a_pixel_with_the_box(case: tuple) -> None:
    rows, columns, (x0, y0, x1, y1) = case
    painted = np.zeros((rows * CELL, columns * CELL), dtype=bool)
    painted[y0:y1, x0:x1] = True
    cells = painted.reshape(rows, CELL, columns, CELL).any((1, 3))
    regions = Qwen2VLRegions(rows, columns, columns * CELL, rows * CELL)
    assert sorted(regions.tokens((x0, y0, x1, y1))) == np.flatnonzero(cells).tolist()


@settings(max_examples=15, deadline=None)
@given(grids_and_boxes())
def test_the_processor_puts_the_box_into_the_same_tokens(case: tuple) -> None:
    """Paint a box on the image that goes in and see which merged patches come out changed."""
    from PIL import Image

    rows, columns, (x0, y0, x1, y1) = case
    processor = Checkpoint(default_checkpoint(), "qwen2_vl").processor.image_processor
    pixels = np.zeros((rows * CELL, columns * CELL, 3), dtype=np.uint8)
    blank = processor(images=[Image.fromarray(pixels)], return_tensors="pt")
    pixels[y0:y1, x0:x1] = 255
    painted = processor(images=[Image.fromarray(pixels)], return_tensors="pt")
    assert painted["image_grid_thw"].tolist() == [[1, 2 * rows, 2 * columns]]
    changed = (painted["pixel_values"] != blank["pixel_values"]).any(-1)
    # The processor lists the 2x2 patches of a merged token one after another.
    tokens = changed.reshape(-1, 4).any(-1).nonzero().flatten().tolist()
    regions = Qwen2VLRegions(rows, columns, columns * CELL, rows * CELL)
    assert sorted(regions.tokens((x0, y0, x1, y1))) == tokens


@pytest.mark.parametrize("box", [(0, 0, 0, 4), (-1, 0, 4, 4), (0, 0, 33, 4), (4, 4, 2, 8)])
def test_a_box_that_is_empty_or_outside_is_named(box: tuple) -> None:
    with pytest.raises(ValueError, match="outside its image of 32x32"):
        Qwen2VLRegions(2, 2, 32, 32).tokens(box)
