"""LLaVA-OneVision, with Qwen2 and other backbones."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sparsemm_eval.errors import UserError
from sparsemm_eval.families.base import (
    Regions,
    SheetRegions,
    VideoFamily,
    cell_boxes,
    decoder_logits,
    grid_boxes,
)
from sparsemm_eval.families.llava_next import LlavaNextRegions
from sparsemm_eval.families.registry import register_family

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

# Images are scaled down where they have so much more than their share, by side.
_TOO_MUCH = 1.1
_ANYRES = re.compile(r"anyres_max_(\d+)")


@dataclass(frozen=True)
class LlavaOnevisionRegions(LlavaNextRegions):
    """As LLaVA-NeXT's, with two differences.

    Where the canvas has many patches, their features are scaled down bilinearly before each row
    gets its newline: a token then lies on all patches that it is mixed of. And an image that is
    not the only one of its prompt is not cut into tiles: padded to a square it is one, with one
    newline.

    Parameters
    ----------
    most_tiles : int
        Tokens of so many tiles an image has at most, about; N of ``anyres_max_N``.
    alone : bool
        Whether it is its prompt's only image.
    """

    most_tiles: int = 9
    alone: bool = True

    @classmethod
    def read(
        cls,
        config: PreTrainedConfig,
        processor: ProcessorMixin,
        inputs: Mapping[str, Tensor],
        index: int,
        size: tuple[int, int],
        image_tokens: str,
    ) -> LlavaOnevisionRegions:
        vision = config.vision_config
        canvases = tuple(map(tuple, processor.image_processor.image_grid_pinpoints))
        counts = inputs["batch_num_images"].tolist()
        alone = np.repeat(counts, counts)[index] == 1
        tile = (vision.image_size, vision.patch_size, canvases)
        return cls(*size, image_tokens, *tile, _most_tiles(config), bool(alone))

    @cached_property
    def boxes(self) -> np.ndarray:
        if self.alone:
            return super().boxes
        side = max(self.width, self.height)
        edges = np.arange(self._side + 1) * self.patch * side / self.tile
        x = (edges - (side - self.width) // 2).clip(0, self.width)
        y = (edges - (side - self.height) // 2).clip(0, self.height)
        boxes = grid_boxes(x, y)
        # All of it is what the square has beside the image.
        boxes[(boxes[:, :2] >= boxes[:, 2:]).any(1)] = np.nan
        return np.concatenate([boxes, np.full((1, 4), np.nan)])

    @cached_property
    def parts(self) -> np.ndarray:
        if not self.alone:
            return np.array(["tile"] * self._side**2 + ["newline"])
        rows, columns = self._scaled
        lines = np.full((rows, columns + 1), "newline")
        lines[:, :-1] = "tile"
        return np.concatenate([np.full(self._side**2, "base"), lines.ravel()])

    @property
    def _scaled(self) -> tuple[int, int]:
        """Rows and columns that are left of the canvas' patches."""
        rows, columns = self._kept.shape
        ratio = math.sqrt(rows * columns / (self.most_tiles * self._side**2))
        if ratio <= _TOO_MUCH:
            return rows, columns
        return int(rows // ratio), int(columns // ratio)

    def _tile_boxes(self) -> np.ndarray:
        rows, columns = self._scaled
        if (rows, columns) == self._kept.shape:
            return super()._tile_boxes()
        of_patches = super()._tile_boxes().reshape(*self._kept.shape[:1], -1, 4)[:, :-1]
        first, last = _mixed(len(of_patches), rows)
        top, bottom = of_patches[first, 0, 1], of_patches[last, 0, 3]
        first, last = _mixed(of_patches.shape[1], columns)
        left, right = of_patches[0, first, 0], of_patches[0, last, 2]
        boxes = np.full((rows, columns + 1, 4), np.nan)
        boxes[:, :-1] = cell_boxes(left, right, top, bottom)
        return boxes.reshape(-1, 4)


class LlavaOnevisionVideoRegions(SheetRegions):
    """A frame is squashed to one tile, whose features are scaled down to half of their sides.

    Behind all frames there is one newline.
    """

    @classmethod
    def read(
        cls,
        config: PreTrainedConfig,
        processor: ProcessorMixin,
        inputs: Mapping[str, Tensor],
        index: int,
        size: tuple[int, int],
        image_tokens: str,
    ) -> SheetRegions:
        tile, patch = config.vision_config.image_size, config.vision_config.patch_size
        side = tile // patch
        edges = np.arange(side + 1) * patch / tile
        first, last = _mixed(side, math.ceil(side / 2))
        start, stop = edges[first], edges[last + 1]
        width, height = size
        frame = cell_boxes(start * width, stop * width, start * height, stop * height)
        steps = inputs["pixel_values_videos"].shape[1]
        return cls.of_frames(size, image_tokens, frame.reshape(-1, 4), steps, newlines=1)


@register_family
@dataclass(frozen=True)
class LlavaOnevision(VideoFamily):
    """A LlavaOnevisionForConditionalGeneration checkpoint."""

    model_type: ClassVar[str] = "llava_onevision"
    lmms_name: ClassVar[str] = "llava_onevision_sparsemm"
    regions: ClassVar[type[Regions]] = LlavaOnevisionRegions
    video_regions: ClassVar[type[SheetRegions]] = LlavaOnevisionVideoRegions

    @classmethod
    def check(cls, config: PreTrainedConfig) -> None:
        """Refuse image layouts that transformers does not have."""
        _most_tiles(config)

    @classmethod
    def arrange_images(cls, images: Sequence[Sequence[Image]]) -> list[list[Image]] | None:
        """A list a prompt: several images of one prompt are not cut into tiles."""
        return [list(of_prompt) for of_prompt in images] if any(images) else None

    @classmethod
    def step_logits(cls, model: PreTrainedModel, ids: Tensor, **given: Any) -> Tensor:
        """What the whole model makes of text."""
        return decoder_logits(model, ids, **given)


def _most_tiles(config: PreTrainedConfig) -> int:
    layout = config.vision_aspect_ratio
    found = _ANYRES.fullmatch(layout) if isinstance(layout, str) else None
    if found is None or int(found[1]) == 0:
        raise UserError(
            f"vision_aspect_ratio={layout!r} in config.json: it must be anyres_max_N with N of at "
            "least 1, which is what transformers reads"
        )
    return int(found[1])


def _mixed(before: int, after: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last of `before` places that each of `after` is mixed of bilinearly."""
    # In float32 as torch does it: whether a second place has any weight is decided by rounding.
    scale = np.float32(before) / np.float32(after)
    half = np.float32(0.5)
    centre = ((np.arange(after, dtype=np.float32) + half) * scale - half).clip(0)
    first = np.floor(centre).astype(int)
    last = np.minimum(first + (centre > first), before - 1)
    return first, last
