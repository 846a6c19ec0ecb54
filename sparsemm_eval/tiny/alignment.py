"""First lesson: the vision tower learns to say which glyph it sees, in the text's own words.

Each cell's feature is pulled to the text embedding of its glyph, on random grids of glyphs.
Without this, the language layers see noise and the circuit that reads never forms.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Qwen2VLForConditionalGeneration

from .checkpoint import VOCABULARY
from .documents import ALPHABET, Layout, Split, draw_cells, stream
from .packing import patch_grid, patchify

# Grids of a step and how many: small ones for variety of faces, large ones for long attention.
_GRIDS = (
    (Layout(2, 11, 1, 1), 24),
    (Layout(8, 22, 1, 1), 6),
    (Layout(16, 22, 1, 1), 3),
)
_LEARNING_RATE = 3e-3
_SHARPNESS = 30.0
_FILLED = 0.6


def draw_grids(
    rng: np.random.Generator, layout: Layout, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw grids of random glyphs and blanks.

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
    pixel_values : torch.Tensor
        Patches, shape (count * patches, 384).
    tokens : torch.Tensor
        Token of every cell, that of the space where it is blank, shape (count * cells,).
    """
    pages, tokens = [], np.full((count, layout.image_tokens), VOCABULARY[" "])
    for page in range(count):
        letters = rng.integers(0, len(ALPHABET), layout.image_tokens)
        filled = np.flatnonzero(rng.random(layout.image_tokens) < _FILLED)
        cells = [(ALPHABET[letters[cell]], *divmod(int(cell), layout.columns)) for cell in filled]
        pages.append(draw_cells(rng, cells, layout)[0])
        tokens[page, filled] = [VOCABULARY[char] for char, _, _ in cells]
    return patchify(np.stack(pages)), torch.from_numpy(tokens).flatten()


def align_vision(
    model: Qwen2VLForConditionalGeneration,
    seed: int,
    steps: int,
    log: Callable[[dict[str, float]], None],
) -> None:
    """Train the vision tower alone, in place, to place each glyph at its text embedding.

    Parameters
    ----------
    model : Qwen2VLForConditionalGeneration
        Model in float32; only its vision tower changes.
    seed : int
        Seed of the glyph grids.
    steps : int
        Number of optimizer steps.
    log : callable
        Receives a record with step, loss and glyph accuracy every 50 steps.
    """
    if not steps:
        return
    words = model.model.language_model.embed_tokens.weight.detach()
    spread = words.var()
    optimizer = torch.optim.AdamW(model.model.visual.parameters(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _LEARNING_RATE, total_steps=steps + 1, pct_start=0.1
    )
    for step in range(steps):
        layout, count = _GRIDS[step % len(_GRIDS)]
        # Counted down from the top, these seeds meet none of the documents' batches.
        rng = stream(Split.TRAIN, seed, 2**32 - 1 - step)
        pixels, tokens = draw_grids(rng, layout, count)
        seen = model.model.visual(pixels, patch_grid(layout, count)).pooler_output
        logits = _SHARPNESS * seen @ words.T
        distance = (seen - words[tokens]).square().mean() / spread
        loss = F.cross_entropy(logits, tokens) + distance
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.model.visual.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49 or step == steps - 1:
            right = (logits.argmax(-1) == tokens).float().mean()
            log({"align_step": step + 1, "loss": loss.item(), "glyph_accuracy": right.item()})
