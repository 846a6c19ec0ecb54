"""Tiny LLaVA checkpoints with random weights, as folders that transformers reads offline."""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
VOCABULARY = {
    token: index for index, token in enumerate((*SPECIAL, *map(chr, range(32, 127)), "\n"))
}
SIDE, PATCH = 32, 8
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
# Vicuna's template leaves the leading <s> to the tokenizer, Mistral's writes it.
TEMPLATES = {
    "llama": (
        "{% for m in messages %}{{ ' ASSISTANT: ' if m['role'] == 'assistant' else 'USER: ' }}"
        "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% else %}"
        "{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
        "{% if messages[-1]['role'] != 'assistant' %} ASSISTANT:{% endif %}"
    ),
    "mistral": (
        "<s>{% for m in messages %}[INST] {% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
        " [/INST]{% endfor %}"
    ),
}


def build_llava(backbone: str, folder: Path, seed: int = 0) -> Path:
    """Write a checkpoint with a "llama" (MHA) or "mistral" (GQA) backbone; return its folder."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaNextForConditionalGeneration(_config(backbone))
    model.generation_config.eos_token_id = VOCABULARY["</s>"]
    model.save_pretrained(folder)
    _processor(backbone).save_pretrained(folder)
    return folder


_TEXT = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    # So large that greedy answers of random weights vary and end.
    "initializer_range": 0.3,
    "max_position_embeddings": 2048,
    "pad_token_id": VOCABULARY["<pad>"],
    "bos_token_id": VOCABULARY["<s>"],
    "eos_token_id": VOCABULARY["</s>"],
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}


def _config(backbone: str) -> LlavaNextConfig:
    if backbone == "llama":
        decoder = LlamaConfig(**_TEXT, num_key_value_heads=4)
    else:
        decoder = MistralConfig(**_TEXT, num_key_value_heads=2, sliding_window=None)
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**_VISION),
        text_config=decoder,
        image_token_index=VOCABULARY["<image>"],
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=False,
    )


def _tokenizer(vocabulary: dict[str, int] = VOCABULARY) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", VOCABULARY["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[
            token for token in vocabulary if token in ("<image>", "<video>")
        ],
        # Not the left, on purpose: the checkpoint must see to that.
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def _processor(backbone: str) -> LlavaNextProcessor:
    images = LlavaNextImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=PINPOINTS,
    )
    return LlavaNextProcessor(
        images,
        _tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATES[backbone],
    )


def build_llava_15(folder: Path, seed: int = 0) -> Path:
    """Write a LLaVA 1.5 checkpoint, of a family that the package does not know."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**_VISION),
        text_config=LlamaConfig(**_TEXT, num_key_value_heads=2),
        image_token_index=VOCABULARY["<image>"],
        image_seq_length=(SIDE // PATCH) ** 2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = VOCABULARY["</s>"]
    model.save_pretrained(folder)
    side = {"height": SIDE, "width": SIDE}
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=side),
        _tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATES["llama"],
    )
    processor.save_pretrained(folder)
    return folder


def build_onevision(folder: Path, seed: int = 0) -> Path:
    """Write a LLaVA-OneVision checkpoint; return its folder."""
    vocabulary = {**VOCABULARY, "<video>": len(VOCABULARY)}
    text = {**_TEXT, "num_key_value_heads": 2, "vocab_size": len(vocabulary)}
    vision = SiglipVisionConfig(**_VISION, vision_use_head=False)
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=Qwen2Config(**text),
        image_token_index=VOCABULARY["<image>"],
        video_token_index=vocabulary["<video>"],
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaOnevisionForConditionalGeneration(config)
        # Zero at the start, as released weights are not.
        torch.nn.init.normal_(model.model.image_newline)
    model.generation_config.eos_token_id = VOCABULARY["</s>"]
    model.save_pretrained(folder)
    side = {"height": SIDE, "width": SIDE}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=side, image_grid_pinpoints=PINPOINTS),
        _tokenizer(vocabulary),
        LlavaOnevisionVideoProcessor(size=side),
        num_image_tokens=(SIDE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=TEMPLATES["llama"].replace(
            "{% else %}", "{% elif c['type'] == 'video' %}<video>\n{% else %}"
        ),
    )
    processor.save_pretrained(folder)
    return folder
