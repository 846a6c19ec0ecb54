"""Image box to image tokens, by what the model's family says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from transformers import PreTrainedConfig, ProcessorMixin

from sparsemm_eval.errors import UserError, check_choice
from sparsemm_eval.families import IMAGE_TOKENS, Regions, families, find_family


def find_regions(
    config: PreTrainedConfig,
    processor: ProcessorMixin,
    inputs: Mapping[str, torch.Tensor],
    sizes: Sequence[tuple[int, int]],
    image_tokens: str = "all",
    shown: str = "image",
) -> list[Regions]:
    """Regions of every image of a batch, or of every video, in the order of the prompts.

    Parameters
    ----------
    config : PreTrainedConfig
        The model's.
    processor : ProcessorMixin
        What made the inputs.
    inputs : mapping
        The processor's output.
    sizes : sequence of tuple
        (width, height) of each image, or of each video's frames, as it was given, in pixels.
    image_tokens : {"all", "tiles"}
        See `Regions`.
    shown : {"image", "video"}
        What they are of.

    Raises
    ------
    ValueError
        If the family's regions are unknown, or image_tokens is no such word.
    """
    check_choice("image_tokens", image_tokens, IMAGE_TOKENS)
    kind = regions_of(config.model_type, shown)
    return [
        kind.read(config, processor, inputs, index, size, image_tokens)
        for index, size in enumerate(sizes)
    ]


def regions_of(model_type: str, shown: str = "image") -> type[Regions]:
    """How a family lays out the tokens of its images, or of its videos.

    Raises
    ------
    UserError
        If that, or the family, is not known.
    """
    name = {"image": "regions", "video": "video_regions"}[shown]
    regions = getattr(find_family(model_type), name, None)
    if regions is None:
        known = sorted(one for one, kind in families().items() if getattr(kind, name, None))
        raise UserError(
            f"where the {shown} tokens of a {model_type} model lie is not known; it is for "
            f"{', '.join(known)}"
        )
    return regions


def image_positions(
    config: PreTrainedConfig, input_ids_row: torch.Tensor, regions: Sequence[Regions]
) -> list[np.ndarray]:
    """Positions, in one row of input ids, of each image's tokens, or of each video's.

    Parameters
    ----------
    config : PreTrainedConfig
        The model's.
    input_ids_row : Tensor
        [n], padding included.
    regions : sequence of Regions
        Of the row's images, in order; or of its videos.

    Raises
    ------
    ValueError
        If the row has another number of image tokens than the regions.
    """
    shown = regions[0].shown if regions else "image"
    token = getattr(config, f"{shown}_token_id")
    found = (input_ids_row == token).nonzero().flatten().cpu().numpy()
    counts = [one.count for one in regions]
    if len(found) != sum(counts):
        raise UserError(
            f"the prompt has {len(found)} {shown} tokens and its {shown}s {sum(counts)}: processor "
            f"and model config disagree about {shown} sizes"
        )
    return np.split(found, np.cumsum(counts)[:-1]) if counts else []
