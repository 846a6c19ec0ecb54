"""The two tiny models: what a trainer has to know of each family.

Both are ordinary transformers models with one token a character and one image token a cell of the
page, so that everything that runs on a real checkpoint runs on them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2VLForConditionalGeneration,
)

from sparsemm_eval.tiny.documents import Layout
from sparsemm_eval.tiny.training import llava, qwen2_vl
from sparsemm_eval.tiny.training.vocabulary import IMAGE_PAD, VISION_END, VISION_START, VOCABULARY


class Family(Protocol):
    """What differs between the families in training."""

    name: str
    learning_rate: float

    def build_model(self, seed: int) -> PreTrainedModel:
        """Return an untrained model in float32."""

    def build_processor(self) -> ProcessorMixin:
        """Return the processor: one token a character, left padding."""

    def prefix(self, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens [P] and positions [axes, P] of an image, in front of its questions."""

    def pixels(self, images: list[Image.Image]) -> dict[str, Tensor]:
        """Return what the image processor makes of images of one size."""

    def features(self, model: PreTrainedModel, pixels: dict[str, Tensor]) -> Tensor:
        """Return the features of all image tokens, [B, P, hidden] flattened to two dimensions."""

    def cells(self, features: Tensor, layout: Layout) -> Tensor:
        """Return the features of the cells of the pages alone, [B * cells, hidden]."""

    def vision(self, model: PreTrainedModel) -> list[torch.nn.Parameter]:
        """Return the parameters between pixels and features."""


class Qwen2VLFamily:
    """Qwen2-VL: one image token a cell, three axes of position."""

    name = "qwen2vl"
    learning_rate = 2e-3

    def build_model(self, seed: int = 0) -> Qwen2VLForConditionalGeneration:
        return qwen2_vl.build_model(seed)

    def build_processor(self) -> ProcessorMixin:
        return qwen2_vl.build_processor()

    def prefix(self, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
        rows, columns = np.divmod(np.arange(layout.image_tokens), layout.columns)
        positions = np.zeros((3, layout.image_tokens + 2), np.int64)
        positions[:, 1:-1] = 1 + np.stack([np.zeros_like(rows), rows, columns])
        positions[:, -1] = 1 + max(layout.rows, layout.columns)
        tokens = np.full(layout.image_tokens + 2, VOCABULARY[IMAGE_PAD])
        tokens[0], tokens[-1] = VOCABULARY[VISION_START], VOCABULARY[VISION_END]
        return tokens, positions

    def pixels(self, images: list[Image.Image]) -> dict[str, Tensor]:
        return qwen2_vl.patchify(np.stack([np.asarray(image) for image in images]))

    def features(self, model: Qwen2VLForConditionalGeneration, pixels: dict[str, Tensor]) -> Tensor:
        return model.model.visual(pixels["pixel_values"], pixels["image_grid_thw"]).pooler_output

    def cells(self, features: Tensor, layout: Layout) -> Tensor:
        return features

    def vision(self, model: Qwen2VLForConditionalGeneration) -> list[torch.nn.Parameter]:
        return list(model.model.visual.parameters())


class LlavaNextFamily:
    """LLaVA-NeXT: the whole page squashed onto a base grid, then tiles, a newline a row."""

    name = "llava_next"
    learning_rate = 1.5e-3

    def __init__(self) -> None:
        self._images = llava.build_image_processor()

    def build_model(self, seed: int = 0) -> LlavaNextForConditionalGeneration:
        return llava.build_model(seed)

    def build_processor(self) -> ProcessorMixin:
        return llava.build_processor()

    def prefix(self, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
        count = 1 + llava.BASE_TOKENS + layout.rows * (layout.columns + 1)
        tokens = np.full(count, VOCABULARY[IMAGE_PAD])
        tokens[0] = VOCABULARY[llava.BOS]
        return tokens, np.arange(count)[None]

    def pixels(self, images: list[Image.Image]) -> dict[str, Tensor]:
        return dict(self._images(images, return_tensors="pt"))

    def features(
        self, model: LlavaNextForConditionalGeneration, pixels: dict[str, Tensor]
    ) -> Tensor:
        config = model.config
        found: Any = model.model.get_image_features(
            pixels["pixel_values"],
            pixels["image_sizes"],
            vision_feature_layer=config.vision_feature_layer,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
        )
        return torch.cat(list(found.pooler_output))

    def cells(self, features: Tensor, layout: Layout) -> Tensor:
        tiles = layout.rows * (layout.columns + 1)
        pages = features.view(-1, llava.BASE_TOKENS + tiles, features.shape[-1])
        rows = pages[:, llava.BASE_TOKENS :].unflatten(1, (layout.rows, -1))
        return rows[:, :, :-1].reshape(-1, features.shape[-1])

    def vision(self, model: LlavaNextForConditionalGeneration) -> list[torch.nn.Parameter]:
        core = model.model
        parts = (core.vision_tower, core.multi_modal_projector)
        return [parameter for part in parts for parameter in part.parameters()]


FAMILIES: dict[str, type[Qwen2VLFamily] | type[LlavaNextFamily]] = {
    family.name: family for family in (Qwen2VLFamily, LlavaNextFamily)
}


def export(family: Family, model: PreTrainedModel, folder: Path, card: str) -> None:
    """Write model, processor and model card so that ``from_pretrained`` reads them offline.

    Parameters
    ----------
    family : Family
        Of the model.
    model : PreTrainedModel
        The model; it is left as it is, its weights are written in bfloat16.
    folder : pathlib.Path
        Destination, made if missing.
    card : str
        Text of the model card, written as README.md.
    """
    folder.mkdir(parents=True, exist_ok=True)
    copy = family.build_model(0)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(folder)
    family.build_processor().save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")
