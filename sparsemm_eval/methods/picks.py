"""Which of its candidates a KV head keeps, where that is not just the best of one ranking."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from sparsemm_eval.methods.scoring import Ranking


class Pick(ABC):
    """Chooses a head's tokens when it is known how many it keeps.

    A subclass is a frozen dataclass whose fields are its settings. It may name ``needs`` as a
    scorer does, and gets them by name.
    """

    @abstractmethod
    def choose(self, ranking: Ranking, counts: Tensor) -> Tensor:
        """Which candidates are kept.

        Parameters
        ----------
        ranking : Ranking
            Of the H KV heads' candidates.
        counts : Tensor
            [R, H] integers: how many each head keeps, in several rows of one prompt.

        Returns
        -------
        Tensor
            [R, H, candidates] bool, as many as the counts say.
        """

    def enough(self, count: int, candidates: int) -> int:
        """How many a head keeps to have all that it would keep of any number up to a count.

        All of its candidates, where a class does not know better.
        """
        return candidates


def best_of(order: Tensor, free: Tensor, counts: Tensor) -> Tensor:
    """The first so many of the free candidates in an order.

    Parameters
    ----------
    order : Tensor
        [H, candidates] int64: positions, the best first.
    free : Tensor
        [R, H, candidates] bool, by position.
    counts : Tensor
        [R, H] integers.

    Returns
    -------
    Tensor
        [R, H, candidates] bool, by position.
    """
    import torch

    places = order.expand(free.shape)
    open_ = free.gather(-1, places)
    taken = open_ & (open_.cumsum(-1) <= counts[..., None])
    return torch.zeros_like(taken).scatter_(-1, places, taken)
