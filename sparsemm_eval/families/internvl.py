"""InternVL, in transformers' own form, with Qwen2 and Qwen3 backbones."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sparsemm_eval.errors import UserError, check_int
from sparsemm_eval.families.base import Family, Regions, decoder_logits, grid_boxes
from sparsemm_eval.families.registry import register_family

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

# Decoders on which this was tried. gpt_oss, which some checkpoints have, adds sinks of its own to
# the softmax and slides a window.
_DECODERS = ("qwen2", "qwen3")


@dataclass(frozen=True)
class TileRegions(Regions):
    """The image stretched over rows and columns of tiles, then, unless it is one tile, the whole.

    Parameters
    ----------
    rows, columns : int
        Tiles in each direction, row by row.
    tile, cell : int
        Sides in pixels: of a tile, and of what a token covers of it.
    """

    rows: int = 1
    columns: int = 1
    tile: int = 448
    cell: int = 28

    @classmethod
    def read(
        cls,
        config: PreTrainedConfig,
        processor: ProcessorMixin,
        inputs: Mapping[str, Tensor],
        index: int,
        size: tuple[int, int],
        image_tokens: str,
    ) -> TileRegions:
        from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

        images, vision = processor.image_processor, config.vision_config
        tile = (images.size["height"], images.size["width"])
        limits = (images.min_patches, images.max_patches)
        columns, rows = get_optimal_tiled_canvas(size[::-1], tile, *limits)
        cell = round(vision.patch_size[0] / config.downsample_ratio)
        return cls(*size, image_tokens, rows, columns, vision.image_size[0], cell)

    @cached_property
    def boxes(self) -> np.ndarray:
        # Whole pixels as long as can be: what lies on an edge must not be rounded across it.
        edges = np.arange(self._side + 1) * self.cell
        across, down = self.columns * self.tile, self.rows * self.tile
        tiles = [
            grid_boxes(
                (column * self.tile + edges) * self.width / across,
                (row * self.tile + edges) * self.height / down,
            )
            for row in range(self.rows)
            for column in range(self.columns)
        ]
        whole = grid_boxes(edges * self.width / self.tile, edges * self.height / self.tile)
        return np.concatenate([*tiles, whole] if self._cut else tiles)

    @cached_property
    def parts(self) -> np.ndarray:
        a_tile = self._side**2
        whole = ["base"] * a_tile if self._cut else []
        return np.array(["tile"] * self.rows * self.columns * a_tile + whole)

    @property
    def _side(self) -> int:
        """Tokens along a tile; what the last whole one leaves is seen by none."""
        return self.tile // self.cell

    @property
    def _cut(self) -> bool:
        return self.rows * self.columns > 1


@register_family
@dataclass(frozen=True)
class InternVL(Family):
    """An InternVLForConditionalGeneration checkpoint.

    Parameters
    ----------
    min_patches, max_patches : int, optional
        Tiles an image is cut into, by its shape, the whole image beside them not counted; without
        them the checkpoint's own hold.
    """

    model_type: ClassVar[str] = "internvl"
    lmms_name: ClassVar[str] = "internvl_sparsemm"
    regions: ClassVar[type[Regions]] = TileRegions

    min_patches: int | None = None
    max_patches: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("min_patches", "max_patches"):
            if (value := getattr(self, name)) is not None:
                check_int(name, value, least=1)

    @classmethod
    def check(cls, config: PreTrainedConfig) -> None:
        """Refuse decoders that attend in a way of their own."""
        decoder = config.get_text_config().model_type
        if decoder not in _DECODERS:
            raise UserError(
                f"an internvl checkpoint with a decoder of model_type={decoder}: it must be one of "
                f"{', '.join(_DECODERS)}; choose a checkpoint of these"
            )

    def configure(self, processor: ProcessorMixin) -> ProcessorMixin:
        """Set how many tiles images are cut into."""
        processor = copy(processor)
        images = processor.image_processor = copy(processor.image_processor)
        for name in ("min_patches", "max_patches"):
            if (value := getattr(self, name)) is not None:
                setattr(images, name, value)
        if images.min_patches > images.max_patches:
            raise UserError(
                f"min_patches={images.min_patches} is above max_patches={images.max_patches}"
            )
        return processor

    @classmethod
    def step_logits(cls, model: PreTrainedModel, ids: Tensor, **given: Any) -> Tensor:
        """What the whole model makes of text."""
        return decoder_logits(model, ids, **given)
