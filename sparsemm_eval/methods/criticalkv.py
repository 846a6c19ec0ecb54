"""CriticalKV: half of what a head keeps is chosen by what its tokens add to the output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparsemm_eval.errors import check_share
from sparsemm_eval.methods.picks import Pick, best_of
from sparsemm_eval.methods.scoring import best_first

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sparsemm_eval.methods.scoring import Ranking

# So that a token that nobody attends to counts by its value.
_EPSILON = 1e-4


@dataclass(frozen=True)
class TwoStages(Pick):
    """First by score, then by score times what the token's value becomes in the layer's output.

    CriticalKV (arXiv 2502.03805, algorithm 1), on any method's scores and head budgets: the first
    part of a head's tokens are its best by score; the others are the best of the rest by (score +
    1e-4) times the L1 norm of its value through the output projection, averaged over the head's
    query heads.

    Parameters
    ----------
    first : float
        The part that is chosen by score alone, 0 to 1 (0.5 in the paper).
    """

    needs: ClassVar[tuple[str, ...]] = ("value", "output")

    first: float = 0.5

    def __post_init__(self) -> None:
        check_share("first", self.first)
        object.__setattr__(self, "first", float(self.first))  # 1 and 1.0 are one cell

    def choose(self, ranking: Ranking, counts: Tensor, value: Tensor, output: Tensor) -> Tensor:
        """As of `Pick`, with value [H, n, d] and output [hidden, Hq * d]."""
        import torch

        scores = ranking.scores
        candidates = scores.shape[1]
        free = torch.ones(len(counts), *scores.shape, dtype=torch.bool, device=scores.device)
        early = (counts * self.first).long()
        chosen = best_of(ranking.order, free, early)
        norms = output_norms(value[:, :candidates], output, scores.dtype)
        order = best_first((scores + _EPSILON) * norms)
        return chosen | best_of(order, ~chosen, counts - early)


def output_norms(value: Tensor, output: Tensor, exact: torch.dtype) -> Tensor:
    """The L1 norm of each value through the output projection, mean over query heads: [H, n]."""
    import torch

    heads, n, dim = value.shape
    of_query_head = output.view(len(output), -1, dim).permute(1, 2, 0)  # [Hq, d, hidden]
    group = len(of_query_head) // heads
    norms = torch.empty(heads * group, n, dtype=exact, device=value.device)
    # One by one: of all heads together this is the hidden states of as many prompts.
    for query_head, weight in enumerate(of_query_head):
        through = value[query_head // group] @ weight.to(value.dtype)
        norms[query_head] = through.abs_().sum(-1, dtype=exact)
    return norms.view(heads, group, n).mean(1)
