"""Qwen2-VL."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sparsemm_eval.errors import UserError, check_choice, check_int
from sparsemm_eval.families.base import (
    Regions,
    SheetRegions,
    VideoFamily,
    decoder_logits,
    grid_boxes,
)
from sparsemm_eval.families.registry import register_family

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

# qwen_vl_utils takes every model's patches to be of 14 pixels, two by two of them a token.
_CELL = 28
_RATIO = 200  # of an image's sides; it reads none that is longer
ROUNDING = ("limits", "loose")
_OF_VIDEOS = ("video_min_pixels", "video_max_pixels")


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


class Qwen2VLVideoRegions(SheetRegions):
    """A frame has a grid of merged patches, as an image has; two frames are one of the sheet."""

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
        steps, rows, columns = inputs["video_grid_thw"][index].tolist()
        merge = processor.video_processor.merge_size
        frame = Qwen2VLRegions(*size, image_tokens, rows // merge, columns // merge)
        return cls.of_frames(size, image_tokens, frame.boxes, steps)


@dataclass(frozen=True)
class QwenVL(VideoFamily):
    """What the Qwen-VL families have alike.

    Parameters
    ----------
    min_pixels, max_pixels : int, optional
        The area an image is scaled into, in pixels; without them the checkpoint's own hold.
    video_min_pixels, video_max_pixels : int, optional
        The same of a video as its processor counts it: the area of one frame, or with Qwen3-VL of
        all frames together.
    """

    regions: ClassVar[type[Regions]] = Qwen2VLRegions
    video_regions: ClassVar[type[SheetRegions]] = Qwen2VLVideoRegions

    min_pixels: int | None = None
    max_pixels: int | None = None
    video_min_pixels: int | None = None
    video_max_pixels: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("min_pixels", "max_pixels", *_OF_VIDEOS):
            if (value := getattr(self, name)) is not None:
                check_int(name, value, least=1)

    @property
    def keyed(self) -> dict[str, Any]:
        """As of any family; limits of videos only where there are: older keys have none."""
        keyed = super().keyed
        return {name: keyed[name] for name in keyed if name not in _OF_VIDEOS or keyed[name]}

    def configure(self, processor: ProcessorMixin) -> ProcessorMixin:
        """Set the area that images and videos are scaled into."""
        processor = copy(processor)
        processor.image_processor = self._within(processor.image_processor)
        processor.video_processor = self._within(processor.video_processor, "video_")
        # What none means, until transformers changes it.
        if getattr(processor.video_processor, "cap_pixels_per_frame", True) is None:
            processor.video_processor.cap_pixels_per_frame = False
        return processor

    def _within(self, reader: Any, of: str = "") -> Any:
        """A copy of a processor's part with the limits of one kind of visuals."""
        size = dict(reader.size)
        names = {"shortest_edge": f"{of}min_pixels", "longest_edge": f"{of}max_pixels"}
        for edge, name in names.items():
            if (value := getattr(self, name)) is not None:
                size[edge] = value
        least, most = (f"{name}={size[edge]}" for edge, name in names.items())
        if size["shortest_edge"] > size["longest_edge"]:
            raise UserError(f"{least} is above {most}")
        reader = copy(reader)
        reader.size = type(reader.size)(**size)
        return reader

    def frame_places(self, count: int) -> np.ndarray:
        """At most `frames` in equal steps, an even number, as two of them make a token.

        As lmms-eval's models of these families have it, and qwen_vl_utils rounds for them.
        """
        even = max(2, min(self.frames, count) // 2 * 2)
        return np.linspace(0, count - 1, even).round().astype(int)

    @classmethod
    def step_logits(cls, model: PreTrainedModel, ids: Tensor, **given: Any) -> Tensor:
        """What the whole model makes of text."""
        return decoder_logits(model, ids, **given)


@register_family
@dataclass(frozen=True)
class Qwen2VL(QwenVL):
    """A Qwen2VLForConditionalGeneration checkpoint.

    Parameters
    ----------
    min_pixels, max_pixels, video_min_pixels, video_max_pixels : int, optional
        As of `QwenVL`.
    rounding : {"limits", "loose"}, optional
        Images are scaled before the processor scales them, to sides of whole times 28 pixels, as
        qwen_vl_utils does. Their area is then within min_pixels and max_pixels, or within its own
        limits, 4 and 16,384 times 28 x 28.
    """

    model_type: ClassVar[str] = "qwen2_vl"
    lmms_name: ClassVar[str] = "qwen2vl_sparsemm"
    protocols: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # The defaults of its model qwen2_vl.
        "lmms-eval": {
            "system_prompt": "You are a helpful assistant.",
            "jpeg_quality": 85,
            "rounding": "limits",
            "min_pixels": 4 * 28 * 28,
            "max_pixels": 602_112,
            "video_min_pixels": 4 * 28 * 28,
            "video_max_pixels": 602_112,
            "max_new_tokens": 128,
        },
        # qwen2_vl of the published fork: it tells its limits to the processor alone, and saves
        # JPEG with PIL's default quality.
        "paper": {
            "system_prompt": "You are a helpful assistant.",
            "jpeg_quality": 75,
            "rounding": "loose",
            "min_pixels": 32 * 28 * 28,
            "max_pixels": 16_384 * 28 * 28,
            "max_new_tokens": 128,
        },
    }
    reading: ClassVar[tuple[str, ...]] = (*VideoFamily.reading, "rounding")

    rounding: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounding is not None:
            check_choice("rounding", self.rounding, ROUNDING)

    def read_image(self, image: Image, processor: ProcessorMixin) -> Image:
        """An image through JPEG and rounding, where they are set."""
        image = super().read_image(image, processor)
        if self.rounding is None:
            return image
        least, most = 4 * _CELL**2, 16_384 * _CELL**2
        if self.rounding == "limits":
            size = processor.image_processor.size
            least, most = size["shortest_edge"], size["longest_edge"]
        # PIL's default filter, bicubic.
        return _opaque(image).resize(rounded(image.size, least, most))


@register_family
@dataclass(frozen=True)
class Qwen25VL(Qwen2VL):
    """A Qwen2_5_VLForConditionalGeneration checkpoint: to the cache it is a Qwen2-VL."""

    model_type: ClassVar[str] = "qwen2_5_vl"
    lmms_name: ClassVar[str] = "qwen2_5_vl_sparsemm"
    protocols: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # The defaults of its model qwen2_5_vl for chats.
        "lmms-eval": {
            "rounding": "loose",
            "min_pixels": 256 * 28 * 28,
            "max_pixels": 1_605_632,
            # qwen_vl_utils holds a frame below this, whatever it is told.
            "video_min_pixels": 256 * 28 * 28,
            "video_max_pixels": 768 * 28 * 28,
            "max_new_tokens": 128,
        },
    }


def rounded(size: tuple[int, int], least: int, most: int) -> tuple[int, int]:
    """The size that qwen_vl_utils scales an image to.

    Parameters
    ----------
    size : (int, int)
        Two sides in pixels.
    least, most : int
        Limits of their product.

    Returns
    -------
    (int, int)
        The nearest whole times 28 pixels, at least one; where their product is beyond a limit,
        the sides scaled alike to the limit, then to whole times 28 within it.

    Raises
    ------
    ValueError
        If one side is more than 200 times the other.
    """
    if max(size) > _RATIO * min(size):
        raise ValueError(
            f"an image of {size[0]} x {size[1]} pixels: one side is 200 times the other"
        )
    near = tuple(max(1, round(side / _CELL)) * _CELL for side in size)
    area = math.prod(near)
    if area > most:
        scale = math.sqrt(math.prod(size) / most)
        return tuple(math.floor(side / scale / _CELL) * _CELL for side in size)
    if area < least:
        scale = math.sqrt(least / math.prod(size))
        return tuple(math.ceil(side * scale / _CELL) * _CELL for side in size)
    return near


def _opaque(image: Image) -> Image:
    """In RGB; what is transparent lies on white."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    from PIL.Image import new

    page = new("RGB", image.size, "white")
    page.paste(image, mask=image.getchannel("A"))
    return page
