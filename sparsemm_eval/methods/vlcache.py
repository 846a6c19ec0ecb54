"""VL-Cache: what the text behind the image attends to, and how many tokens that needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparsemm_eval.errors import check_share
from sparsemm_eval.methods.layers import LayerShare
from sparsemm_eval.methods.picks import Pick, best_of
from sparsemm_eval.methods.scoring import WithoutWindow, attention_weights

if TYPE_CHECKING:
    from torch import Tensor

    from sparsemm_eval.methods.scoring import Ranking

# Queries that are looked at where no text stands behind an image.
_WITHOUT_IMAGE = 32


@dataclass(frozen=True)
class PostVision(WithoutWindow):
    """Attention that a token gets from all text behind the last image.

    VL-Cache's score (arXiv 2410.23317, section 4.2): the sum over these queries, mean over the
    query heads of a KV head. Of a prompt that ends with an image, or has none, the last 32 tokens
    are the queries. No token is set apart; `RecentAndBest` protects the newest.
    """

    needs: ClassVar[tuple[str, ...]] = ("visual",)

    def __call__(self, query: Tensor, key: Tensor, visual: Tensor) -> Tensor:
        """Scores [H, n] from query [Hq, n, d], key [H, n, d] and visual [n]."""
        import torch

        weights = attention_weights(query, key, post_vision(visual))
        return weights.sum(-2, dtype=torch.float64).mean(1).to(weights.dtype)


@dataclass(frozen=True)
class ByDensity(LayerShare):
    """By how many tokens matter to the text behind the image.

    VL-Cache (section 4.1): the share of attention weights, among those that causality allows, that
    are at least a part of their row's largest.

    Parameters
    ----------
    threshold : float
        The part of the row's largest, 0 to 1.
    """

    needs: ClassVar[tuple[str, ...]] = ("visual",)
    least: ClassVar[float] = 0.01

    threshold: float = 0.01

    def __post_init__(self) -> None:
        check_share("threshold", self.threshold)
        object.__setattr__(self, "threshold", float(self.threshold))

    def weight(
        self, ranking: Ranking, query: Tensor, key: Tensor, window: int, visual: Tensor
    ) -> Tensor:
        rows = post_vision(visual)
        weights = attention_weights(query, key, rows)
        dense = (weights >= self.threshold * weights.amax(-1, keepdim=True)).sum().double()
        n = key.shape[1]
        allowed = rows * n - rows * (rows - 1) // 2
        return dense / (weights.shape[0] * weights.shape[1] * allowed)


@dataclass(frozen=True)
class RecentAndBest(Pick):
    """A part of a head's tokens are the newest, the others its best.

    Parameters
    ----------
    recent : float
        The part, 0 to 1 (0.1 in VL-Cache).
    """

    recent: float = 0.1

    def __post_init__(self) -> None:
        check_share("recent", self.recent)
        object.__setattr__(self, "recent", float(self.recent))

    def choose(self, ranking: Ranking, counts: Tensor) -> Tensor:
        """As of `Pick`."""
        import torch

        scores = ranking.scores
        newest = (counts * self.recent).long()
        behind = torch.arange(scores.shape[1], 0, -1, device=scores.device)  # 1 for the last
        chosen = behind <= newest[..., None]
        return chosen | best_of(ranking.order, ~chosen, counts - newest)

    def enough(self, count: int, candidates: int) -> int:
        """As many more as are the newest: what was among the best still is, behind these."""
        more = count if self.recent == 1 else math.ceil(count / (1 - self.recent)) + 1
        return min(more, candidates)


def post_vision(visual: Tensor) -> int:
    """Tokens behind the last that shows anything; the last 32 at most where there are none."""
    n = len(visual)
    places = visual.nonzero()
    behind = n - 1 - int(places[-1]) if len(places) else 0
    return behind or min(n, _WITHOUT_IMAGE)
