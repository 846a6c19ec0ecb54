"""Which tokens matter: one score per (KV head, candidate token) of one prompt.

A scorer is a frozen dataclass with a ``window`` (the last tokens, always kept and no candidates)
and a call ``(query, key) -> scores``; what else of a layer it looks at it names in ``needs``. Equal
scorers give equal scores, so that one `Ranking` serves every method and budget.

Settings are read from these classes before torch is there: only what computes imports it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import numpy as np

from sparsemm_eval.errors import UserError, check_choice, check_int, short_repr

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Of neighbours that smooth a token's score.
_LARGEST_KERNEL = 9_999


# What a part of a method may need beside query and key, by the name it gets it by.
NEEDS = ("value", "output", "visual", "rotation")


class Scorer(Protocol):
    """What a method needs of a scorer.

    Two more things may be stated in its class: ``needs``, a tuple of `NEEDS` that the call gets by
    name; and ``query_aware = False`` of one that could rank a prompt before its question is known.
    """

    @property
    def window(self) -> int:
        """Trailing tokens that are always kept."""

    @property
    def least_budget(self) -> int:
        """The smallest budget this scorer can serve."""

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        """Scores [H, n - window] from query [Hq, window or more, d] and key [H, n, d].

        A scorer that scores layers unlike each other has in its place a method `of_layer`, which
        gives what scores a layer.
        """


@dataclass(frozen=True, eq=False)
class PromptLayer:
    """One layer of one prompt, without padding, while it is dense.

    Parameters
    ----------
    index : int
        Which layer it is.
    query : Tensor
        [Hq, m, d] after RoPE: the last ``window`` positions at least.
    key : Tensor
        [H, n, d] after RoPE.
    value : Tensor, optional
        [H, n, d].
    output : Tensor, optional
        [hidden, Hq * d]: the weight by which the heads' outputs become the layer's.
    visual : Tensor, optional
        [n] bool: which tokens show an image or a video; perhaps on another device than the rest.
    rotation : Tensor, optional
        [2, n + ahead, d]: cosines and sines by which RoPE turned the tokens, and will turn those
        that follow.
    """

    index: int
    query: Tensor
    key: Tensor
    value: Tensor | None = None
    output: Tensor | None = None
    visual: Tensor | None = None
    rotation: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Of the prompt (n)."""
        return self.key.shape[1]

    def given(self, part: object) -> dict[str, Tensor]:
        """What a part of a method needs, by name.

        Raises
        ------
        ValueError
            If it is not there.
        """
        needs = needs_of(part)
        for name in needs:
            if getattr(self, name) is None:
                raise ValueError(f"{type(part).__name__} needs {name}, which was not given")
        return {name: getattr(self, name) for name in needs}

    def first(self, tokens: int) -> PromptLayer:
        """The layer of a prompt of these first tokens alone; the query must be of all positions."""
        import torch

        cut = {
            name: given[:, :tokens]
            for name in ("query", "key", "value")
            if (given := getattr(self, name)) is not None
        }
        if self.visual is not None:
            cut["visual"] = self.visual[:tokens]
        if self.rotation is not None:
            # What follows the whole prompt stays what is to come.
            cut["rotation"] = torch.cat(
                [self.rotation[:, :tokens], self.rotation[:, self.tokens :]], 1
            )
        return replace(self, **cut)


def needs_of(part: object) -> Sequence[str]:
    """What a part of a method looks at, beside query and key."""
    return getattr(part, "needs", ())


def scorer_of_layer(scorer: Scorer, layer: int) -> Callable[[Tensor, Tensor], Tensor]:
    """What scores a layer: the scorer itself, or what its `of_layer` gives."""
    return scorer.of_layer(layer) if hasattr(scorer, "of_layer") else scorer


class Checks:
    """What must hold of numbers on a device, looked at once for all: until then nobody waits."""

    def __init__(self) -> None:
        self._open: list[tuple[Tensor, str]] = []

    def add(self, holds: Tensor, otherwise: str) -> None:
        """Note a condition, one bool on its device, and the sentence for the user if it fails."""
        self._open.append((holds, otherwise))

    def settle(self) -> None:
        """Ask the device.

        Raises
        ------
        UserError
            With the sentence of the first condition that does not hold.
        """
        import torch

        if not self._open:
            return
        asked, self._open = self._open, []
        device = asked[0][0].device
        held = torch.stack([holds.to(device) for holds, _ in asked]).tolist()
        for fine, (_, otherwise) in zip(held, asked, strict=True):
            if not fine:
                raise UserError(otherwise)


def is_plain_tensor(value: object) -> bool:
    """Whether a value that a method gives is a tensor that holds its numbers one by one."""
    import torch

    return isinstance(value, torch.Tensor) and value.layout == torch.strided and not value.is_meta


class Ranking:
    """The candidates of one prompt in one layer, ranked by score within each KV head.

    Parameters
    ----------
    scores : Tensor
        [H, candidates], finite and not negative.
    """

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores
        self.order = best_first(scores)

    def ranks(self, window: int) -> Tensor:
        """How many candidates of its head come before each token, [H, candidates + window].

        The ``window`` last tokens are no candidates and come before all of them: -1. The integers
        are of the narrowest type that holds every rank.
        """
        import torch

        heads, candidates = self.order.shape
        n = candidates + window
        narrow = torch.int16 if n <= torch.iinfo(torch.int16).max else torch.int32
        ranks = torch.full((heads, n), -1, dtype=narrow, device=self.order.device)
        count = torch.arange(candidates, dtype=narrow, device=self.order.device)
        return ranks.scatter_(1, self.order, count.expand(heads, candidates))

    @cached_property
    def best(self) -> Tensor:
        """The scores of each head from the best down, [H, candidates] float64."""
        return self.scores.gather(1, self.order).double()


def best_first(scores: Tensor) -> Tensor:
    """Positions by score, [H, candidates] int64. Equal scores: the earlier token first."""
    import torch

    if scores.device.type != "cpu" or scores.dtype != torch.float32:
        return scores.sort(dim=-1, descending=True, stable=True).indices
    # The bits of numbers that are not negative grow with them (0.0 makes a 0 of -0), so that score
    # and position are one integer: numpy sorts such five times as fast as torch sorts pairs.
    bits = (scores + 0.0).view(torch.int32).to(torch.int64)
    keys = (~bits << 32) + torch.arange(scores.shape[-1])
    keys = torch.from_numpy(np.sort(keys.numpy(), axis=-1))
    return keys & 0xFFFFFFFF


@dataclass(frozen=True)
class ObservationWindow:
    """Attention that the prompt's last queries pay to each earlier token.

    Softmax (causal, over all keys) of the last ``window`` queries; mean over these rows, reduced
    over the query heads of a KV head, then pooled over neighbouring tokens. SnapKV's score, used
    by every method of the SparseMM paper (section 3.2).

    Parameters
    ----------
    window : int
        Queries that observe, which are also the tokens always kept.
    kernel_size : int
        Width of the pooling over tokens, odd.
    pooling : {"avg", "max"}
        Average pooling counts its zero padding, as the published code does.
    group_reduction : {"mean", "max"}
        How the query heads of one KV head become one score.
    """

    window: int = 32
    kernel_size: int = 5
    pooling: Literal["avg", "max"] = "avg"
    group_reduction: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        check_int("window", self.window, least=1)
        check_int("kernel_size", self.kernel_size, least=1)
        if self.kernel_size > _LARGEST_KERNEL:
            raise UserError(
                f"kernel_size={short_repr(self.kernel_size)}: it must be at most "
                f"{_LARGEST_KERNEL:,}, so many neighbours smooth a token's score"
            )
        if self.kernel_size % 2 == 0:
            raise UserError(f"kernel_size={self.kernel_size}: it must be odd, such as 5")
        check_choice("pooling", self.pooling, ("avg", "max"))
        check_choice("group_reduction", self.group_reduction, ("mean", "max"))

    @property
    def least_budget(self) -> int:
        """One token beside the window."""
        return self.window + 1

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        """Score the candidates of one prompt.

        Parameters
        ----------
        query : Tensor
            [Hq, m, d] with m >= window, after RoPE; only the last ``window`` rows are read.
        key : Tensor
            [H, n, d] after RoPE, n > window.

        Returns
        -------
        Tensor
            [H, n - window], float32 or better.
        """
        rows, exact = self._rows(query, key)
        scores = rows.mean(1) if self.group_reduction == "mean" else rows.amax(1)
        return self._pooled(scores.to(exact)[:, None])[:, 0]

    def _rows(self, query: Tensor, key: Tensor) -> tuple[Tensor, torch.dtype]:
        """What the window pays to each candidate, [H, G, candidates] float64; the dtype it had."""
        weights = attention_weights(query, key, self.window)
        return self._of_rows(weights[..., : key.shape[1] - self.window]), weights.dtype

    def _pooled(self, scores: Tensor) -> Tensor:
        """Scores [H, channels, candidates] pooled over tokens."""
        import torch.nn.functional as F

        pool = F.avg_pool1d if self.pooling == "avg" else F.max_pool1d
        return pool(scores, self.kernel_size, 1, self.kernel_size // 2)

    def _of_rows(self, weights: Tensor) -> Tensor:
        """Of the window's rows [..., window, candidates] one, in float64."""
        import torch

        # Where a few float32 weights add up without rounding: else the order of summation, which
        # differs by column and device, would decide between equal tokens.
        return weights.mean(-2, dtype=torch.float64)


def attention_weights(query: Tensor, key: Tensor, window: int) -> Tensor:
    """What the last queries of one prompt attend to: softmax, causal, over all keys.

    Parameters
    ----------
    query : Tensor
        [Hq, m, d] with m >= window, after RoPE; only the last ``window`` rows are read.
    key : Tensor
        [H, n, d] after RoPE, n >= window.
    window : int
        Queries.

    Returns
    -------
    Tensor
        [H, G, window, n], float32 or better.
    """
    import torch

    heads, n, dim = key.shape
    exact = torch.promote_types(key.dtype, torch.float32)
    grouped = query[:, -window:].reshape(heads, -1, dim)  # [H, G * window, d]
    logits = _products(grouped, key, exact).mul_(dim**-0.5).view(heads, -1, window, n)
    future = torch.ones(window, window, dtype=torch.bool, device=key.device).triu(1)
    logits[..., n - window :].masked_fill_(future, -torch.inf)
    return logits.softmax(-1)


def _products(query: Tensor, key: Tensor, exact: torch.dtype) -> Tensor:
    """[H, m, n] in a dtype of float32 or better from query [H, m, d] and key [H, n, d]."""
    import torch

    if key.device.type == "cuda" and key.dtype != exact:
        # Products of half-precision numbers are exact and summed in float32: the keys, by far the
        # most of what is read, need no copy in float32.
        return torch.bmm(query, key.transpose(1, 2), out_dtype=exact)
    return torch.bmm(query.to(exact), key.to(exact).transpose(1, 2))


class WithoutWindow:
    """What scorers have alike that set no token apart."""

    @property
    def window(self) -> int:
        """No token is set apart."""
        return 0

    @property
    def least_budget(self) -> int:
        """One token."""
        return 1


@dataclass(frozen=True)
class Recency(WithoutWindow):
    """Newer is better: keeps the last tokens and nothing else (Table 2, "local")."""

    query_aware: ClassVar[bool] = False

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        """Scores [H, n]: the position."""
        import torch

        heads, n, _ = key.shape
        return torch.arange(n, dtype=torch.float32, device=key.device).expand(heads, n)


@dataclass(frozen=True)
class SinksAndRecent:
    """StreamingLLM's choice (arXiv 2309.17453): the first tokens and the most recent ones.

    Parameters
    ----------
    sinks : int
        First tokens of the prompt that are kept.
    """

    query_aware: ClassVar[bool] = False

    sinks: int = 4

    def __post_init__(self) -> None:
        check_int("sinks", self.sinks, least=0)

    @property
    def window(self) -> int:
        """No token is set apart: sinks and recent tokens share the budget."""
        return 0

    @property
    def least_budget(self) -> int:
        """The sinks and one recent token."""
        return self.sinks + 1

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        """Scores [H, n]: the position, with the sinks above all."""
        import torch

        heads, n, _ = key.shape
        scores = torch.arange(n, dtype=torch.float32, device=key.device)
        scores[: self.sinks] = n
        return scores.expand(heads, n)
