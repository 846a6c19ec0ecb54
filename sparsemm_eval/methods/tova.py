"""TOVA: what the last token attends to, alike for all heads of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsemm_eval.methods.scoring import attention_weights

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LastQuery:
    """The last query's attention, mean over all query heads of the layer.

    TOVA (arXiv 2401.06104, section 3): all heads of a layer keep the same tokens. The last token is
    kept in any case.
    """

    @property
    def window(self) -> int:
        """The last token."""
        return 1

    @property
    def least_budget(self) -> int:
        """One token beside it."""
        return 2

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        """Scores [H, n - 1] from query [Hq, 1 or more, d] and key [H, n, d]."""
        weights = attention_weights(query, key, 1)  # [H, G, 1, n]
        mean = weights.double().mean((0, 1, 2)).to(weights.dtype)
        return mean[:-1].expand(len(key), -1)
