"""Which tokens matter: one score per (KV head, candidate token) of one prompt.

A scorer is a frozen dataclass with a ``window`` (the last tokens, always kept and no candidates)
and a call ``(query, key) -> scores``. Equal scorers give equal scores, so callers may share them.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsemm_eval.errors import UserError, check_choice, check_int


class Scorer(Protocol):
    """What a method needs of a scorer."""

    @property
    def window(self) -> int:
        """Trailing tokens that are always kept."""

    @property
    def least_budget(self) -> int:
        """The smallest budget this scorer can serve."""

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        """Scores [H, n - window] from query [Hq, window or more, d] and key [H, n, d]."""


@dataclass(frozen=True)
class ObservationWindow:
    """Attention that the prompt's last queries pay to each earlier token.

    Softmax (causal, over all keys) of the last ``window`` queries; mean over these rows, reduced
    over the query heads of a KV head, then pooled over neighbouring tokens. SnapKV's score, used
    by every method of the SparseMM paper (section 3.2).

    Parameters
    ----------
    window : int
        Queries that observe, which are also the tokens always kept.
    kernel_size : int
        Width of the pooling over tokens, odd.
    pooling : {"avg", "max"}
        Average pooling counts its zero padding, as the published code does.
    group_reduction : {"mean", "max"}
        How the query heads of one KV head become one score.
    """

    window: int = 32
    kernel_size: int = 5
    pooling: Literal["avg", "max"] = "avg"
    group_reduction: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        check_int("window", self.window, least=1)
        check_int("kernel_size", self.kernel_size, least=1)
        if self.kernel_size % 2 == 0:
            raise UserError(f"kernel_size={self.kernel_size}: it must be odd, such as 5")
        check_choice("pooling", self.pooling, ("avg", "max"))
        check_choice("group_reduction", self.group_reduction, ("mean", "max"))

    @property
    def least_budget(self) -> int:
        """One token beside the window."""
        return self.window + 1

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        """Score the candidates of one prompt.

        Parameters
        ----------
        query : Tensor
            [Hq, m, d] with m >= window, after RoPE; only the last ``window`` rows are read.
        key : Tensor
            [H, n, d] after RoPE, n > window.

        Returns
        -------
        Tensor
            [H, n - window], float32 or better.
        """
        heads, n, dim = key.shape
        w = self.window
        exact = torch.promote_types(key.dtype, torch.float32)
        grouped = query[:, -w:].reshape(heads, -1, dim)  # [H, G * w, d]
        logits = _products(grouped, key, exact).mul_(dim**-0.5).view(heads, -1, w, n)
        future = torch.ones(w, w, dtype=torch.bool, device=key.device).triu(1)
        logits[..., n - w :].masked_fill_(future, -torch.inf)
        # Summed in float64, where a few float32 weights add up without rounding: else the order of
        # summation, which differs by column and device, would decide between equal tokens.
        rows = logits.softmax(-1)[..., : n - w].mean(-2, dtype=torch.float64)  # [H, G, n - w]
        scores = rows.mean(1) if self.group_reduction == "mean" else rows.amax(1)
        pool = F.avg_pool1d if self.pooling == "avg" else F.max_pool1d
        half = self.kernel_size // 2
        return pool(scores.to(exact)[:, None], self.kernel_size, 1, half)[:, 0]


def _products(query: Tensor, key: Tensor, exact: torch.dtype) -> Tensor:
    """[H, m, n] in a dtype of float32 or better from query [H, m, d] and key [H, n, d]."""
    if key.device.type == "cuda" and key.dtype != exact:
        # Products of half-precision numbers are exact and summed in float32: the keys, by far the
        # most of what is read, need no copy in float32.
        return torch.bmm(query, key.transpose(1, 2), out_dtype=exact)
    return torch.bmm(query.to(exact), key.to(exact).transpose(1, 2))


@dataclass(frozen=True)
class Recency:
    """Newer is better: keeps the last tokens and nothing else (Table 2, "local")."""

    @property
    def window(self) -> int:
        """No token is set apart: the budget itself is the window."""
        return 0

    @property
    def least_budget(self) -> int:
        """One token."""
        return 1

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        """Scores [H, n]: the position."""
        heads, n, _ = key.shape
        return torch.arange(n, dtype=torch.float32, device=key.device).expand(heads, n)


@dataclass(frozen=True)
class SinksAndRecent:
    """StreamingLLM's choice (arXiv 2309.17453): the first tokens and the most recent ones.

    Parameters
    ----------
    sinks : int
        First tokens of the prompt that are kept.
    """

    sinks: int = 4

    def __post_init__(self) -> None:
        check_int("sinks", self.sinks, least=0)

    @property
    def window(self) -> int:
        """No token is set apart: sinks and recent tokens share the budget."""
        return 0

    @property
    def least_budget(self) -> int:
        """The sinks and one recent token."""
        return self.sinks + 1

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        """Scores [H, n]: the position, with the sinks above all."""
        heads, n, _ = key.shape
        scores = torch.arange(n, dtype=torch.float32, device=key.device)
        scores[: self.sinks] = n
        return scores.expand(heads, n)
