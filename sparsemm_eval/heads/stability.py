"""How far visual scores can be trusted: do other images rank the heads alike?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

ENOUGH = 0.9
_SPLITS = 20


@dataclass(frozen=True)
class Stability:
    """Rank correlations (Spearman, over all heads) between scores from different images.

    Parameters
    ----------
    split_half : float or None
        Between two disjoint halves, mean over random splits; None for fewer than two images.
    worst : float or None
        The lowest of them.
    halves : tuple of (int, float)
        The same with two disjoint sets of k images only, k doubling.
    settling : tuple of (int, float)
        First k images against all, k doubling.
    needed : int or None
        Images from which two halves agree by 0.9: seen where they do, else by the Spearman-Brown
        formula; None if nothing can be said.
    """

    split_half: float | None
    worst: float | None
    halves: tuple[tuple[int, float], ...]
    settling: tuple[tuple[int, float], ...]
    needed: int | None

    @property
    def settled(self) -> bool:
        """Whether two halves agree by 0.9."""
        return self.split_half is not None and self.split_half >= ENOUGH


def stability(scores: np.ndarray, seed: int = 0) -> Stability:
    """Compare scores from disjoint sets of images.

    Parameters
    ----------
    scores : ndarray
        [images, L, Hq].
    seed : int
        Of the random splits.
    """
    images = len(scores)
    flat = scores.reshape(images, -1)
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(images) for _ in range(_SPLITS)]

    def between(k: int) -> list[float]:
        return [
            rank_correlation(flat[order[:k]].mean(0), flat[order[k : 2 * k]].mean(0))
            for order in orders
        ]

    sizes = _doubling(images // 2)
    found = {k: between(k) for k in sizes}
    halves = tuple((k, float(np.mean(found[k]))) for k in sizes)
    everything = flat.mean(0)
    settling = tuple((k, rank_correlation(flat[:k].mean(0), everything)) for k in _doubling(images))
    if not sizes:
        return Stability(None, None, (), settling, None)
    return Stability(halves[-1][1], min(found[sizes[-1]]), halves, settling, _needed(halves))


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's; 0 where one of the two says nothing because all its heads are equal."""
    one, other = (pd.Series(x.ravel()).rank() for x in (one, other))
    if one.nunique() == 1 or other.nunique() == 1:
        return 0.0
    return float(one.corr(other))


def _doubling(most: int) -> list[int]:
    """1, 2, 4, … and at last `most` itself."""
    sizes = [2**power for power in range(most.bit_length()) if 2**power < most]
    return [*sizes, most] if most else []


def _needed(halves: tuple[tuple[int, float], ...]) -> int | None:
    for k, agreement in halves:
        if agreement >= ENOUGH:
            return 2 * k
    k, agreement = halves[-1]
    if agreement <= 0:
        return None
    longer = ENOUGH * (1 - agreement) / (agreement * (1 - ENOUGH))
    return 2 * math.ceil(k * longer)
