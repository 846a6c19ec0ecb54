"""The tiny LLaVA-NeXT: a CLIP tower of 11 x 11 patches, anyres tiles and a Llama with MHA."""

from __future__ import annotations

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
)

from sparsemm_eval.tiny.training.vocabulary import (
    IM_END,
    IM_START,
    IMAGE_PAD,
    PAD,
    VOCABULARY,
    build_tokenizer,
    chat_template,
)

PATCH = 16
SIDE = 11 * PATCH
BASE_TOKENS = 11 * 11
# A page of 22 columns is never shown whole but squashed: only its tiles are legible.
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
BOS = IM_START


def build_config() -> LlavaNextConfig:
    """Return the configuration of the tiny model: 40 query heads and 40 KV heads in 5 layers."""
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        initializer_range=0.06,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        pad_token_id=VOCABULARY[PAD],
        bos_token_id=VOCABULARY[BOS],
        eos_token_id=VOCABULARY[IM_END],
    )
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        initializer_range=0.06,
    )
    return LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=VOCABULARY[IMAGE_PAD],
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def build_model(seed: int = 0) -> LlavaNextForConditionalGeneration:
    """Return an untrained model in float32.

    Parameters
    ----------
    seed : int
        Seed of the weights.

    Returns
    -------
    LlavaNextForConditionalGeneration
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlavaNextForConditionalGeneration(build_config())


def build_image_processor() -> LlavaNextImageProcessor:
    """Return the image processor: base image and tiles of 176 x 176 pixels."""
    return LlavaNextImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=PINPOINTS,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def build_processor() -> LlavaNextProcessor:
    """Return the processor: one token a character, base and tile tokens, left padding."""
    return LlavaNextProcessor(
        build_image_processor(),
        build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_PAD,
        chat_template=chat_template(BOS + IMAGE_PAD),
    )
