"""What learns: the model with its optimizers, one step of it, and its place on disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from sparsemm_eval.tiny.pictures import Kind
from sparsemm_eval.tiny.training.family import Family
from sparsemm_eval.tiny.training.packing import IGNORED, Batch
from sparsemm_eval.tiny.training.vocabulary import IMAGE_PAD, VOCABULARY

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
    family : Family
        Of the model.
    model : PreTrainedModel
        Model in float32, trained in place.
    compiled : bool
        Run the language layers through ``torch.compile``, which needs a C++ compiler.
    """

    def __init__(self, family: Family, model: PreTrainedModel, compiled: bool) -> None:
        self.family, self.model = family, model
        matrices, rest = split_parameters(model)
        self.optimizers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(
                matrices, lr=family.learning_rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(rest, lr=family.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
        )
        self._layer: Callable = _run_layer
        if compiled:
            # Lengths are fixed within a stage: two graphs a stage, shared by the layers, and one
            # more where nothing is learnt.
            torch._dynamo.config.recompile_limit = 32
            self._layer = torch.compile(_run_layer, dynamic=False)

    def predict(self, batch: Batch) -> torch.Tensor:
        """Return the logits at the batch's labelled places, shape (places, vocabulary)."""
        text = self.model.model.language_model
        seen = self.family.features(self.model, batch.pixels)
        is_image = (batch.input_ids == VOCABULARY[IMAGE_PAD]).unsqueeze(-1)
        hidden = text.embed_tokens(batch.input_ids).masked_scatter(is_image, seen)
        axes = len(batch.position_ids)
        rotary = text.rotary_emb(hidden, batch.position_ids if axes > 1 else batch.position_ids[0])
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
    model: PreTrainedModel,
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
        Right and asked answers of every kind, then right and asked characters of transcripts;
        shape (kinds + 1, 2), float64.
    """
    places = batch.labels != IGNORED
    right = logits.argmax(-1) == batch.labels[places]
    blocks = batch.blocks[places]
    wrong = torch.zeros(len(batch.kinds)).index_add_(0, blocks, (~right).float())
    counts = torch.zeros(len(Kind) + 1, 2, dtype=torch.float64)
    exact = torch.stack([wrong == 0, torch.ones_like(wrong, dtype=torch.bool)], 1)
    counts.index_add_(0, batch.kinds, exact.double())
    characters = right[batch.kinds[blocks] == Kind.TRANSCRIPT]
    counts[-1] = torch.tensor([characters.sum(), len(characters)])
    return counts


def rates(counts: torch.Tensor) -> dict[str, float]:
    """Turn summed counts into shares of exact answers by kind, and of transcripts' characters."""
    names = [*(f"{kind.name.lower()}_exact" for kind in Kind), "transcript_characters"]
    return {
        name: right / asked
        for name, (right, asked) in zip(names, counts.tolist(), strict=True)
        if asked
    }
