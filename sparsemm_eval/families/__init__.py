"""Model families: what is particular to the checkpoints of one model_type, a file each."""

from importlib import import_module
from pkgutil import iter_modules

from sparsemm_eval.families.base import (
    IMAGE_TOKENS,
    PLAIN,
    Box,
    Family,
    Regions,
    SheetRegions,
    VideoFamily,
    cell_boxes,
    decoder_logits,
    grid_boxes,
)
from sparsemm_eval.families.registry import (
    families,
    family_digest,
    family_of,
    family_settings,
    find_family,
    protocols,
    register_family,
    video_families,
)

# Every file of this folder: a family needs no other place that names it.
for _module in iter_modules(__path__, f"{__name__}."):
    import_module(_module.name)

__all__ = [
    "IMAGE_TOKENS",
    "PLAIN",
    "Box",
    "Family",
    "Regions",
    "SheetRegions",
    "VideoFamily",
    "cell_boxes",
    "decoder_logits",
    "families",
    "family_digest",
    "family_of",
    "family_settings",
    "find_family",
    "grid_boxes",
    "protocols",
    "register_family",
    "video_families",
]
