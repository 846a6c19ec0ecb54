"""Attention over an image while a model writes its answer, which it does greedily."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import torch
from PIL import Image

from sparsemm_eval.errors import UserError, check_int
from sparsemm_eval.heads.reading import greedy_answers, read_prompts, teacher_forced
from sparsemm_eval.heads.regions import Box, Regions, check_family, find_regions, image_positions
from sparsemm_eval.heads.watch import WeightCache
from sparsemm_eval.models.checkpoint import Checkpoint


@dataclass(frozen=True, eq=False)
class Scene:
    """An image, a question about it, and where its answer stands.

    Parameters
    ----------
    image : Image
        RGB.
    question : str
        As the user asks it; the chat template goes around it.
    box : tuple or None
        Where the answer stands, (x0, y0, x1, y1) in pixels of the image, end exclusive.
    """

    image: Image.Image
    question: str
    box: Box | None = None


@dataclass(frozen=True, eq=False)
class ImageAttention:
    """Where all heads looked while the answer was written.

    Parameters
    ----------
    answer : str
        What the model wrote.
    tokens : int
        Its tokens, over which the weights are averaged.
    weights : ndarray
        [L, Hq, image tokens] float32; what is missing to 1 fell on tokens of text.
    regions : Regions
        Of the image's tokens.
    """

    answer: str
    tokens: int
    weights: np.ndarray
    regions: Regions

    @property
    def on_image(self) -> np.ndarray:
        """[L, Hq]: share of a head's attention that falls on the image."""
        return self.weights.sum(-1)

    def on_box(self, box: Box) -> np.ndarray:
        """[L, Hq]: share of a head's attention on tokens whose region overlaps a box."""
        return self.weights[..., self.regions.tokens(box)].sum(-1)

    def on_parts(self) -> dict[str, np.ndarray]:
        """[L, Hq] for each kind of image token there is: base, tile, newline."""
        parts = self.regions.parts
        return {part: self.weights[..., parts == part].sum(-1) for part in dict.fromkeys(parts)}


def attend(checkpoint: Checkpoint, scene: Scene, max_new_tokens: int = 64) -> ImageAttention:
    """Answer a scene's question greedily, and look at the attention that wrote the answer.

    Parameters
    ----------
    checkpoint : Checkpoint
        A model of a family whose regions are known.
    scene : Scene
        What is asked.
    max_new_tokens : int
        Where the answer ends at the latest.

    Raises
    ------
    ValueError
        If the family is unknown or the box lies outside the image (both before the weights are
        loaded), or if the answer is empty.
    """
    check_int("max_new_tokens", max_new_tokens, least=1)
    check_family(checkpoint.config.model_type)
    inputs = read_prompts(checkpoint.processor, [scene.image], [scene.question])
    regions = find_regions(checkpoint.config, checkpoint.processor, inputs, [scene.image.size])
    positions = image_positions(checkpoint.config, inputs["input_ids"][0], regions)[0]
    if scene.box is not None:
        regions[0].tokens(scene.box)  # raises for a box that is empty or outside
    model, tokenizer = checkpoint.model, checkpoint.processor.tokenizer
    inputs = inputs.to(model.device, model.dtype)
    (said,) = greedy_answers(checkpoint, inputs, max_new_tokens)
    special = set(tokenizer.all_special_ids)
    answer = list(takewhile(lambda token: token not in special, said))
    if not answer:
        raise UserError(
            f"the answer to {scene.question!r} is empty: no token of it has attention to draw; "
            "ask another question"
        )
    cache = WeightCache(checkpoint.shape.layers, len(answer), positions)
    forced = teacher_forced(inputs, [answer], tokenizer.pad_token_id)
    with torch.inference_mode():
        model(**forced, past_key_values=cache, use_cache=True, logits_to_keep=1)
    weights = cache.weights()[0].float().numpy()
    return ImageAttention(tokenizer.decode(answer).strip(), len(answer), weights, regions[0])
