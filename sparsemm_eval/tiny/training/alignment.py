"""First lesson: the vision tower learns to say what it sees, in the text's own words.

Each cell's feature is pulled to the word of its glyph (its text embedding, unless a trained model
lends another), or to the sum of two words where it is coloured, on random grids. Without this, the
language layers see noise and the circuit that reads never forms.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import PreTrainedModel

from sparsemm_eval.tiny.documents import ALPHABET, Layout, Split, stream
from sparsemm_eval.tiny.pictures import BAR, BLOCK, COLORS, SHAPES, Mark, paint
from sparsemm_eval.tiny.training.family import Family
from sparsemm_eval.tiny.training.vocabulary import VOCABULARY

# Grids of a step and how many: small ones for variety of faces, large ones for long attention.
_GRIDS = ((Layout(3, 22), 16), (Layout(7, 22), 7), (Layout(16, 22), 3))
_LEARNING_RATE = 3e-3
_SHARPNESS = 30.0
_GLYPHS, _MARKS = 0.5, 0.2
# Words of the vocabulary, one character each, that no page is written in.
_COLOR_WORDS = dict(zip(COLORS, "rgbypk", strict=True))
_SHAPE_WORDS = dict(zip((*SHAPES, BLOCK, BAR), "oqtsxdzz", strict=True))


def draw_grids(
    rng: np.random.Generator, layout: Layout, count: int
) -> tuple[list[Image.Image], list[Image.Image], torch.Tensor]:
    """Draw grids of random glyphs, cells of colour and blanks.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of all randomness.
    layout : Layout
        Shape of the grids.
    count : int
        Number of grids.

    Returns
    -------
    images : list of PIL.Image.Image
        The grids.
    plain : list of PIL.Image.Image
        The same glyphs without the cells of colour.
    tokens : torch.Tensor
        Two tokens for every cell, shape (count * cells, 2): twice that of its glyph or of the
        space, or those of colour and shape.
    """
    images, plain = [], []
    tokens = np.full((count, layout.image_tokens, 2), VOCABULARY[" "])
    colors, shapes = list(COLORS), list(_SHAPE_WORDS)
    for page in range(count):
        cells, marks = [], []
        for cell, chance in enumerate(rng.random(layout.image_tokens)):
            place = divmod(cell, layout.columns)
            if chance < _GLYPHS:
                char = ALPHABET[int(rng.integers(len(ALPHABET)))]
                cells.append((char, *place))
                tokens[page, cell] = VOCABULARY[char]
            elif chance < _GLYPHS + _MARKS:
                color = colors[int(rng.integers(len(colors)))]
                shape = shapes[int(rng.integers(len(shapes)))]
                marks.append(Mark(color, shape, *place, width=int(rng.integers(1, 17))))
                words = _COLOR_WORDS[color], _SHAPE_WORDS[shape]
                tokens[page, cell] = [VOCABULARY[word] for word in words]
        plain.append(Image.fromarray(paint(deepcopy(rng), cells, [], layout)))
        images.append(Image.fromarray(paint(rng, cells, marks, layout)))
    return images, plain, torch.from_numpy(tokens).flatten(0, 1)


@torch.no_grad()
def seen_words(family: Family, model: PreTrainedModel, seed: int = 0) -> torch.Tensor:
    """Return what a trained model sees where a glyph stands, as a table of words.

    A trained model's features have left the text embeddings they began at, and its language
    layers have followed. The vision that is to serve them aims at these features.

    Parameters
    ----------
    family : Family
        Of the trained model.
    model : PreTrainedModel
        The trained model.
    seed : int
        Seed of the grids that are looked at.

    Returns
    -------
    torch.Tensor
        Mean feature of every glyph and of the blank, shape (vocabulary, hidden); the words of
        colours and shapes are their text embeddings, brought to the same scale.
    """
    words = model.model.language_model.embed_tokens.weight.clone()
    layout, count = _GRIDS[1]
    images, _, tokens = draw_grids(stream(Split.TRAIN, seed, 2**32), layout, 8 * count)
    seen = family.cells(family.features(model, family.pixels(images)), layout)
    plain = tokens[:, 0] == tokens[:, 1]
    words = seen.mean(0) + words * (seen.std(0).mean() / words.std())
    for token in tokens[plain, 0].unique():
        words[token] = seen[plain & (tokens[:, 0] == token)].mean(0)
    return words


def align_vision(
    family: Family,
    model: PreTrainedModel,
    words: torch.Tensor,
    seed: int,
    steps: int,
    log: Callable[[dict[str, float]], None],
    keep: bool = False,
) -> None:
    """Train the vision tower alone, in place, to place each cell at its words.

    Parameters
    ----------
    family : Family
        Of the model.
    model : PreTrainedModel
        Model in float32; only what lies between pixels and features changes.
    words : torch.Tensor
        Where the features are pulled, shape (vocabulary, hidden).
    seed : int
        Seed of the grids.
    steps : int
        Number of optimizer steps.
    log : callable
        Receives a record with step, loss and the share of cells told right every 50 steps.
    keep : bool
        The model sees glyphs already, and its language layers know how: what it sees of them
        now, their neighbours included, is kept, and only cells of colour get words.
    """
    if not steps:
        return
    center = words.mean(0)
    spread = (words - center).square().mean()
    directions = (words - center) / (words - center).square().sum(1).mean()
    parameters = family.vision(model)
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _LEARNING_RATE, total_steps=steps + 1, pct_start=0.1
    )
    teacher = deepcopy(model) if keep else None
    for step in range(steps):
        layout, count = _GRIDS[step % len(_GRIDS)]
        # Counted down from the top, these seeds meet none of the documents' batches.
        rng = stream(Split.TRAIN, seed, 2**32 - 1 - step)
        images, plain, tokens = draw_grids(rng, layout, count)
        seen = family.cells(family.features(model, family.pixels(images)), layout)
        logits = _SHARPNESS * (seen - center) @ directions.T
        named = F.log_softmax(logits, -1).gather(1, tokens)
        aim = center + (words[tokens] - center).sum(1) / _parts(tokens)
        if teacher is not None:
            with torch.no_grad():
                now = family.cells(family.features(teacher, family.pixels(plain)), layout)
            marked = tokens[:, :1] != tokens[:, 1:]
            aim, named = torch.where(marked, aim, now), named[marked.squeeze(1)]
        distance = (seen - aim).square().mean() / spread
        loss = distance - named.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49 or step == steps - 1:
            log({"align_step": step + 1, "loss": loss.item(), "told_right": _told(logits, tokens)})


def _parts(tokens: torch.Tensor) -> torch.Tensor:
    """2 where a cell's two tokens are one and the same, else 1: [cells, 1]."""
    return 1 + (tokens[:, :1] == tokens[:, 1:]).float()


def _told(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    """Share of cells whose tokens are the most likely ones."""
    best = logits.topk(2, -1).indices
    two = tokens[:, 0] != tokens[:, 1]
    once = best[:, 0] == tokens[:, 0]
    both = best.sort(-1).values.eq(tokens.sort(-1).values).all(-1)
    return torch.where(two, both, once).float().mean().item()
