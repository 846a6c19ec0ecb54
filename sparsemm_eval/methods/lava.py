"""LAVA: budgets of layers and heads from the scores alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparsemm_eval.methods.allocation import LayerAllocation, Prompt, least_of_all
from sparsemm_eval.methods.layers import LayerShare
from sparsemm_eval.methods.scoring import ObservationWindow

if TYPE_CHECKING:
    from torch import Tensor

    from sparsemm_eval.methods.scoring import Ranking


@dataclass(frozen=True)
class ByValue(ObservationWindow):
    """The window's attention times the largest value of the head, in the L1 norm.

    LAVA's score (arXiv 2509.09754, section 3): what a dropped token can change at most in the
    layer's output; of the query heads of a KV head the largest. Its public code pools over 7 tokens
    by their maximum (``kernel_size=7``, ``pooling=max``).

    Parameters
    ----------
    window, kernel_size, pooling
        Of the attention, as of `ObservationWindow`.
    """

    needs: ClassVar[tuple[str, ...]] = ("value",)
    group_reduction: ClassVar[str] = "max"

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Scores [H, n - window]; as of `ObservationWindow`, with value [H, n, d]."""
        rows, exact = self._rows(query, key)
        largest = value.to(exact).abs().sum(-1).amax(-1, keepdim=True)
        return self._pooled(rows.to(exact)).amax(1) * largest


@dataclass(frozen=True)
class BestOfLayer(LayerAllocation):
    """The best tokens of a layer over its heads together: heads share as the cut falls."""

    def paper(self, prompt: Prompt, ranking: Ranking) -> Tensor:
        return self.wants(prompt, ranking).long()

    def wants(self, prompt: Prompt, ranking: Ranking) -> Tensor:
        best = ranking.best
        count = len(best) * prompt.base
        return least_of_all(-best[:, :count], count).double()

    def most(self, prompt: Prompt, layer: int, exact: bool) -> int:
        return prompt.base * prompt.shape.kv_heads


@dataclass(frozen=True)
class ByEntropy(LayerShare):
    """More for layers whose scores are spread over more tokens: by their entropy."""

    def weight(self, ranking: Ranking, query: Tensor, key: Tensor, window: int) -> Tensor:
        scores = ranking.best
        share = scores / scores.sum().clamp(min=1e-300)
        return -share.xlogy(share).sum() / math.log(max(2, scores.numel()))
