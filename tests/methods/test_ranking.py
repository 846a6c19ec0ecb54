"""One ranking for all methods: ranks, ties, and the cut through several ranked heads."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods.test_keep import EVERY_METHOD, some_case

from sparsemm_eval.methods import PromptLayer, Ranking, keep_rows
from sparsemm_eval.methods.allocation import least_of_all

# Few values, so that most are equal; -0.0 equals 0.0, and neighbours in float32 do not.
VALUES = st.sampled_from([0.0, -0.0, 1e-45, 0.1, 0.1 + 1e-8, 0.25, 1.0, 3e38])


def heads_of(data: st.DataObject, values: st.SearchStrategy[float]) -> list[list[float]]:
    heads, tokens = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 30))
    return [data.draw(st.lists(values, min_size=tokens, max_size=tokens)) for _ in range(heads)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_a_rank_counts_what_comes_before(dtype: torch.dtype, data: st.DataObject) -> None:
    """Better scores, and equal ones that stand earlier; the window before all."""
    scores = torch.tensor(heads_of(data, VALUES), dtype=dtype)
    window = data.draw(st.integers(0, 3))
    ranks = Ranking(scores).ranks(window)
    for head, row in enumerate(scores.tolist()):
        wanted = [
            sum(other > score or (other == score and there < at) for there, other in enumerate(row))
            for at, score in enumerate(row)
        ]
        assert ranks[head].tolist() == wanted + [-1] * window
        assert Ranking(scores).best[head].tolist() == sorted(row, reverse=True)


def test_ranks_of_a_long_prompt() -> None:
    """Beyond what 16 bits hold."""
    scores = torch.rand(2, 40_000, generator=torch.Generator().manual_seed(0))
    ranks = Ranking(scores).ranks(8)
    assert (
        ranks[:, :-8].sort(-1).values.equal(torch.arange(40_000, dtype=ranks.dtype).expand(2, -1))
    )
    assert (ranks[:, -8:] == -1).all()


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_theleast_of_all_rows_are_those_of_one_sort(data: st.DataObject) -> None:
    rows = heads_of(data, st.sampled_from([0.0, -0.0, -0.1, -0.2, -0.2 - 1e-16, -0.5]))
    rising = torch.tensor(rows, dtype=torch.float64).sort(-1).values
    count = data.draw(st.integers(1, rising.numel()))
    order = rising.flatten().sort(stable=True).indices[:count]
    held = (order // rising.shape[1]).bincount(minlength=len(rising))
    assert least_of_all(rising, count).tolist() == held.tolist()


@pytest.mark.parametrize("tokens", [17, 90])
def test_methods_together_keep_what_each_keeps_alone(tokens: int) -> None:
    """Of unlike scorers and budgets, one of them larger than the prompt."""
    case = some_case("snapkv", tokens=(tokens,))
    (query, *_), (key, *_), _ = case.batch()
    methods = [some_case(name).make() for name in EVERY_METHOD]
    methods.append(some_case("adakv", "exact").make())
    methods += [
        some_case("snapkv", settings={"budget": budget, "window": window, "pooling": "max"}).make()
        for budget, window in ((16, 4), (9, 4), (64, 4), (64, 8))
    ]
    together = keep_rows(methods, PromptLayer(0, query[0], key[0]))
    for method, mask in zip(methods, together, strict=True):
        assert torch.equal(mask, method.keep(query, key, 0)[0])


def test_equal_scorers_score_once() -> None:
    """All methods of one window, whatever their budgets."""
    calls = []

    class Counted(type(some_case("snapkv").make().scorer)):
        def __call__(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return super().__call__(query, key)

    scorer = Counted(window=4)
    methods = [
        replace(some_case(name, settings={"budget": budget, "window": 4}).make(), scorer=scorer)
        for name in ("snapkv", "adakv", "sparsemm")
        for budget in (8, 16)
    ]
    (query, *_), (key, *_), _ = some_case("snapkv", tokens=(90,)).batch()
    keep_rows(methods, PromptLayer(0, query[0], key[0]))
    assert len(calls) == 1
