"""Qwen2-VL."""

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


@dataclass(frozen=True)
class Qwen2VLRegions(Regions):
    """The image is resized to a grid of merged patches.

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
        inputs: Mapping[str, Tensor],
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
        return grid_boxes(x, y)

    @property
    def parts(self) -> np.ndarray:
        return np.full(self.rows * self.columns, "tile")


@register_family
@dataclass(frozen=True)
class Qwen2VL(Family):
    """A Qwen2VLForConditionalGeneration checkpoint.

    Parameters
    ----------
    min_pixels, max_pixels : int, optional
        The area an image is scaled into, in pixels; without them the checkpoint's own hold. The
        paper's runs had max_pixels=12845056.
    """

    model_type: ClassVar[str] = "qwen2_vl"
    lmms_name: ClassVar[str] = "qwen2vl_sparsemm"
    regions: ClassVar[type[Regions]] = Qwen2VLRegions

    min_pixels: int | None = None
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        for name, value in self.settings.items():
            if value is not None:
                check_int(name, value, least=1)

    def configure(self, processor: ProcessorMixin) -> ProcessorMixin:
        """Set the area that images are scaled into."""
        size = dict(processor.image_processor.size)
        for value, edge in (
            (self.min_pixels, "shortest_edge"), (self.max_pixels, "longest_edge")
        ):  # fmt: skip
            if value is not None:
                size[edge] = value
        if size["shortest_edge"] > size["longest_edge"]:
            raise UserError(
                f"min_pixels={size['shortest_edge']} is above max_pixels={size['longest_edge']}"
            )
        processor = copy(processor)
        processor.image_processor = copy(processor.image_processor)
        processor.image_processor.size = type(processor.image_processor.size)(**size)
        return processor

    @classmethod
    def step_logits(cls, model: PreTrainedModel, ids: Tensor, **given: Any) -> Tensor:
        """What the whole model makes of text."""
        return decoder_logits(model, ids, **given)


@register_family
@dataclass(frozen=True)
class Qwen25VL(Qwen2VL):
    """A Qwen2_5_VLForConditionalGeneration checkpoint: to the cache it is a Qwen2-VL."""

    model_type: ClassVar[str] = "qwen2_5_vl"
    lmms_name: ClassVar[str] = "qwen2_5_vl_sparsemm"
