"""Image box to image tokens, per model family.

One class a family says which box of the image each of its tokens covers; the rest follows. A
family of one's own is a subclass of `Regions` under its `model_type` in `FAMILIES`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from transformers import PreTrainedConfig, ProcessorMixin
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.modeling_llava_next import unpad_image

from sparsemm_eval.errors import UserError, check_choice

Box = tuple[float, float, float, float]
IMAGE_TOKENS = ("all", "tiles")


@dataclass(frozen=True)
class Regions(ABC):
    """Where the tokens of one image lie on it.

    Parameters
    ----------
    width, height : int
        Of the image as it was given, in pixels.
    image_tokens : {"all", "tiles"}
        Whether a box is looked for in all tokens, or in those of tiles only, as published code
        does; the same thing where a family has no tokens of the whole image beside its tiles.
    """

    width: int
    height: int
    image_tokens: str = "all"

    @classmethod
    @abstractmethod
    def read(
        cls,
        config: PreTrainedConfig,
        processor: ProcessorMixin,
        inputs: Mapping[str, torch.Tensor],
        index: int,
        size: tuple[int, int],
        image_tokens: str,
    ) -> Regions:
        """Of image `index` in a processor's output; `size` is its width and height as given."""

    @property
    @abstractmethod
    def boxes(self) -> np.ndarray:
        """[count, 4]: what each token covers in the image's pixels; NaN where it covers nothing."""

    @property
    @abstractmethod
    def parts(self) -> np.ndarray:
        """[count] of str: "base" (of the whole image, squashed), "tile" or "newline"."""

    @property
    def count(self) -> int:
        """Image tokens this image has in the prompt."""
        return len(self.parts)

    def tokens(self, box: Box) -> np.ndarray:
        """Indices, among this image's tokens, of those whose region overlaps a box, ascending.

        Parameters
        ----------
        box : tuple
            (x0, y0, x1, y1) in pixels of the image as it was given, end exclusive.

        Returns
        -------
        ndarray
            Of int. It may be empty with ``image_tokens="tiles"``: LLaVA-NeXT's unpadding cuts
            away up to half a patch at the image's edges.

        Raises
        ------
        ValueError
            If the box is empty or not within the image.
        """
        x0, y0, x1, y1 = box
        if not (0 <= x0 < x1 <= self.width and 0 <= y0 < y1 <= self.height):
            raise UserError(
                f"box {box} is empty or outside its image of {self.width}x{self.height} pixels"
            )
        left, top, right, bottom = self.boxes.T
        overlap = (left < x1) & (x0 < right) & (top < y1) & (y0 < bottom)
        if self.image_tokens == "tiles":
            overlap &= self.parts != "base"
        return overlap.nonzero()[0]


@dataclass(frozen=True)
class Qwen2VLRegions(Regions):
    """Qwen2-VL, and Qwen2.5-VL alike: the image is resized to a grid of merged patches.

    Parameters
    ----------
    rows, columns : int
        Merged patches in each direction, one token each, row by row.
    """

    rows: int = 1
    columns: int = 1

    @classmethod
    def read(
        cls,
        config: PreTrainedConfig,
        processor: ProcessorMixin,
        inputs: Mapping[str, torch.Tensor],
        index: int,
        size: tuple[int, int],
        image_tokens: str,
    ) -> Qwen2VLRegions:
        _, rows, columns = inputs["image_grid_thw"][index].tolist()
        merge = processor.image_processor.merge_size
        return cls(*size, image_tokens, rows // merge, columns // merge)

    @cached_property
    def boxes(self) -> np.ndarray:
        x = np.arange(self.columns + 1) * self.width / self.columns
        y = np.arange(self.rows + 1) * self.height / self.rows
        return _grid(x, y)

    @property
    def parts(self) -> np.ndarray:
        return np.full(self.rows * self.columns, "tile")


@dataclass(frozen=True)
class LlavaNextRegions(Regions):
    """LLaVA-NeXT: the whole image squashed to one tile, then the image in tiles (anyres).

    For the tiles the image is scaled to fit the best of a few canvases, centred and padded. Of the
    canvas' patches those of padding are cut off again; each row of what remains ends in a newline
    token.

    Parameters
    ----------
    tile, patch : int
        Sides in pixels: of what the vision tower takes, and of its patches.
    canvases : tuple
        (height, width) of each canvas, in pixels; image_grid_pinpoints.
    """

    tile: int = 336
    patch: int = 14
    canvases: tuple[tuple[int, int], ...] = ()

    @classmethod
    def read(
        cls,
        config: PreTrainedConfig,
        processor: ProcessorMixin,
        inputs: Mapping[str, torch.Tensor],
        index: int,
        size: tuple[int, int],
        image_tokens: str,
    ) -> LlavaNextRegions:
        vision = config.vision_config
        canvases = tuple(map(tuple, processor.image_processor.image_grid_pinpoints))
        return cls(*size, image_tokens, vision.image_size, vision.patch_size, canvases)

    @cached_property
    def boxes(self) -> np.ndarray:
        # A tower leaves out what its last whole patch leaves of a tile.
        edges = np.arange(self._side + 1) * self.patch
        base = _grid(edges * self.width / self.tile, edges * self.height / self.tile)
        return np.concatenate([base, self._tile_boxes()])

    @cached_property
    def parts(self) -> np.ndarray:
        rows, columns = self._kept.shape
        lines = np.full((rows, columns + 1), "newline")
        lines[:, :-1] = "tile"
        return np.concatenate([np.full(self._side**2, "base"), lines.ravel()])

    @property
    def _side(self) -> int:
        """Patches along a tile."""
        return self.tile // self.patch

    @cached_property
    def _canvas(self) -> tuple[int, int]:
        return select_best_resolution((self.height, self.width), list(self.canvases))

    @cached_property
    def _kept(self) -> np.ndarray:
        """[rows, columns]: numbers of the canvas' patches that are no padding to the model."""
        rows, columns = (edge // self.tile * self._side for edge in self._canvas)
        patches = torch.arange(rows * columns).view(1, rows, columns)
        return unpad_image(patches, (self.height, self.width))[0].numpy()

    def _tile_boxes(self) -> np.ndarray:
        rows, columns = self._kept.shape
        boxes = np.full((rows, columns + 1, 4), np.nan)
        if self._kept.size:
            across = self._canvas[1] // self.tile * self._side
            top, left = divmod(int(self._kept[0, 0]), across)
            scale = min(self._canvas[1] / self.width, self._canvas[0] / self.height)
            x = self._axis(left, columns, self.width, self._canvas[1], scale)
            y = self._axis(top, rows, self.height, self._canvas[0], scale)
            boxes[:, :-1] = _cells(*x, *y)
        return boxes.reshape(-1, 4)

    def _axis(
        self, first: int, count: int, length: int, canvas: int, scale: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where `count` patches of the canvas from `first` on start and end on the image."""
        tile, place = np.divmod(np.arange(first, first + count), self._side)
        start = tile * self.tile + place * self.patch
        drawn = min(math.ceil(length * scale), canvas)
        margin = (canvas - drawn) // 2
        return tuple(
            np.clip((edge - margin) * length / drawn, 0, length)
            for edge in (start, start + self.patch)
        )


FAMILIES: dict[str, type[Regions]] = {
    "llava_next": LlavaNextRegions,
    "qwen2_vl": Qwen2VLRegions,
    "qwen2_5_vl": Qwen2VLRegions,
}


def find_regions(
    config: PreTrainedConfig,
    processor: ProcessorMixin,
    inputs: Mapping[str, torch.Tensor],
    sizes: Sequence[tuple[int, int]],
    image_tokens: str = "all",
) -> list[Regions]:
    """Regions of every image of a batch, in the order of the prompts.

    Parameters
    ----------
    config : PreTrainedConfig
        The model's.
    processor : ProcessorMixin
        What made the inputs.
    inputs : mapping
        The processor's output.
    sizes : sequence of tuple
        (width, height) of each image as it was given, in pixels.
    image_tokens : {"all", "tiles"}
        See `Regions`.

    Raises
    ------
    ValueError
        If the family's regions are unknown, or image_tokens is no such word.
    """
    check_family(config.model_type)
    check_choice("image_tokens", image_tokens, IMAGE_TOKENS)
    family = FAMILIES[config.model_type]
    return [
        family.read(config, processor, inputs, index, size, image_tokens)
        for index, size in enumerate(sizes)
    ]


def check_family(model_type: str) -> None:
    """Raise ValueError unless it is known where a family's image tokens lie."""
    if model_type not in FAMILIES:
        raise UserError(
            f"where the image tokens of a {model_type} model lie is not known; it is for "
            f"{', '.join(sorted(FAMILIES))}"
        )


def image_positions(
    config: PreTrainedConfig, input_ids_row: torch.Tensor, regions: Sequence[Regions]
) -> list[np.ndarray]:
    """Positions, in one row of input ids, of each image's tokens.

    Parameters
    ----------
    config : PreTrainedConfig
        The model's.
    input_ids_row : Tensor
        [n], padding included.
    regions : sequence of Regions
        Of the row's images, in order.

    Raises
    ------
    ValueError
        If the row has another number of image tokens than the regions.
    """
    found = (input_ids_row == config.image_token_id).nonzero().flatten().cpu().numpy()
    counts = [one.count for one in regions]
    if len(found) != sum(counts):
        raise UserError(
            f"the prompt has {len(found)} image tokens and its images {sum(counts)}: processor "
            "and model config disagree about image sizes"
        )
    return np.split(found, np.cumsum(counts)[:-1]) if counts else []


def _grid(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Boxes between grid lines, row by row, [rows * columns, 4]."""
    return _cells(x[:-1], x[1:], y[:-1], y[1:]).reshape(-1, 4)


def _cells(left: np.ndarray, right: np.ndarray, top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """Boxes of all rows and columns, [rows, columns, 4]."""
    rows, columns = len(top), len(left)
    sides = (left, top[:, None], right, bottom[:, None])
    return np.stack([np.broadcast_to(side, (rows, columns)) for side in sides], -1)
