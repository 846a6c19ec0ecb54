"""LLaVA-NeXT, with Vicuna, Mistral and other backbones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sparsemm_eval.families.base import Family, Regions, cell_boxes, decoder_logits, grid_boxes
from sparsemm_eval.families.registry import register_family

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin


@dataclass(frozen=True)
class LlavaNextRegions(Regions):
    """The whole image squashed to one tile, then the image in tiles (anyres).

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
        inputs: Mapping[str, Tensor],
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
        base = grid_boxes(edges * self.width / self.tile, edges * self.height / self.tile)
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
        from transformers.image_processing_utils import select_best_resolution

        return select_best_resolution((self.height, self.width), list(self.canvases))

    @cached_property
    def _kept(self) -> np.ndarray:
        """[rows, columns]: numbers of the canvas' patches that are no padding to the model."""
        rows, columns = (edge // self.tile * self._side for edge in self._canvas)
        import torch
        from transformers.models.llava_next.modeling_llava_next import unpad_image

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
            boxes[:, :-1] = cell_boxes(*x, *y)
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


@register_family
@dataclass(frozen=True)
class LlavaNext(Family):
    """A LlavaNextForConditionalGeneration checkpoint."""

    model_type: ClassVar[str] = "llava_next"
    lmms_name: ClassVar[str] = "llava_sparsemm"
    regions: ClassVar[type[Regions]] = LlavaNextRegions
    # llava_hf of lmms-eval, and llava of the published fork.
    protocols: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "lmms-eval": {"max_new_tokens": 1024},
        "paper": {"max_new_tokens": 1024},
    }

    @classmethod
    def step_logits(cls, model: PreTrainedModel, ids: Tensor, **given: Any) -> Tensor:
        """What the whole model makes of text."""
        return decoder_logits(model, ids, **given)
