"""Whole models to measure: the embedded ones, and shapes of large ones with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2VLConfig,
)

from sparsemm_eval.cache import use_head_budget_attention
from sparsemm_eval.errors import check_choice
from sparsemm_eval.methods import HeadScores, ModelShape
from sparsemm_eval.tiny import embedded_checkpoints
from sparsemm_eval.tiny.documents import Split, draw_document, stream, value_question

LARGE = ("vicuna", "mistral", "qwen2vl-7b")
# The same models with few, narrow layers, for runs that take seconds.
SMALL = ("vicuna-small", "mistral-small", "qwen2vl-small")
SHAPES = (*LARGE, *SMALL)
# What the paper calls the models whose shapes these are.
PAPER_NAMES = {
    "vicuna": "LLaVA-NeXT-Vicuna-7B",
    "mistral": "LLaVA-NeXT-Mistral-7B",
    "qwen2vl-7b": "Qwen2-VL-7B-Instruct",
}
_CHARACTERS = 8  # new tokens that are enough for any value on a drawn page


@dataclass(frozen=True)
class Subject:
    """A model with batches of prompts for it.

    Parameters
    ----------
    model : PreTrainedModel
        On `sparsemm_eval.cache.use_head_budget_attention`.
    batches : list of mapping
        Inputs of ``generate``.
    shape : ModelShape
        For methods.
    heads : HeadScores
        Visual scores: chased ones, or drawn with a heavy tail where weights are random.
    new_tokens : int
        Decoded at most.
    """

    model: PreTrainedModel
    batches: list[Mapping[str, Tensor]]
    shape: ModelShape
    heads: HeadScores
    new_tokens: int


def subject(
    name: str,
    device: torch.device,
    samples: int,
    batch_size: int,
    prompt_tokens: int = 2000,
    new_tokens: int = 32,
) -> Subject:
    """Make a model and prompts.

    Parameters
    ----------
    name : str
        An embedded model, which reads drawn pages and answers as long as it likes; or one of
        `LARGE`: the shape of a 7B model with random weights in half precision, which is given so
        many random tokens and never ends by itself.
    device : torch.device
        Where it lies.
    samples, batch_size : int
        Prompts in all, and read together.
    prompt_tokens, new_tokens : int
        Of the large shapes.

    Raises
    ------
    ValueError
        For an unknown name.
    """
    check_choice("model", name, (*embedded_checkpoints(), *LARGE))
    if name in LARGE:
        return _large(name, device, samples, batch_size, prompt_tokens, new_tokens)
    folder = embedded_checkpoints()[name]
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).to(device)
    pages = [draw_document(stream(Split.HELD_OUT, 0, number)) for number in range(samples)]
    texts = [_chat(processor, value_question(page, 0).prompt) for page in pages]
    batches = []
    for start in range(0, samples, batch_size):
        part = slice(start, start + batch_size)
        images = [page.image for page in pages[part]]
        batches.append(
            processor(text=texts[part], images=images, padding=True, return_tensors="pt").to(device)
        )
    heads = HeadScores.read(folder / "head_scores.json")
    return _subject(model, batches, heads, _CHARACTERS)


def _large(
    name: str, device: torch.device, samples: int, batch_size: int, tokens: int, new: int
) -> Subject:
    model = large_model(name, device)
    batches = [
        {"input_ids": part, "attention_mask": torch.ones_like(part)}
        for part in random_prompts(model, samples, tokens).split(batch_size)
    ]
    shape = ModelShape.from_config(model.config)
    heads = heavy_scores(shape.layers, shape.query_heads)
    return _subject(model, batches, heads, new)


def large_model(
    name: str, device: torch.device | str, dtype: torch.dtype = torch.float16
) -> PreTrainedModel:
    """Build the shape of a 7B model with random weights; its answers never end by themselves.

    On the device "meta" it has no weights: its sizes cost nothing.
    """
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(_config(name), dtype=dtype)
    return endless(model)


def endless(model: PreTrainedModel) -> PreTrainedModel:
    """Take the tokens away that end a model's answers, and put it on our attention."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    use_head_budget_attention(model.eval())
    return model


def random_prompts(model: PreTrainedModel, samples: int, tokens: int) -> Tensor:
    """Text tokens [samples, tokens], the same in every run, on the model's device."""
    config = model.config
    special = {
        value
        for part in (config, config.get_text_config())
        for name, value in vars(part).items()
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    vocabulary = config.get_text_config().vocab_size
    words = torch.tensor([token for token in range(vocabulary) if token not in special])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(words), (samples, tokens), generator=generator)
    return words[drawn].to(model.device)


def heavy_scores(layers: int, query_heads: int) -> HeadScores:
    """Visual scores of which 5% of the heads hold about 55%, as chased ones do."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(layers, query_heads, generator=generator)
    return HeadScores((drawn**20 + 0.01).double().numpy())


def _subject(
    model: PreTrainedModel, batches: list[Mapping[str, Tensor]], heads: HeadScores, new: int
) -> Subject:
    use_head_budget_attention(model.eval())
    return Subject(model, batches, ModelShape.from_config(model.config), heads, new)


def _chat(processor: object, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )


def _config(name: str) -> LlavaNextConfig | Qwen2VLConfig:
    """A model's language layers; its vision tower, which text prompts leave alone, is tiny."""
    kind, small = name.split("-")[0], name in SMALL
    if kind == "qwen2vl":
        text = dict(_QWEN2VL)
        if small:  # a head has 64 numbers, half of them turned by positions
            rope = _QWEN2VL["rope_parameters"] | {"mrope_section": [8, 12, 12]}
            text |= _SMALL | {"num_key_value_heads": 2, "rope_parameters": rope}
        hidden = text["hidden_size"]
        vision = {"depth": 1, "embed_dim": 64, "num_heads": 2, "hidden_size": hidden}
        special = {f"{what}_token_id": 500 + i for i, what in enumerate(_SPECIAL)} if small else {}
        return Qwen2VLConfig(text_config=text, vision_config=vision, **special)
    made, kv_heads, inner = {
        "vicuna": (LlamaConfig, 32, 11008), "mistral": (MistralConfig, 8, 14336)
    }[kind]  # fmt: skip
    sizes = {"num_key_value_heads": kv_heads, "intermediate_size": inner}
    if small:
        sizes = _SMALL | {"num_key_value_heads": kv_heads // 4}
    text = made(**{**_LLAVA, **sizes})
    if made is MistralConfig:
        text.sliding_window = None
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        image_size=336, patch_size=14, projection_dim=64,
    )  # fmt: skip
    image = 500 if small else 32_000
    return LlavaNextConfig(vision_config=vision, text_config=text, image_token_id=image)


_SPECIAL = ("image", "video", "vision_start", "vision_end")
_SMALL = {
    "hidden_size": 512, "intermediate_size": 768, "num_hidden_layers": 3,
    "num_attention_heads": 8, "vocab_size": 512,
}  # fmt: skip
_QWEN2VL = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152_064,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}  # fmt: skip
_LLAVA = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "vocab_size": 32_064, "max_position_embeddings": 65_536,
}  # fmt: skip
