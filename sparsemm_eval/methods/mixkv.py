"""MixKV: what is attended to, mixed with what is unlike the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparsemm_eval.methods.scoring import ObservationWindow

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Mixed(ObservationWindow):
    """Importance and diversity of a token, mixed by how alike the keys of its head are.

    MixKV (arXiv 2510.20707, section 3): (1 - r) I + r D. I is the window's attention plus the
    value's norm, D how unlike a token's key is to the mean of the head's unit keys; norm and
    unlikeness are brought to 0..1 over the candidates and then to the mean of the attention. r is
    the mean similarity of two of the head's keys, in this prompt; the published code takes it from
    one table, of Qwen2-VL's heads, for all models.

    Parameters
    ----------
    window, kernel_size, pooling, group_reduction
        Of the attention, as of `ObservationWindow`.
    """

    needs: ClassVar[tuple[str, ...]] = ("value",)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Scores [H, n - window]; as of `ObservationWindow`, with value [H, n, d]."""
        import torch

        attention = super().__call__(query, key)
        exact, (n, candidates) = attention.dtype, (key.shape[1], attention.shape[1])
        unit = torch.nn.functional.normalize(key.to(exact), dim=-1)
        mean = unit.mean(1, keepdim=True)
        alike = (n * mean.square().sum(-1) - 1) / (n - 1)  # [H, 1]
        unlike = -(unit[:, :candidates] * torch.nn.functional.normalize(mean, dim=-1)).sum(-1)
        norm = value[:, :candidates].to(exact).norm(dim=-1)
        important = attention + _brought(norm, attention)
        # Keys that point away from each other are alike by a little less than 0.
        return ((1 - alike) * important + alike * _brought(unlike, attention)).clamp(min=0)


def _brought(numbers: Tensor, attention: Tensor) -> Tensor:
    """Numbers of each head to 0..1, then to the mean of its attention; 0 where all are equal."""
    import torch

    low, high = numbers.amin(-1, keepdim=True), numbers.amax(-1, keepdim=True)
    numbers = torch.where(high > low, (numbers - low) / (high - low), 0)
    mean = numbers.mean(-1, keepdim=True)
    return torch.where(mean > 0, numbers * (attention.mean(-1, keepdim=True) / mean), 0)
