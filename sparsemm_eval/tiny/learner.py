"""What learns: the model with its optimizers, one step of it, and its place on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import Qwen2VLForConditionalGeneration

from .checkpoint import IMAGE_PAD, VOCABULARY
from .packing import IGNORED, Batch, Kind

LEARNING_RATE = 2e-3
_CLIP = 1.0


def _run_layer(
    layer: torch.nn.Module,
    hidden: torch.Tensor,
    mask: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    return layer(hidden, attention_mask=mask, position_embeddings=rotary)


class Learner:
    """A model, its two optimizers and the number of steps it has taken.

    Parameters
    ----------
    model : Qwen2VLForConditionalGeneration
        Model in float32, trained in place.
    compiled : bool
        Run the language layers through ``torch.compile``, which needs a C++ compiler.
    """

    def __init__(self, model: Qwen2VLForConditionalGeneration, compiled: bool) -> None:
        self.model = model
        matrices, rest = split_parameters(model)
        self.optimizers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(
                matrices, lr=LEARNING_RATE, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0),
        )
        self._layer: Callable = _run_layer
        if compiled:
            # Lengths are fixed within a stage: one graph a stage, shared by the layers.
            self._layer = torch.compile(_run_layer, dynamic=False)

    def predict(self, batch: Batch) -> torch.Tensor:
        """Return the logits at the batch's labelled places, shape (places, vocabulary)."""
        core, text = self.model.model, self.model.model.language_model
        seen = core.visual(batch.pixel_values, batch.grid_thw).pooler_output
        is_image = (batch.input_ids == VOCABULARY[IMAGE_PAD]).unsqueeze(-1)
        hidden = text.embed_tokens(batch.input_ids).masked_scatter(is_image, seen)
        rotary = text.rotary_emb(hidden, batch.position_ids)
        for layer in text.layers:
            hidden = self._layer(layer, hidden, batch.mask, rotary)
        return self.model.lm_head(text.norm(hidden[batch.labels != IGNORED]))

    def step(self, batch: Batch, learning_rate: float) -> tuple[float, torch.Tensor]:
        """Take one optimizer step.

        Parameters
        ----------
        batch : Batch
            What to learn.
        learning_rate : float
            Rate of both optimizers.

        Returns
        -------
        loss : float
            Weighted mean cross entropy.
        counts : torch.Tensor
            See :func:`count_right`.
        """
        places = batch.labels != IGNORED
        logits, labels, weights = self.predict(batch), batch.labels[places], batch.weights[places]
        loss = (F.cross_entropy(logits, labels, reduction="none") * weights).sum() / weights.sum()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.item(), count_right(logits, batch)

    @torch.no_grad()
    def test(self, batch: Batch) -> torch.Tensor:
        """Return the counts of :func:`count_right` on a batch, learning nothing."""
        return count_right(self.predict(batch), batch)

    def save(self, file: Path, progress: dict[str, float]) -> None:
        """Write weights, optimizer state and progress; a reader never sees half a file."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": progress,
        }
        partial = file.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, file)

    def load(self, file: Path) -> dict[str, float]:
        """Read what :meth:`save` wrote and return the progress."""
        state = torch.load(file, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        return state["progress"]


def split_parameters(
    model: Qwen2VLForConditionalGeneration,
) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """Split the parameters into the layers' matrices, for Muon, and the rest, for AdamW."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        in_layer = ".layers." in name or ".blocks." in name
        (matrices if in_layer and parameter.ndim == 2 else rest).append(parameter)
    return matrices, rest


@torch.no_grad()
def count_right(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Count what was predicted right. Greedy decoding is exact where every place is right.

    Parameters
    ----------
    logits : torch.Tensor
        Logits at the labelled places, shape (places, vocabulary).
    batch : Batch
        The batch they belong to.

    Returns
    -------
    torch.Tensor
        Right and asked values, right and asked read-on answers, right and asked characters of
        transcripts; shape (6,).
    """
    places = batch.labels != IGNORED
    right = logits.argmax(-1) == batch.labels[places]
    blocks = batch.blocks[places]
    wrong = torch.zeros(len(batch.kinds)).index_add_(0, blocks, (~right).float())
    is_value, is_onward = batch.kinds == Kind.VALUE, batch.kinds == Kind.ONWARD
    characters = right[batch.kinds[blocks] == Kind.TRANSCRIPT]
    return torch.tensor(
        [
            (wrong[is_value] == 0).sum(),
            is_value.sum(),
            (wrong[is_onward] == 0).sum(),
            is_onward.sum(),
            characters.sum(),
            len(characters),
        ],
        dtype=torch.float64,
    )


def rates(counts: torch.Tensor) -> dict[str, float]:
    """Turn summed counts into shares: value exact, read-on exact, transcript characters."""
    shares = (counts[0::2] / counts[1::2].clamp(min=1)).tolist()
    names = ("value_exact", "onward_exact", "transcript_characters")
    return dict(zip(names, shares, strict=True))
