"""The tiny Qwen2-VL: an ordinary one, with 0.9 million parameters."""

from __future__ import annotations

import numpy as np
import torch
from transformers import (
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
)
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from sparsemm_eval.tiny.training.vocabulary import (
    IM_END,
    IM_START,
    IMAGE_PAD,
    PAD,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    VOCABULARY,
    build_tokenizer,
    chat_template,
)

PATCH = 8
MERGE = 2
CELL = PATCH * MERGE
MAX_TEXT_POSITION = 4096
# Bounds on the image's area in pixels: from one cell to 32 x 32 cells. A page within them whose
# sides are multiples of a cell is never resized, so that a cell stays one token.
MIN_PIXELS = CELL * CELL
MAX_PIXELS = 1024 * CELL * CELL


def build_config() -> Qwen2VLConfig:
    """Return the configuration of the tiny model: 40 query heads and 20 KV heads in 5 layers."""
    text = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": MAX_TEXT_POSITION,
        # At 16 dimensions a head, a larger theta leaves hardly any resolution across a row.
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 100.0,
            "mrope_section": [1, 1, 1, 1, 2, 2],
        },
        "initializer_range": 0.06,
        "rms_norm_eps": 1e-5,
        "pad_token_id": VOCABULARY[PAD],
        "bos_token_id": VOCABULARY[IM_START],
        "eos_token_id": VOCABULARY[IM_END],
    }
    vision = {
        "depth": 1,
        "embed_dim": 64,
        "hidden_size": 128,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "initializer_range": 0.06,
    }
    return Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=VOCABULARY[IMAGE_PAD],
        video_token_id=VOCABULARY[VIDEO_PAD],
        vision_start_token_id=VOCABULARY[VISION_START],
        vision_end_token_id=VOCABULARY[VISION_END],
        tie_word_embeddings=False,
    )


def build_model(seed: int = 0) -> Qwen2VLForConditionalGeneration:
    """Return an untrained model in float32.

    Parameters
    ----------
    seed : int
        Seed of the weights.

    Returns
    -------
    Qwen2VLForConditionalGeneration
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen2VLForConditionalGeneration(build_config())


def build_processor() -> Qwen2VLProcessor:
    """Return the processor: one token a character, one image token a cell, left padding."""
    images = Qwen2VLImageProcessor(
        patch_size=PATCH,
        merge_size=MERGE,
        size={"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    videos = Qwen2VLVideoProcessor(patch_size=PATCH, merge_size=MERGE)
    template = chat_template(VISION_START + IMAGE_PAD + VISION_END)
    return Qwen2VLProcessor(images, build_tokenizer(), videos, chat_template=template)


def patchify(images: np.ndarray) -> dict[str, torch.Tensor]:
    """Cut images into patches as the image processor does, without its per-image work.

    Parameters
    ----------
    images : numpy.ndarray
        RGB images, uint8, shape (B, height, width, 3); sides are multiples of 16.

    Returns
    -------
    dict
        ``pixel_values``, float32 of shape (B * patches, 3 * 2 * 8 * 8), four patches of a cell in
        a row, and ``image_grid_thw``, shape (B, 3).
    """
    count, height, width, _ = images.shape
    rows, columns = height // CELL, width // CELL
    pixels = torch.from_numpy(images).float().div_(127.5).sub_(1)
    cells = pixels.view(count, rows, MERGE, PATCH, columns, MERGE, PATCH, 3)
    patches = cells.permute(0, 1, 4, 2, 5, 7, 3, 6)
    # Two equal frames.
    frames = patches.unsqueeze(-3).expand(*[-1] * 6, 2, -1, -1)
    grid = torch.tensor([[1, rows * MERGE, columns * MERGE]]).expand(count, -1)
    return {"pixel_values": frames.reshape(-1, 6 * PATCH * PATCH), "image_grid_thw": grid}
