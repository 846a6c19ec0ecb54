"""How many tokens each KV head keeps: five rules over one scorer (SparseMM, section 3.3).

All arithmetic here is float64. Two ways of rounding: ``paper`` as published, to the token, where
what exceeds a prompt is lost; ``exact``, where every method spends the same total.

Settings are read from these classes before torch is there: only what computes imports it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from sparsemm_eval.errors import UserError, check_int, check_share
from sparsemm_eval.methods.head_scores import HeadScores, ModelShape
from sparsemm_eval.methods.scoring import Ranking, is_plain_tensor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """What an allocation knows of one prompt that does not fit the budget.

    Parameters
    ----------
    shape : ModelShape
        The decoder.
    base : int
        Mean tokens per KV head beside the window: budget - window.
    candidates : int
        Tokens beside the window, n - window; more than ``base``.
    """

    shape: ModelShape
    base: int
    candidates: int


class Allocation(ABC):
    """Shares a prompt's budget among the KV heads.

    A subclass is a frozen dataclass whose fields are its settings. It states its allotments
    twice: rounded as published (``paper``) and unrounded (``wants``), from which ``exact`` makes
    counts that sum to the budget. Rules that look at the scores derive from ``LayerAllocation``.
    """

    rounds: ClassVar[bool] = True
    """False where `paper` and `exact` are the same, so that a cell has one name."""

    def check(self, shape: ModelShape) -> None:
        """Raise UserError if the settings do not fit a model of this shape."""

    @abstractmethod
    def paper(self, prompt: Prompt) -> np.ndarray:
        """Allotments beside the window as published, [L, H] integers, before the cap."""

    @abstractmethod
    def wants(self, prompt: Prompt) -> np.ndarray:
        """Unrounded allotments beside the window, [L, H] float64."""

    def counts(self, prompt: Prompt, exact: bool) -> np.ndarray:
        """Tokens that each KV head keeps beside the window, [L, H] int64.

        Raises
        ------
        UserError
            If the allotments have another shape, or are no numbers that tokens can be kept by.
        """
        return _whole_model(self, prompt, exact)


class LayerAllocation(ABC):
    """Shares a layer's part of the budget among its KV heads, knowing their scores."""

    rounds: ClassVar[bool] = True

    def check(self, shape: ModelShape) -> None:
        """Raise UserError if the settings do not fit a model of this shape."""

    @abstractmethod
    def paper(self, prompt: Prompt, ranking: Ranking) -> Tensor:
        """Allotments as published from a layer's ranked scores, [H] int64, before the cap."""

    @abstractmethod
    def wants(self, prompt: Prompt, ranking: Ranking) -> Tensor:
        """Unrounded allotments from a layer's ranked scores, [H] float64."""

    def counts(
        self, prompt: Prompt, ranking: Ranking, exact: bool, total: int | None = None
    ) -> Tensor:
        """Tokens that each KV head of a layer keeps beside the window, [H] int64.

        What only the device knows, that none is negative, is left to the caller.

        Parameters
        ----------
        prompt : Prompt
            Its base is this layer's.
        ranking : Ranking
            The layer's scores.
        exact : bool
            Whether the layer's heads together keep all that is the layer's.
        total : int, optional
            Tokens that are the layer's; its base in every head by default.

        Raises
        ------
        UserError
            If the allotments have another shape or type, or cannot be shared out.
        """
        import torch

        allotted = self.wants(prompt, ranking) if exact else self.paper(prompt, ranking)
        plain = is_plain_tensor(allotted)
        kind = allotted.dtype if plain else type(allotted).__name__
        form = tuple(getattr(allotted, "shape", ()))
        whole = isinstance(kind, torch.dtype) and not (
            kind.is_floating_point or kind.is_complex or kind == torch.bool
        )
        if not plain or form != (prompt.shape.kv_heads,) or not (whole or exact):
            raise UserError(
                f"{_called(self, exact)} gives {kind} of shape {form}: it must give a plain tensor "
                f"of {prompt.shape.kv_heads} {'numbers' if exact else 'integers'}, one a KV head"
            )
        if not exact:
            return allotted.clamp(max=prompt.candidates)
        wants = allotted.detach().to("cpu", torch.float64).numpy()
        _check_numbers(self, wants, exact)
        total = prompt.base * prompt.shape.kv_heads if total is None else total
        return torch.from_numpy(share_out(wants, prompt.candidates, total)).to(allotted.device)

    def most(self, prompt: Prompt, layer: int, exact: bool) -> int | None:
        """At most so many tokens a layer's KV heads keep beside the window, all together.

        A bound that needs no scores lets a layer be packed without waiting for the device to count
        them; None where there is none.
        """
        return prompt.base * prompt.shape.kv_heads if exact else None


@dataclass(frozen=True)
class KeepAll(Allocation):
    """Every token of every head: the uncompressed cache."""

    def paper(self, prompt: Prompt) -> np.ndarray:
        return np.full((prompt.shape.layers, prompt.shape.kv_heads), prompt.candidates)

    def wants(self, prompt: Prompt) -> np.ndarray:
        return self.paper(prompt).astype(np.float64)


@dataclass(frozen=True)
class Uniform(Allocation):
    """The same for every head (SnapKV, arXiv 2404.14469)."""

    rounds = False

    def paper(self, prompt: Prompt) -> np.ndarray:
        return np.full((prompt.shape.layers, prompt.shape.kv_heads), prompt.base)

    def wants(self, prompt: Prompt) -> np.ndarray:
        return self.paper(prompt).astype(np.float64)


@dataclass(frozen=True)
class Pyramid(Allocation):
    """Less from layer to layer (PyramidKV, arXiv 2406.02069), from this prompt's length alone."""

    def _ends(self, prompt: Prompt) -> tuple[int, int]:
        low = prompt.base // 20
        high = 2 * prompt.base - low
        if high >= prompt.candidates:
            high = prompt.candidates
            low = 2 * prompt.base - high
        return low, high

    def paper(self, prompt: Prompt) -> np.ndarray:
        layers = prompt.shape.layers
        low, high = self._ends(prompt)
        if layers == 1:
            per_layer = np.array([prompt.base])
        else:
            per_layer = high - np.arange(layers) * ((high - low) // (layers - 1))
        return np.repeat(per_layer[:, None], prompt.shape.kv_heads, 1)

    def wants(self, prompt: Prompt) -> np.ndarray:
        layers = prompt.shape.layers
        low, high = self._ends(prompt)
        if layers == 1:
            per_layer = np.array([prompt.base], dtype=np.float64)
        else:
            per_layer = high - np.arange(layers) * ((high - low) / (layers - 1))
        return np.repeat(per_layer[:, None], prompt.shape.kv_heads, 1)


@dataclass(frozen=True)
class Adaptive(LayerAllocation):
    """By how much of a layer's best scores each head holds (AdaKV, arXiv 2407.11550).

    Parameters
    ----------
    floor : float
        Share of the budget given to every head alike.
    """

    floor: float = 0.2

    def __post_init__(self) -> None:
        check_share("floor", self.floor)
        object.__setattr__(self, "floor", float(self.floor))  # 1 and 1.0 are one cell

    def paper(self, prompt: Prompt, ranking: Ranking) -> Tensor:
        return self.wants(prompt, ranking).round().long()

    def wants(self, prompt: Prompt, ranking: Ranking) -> Tensor:
        import torch

        best = ranking.best
        count = len(best) * prompt.base
        total = best.sum(-1, keepdim=True)
        share = best[:, : prompt.base].sum(-1, keepdim=True) / total
        # Negated, so that each head's scores rise; more than `count` of one head are never taken.
        scaled = best[:, :count] * -torch.where(total > 0, share, 1.0)
        held = least_of_all(scaled, count).to(torch.float64)
        return (1 - self.floor) * held + int(self.floor * prompt.base)

    def most(self, prompt: Prompt, layer: int, exact: bool) -> int | None:
        if exact:
            return super().most(prompt, layer, exact)
        # As `wants` sums up, and half a token a head for the rounding.
        a_head = (1 - self.floor) * prompt.base + int(self.floor * prompt.base) + 0.5
        return int(prompt.shape.kv_heads * min(a_head, prompt.candidates) + _ROUNDING)


@dataclass(frozen=True)
class ByHeadScore(Allocation):
    """By the visual score of each KV head (SparseMM, section 3.3).

    Parameters
    ----------
    head_scores : HeadScores
        Visual scores of the query heads.
    ratio : float
        Share of the budget given to every head alike (rho, Table 1).
    """

    head_scores: HeadScores
    ratio: float = 0.1

    def __post_init__(self) -> None:
        check_share("ratio", self.ratio)
        object.__setattr__(self, "ratio", float(self.ratio))  # 1 and 1.0 are one cell
        if not isinstance(self.head_scores, HeadScores):
            kind = type(self.head_scores).__name__
            raise UserError(f"head_scores is a {kind}: it must be HeadScores(array) or .read(path)")

    def check(self, shape: ModelShape) -> None:
        self.head_scores.check_shape(shape)

    def paper(self, prompt: Prompt) -> np.ndarray:
        return np.rint(self.wants(prompt)).astype(np.int64)

    def wants(self, prompt: Prompt) -> np.ndarray:
        shape = prompt.shape
        visual = self.head_scores.per_kv_head(shape.kv_heads)
        floor = int(self.ratio * prompt.base)
        pool = (prompt.base - floor) * shape.layers * shape.kv_heads
        return visual / visual.sum() * pool + floor


@dataclass(frozen=True)
class ByRandomScore(Allocation):
    """As by head score, with uniform random scores: the control.

    Parameters
    ----------
    ratio : float
        Share of the budget given to every head alike.
    seed : int
        Seed of numpy's PCG64; the scores are drawn once, one a query head.
    """

    ratio: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_share("ratio", self.ratio)
        object.__setattr__(self, "ratio", float(self.ratio))  # 1 and 1.0 are one cell
        check_int("seed", self.seed, least=0)

    def _scored(self, shape: ModelShape) -> ByHeadScore:
        generator = np.random.Generator(np.random.PCG64(self.seed))
        drawn = generator.random((shape.layers, shape.query_heads))
        return ByHeadScore(HeadScores(drawn), self.ratio)

    def paper(self, prompt: Prompt) -> np.ndarray:
        return self._scored(prompt.shape).paper(prompt)

    def wants(self, prompt: Prompt) -> np.ndarray:
        return self._scored(prompt.shape).wants(prompt)


@lru_cache(maxsize=4096)  # as many as a batch of prompts under a grid of methods asks for
def _whole_model(allocation: Allocation, prompt: Prompt, exact: bool) -> np.ndarray:
    """Counts of all layers; remembered, because each layer of a prompt asks for its own."""
    allotted = np.asarray(allocation.wants(prompt) if exact else allocation.paper(prompt))
    wanted = (prompt.shape.layers, prompt.shape.kv_heads)
    if allotted.shape != wanted or allotted.dtype.kind not in "iuf":
        raise UserError(
            f"{_called(allocation, exact)} gives {allotted.dtype} of shape {allotted.shape}: it "
            f"must give numbers of shape {wanted}, one a layer and KV head"
        )
    _check_numbers(allocation, allotted, exact)
    if exact:
        total = min(prompt.base, prompt.candidates) * allotted.size
        wants = allotted.astype(np.float64).ravel()
        return share_out(wants, prompt.candidates, total).reshape(wanted)
    return np.minimum(allotted, prompt.candidates).astype(np.int64)


def _called(allocation: Allocation | LayerAllocation, exact: bool) -> str:
    return f"{type(allocation).__name__}.{'wants' if exact else 'paper'}"


def _check_numbers(
    allocation: Allocation | LayerAllocation, allotted: np.ndarray, exact: bool
) -> None:
    """Raise UserError unless tokens can be kept by these numbers: no kept token is arbitrary."""
    sound = np.isfinite(allotted) & (allotted >= 0)
    if not exact:
        sound &= allotted == np.floor(allotted)
    for place in np.argwhere(~sound)[:1]:
        head = "-".join(map(str, place))
        raise UserError(
            f"{_called(allocation, exact)} gives {allotted[tuple(place)]} for head {head}: an "
            f"allotment is {'finite' if exact else 'whole'} and not negative"
        )


def least_of_all(rising: Tensor, count: int) -> Tensor:
    """How many of the ``count`` least of all numbers lie in each row.

    Parameters
    ----------
    rising : Tensor
        [rows, N], each row from its least number up.
    count : int
        At most as many as there are numbers.

    Returns
    -------
    Tensor
        [rows] int64. Equal numbers: those of the lower row are taken first.
    """
    import torch

    # The rows are sorted already: where all of them are cut is a matter of one number.
    cut = rising.flatten().topk(count, largest=False, sorted=False).values.amax()
    cut = cut.repeat(len(rising), 1)
    below = torch.searchsorted(rising, cut)[:, 0]
    ties = torch.searchsorted(rising, cut, right=True)[:, 0] - below
    lower = ties.cumsum(0) - ties
    return below + (count - below.sum() - lower).clamp(min=0).minimum(ties)


def share_out(wants: np.ndarray, cap: int, total: int) -> np.ndarray:
    """Whole counts in proportion to ``wants``, none above ``cap``, summing to ``total``.

    Parameters
    ----------
    wants : ndarray
        [heads] float64, finite and not negative.
    cap : int
        Most tokens one head can keep.
    total : int
        At most ``cap * heads``.

    Returns
    -------
    ndarray
        [heads] int64: wants of more than ``total`` are scaled down to it; what is clipped goes to
        the unclipped heads in proportion to their want (equally if all of these are 0); then the
        largest remainders are rounded up, ties to the lower head.
    """
    shares = np.minimum(wants, cap)
    if shares.sum() > total + _ROUNDING * wants.size:
        wants = wants * (total / wants.sum())
        shares = np.minimum(wants, cap)
    full = shares >= cap
    # Each round fills at least one more head or ends.
    while not full.all():
        open_wants = wants[~full]
        missing = total - shares.sum()
        even = np.full(open_wants.shape, 1 / open_wants.size)
        weights = open_wants / open_wants.sum() if open_wants.any() else even
        shares[~full] += missing * weights
        if not (shares > cap).any():
            break
        shares = np.minimum(shares, cap)
        full = shares >= cap
    counts = np.floor(shares + _ROUNDING).astype(np.int64)
    left = total - counts.sum()
    remainders = np.round(shares - counts, 9)
    remainders[counts >= cap] = -1
    counts[np.argsort(-remainders, kind="stable")[:left]] += 1
    return counts


# Float64 sums of a few thousand shares are off by less; a share of 2.9999999999 is a 3.
_ROUNDING = 1e-9
