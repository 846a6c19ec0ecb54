"""CAKE: budgets of layers by how spread and how changing their attention is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsemm_eval.errors import UserError
from sparsemm_eval.methods.layers import LayerShare
from sparsemm_eval.methods.scoring import ObservationWindow, attention_weights

if TYPE_CHECKING:
    from torch import Tensor

    from sparsemm_eval.methods.scoring import Ranking


@dataclass(frozen=True)
class MeanAndVariance(ObservationWindow):
    """What the window attends to on average, and how much that changes from query to query.

    CAKE's score (arXiv 2503.12491, section 4.3): mean + gamma * variance over the window's rows,
    reduced and pooled as of `ObservationWindow`.

    Parameters
    ----------
    window, kernel_size, pooling, group_reduction
        As of `ObservationWindow`.
    gamma : float
        Weight of the variance; 200 in the public code.
    """

    gamma: float = 200.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_number("gamma", self.gamma, least=0)
        object.__setattr__(self, "gamma", float(self.gamma))

    def _of_rows(self, weights: Tensor) -> Tensor:
        rows = weights.double()
        return rows.mean(-2) + self.gamma * rows.var(-2, correction=0)


@dataclass(frozen=True)
class ByDispersion(LayerShare):
    """By the entropy of the window's attention and its variance over the window's rows.

    CAKE's preference score (section 4.1): entropy^(1/tau1) * variance^(1/tau2), both summed over
    heads and tokens. Its public code tunes the temperatures for each model and budget.

    Parameters
    ----------
    tau1, tau2 : float
        Temperatures of entropy and variance, above 0.
    """

    tau1: float = 1.0
    tau2: float = 1.0

    def __post_init__(self) -> None:
        for name in ("tau1", "tau2"):
            _check_number(name, getattr(self, name), least=1e-3)
            object.__setattr__(self, name, float(getattr(self, name)))

    def weight(self, ranking: Ranking, query: Tensor, key: Tensor, window: int) -> Tensor:
        n = key.shape[1]
        rows = attention_weights(query, key, window)[..., : n - window].double()
        entropy = -rows.xlogy(rows).sum()
        return entropy ** (1 / self.tau1) * rows.var(-2, correction=0).sum() ** (1 / self.tau2)


def _check_number(name: str, value: object, least: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not least <= value < 1e9:
        raise UserError(f"{name}={value!r}: it must be a number of at least {least:g}")
