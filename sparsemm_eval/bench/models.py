"""Whole models to measure: shapes of the paper's, with random weights, and checkpoints; bounds.

A bound is the least that a step of decoding must read and write.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2VLConfig,
)

from sparsemm_eval.cache import use_head_budget_attention
from sparsemm_eval.methods import HeadScores, Method, ModelShape, make_method, method_settings
from sparsemm_eval.tiny import EMBEDDED, embedded_checkpoints

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
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_GRID_METHODS = ("sparsemm", "snapkv", "pyramidkv", "adakv", "random")
_GRID_BUDGETS = {False: (256, 128, 64, 32, 16, 12), True: (2048, 1024, 512, 256, 128, 64)}
_GRID_WINDOW = {False: 8, True: 32}


@dataclass(frozen=True)
class Subject:
    """A model that is measured.

    Parameters
    ----------
    name : str
        Its own or the paper's.
    model : PreTrainedModel
        On `sparsemm_eval.cache.use_head_budget_attention`.
    shape : ModelShape
        For methods.
    scores : HeadScores
        Visual scores: chased ones that lie beside its weights, else drawn with a heavy tail.
    """

    name: str
    model: PreTrainedModel
    shape: ModelShape
    scores: HeadScores

    @classmethod
    def load(
        cls, name: str, device: torch.device, dtype: torch.dtype, ends: bool = False
    ) -> Subject:
        """Load a checkpoint, or make a shape of `SHAPES` with random weights.

        Parameters
        ----------
        name : str
            One of `SHAPES`, an embedded model, or a checkpoint's folder or repository.
        device : torch.device
            Where it lies; "meta" for the sizes of a shape alone.
        dtype : torch.dtype
            Of its weights.
        ends : bool
            Leave a checkpoint the tokens that end its answers.
        """
        name, chased = name.removeprefix(EMBEDDED), None
        if name in SHAPES:
            model = large_model(name, device, dtype)
        else:
            folder = embedded_checkpoints().get(name, Path(name))
            chased = folder / "head_scores.json"
            model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).to(device)
            use_head_budget_attention(model.eval()) if ends else endless(model)
        shape = ModelShape.from_config(model.config)
        if chased and chased.is_file():
            scores = HeadScores.read(chased)
        else:
            scores = heavy_scores(shape.layers, shape.query_heads)
        return cls(PAPER_NAMES.get(name, name), model, shape, scores)

    def method(self, name: str, budget: int | None, window: int) -> Method:
        """A method for the model, given those of its settings that it has."""
        return _method(name, self.shape, self.scores, budget, window)

    def prompts(self, tokens: int, samples: int = 1) -> dict[str, Tensor]:
        """Random text, as inputs of ``generate``."""
        ids = random_prompts(self.model, samples, tokens)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def large_model(
    name: str, device: torch.device | str, dtype: torch.dtype = torch.float16
) -> PreTrainedModel:
    """Build the shape of a 7B model with random weights; its answers never end by themselves.

    On the device "meta" it has no weights: its sizes cost nothing.
    """
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(shape_config(name), dtype=dtype)
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


def shape_config(name: str) -> LlavaNextConfig | Qwen2VLConfig:
    """Language layers of one of `SHAPES`; the vision tower, which text does not reach, is tiny."""
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
    config_type, kv_heads, inner = {
        "vicuna": (LlamaConfig, 32, 11008), "mistral": (MistralConfig, 8, 14336)
    }[kind]  # fmt: skip
    sizes = {"num_key_value_heads": kv_heads, "intermediate_size": inner}
    if small:
        sizes = _SMALL | {"num_key_value_heads": kv_heads // 4}
    text = config_type(**{**_LLAVA, **sizes})
    if config_type is MistralConfig:
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


def grid_methods(shape: ModelShape, scores: HeadScores, large: bool) -> list[Method]:
    """The cells of a grid of 31: full KV, and five methods at six budgets.

    Parameters
    ----------
    shape : ModelShape
        The decoder.
    scores : HeadScores
        For the methods that take them.
    large : bool
        Budgets 2048 to 64 with a window of 32, as the paper's; else the demo's, 256 to 12 with 8.
    """
    cells = [(name, budget) for name in _GRID_METHODS for budget in _GRID_BUDGETS[large]]
    return [
        _method(name, shape, scores, budget, _GRID_WINDOW[large])
        for name, budget in (("fullkv", None), *cells)
    ]


def _method(
    name: str, shape: ModelShape, scores: HeadScores, budget: int | None, window: int
) -> Method:
    """A method, given those of the settings that it has."""
    known = method_settings(name)
    given = {"budget": budget, "window": window, "head_scores": scores}
    return make_method(name, shape, **{key: given[key] for key in given if key in known})


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that one step reads: the decoder's and the output layer's, no embeddings."""
    skipped = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    decoder = [p for p in model.model.language_model.parameters() if id(p) not in skipped]
    return sum(p.numel() * p.element_size() for p in [*decoder, *model.lm_head.parameters()])


def token_bytes(model: PreTrainedModel) -> int:
    """Bytes of the key and value of one token in one KV head."""
    return 2 * ModelShape.from_config(model.config).head_dim * model.dtype.itemsize


def kept_tokens(methods: Sequence[Method], tokens: int) -> int:
    """Tokens that rows keep of one prompt, all layers and KV heads together.

    Exact where scores decide only which tokens are kept and not how many; else what they are
    asked to keep.
    """
    total = 0
    for method in methods:
        shape = method.shape
        layers = [method.most_kept(layer, tokens) for layer in range(shape.layers)]
        nominal = shape.kv_heads * min(tokens, method.budget or tokens)
        total += sum(nominal if kept is None else kept for kept in layers)
    return total


def kv_bytes(model: PreTrainedModel, methods: Sequence[Method], tokens: int, steps: int) -> int:
    """Bytes of keys and values that the mean of so many steps reads and writes, all rows."""
    shape = methods[0].shape
    sequences = len(methods) * shape.layers * shape.kv_heads
    read = kept_tokens(methods, tokens) + sequences * (steps + 1) // 2  # the step's own token too
    return (read + sequences) * token_bytes(model)
