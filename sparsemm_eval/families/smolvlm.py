"""SmolVLM and Idefics3, which the first SmolVLM is in transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar

from sparsemm_eval.errors import UserError, check_int
from sparsemm_eval.families.base import Family, Regions
from sparsemm_eval.families.internvl import TileRegions
from sparsemm_eval.families.registry import register_family

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from transformers import PreTrainedConfig, ProcessorMixin


# No side of an image is scaled to more pixels.
_MOST_PIXELS = 4096


@dataclass(frozen=True)
class Idefics3Regions(TileRegions):
    """The image scaled twice, the second time to whole tiles, and cut; then the whole, if cut."""

    @classmethod
    def read(
        cls,
        config: PreTrainedConfig,
        processor: ProcessorMixin,
        inputs: Mapping[str, Tensor],
        index: int,
        size: tuple[int, int],
        image_tokens: str,
    ) -> Idefics3Regions:
        images, vision = processor.image_processor, config.vision_config
        rows = columns = 1
        if images.do_image_splitting:
            longest, tile = images.size["longest_edge"], images.max_image_size["longest_edge"]
            columns, rows = _tiles(size, longest, tile)
        cell = vision.patch_size * config.scale_factor
        return cls(*size, image_tokens, rows, columns, vision.image_size, cell)


@register_family
@dataclass(frozen=True)
class Idefics3(Family):
    """An Idefics3ForConditionalGeneration checkpoint, such as SmolVLM-Instruct.

    Parameters
    ----------
    longest_edge : int, optional
        What an image's longer side is scaled to before it is cut into tiles, in pixels; without it
        the checkpoint's own holds.
    """

    model_type: ClassVar[str] = "idefics3"
    lmms_name: ClassVar[str] = "idefics3_sparsemm"
    regions: ClassVar[type[Regions]] = Idefics3Regions

    longest_edge: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.longest_edge is not None:
            check_int("longest_edge", self.longest_edge, least=1)

    def configure(self, processor: ProcessorMixin) -> ProcessorMixin:
        """Set how large images are before they are cut."""
        if self.longest_edge is None:
            return processor
        processor = copy(processor)
        images = processor.image_processor = copy(processor.image_processor)
        images.size = type(images.size)(longest_edge=self.longest_edge)
        return processor

    @classmethod
    def arrange_images(cls, images: Sequence[Sequence[Image]]) -> list[list[Image]] | None:
        """A list a prompt; its processor takes one list of all for those of one prompt."""
        return [list(of_prompt) for of_prompt in images] if any(images) else None


@register_family
@dataclass(frozen=True)
class SmolVLM(Idefics3):
    """A SmolVLMForConditionalGeneration checkpoint, such as SmolVLM2's."""

    model_type: ClassVar[str] = "smolvlm"
    lmms_name: ClassVar[str] = "smolvlm_sparsemm"

    @classmethod
    def check(cls, config: PreTrainedConfig) -> None:
        """Refuse to go on without a package that its processor needs."""
        if find_spec("num2words") is None:
            raise UserError(
                "a smolvlm checkpoint's processor needs the package num2words, which is not "
                "installed; install it (pip install num2words)"
            )


def _tiles(size: tuple[int, int], longest: int, tile: int) -> tuple[int, int]:
    """Columns and rows of tiles that an image of this width and height is cut into."""
    wide = size[0] >= size[1]
    long, short = size if wide else size[::-1]
    # Ratios are of width over height throughout: rounding decides at the edges.
    short = _beside(longest, long, short, wide)
    long, short = longest, max(short + short % 2, 1)
    if long > _MOST_PIXELS:
        long, short = _MOST_PIXELS, max(_beside(_MOST_PIXELS, long, short, wide), 1)
    if long < short or (long == short and not wide):  # scaled to a square, or a pixel beyond it
        long, short, wide = short, long, not wide
    along = math.ceil(long / tile)
    across = math.ceil(_beside(along * tile, long, short, wide) / tile)
    return (along, across) if wide else (across, along)


def _beside(new: int, long: int, short: int, wide: bool) -> int:
    """The shorter side where the longer one becomes `new` pixels."""
    return int(new / (long / short)) if wide else int(new * (short / long))
