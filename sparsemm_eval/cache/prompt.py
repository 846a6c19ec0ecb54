"""How long the prompts of one cache are."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsemm_eval.methods import row_lengths


class Prompt:
    """What the layers of one cache share: the first finds the lengths for all."""

    def __init__(self) -> None:
        self.lengths: list[int] = []  # of the samples as they were read
        self.rows: list[int] = []  # of the rows that are held


def prompt_lengths_of(mask: Tensor | None, samples: int, n: int) -> list[int]:
    """Tokens of each sample, from the attention mask of its prompt.

    Raises
    ------
    NotImplementedError
        For a mask that does more than hide padding.
    """
    if mask is None:
        return [n] * samples
    if mask.dtype != torch.bool or mask.shape != (samples, 1, n, n) or not _only_pads(mask[:, 0]):
        raise NotImplementedError(
            f"attention mask {tuple(mask.shape)} {mask.dtype}: HeadBudgetCache takes a 2-D padding "
            "mask, no attention pattern of one's own"
        )
    return row_lengths(mask[:, 0, -1], samples, n)


def _only_pads(mask: Tensor) -> bool:
    """Whether a mask [B, n, n] is causal but for keys that no query sees."""
    n = mask.shape[-1]
    causal = torch.ones(n, n, dtype=torch.bool, device=mask.device).tril()
    return all(torch.equal(seen, causal & seen[-1]) for seen in mask)
