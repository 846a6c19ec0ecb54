"""SmolVLM and Idefics3, which the first SmolVLM is in transformers."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar

from sparsemm_eval.errors import UserError, check_int
from sparsemm_eval.families.base import Family
from sparsemm_eval.families.registry import register_family

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedConfig, ProcessorMixin


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
