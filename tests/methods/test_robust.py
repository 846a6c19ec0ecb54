"""A method of one's own that gives nonsense is an error that names it, never arbitrary tokens."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsemm_eval.errors import UserError
from sparsemm_eval.methods import (
    Allocation,
    LayerAllocation,
    Method,
    ModelShape,
    Prompt,
    Ranking,
    make_method,
    register_method,
    registry,
    tokens_per_head,
)
from sparsemm_eval.methods.allocation import Uniform, share_out

SHAPE = ModelShape(2, 4, 2)
TOKENS, BUDGET = 40, 16
PROMPT = torch.randn(1, 4, TOKENS, 8), torch.randn(1, 2, TOKENS, 8)


@dataclass(frozen=True)
class Given(Allocation):
    """Allotments as they are given."""

    make: Callable[[Prompt], Any] = field(default=lambda _: None)

    def paper(self, prompt: Prompt) -> np.ndarray:
        return self.make(prompt)

    def wants(self, prompt: Prompt) -> np.ndarray:
        return self.make(prompt)


@dataclass(frozen=True)
class GivenByLayer(LayerAllocation):
    """Allotments of a layer as they are given."""

    make: Callable[[Ranking], Any] = field(default=lambda _: None)
    bound: int | None = None

    def paper(self, prompt: Prompt, ranking: Ranking) -> Tensor:
        return self.make(ranking)

    def wants(self, prompt: Prompt, ranking: Ranking) -> Tensor:
        return self.make(ranking)

    def most(self, prompt: Prompt, layer: int, exact: bool) -> int | None:
        return self.bound


@dataclass(frozen=True)
class GivenScores:
    """Scores as they are given."""

    make: Callable[[Tensor], Any] = field(default=lambda _: None)
    window = 4
    least_budget = 5

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        return self.make(torch.rand(key.shape[0], key.shape[1] - 4))


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    register_method("own_counts", Given)
    register_method("own_layer", GivenByLayer)
    register_method("own_scores", Uniform, scorer=GivenScores)


def own(name: str, make: Callable, allocation: str = "paper", **more: Any) -> Method:
    window = {} if name == "own_scores" else {"window": 4}
    rounding = {} if name == "own_scores" else {"allocation": allocation}
    return make_method(name, SHAPE, budget=BUDGET, make=make, **window, **rounding, **more)


def refused(method: Method) -> str:
    with pytest.raises(UserError) as caught:
        method.keep(*PROMPT, 1)
    message = str(caught.value)
    assert f"method={method.name}" in message
    assert "\n" not in message
    return message


def numbers(value: float) -> Callable[[Prompt], np.ndarray]:
    """Twelve tokens a head, but for one head of the second layer."""

    def make(prompt: Prompt) -> np.ndarray:
        allotted = np.full((2, 2), 12.0)
        allotted[1, 0] = value
        return allotted

    return make


@pytest.mark.parametrize("allocation", ["paper", "exact"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0])
def test_counts_that_are_none(allocation: str, value: float) -> None:
    message = refused(own("own_counts", numbers(value), allocation))
    assert "head 1-0" in message
    assert str(value) in message
    with pytest.raises(UserError, match="method=own_counts"):
        tokens_per_head(own("own_counts", numbers(value), allocation), TOKENS)


def test_half_a_token() -> None:
    """As published counts are whole; what is wanted need not be."""
    assert "whole" in refused(own("own_counts", numbers(11.5)))
    kept = own("own_counts", numbers(11.5), "exact").keep(*PROMPT, 1)
    assert int(kept.sum()) in (BUDGET * 2 - 1, BUDGET * 2, BUDGET * 2 + 1)


@pytest.mark.parametrize("allocation", ["paper", "exact"])
@pytest.mark.parametrize("shape", [(2,), (2, 1), (1, 2), (2, 3), (2, 2, 1)])
def test_too_few_counts(allocation: str, shape: tuple[int, ...]) -> None:
    """Also such as would be spread over the heads without a word."""
    message = refused(own("own_counts", lambda _: np.full(shape, 12), allocation))
    assert str(shape) in message
    assert "(2, 2)" in message


@pytest.mark.parametrize("given", [None, "12", np.full((2, 2), "x"), np.full((2, 2), True)])
def test_counts_that_are_no_numbers(given: Any) -> None:
    assert "numbers" in refused(own("own_counts", lambda _: given))


@pytest.mark.parametrize(
    "given",
    [None, 3, torch.tensor([3.0, 3.0]), torch.tensor([3]), torch.tensor([[3], [3]]),
     torch.tensor([True, True])],
    ids=str,
)  # fmt: skip
def test_counts_of_a_layer_that_are_none(given: Any) -> None:
    assert "own_layer" in refused(own("own_layer", lambda _: given))


@pytest.mark.parametrize(
    "given",
    [None, [3, 3], np.array([3.0, 3.0]), torch.tensor([3.0, 3.0]).to_sparse(),
     torch.empty(2, device="meta")],
    ids=["nothing", "list", "numpy", "sparse", "empty"],
)  # fmt: skip
def test_wants_of_a_layer_that_are_no_tensor(given: Any) -> None:
    assert "plain tensor" in refused(own("own_layer", lambda _: given, "exact"))


def test_counts_of_a_layer_that_are_negative_or_beyond_its_bound() -> None:
    assert "negative" in refused(own("own_layer", lambda _: torch.tensor([-1, 20])))
    assert "most" in refused(own("own_layer", lambda _: torch.tensor([10, 20]), bound=29))
    kept = own("own_layer", lambda _: torch.tensor([10, 20]), bound=30).keep(*PROMPT, 1)
    assert kept.sum(-1).tolist() == [[14, 24]]


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_wants_of_a_layer_that_are_none(value: float) -> None:
    """Infinite ones are clipped to the prompt by no rule: they once kept all of it."""
    message = refused(own("own_layer", lambda _: torch.tensor([1.0, value]), "exact"))
    assert "head 1" in message


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.5])
def test_scores_that_are_none(value: float) -> None:
    def make(scores: Tensor) -> Tensor:
        scores[1, 3] = value
        return scores

    assert "layer 1" in refused(own("own_scores", make))


@pytest.mark.parametrize(
    "make",
    [
        lambda scores: scores[:, :-1],
        lambda scores: scores[:1],
        lambda scores: scores[None],
        lambda scores: scores.long(),
        lambda scores: scores.to_sparse(),
        lambda scores: scores.to("meta"),
        lambda scores: scores.numpy(),
        lambda scores: scores.tolist(),
        lambda _: None,
    ],
    ids=["tokens", "heads", "axes", "integers", "sparse", "empty", "numpy", "list", "nothing"],
)
def test_scores_of_another_shape(make: Callable) -> None:
    assert "(2, 36)" in refused(own("own_scores", make))


def test_a_model_whose_numbers_are_not_finite() -> None:
    """Half precision that overflowed: an error, and a word on what mends it."""
    query, key = (x.clone() for x in PROMPT)
    key[0, 1, 7] = math.nan
    with pytest.raises(UserError, match=r"method=snapkv.*layer 0.*dtype"):
        make_method("snapkv", SHAPE, budget=BUDGET, window=4).keep(query, key, 0)


def test_a_scorer_whose_window_is_its_budget() -> None:
    """Whatever a scorer of one's own calls its least budget, one token is left to choose."""

    @dataclass(frozen=True)
    class Greedy(GivenScores):
        least_budget = 1

    register_method("own_window", Uniform, scorer=Greedy)
    with pytest.raises(UserError, match="needs at least 5"):
        make_method("own_window", SHAPE, budget=4)


wanted = st.lists(
    st.one_of(st.just(0.0), st.floats(1e-3, 1e4), st.integers(0, 9).map(float)),
    min_size=1, max_size=12,
)  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(wanted, st.integers(0, 60), st.floats(0, 1))
def test_what_is_shared_out_is_the_total_in_proportion(
    wants: list[float], cap: int, share: float
) -> None:
    """However much is wanted: more than there is is scaled down, less is scaled up."""
    total = int(share * cap * len(wants))
    counts = share_out(np.array(wants), cap, total)
    assert counts.sum() == total
    assert counts.min() >= 0
    assert counts.max() <= cap
    open_heads = [(want, count) for want, count in zip(wants, counts, strict=True) if count < cap]
    if sum(want for want, _ in open_heads) > 0:
        rate = [count / want for want, count in open_heads if want >= 1]
        slack = [1 / want for want, _ in open_heads if want >= 1]
        if rate:
            highest = max(r - s for r, s in zip(rate, slack, strict=True))
            lowest = min(r + s for r, s in zip(rate, slack, strict=True))
            assert highest <= lowest + 1e-6


def test_more_is_wanted_than_there_is() -> None:
    assert share_out(np.array([100.0, 1.0]), 10, 5).tolist() == [5, 0]
    assert share_out(np.array([30.0, 20.0, 10.0]), 100, 6).tolist() == [3, 2, 1]
