"""Qwen2-VL on a head-budgeted cache."""

from copy import copy
from typing import Any

from transformers import ProcessorMixin

from sparsemm_eval.engine.wrapper import SparseMMModel
from sparsemm_eval.errors import UserError, check_int


class Qwen2VLSparseMM(SparseMMModel):
    """``--model qwen2vl_sparsemm``: a Qwen2VLForConditionalGeneration checkpoint.

    Its own settings are ``min_pixels`` and ``max_pixels``, the area an image is scaled into;
    without them the checkpoint's own hold. The paper's runs had max_pixels=12845056.
    """

    model_id = "qwen2vl_sparsemm"
    model_type = "qwen2_vl"
    family_settings = ("min_pixels", "max_pixels")

    @classmethod
    def configure(cls, processor: ProcessorMixin, **family: Any) -> ProcessorMixin:
        """Set the area that images are scaled into, in pixels."""
        size = dict(processor.image_processor.size)
        for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            if family.get(name) is not None:
                check_int(name, family[name], least=1)
                size[edge] = family[name]
        if size["shortest_edge"] > size["longest_edge"]:
            raise UserError(
                f"min_pixels={size['shortest_edge']} is above max_pixels={size['longest_edge']}"
            )
        # Copies: models that share a checkpoint share its processor too.
        processor = copy(processor)
        processor.image_processor = copy(processor.image_processor)
        processor.image_processor.size = type(processor.image_processor.size)(**size)
        return processor
