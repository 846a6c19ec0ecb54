"""KeyDiff: keys that are unlike the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparsemm_eval.methods.scoring import WithoutWindow

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class UnlikeKeys(WithoutWindow):
    """How unlike a token's key is to the mean of the head's unit keys.

    KeyDiff (arXiv 2504.15364, section 3): 1 - cosine. It looks at no query, so that a prompt could
    be compressed before its question is known.
    """

    query_aware: ClassVar[bool] = False

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        """Scores [H, n] from key [H, n, d]."""
        import torch
        from torch.nn.functional import normalize

        unit = normalize(key.to(torch.promote_types(key.dtype, torch.float32)), dim=-1)
        mean = normalize(unit.mean(1, keepdim=True), dim=-1)
        return (1 - (unit * mean).sum(-1)).clamp(min=0)
