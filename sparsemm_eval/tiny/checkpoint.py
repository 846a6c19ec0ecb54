"""The tiny Qwen2-VL: its configuration, its processor, and how it is written to a folder.

It is an ordinary ``Qwen2VLForConditionalGeneration`` with 0.9 million parameters and one token a
character, so everything that runs on a real Qwen2-VL runs on it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
)
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

PATCH = 8
MERGE = 2
CELL = PATCH * MERGE
MAX_TEXT_POSITION = 4096
# Bounds on the image's area in pixels: from one cell to 32 x 32 cells. A page within them whose
# sides are multiples of a cell is never resized, so that a cell stays one token.
MIN_PIXELS = CELL * CELL
MAX_PIXELS = 1024 * CELL * CELL

PAD, IM_START, IM_END = "<|pad|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD, UNKNOWN = "<|image_pad|>", "<|video_pad|>", "<|unk|>"
SPECIAL_TOKENS = (
    PAD,
    IM_START,
    IM_END,
    VISION_START,
    VISION_END,
    IMAGE_PAD,
    VIDEO_PAD,
    UNKNOWN,
)
CHARACTERS = "".join(map(chr, range(32, 127))) + "\n"
VOCABULARY: dict[str, int] = {
    token: index for index, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))
}

# Nothing but the content: the prompt stays as short as the image allows, and the answer follows
# the question as the value follows the key on the page.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}" + VISION_START + IMAGE_PAD + VISION_END + "{% elif "
    "part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}" + IM_END + "{% endif %}"
    "{% endfor %}"
)


def encode(text: str) -> list[int]:
    """Return the token of every character; a character outside the vocabulary is unknown.

    Parameters
    ----------
    text : str
        Text without special tokens.

    Returns
    -------
    list of int
        As long as the text.
    """
    unknown = VOCABULARY[UNKNOWN]
    return [VOCABULARY.get(char, unknown) for char in text]


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
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=IM_START,
        eos_token=IM_END,
        unk_token=UNKNOWN,
        additional_special_tokens=[VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    images = Qwen2VLImageProcessor(
        patch_size=PATCH,
        merge_size=MERGE,
        size={"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    videos = Qwen2VLVideoProcessor(patch_size=PATCH, merge_size=MERGE)
    return Qwen2VLProcessor(images, fast, videos, chat_template=CHAT_TEMPLATE)


def export(model: Qwen2VLForConditionalGeneration, folder: Path, card: str) -> None:
    """Write model, processor and model card so that ``from_pretrained`` reads them offline.

    Parameters
    ----------
    model : Qwen2VLForConditionalGeneration
        The model; it is left as it is, its weights are written in bfloat16.
    folder : pathlib.Path
        Destination, made if missing.
    card : str
        Text of the model card, written as README.md.
    """
    folder.mkdir(parents=True, exist_ok=True)
    copy = Qwen2VLForConditionalGeneration(build_config())
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(folder)
    build_processor().save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
