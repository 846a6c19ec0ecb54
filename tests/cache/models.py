"""Tiny multimodal models with random weights, and image prompts that fit them.

The models are the real classes, built from configurations and drawn with so wide an initializer
that tokens vary from step to step. Prompts hold an image as the processor would give it: pixels,
as many image tokens as the model makes of them, and the sizes it asks for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from sparsemm_eval.cache import use_head_budget_attention
from sparsemm_eval.methods import HeadScores, Method, ModelShape, make_method, settings_of

FAMILIES = ("llama-mha", "llama-gqa", "mistral", "qwen2vl")
VOCABULARY = 128
PAD, FIRST_WORD, VISION_START, IMAGE = 0, 4, 126, 127
LAYERS = 3
TILE, PATCH = 16, 4  # sides in pixels of LLaVA-NeXT's tiles and of all patches
MERGE = 2  # patches of Qwen2-VL that make one cell, by side
WINDOW = 8
# What differs between `paper` and `exact` runs as both; the others spend the same either way.
COMPRESSING = (
    ("sparsemm", "paper"), ("sparsemm", "exact"), ("snapkv", "paper"),
    ("pyramidkv", "paper"), ("pyramidkv", "exact"), ("adakv", "paper"), ("adakv", "exact"),
    ("random", "paper"), ("random", "exact"), ("local", "paper"), ("streaming", "paper"),
)  # fmt: skip
METHODS = tuple(dict.fromkeys(name for name, _ in COMPRESSING))
# Those that look at more than queries and keys, or share the budget among layers as they are read.
MORE = (
    ("mixkv+pyramidkv", "exact"), ("criticalkv+sparsemm", "paper"), ("lava", "exact"),
    ("vlcache", "paper"), ("criticalkv+cake", "exact"), ("tgvkv", "paper"),
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One prompt: `words` text tokens, split around an image of so many cells by side.

    Qwen2-VL makes a token of each cell, LLaVA-NeXT about one and a half. No cells: text alone.
    """

    words: int
    cells: tuple[int, int] | None = None
    seed: int = 0

    def text(self) -> Tensor:
        """The text's tokens."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(FIRST_WORD, VISION_START, (self.words,), generator=generator)

    def noise(self, *size: int) -> Tensor:
        """The image's pixels."""
        return torch.randn(*size, generator=torch.Generator().manual_seed(self.seed + 1))


# A left-padded batch whose rows have unlike images, and one that has none.
SAMPLES = (
    Sample(9, (8, 8), 10),
    Sample(21, (8, 6), 20),
    Sample(14, None, 30),
    Sample(5, (6, 8), 40),
)


def build(
    family: str, seed: int = 0, dtype: torch.dtype = torch.float32, sliding: int | None = None
) -> PreTrainedModel:
    """Draw a model on transformers' own sdpa; the same seed draws the same weights.

    The end of a sequence is no token of these models, so that every run has its full length.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "qwen2vl":
            model = Qwen2VLForConditionalGeneration(_qwen2vl_config())
        else:
            model = LlavaNextForConditionalGeneration(_llava_config(family, sliding))
            # Zero at the start, as released weights are not.
            torch.nn.init.normal_(model.model.image_newline)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    if dtype == torch.float64:
        _norm_in_float64(model.model.language_model)
    return model.to(dtype).eval()


def budgeted(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Draw the same model, on the attention under test."""
    model = build(family, seed, dtype)
    use_head_budget_attention(model)
    return model


def shape_of(model: PreTrainedModel) -> ModelShape:
    """Layers and heads of the decoder; of sliding layers beside full ones, their windows."""
    text = model.config.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers)
    windows = ()
    if len(set(kinds)) == 2:
        windows = [None if kind == "full_attention" else text.sliding_window for kind in kinds]
        kinds = [kind for kind in kinds if kind == "full_attention"]
    heads = text.num_attention_heads, text.num_key_value_heads
    return ModelShape(len(kinds), *heads, windows=tuple(windows))


def method_for(
    model: PreTrainedModel, name: str, budget: int = 24, allocation: str = "paper"
) -> Method:
    """Make a method for a model: window 8, and visual scores that are far from even."""
    shape = shape_of(model)
    settings: dict[str, object] = {} if name == "fullkv" else {"budget": budget}
    known = {setting.name for setting in settings_of(name)}
    settings |= {
        k: v for k, v in {"allocation": allocation, "window": WINDOW}.items() if k in known
    }
    if "head_scores" in known:
        generator = torch.Generator().manual_seed(7)
        drawn = torch.randn(shape.layers, shape.query_heads, generator=generator)
        settings["head_scores"] = HeadScores((1.5 * drawn).exp().numpy())
    return make_method(name, shape, **settings)


def prompt(model: PreTrainedModel, samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Make the model's inputs for a batch of samples, padded on the left."""
    llava = isinstance(model, LlavaNextForConditionalGeneration)
    images = [s for s in samples if s.cells is not None]
    extra = (_llava_images if llava else _qwen2vl_images)(images) if images else {}
    counts = iter(_image_tokens(model, extra, images))
    rows = [_tokens(s, next(counts) if s.cells is not None else 0) for s in samples]
    width = max(map(len, rows))
    ids = torch.stack([pad(row, (width - len(row), 0), value=PAD) for row in rows])
    mask = torch.stack([pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
    if not llava:
        extra["mm_token_type_ids"] = (ids == IMAGE).int()
    dtype = next(model.parameters()).dtype
    return {
        "input_ids": ids,
        "attention_mask": mask,
        **{name: x.to(dtype) if x.is_floating_point() else x for name, x in extra.items()},
    }


def lengths(inputs: dict[str, Tensor]) -> list[int]:
    """Tokens of each row, padding excluded."""
    return inputs["attention_mask"].sum(-1).tolist()


def _norm_in_float64(decoder: torch.nn.Module) -> None:
    """Replace norms that round to float32 whatever they are given: they would hide differences."""
    for parent in list(decoder.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon)
                setattr(parent, name, norm)


def text_config(heads: int, kv_heads: int) -> dict[str, object]:
    """Settings of a decoder with wide random weights."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 8192,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": PAD,
    }


def _tokens(sample: Sample, image: int) -> Tensor:
    text = sample.text()
    if image == 0:
        return text
    middle = torch.tensor([VISION_START] + [IMAGE] * image)
    return torch.cat([text[:3], middle, text[3:]])


def _image_tokens(
    model: PreTrainedModel, extra: dict[str, Tensor], images: Sequence[Sample]
) -> list[int]:
    """How many tokens the model makes of each image: asked, not computed a second time."""
    if not images:
        return []
    dtype = next(model.parameters()).dtype
    given = {name: x.to(dtype) if x.is_floating_point() else x for name, x in extra.items()}
    with torch.no_grad():
        return [len(features) for features in model.get_image_features(**given).pooler_output]


def _llava_images(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Five tiles a sample, of which the model reads as many as the size needs."""
    return {
        "pixel_values": torch.stack([s.noise(5, 3, TILE, TILE) for s in samples]),
        "image_sizes": torch.tensor([[side * PATCH for side in s.cells] for s in samples]),
    }


def _qwen2vl_images(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Patches in a flat list; each is two frames deep, as a still image comes."""
    grids = [(1, *(side * MERGE for side in s.cells)) for s in samples]
    pixels = 2 * 3 * PATCH**2
    patches = [s.noise(h * w, pixels) for s, (_, h, w) in zip(samples, grids, strict=True)]
    return {"pixel_values": torch.cat(patches), "image_grid_thw": torch.tensor(grids)}


def _llava_config(family: str, sliding: int | None) -> LlavaNextConfig:
    if family == "mistral":
        text = MistralConfig(**text_config(4, 2), sliding_window=sliding)
    else:
        text = LlamaConfig(**text_config(4, 4 if family == "llama-mha" else 1))
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=TILE, patch_size=PATCH, initializer_range=0.3, initializer_factor=4.0,
    )  # fmt: skip
    return LlavaNextConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE,
        image_grid_pinpoints=[[TILE, 2 * TILE], [2 * TILE, TILE], [2 * TILE, 2 * TILE]],
        initializer_range=0.3,
    )


def _qwen2vl_config() -> Qwen2VLConfig:
    rope = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [1, 1, 2]}
    vision = {
        "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2,
        "patch_size": PATCH, "spatial_merge_size": MERGE, "initializer_range": 0.3,
    }  # fmt: skip
    return Qwen2VLConfig(
        text_config={**text_config(4, 2), "rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VOCABULARY - 3,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VOCABULARY - 4,
        tie_word_embeddings=False,
    )
