"""KNorm: keys of a small norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsemm_eval.methods.keydiff import UnlikeKeys

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class SmallKeys(UnlikeKeys):
    """How much smaller a token's key is than the head's largest.

    Keys of a small L2 norm are attended to the most (arXiv 2406.11430). It looks at no query.
    """

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        """Scores [H, n] from key [H, n, d]."""
        import torch

        norm = key.to(torch.promote_types(key.dtype, torch.float32)).norm(dim=-1)
        return norm.amax(-1, keepdim=True) - norm
