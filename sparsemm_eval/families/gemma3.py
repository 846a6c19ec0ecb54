"""Gemma 3: full attention in every sixth layer, a sliding window in the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sparsemm_eval.errors import UserError
from sparsemm_eval.families.base import Family, Regions, decoder_logits
from sparsemm_eval.families.internvl import TileRegions
from sparsemm_eval.families.registry import register_family

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin


@dataclass(frozen=True)
class Gemma3Regions(TileRegions):
    """The image squashed to a square, and no more: as many tokens of each."""

    @classmethod
    def read(
        cls,
        config: PreTrainedConfig,
        processor: ProcessorMixin,
        inputs: Mapping[str, Tensor],
        index: int,
        size: tuple[int, int],
        image_tokens: str,
    ) -> Gemma3Regions:
        vision = config.vision_config
        patches = vision.image_size // vision.patch_size
        cell = patches // int(config.mm_tokens_per_image**0.5) * vision.patch_size
        return cls(*size, image_tokens, tile=vision.image_size, cell=cell)


@register_family
@dataclass(frozen=True)
class Gemma3(Family):
    """A Gemma3ForConditionalGeneration checkpoint.

    Methods compress the layers of full attention; the others hold their window, which is the same
    for all methods. Tokens of one image attend to each other in both directions while the prompt
    is read. Images are read whole, without crops (pan and scan), as transformers does by default.
    """

    model_type: ClassVar[str] = "gemma3"
    lmms_name: ClassVar[str] = "gemma3_sparsemm"
    regions: ClassVar[type[Regions]] = Gemma3Regions

    @classmethod
    def check(cls, config: PreTrainedConfig) -> None:
        """Refuse what does not read text from left to right."""
        text = config.get_text_config()
        if getattr(text, "use_bidirectional_attention", False):
            raise UserError(
                "a gemma3 checkpoint with use_bidirectional_attention makes embeddings and writes "
                "no text; take one that generates"
            )

    @classmethod
    def arrange_images(cls, images: Sequence[Sequence[Image]]) -> list[list[Image]] | None:
        """A list a prompt; its processor takes one list of all for those of one prompt."""
        return [list(of_prompt) for of_prompt in images] if any(images) else None

    @classmethod
    def step_logits(cls, model: PreTrainedModel, ids: Tensor, **given: Any) -> Tensor:
        return decoder_logits(model, ids, **given)
