"""Expected attention: what queries to come would attend to, if they were like the prompt's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparsemm_eval.methods.scoring import SinksAndRecent

if TYPE_CHECKING:
    from torch import Tensor

# Positions behind the prompt over which the rotation is averaged.
AHEAD = 512


@dataclass(frozen=True)
class ExpectedAttention(SinksAndRecent):
    """Attention that a Gaussian of the prompt's queries is expected to pay, times the value's norm.

    Expected attention (arXiv 2510.00636, section 3): mean and covariance of a head's queries before
    RoPE, rotated by the mean of the next 512 positions' rotations; softmax over the prompt of the
    logits that are expected, mean over the query heads of a KV head, times the L2 norm of the
    value. Its public code leaves the first tokens out of the Gaussian and of the softmax. A prompt
    could be compressed before its question is known: that is a few of its queries.

    Parameters
    ----------
    sinks : int
        First tokens of the prompt that are kept.
    """

    needs: ClassVar[tuple[str, ...]] = ("value", "rotation")

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, rotation: Tensor) -> Tensor:
        """Scores [H, n] from query [Hq, n, d], key and value [H, n, d].

        ``rotation`` is [2, n + 512, d], cosines and sines of RoPE at each token and behind them.
        """
        import torch

        exact = torch.promote_types(key.dtype, torch.float32)
        heads, n, dim = key.shape
        cos, sin = rotation[:, :n].to(exact)
        asked = query.to(exact)
        # Back to before RoPE, which may scale as well as rotate.
        before = (asked * cos - _half(asked) * sin) / (cos.square() + sin.square())
        mean = before.mean(1, keepdim=True)  # [Hq, 1, d]
        spread = (before - mean).transpose(1, 2) @ (before - mean) / n  # [Hq, d, d]
        cos, sin = rotation[:, n:].to(exact).mean(1)
        turn = torch.eye(dim, dtype=exact, device=key.device)
        turn = turn * cos + _half(turn) * sin  # a row is what a unit vector turns into
        keys = key.to(exact).repeat_interleave(len(query) // heads, 0)  # [Hq, n, d]
        seen = (keys @ (mean @ turn).transpose(1, 2))[..., 0]
        wide = ((keys @ (turn.T @ spread @ turn)) * keys).sum(-1)
        logits = seen * dim**-0.5 + wide / (2 * dim)
        scores = logits.softmax(-1).view(heads, -1, n).mean(1) * value.to(exact).norm(dim=-1)
        scores[:, : self.sinks] = 1 + scores.amax(-1, keepdim=True)
        return scores


def _half(x: Tensor) -> Tensor:
    """RoPE's partner of each number, whose second half mirrors the first."""
    import torch

    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)
