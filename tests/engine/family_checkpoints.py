"""Tiny checkpoints with random weights of today's families, of their real classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GotOcr2ImageProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    Idefics3VisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3Config,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
    SmolVLMVisionConfig,
)

from sparsemm_eval.tiny.training.vocabulary import (
    IM_END,
    IM_START,
    IMAGE_PAD,
    PAD,
    UNKNOWN,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    VOCABULARY,
    build_tokenizer,
    chat_template,
)

PATCH, MERGE = 8, 2
TILE = 48  # side in pixels of the tiles of those that cut images into tiles


def text_settings(**more: Any) -> dict[str, Any]:
    """Three layers of 4 query and 2 KV heads; weights so wide that answers vary."""
    return {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "max_position_embeddings": 2048,
        "pad_token_id": VOCABULARY[PAD],
        "bos_token_id": VOCABULARY[IM_START],
        "eos_token_id": VOCABULARY[IM_END],
        **more,
    }


_QWEN_TOKENS = {
    "image_token_id": VOCABULARY[IMAGE_PAD],
    "video_token_id": VOCABULARY[VIDEO_PAD],
    "vision_start_token_id": VOCABULARY[VISION_START],
    "vision_end_token_id": VOCABULARY[VISION_END],
}
_QWEN_VISION = {
    "depth": 2, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 32,
    "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": MERGE, "initializer_range": 0.2,
}  # fmt: skip


def qwen25_model() -> PreTrainedModel:
    """Draw a Qwen2.5-VL."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    config = Qwen2_5_VLConfig(
        text_config=text_settings(rope_parameters=rope),
        vision_config={**_QWEN_VISION, "window_size": 64, "fullatt_block_indexes": [1]},
        **_QWEN_TOKENS,
    )
    return _draw(Qwen2_5_VLForConditionalGeneration, config)


def qwen3_model() -> PreTrainedModel:
    """Draw a Qwen3-VL whose tower adds to the first layer's hidden states."""
    rope = {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    }  # fmt: skip
    config = Qwen3VLConfig(
        text_config=text_settings(rope_parameters=rope, head_dim=16),
        vision_config={
            **_QWEN_VISION, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
        },
        **_QWEN_TOKENS,
    )  # fmt: skip
    return _draw(Qwen3VLForConditionalGeneration, config)


def build_qwen2(folder: Path) -> Path:
    """Write a Qwen2-VL checkpoint; return its folder."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
    vision = {
        "depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 1, "num_heads": 2,
        "patch_size": PATCH, "spatial_merge_size": MERGE, "initializer_range": 0.2,
    }  # fmt: skip
    text = text_settings(rope_parameters=rope)
    config = Qwen2VLConfig(text_config=text, vision_config=vision, **_QWEN_TOKENS)
    model = _draw(Qwen2VLForConditionalGeneration, config)
    return _write(folder, model, _qwen_processor(Qwen2VLProcessor))


def build_qwen25(folder: Path) -> Path:
    """Write a Qwen2.5-VL checkpoint; return its folder."""
    return _write(folder, qwen25_model(), _qwen_processor(Qwen2_5_VLProcessor))


def build_qwen3(folder: Path) -> Path:
    """Write a Qwen3-VL checkpoint; return its folder."""
    # Of all frames together.
    size = {"shortest_edge": 4 * 32**2, "longest_edge": 6 * 64**2}
    videos = Qwen3VLVideoProcessor(patch_size=PATCH, merge_size=MERGE, size=size)
    return _write(folder, qwen3_model(), _qwen_processor(Qwen3VLProcessor, videos))


def _qwen_processor(kind: type, videos: Any = None) -> Any:
    size = {"shortest_edge": 32**2, "longest_edge": 96**2}
    images = Qwen2VLImageProcessor(patch_size=PATCH, merge_size=MERGE, size=size)
    of_frame = size | {"longest_edge": 64**2}
    videos = videos or Qwen2VLVideoProcessor(patch_size=PATCH, merge_size=MERGE, size=of_frame)
    image, video = (VISION_START + pad + VISION_END for pad in (IMAGE_PAD, VIDEO_PAD))
    template = chat_template(image).replace(
        "{% elif", "{% elif part['type'] == 'video' %}" + video + "{% elif"
    )
    return kind(images, build_tokenizer(), videos, chat_template=template)


def internvl_model(decoder: str = "qwen2", tile: int = TILE) -> PreTrainedModel:
    """Draw an InternVL on a decoder of this model_type: 3 x 3 tokens a tile."""
    text = text_settings(vocab_size=len(VOCABULARY) + len(_INTERNVL_TOKENS))
    kinds = {
        "qwen2": lambda: Qwen2Config(**text),
        "qwen3": lambda: Qwen3Config(**text, head_dim=16),
    }
    vision = InternVLVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        image_size=[tile, tile], patch_size=[PATCH, PATCH], initializer_range=0.2,
    )  # fmt: skip
    config = InternVLConfig(
        vision_config=vision,
        text_config=kinds[decoder](),
        image_token_id=len(VOCABULARY),
        image_seq_length=9,
        tie_word_embeddings=False,
    )
    return _draw(InternVLForConditionalGeneration, config)


_INTERNVL_TOKENS = {
    "context_image_token": "<IMG_CONTEXT>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "video_token": "<video>",
}


def internvl_processor() -> InternVLProcessor:
    """Make the processor: up to six tiles of an image."""
    tokens = list(_INTERNVL_TOKENS.values())
    vocabulary = VOCABULARY | {token: len(VOCABULARY) + n for n, token in enumerate(tokens)}
    side = {"height": TILE, "width": TILE}
    return InternVLProcessor(
        GotOcr2ImageProcessor(size=side, max_patches=6),
        tokenizer_of(vocabulary, extra_special_tokens=_INTERNVL_TOKENS),
        InternVLVideoProcessor(size=side),
        image_seq_length=9,
        chat_template=chat_template("<IMG_CONTEXT>\n"),
    )


def build_internvl(folder: Path, decoder: str = "qwen2") -> Path:
    """Write an InternVL checkpoint; return its folder."""
    return _write(folder, internvl_model(decoder), internvl_processor())


_GEMMA3_TOKENS = {
    "image_token": "<image_soft_token>", "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
}  # fmt: skip


def gemma3_model(window: int = 12) -> PreTrainedModel:
    """Draw a Gemma 3 of two full layers and two of such a window: 3 x 3 tokens an image."""
    text = text_settings(
        vocab_size=len(VOCABULARY) + len(_GEMMA3_TOKENS),
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=window,
        head_dim=16,
        query_pre_attn_scalar=24,
        tie_word_embeddings=False,
    )
    config = Gemma3Config(
        text_config=text,
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": TILE, "patch_size": PATCH,
        },
        mm_tokens_per_image=9,
        tie_word_embeddings=False,
        image_token_index=len(VOCABULARY),
        boi_token_index=len(VOCABULARY) + 1,
        eoi_token_index=len(VOCABULARY) + 2,
    )  # fmt: skip
    model = _draw(Gemma3ForConditionalGeneration, config)
    # Zero at the start, as released weights are not.
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.model.multi_modal_projector.mm_input_projection_weight.normal_(generator=generator)
    return model


def gemma3_processor() -> Gemma3Processor:
    """Make the processor."""
    tokens = list(_GEMMA3_TOKENS.values())
    vocabulary = VOCABULARY | {token: len(VOCABULARY) + n for n, token in enumerate(tokens)}
    return Gemma3Processor(
        Gemma3ImageProcessor(size={"height": TILE, "width": TILE}),
        tokenizer_of(vocabulary, extra_special_tokens=_GEMMA3_TOKENS),
        chat_template=chat_template("<start_of_image>"),
        image_seq_length=9,
    )


def build_gemma3(folder: Path, window: int = 12) -> Path:
    """Write a Gemma 3 checkpoint; return its folder."""
    return _write(folder, gemma3_model(window), gemma3_processor())


_SMOLVLM_TOKENS = (
    "<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", "<video>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)  # fmt: skip


def build_idefics3(folder: Path) -> Path:
    """Write an Idefics3 checkpoint, of 3 x 3 tokens a tile; return its folder."""
    config = Idefics3Config(vision_config=Idefics3VisionConfig(**_SMOLVLM_VISION), **_smolvlm())
    processor = Idefics3Processor(
        Idefics3ImageProcessor(**_SMOLVLM_IMAGES), _smolvlm_tokenizer(), image_seq_len=9,
        chat_template=chat_template("<image>"),
    )  # fmt: skip
    return _write(folder, _draw(Idefics3ForConditionalGeneration, config), processor)


def build_smolvlm(folder: Path) -> Path:
    """Write a SmolVLM checkpoint, which needs num2words; return its folder."""
    config = SmolVLMConfig(vision_config=SmolVLMVisionConfig(**_SMOLVLM_VISION), **_smolvlm())
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(**_SMOLVLM_IMAGES), _smolvlm_tokenizer(), SmolVLMVideoProcessor(),
        image_seq_len=9, chat_template=chat_template("<image>"),
    )  # fmt: skip
    return _write(folder, _draw(SmolVLMForConditionalGeneration, config), processor)


_SMOLVLM_IMAGES = {
    "size": {"longest_edge": 2 * TILE}, "max_image_size": {"longest_edge": TILE},
}  # fmt: skip
_SMOLVLM_VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": TILE, "patch_size": PATCH, "initializer_range": 0.2,
}  # fmt: skip


def _smolvlm() -> dict[str, Any]:
    text = LlamaConfig(**text_settings(vocab_size=len(VOCABULARY) + len(_SMOLVLM_TOKENS)))
    return {
        "text_config": text, "image_token_id": len(VOCABULARY), "scale_factor": 2,
        "pad_token_id": VOCABULARY[PAD],
    }  # fmt: skip


def _smolvlm_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = VOCABULARY | {one: len(VOCABULARY) + n for n, one in enumerate(_SMOLVLM_TOKENS)}
    return tokenizer_of(vocabulary, additional_special_tokens=list(_SMOLVLM_TOKENS))


def tokenizer_of(vocabulary: dict[str, int], **more: Any) -> PreTrainedTokenizerFast:
    """One token a character, and those of a family beside."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=IM_START, eos_token=IM_END,
        unk_token=UNKNOWN, padding_side="left", clean_up_tokenization_spaces=False, **more,
    )  # fmt: skip


def _draw(kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config).eval()


def _write(folder: Path, model: PreTrainedModel, processor: Any) -> Path:
    model.generation_config.eos_token_id = VOCABULARY[IM_END]
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
