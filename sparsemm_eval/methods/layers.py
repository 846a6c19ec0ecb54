"""How a prompt's budget is shared among layers by what the prompt looks like in each of them.

Known only when the last layer was read. Until then a layer holds what it would get if it were the
last: layers to come can only take from it, so that nothing is dropped that is kept in the end, and
a few times the budget is all that is ever held.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from sparsemm_eval.methods.allocation import Prompt, share_out

if TYPE_CHECKING:
    from torch import Tensor

    from sparsemm_eval.methods.scoring import Ranking

# A layer that nothing speaks for is open to what others cannot hold, as any other.
_LEAST = 1e-9


class LayerShare(ABC):
    """Gives each layer a part of a prompt's budget, in proportion to a weight.

    A subclass is a frozen dataclass whose fields are its settings. It may name ``needs`` as a
    scorer does.
    """

    rounds: ClassVar[bool] = True

    least: ClassVar[float] = 0.0
    """The share of the prompt's tokens that each KV head keeps at least."""

    @abstractmethod
    def weight(self, ranking: Ranking, query: Tensor, key: Tensor, window: int) -> Tensor:
        """What speaks for a layer: one number, float64, finite and not negative.

        Parameters
        ----------
        ranking : Ranking
            The layer's scores.
        query, key : Tensor
            [Hq, m, d] and [H, n, d] of the layer, after RoPE.
        window : int
            The last tokens, which are no candidates.
        """

    def totals(self, prompt: Prompt, weights: np.ndarray, exact: bool) -> np.ndarray:
        """Tokens of each layer's KV heads together, beside the window: [L] int64.

        Each KV head of a layer gets the same: as published its share, rounded, so that what is
        beyond the prompt is lost; or so that all layers' sum up to the budget.
        """
        wants = self._wants(prompt, weights, prompt.base * prompt.shape.layers)
        if exact:
            total = min(prompt.base, prompt.candidates) * len(wants)
            counts = share_out(wants, prompt.candidates, total)
        else:
            counts = np.minimum(np.rint(wants), prompt.candidates).astype(np.int64)
            counts = np.maximum(counts, 1 if self.least else 0)
        return prompt.shape.kv_heads * counts

    def most(self, prompt: Prompt, weights: np.ndarray) -> int:
        """At most so many tokens each KV head of the newest layer gets, whatever layers follow."""
        cap = prompt.candidates
        total = min(prompt.base * prompt.shape.layers, len(weights) * cap)
        wants = self._wants(prompt, weights, total)
        # Rounding may move a token between layers.
        return min(cap, max(int(share_out(wants, cap, total)[-1]), math.ceil(wants[-1])) + 1)

    def _wants(self, prompt: Prompt, weights: np.ndarray, total: int) -> np.ndarray:
        """Parts of a total in proportion to weights; alike where all of them are 0."""
        weights = weights if weights.any() else np.ones(len(weights))
        weights = np.maximum(weights, _LEAST * weights.max())
        return np.maximum(weights / weights.sum() * total, self.least * prompt.candidates)
