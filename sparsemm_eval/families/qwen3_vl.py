"""Qwen3-VL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sparsemm_eval.families.qwen2_vl import QwenVL
from sparsemm_eval.families.registry import register_family


@register_family
@dataclass(frozen=True)
class Qwen3VL(QwenVL):
    """A Qwen3VLForConditionalGeneration checkpoint.

    What its vision tower adds to the first layers' hidden states while a prompt is read lies in
    keys and values that the cache gets; queries and keys come to it normed and rotated. It has no
    `rounding`: qwen_vl_utils rounds for it to whole times 32 pixels, as its processor does anyway.
    """

    model_type: ClassVar[str] = "qwen3_vl"
    lmms_name: ClassVar[str] = "qwen3_vl_sparsemm"
