"""Which tokens `Method.keep` keeps: against the reference, and what holds for any input."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from methods.cases import BY_POSITION, SCORED, Case, Tally, cases

from sparsemm_eval.methods import ModelShape, make_method

EVERY_METHOD = SCORED + BY_POSITION
TRIED = [(name, "paper") for name in EVERY_METHOD] + [(name, "exact") for name in SCORED]
each_method = pytest.mark.parametrize("name", EVERY_METHOD)
each_scored_method = pytest.mark.parametrize("name", SCORED)
each_allocation = pytest.mark.parametrize(("name", "allocation"), TRIED)


def quick(examples: int) -> settings:
    """Run the same examples every time, however busy the machine."""
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


def some_case(name: str, allocation: str = "paper", **changes: Any) -> Case:
    """Return a case of a method with unlike visual scores; budget 16 and window 4."""
    chosen: dict[str, Any] = {} if name == "fullkv" else {"budget": 16}
    if name in SCORED:
        chosen |= {"window": 4, "allocation": allocation}
    scores = np.random.default_rng(5).lognormal(sigma=2, size=(3, 8))
    case = Case(
        method=name,
        settings=chosen,
        shape=(3, 8, 2),
        tokens=(90, 41, 64),
        seed=11,
        head_scores=scores if name == "sparsemm" else None,
    )
    return replace(case, **changes)


# --- against the reference ----------------------------------------------------------------------


@each_allocation
def test_masks_are_the_references(name: str, allocation: str) -> None:
    tally = Tally()

    @quick(100)
    @given(cases(name, allocation))
    def compare(case: Case) -> None:
        tally.compare(case)

    compare()
    tally.assert_strict()


@each_method
def test_defaults_are_the_references(name: str) -> None:
    """Window 32, kernel 5, average, mean, ratio 0.1, floor 0.2, seed 0, four sinks, `paper`."""
    chosen = {} if name == "fullkv" else {"budget": 48}
    tally = Tally()
    tally.compare(some_case(name, settings=chosen, tokens=(120, 70, 49)))
    tally.assert_strict()


# --- how many -----------------------------------------------------------------------------------


@each_scored_method
@quick(60)
@given(data=st.data())
def test_exact_spends_the_nominal_budget(name: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, "exact"))
    layers, _, kv_heads = case.shape
    spent = case.masks().sum(axis=(0, 2, 3))
    nominal = [min(case.settings["budget"], n) * layers * kv_heads for n in case.tokens]
    assert spent.tolist() == nominal


@each_allocation
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 15, 16])
def test_a_prompt_within_the_budget_is_kept_whole(name: str, allocation: str, tokens: int) -> None:
    """Up to n == b, and below the window too; beside a row that is compressed."""
    case = some_case(name, allocation, tokens=(tokens, 40))
    assert case.masks()[:, 0, :, case.width - tokens :].all()
    alone = some_case(name, allocation, tokens=(tokens,))
    assert alone.masks().all()


@each_allocation
def test_one_token_beyond_the_budget_is_compressed(name: str, allocation: str) -> None:
    case = some_case(name, allocation, tokens=(17,))
    assert case.masks().all() == (name == "fullkv")
    tally = Tally()
    tally.compare(case)
    tally.assert_strict()


@each_scored_method
@pytest.mark.parametrize("allocation", ["paper", "exact"])
def test_the_window_is_always_kept_and_counted(name: str, allocation: str) -> None:
    """A head without visual scores keeps it too, and without a floor nothing else."""
    case = some_case(name, allocation, tokens=(90,))
    assert case.masks()[..., -4:].all()
    if name == "sparsemm":
        two = replace(case, head_scores=np.eye(3, 8), settings=case.settings | {"ratio": 0})
        masks = two.masks()
        assert masks[..., -4:].all()
        assert masks.sum(axis=-1).tolist() == [[[28, 4]]] * 3


# --- rows, padding, dtypes ----------------------------------------------------------------------


@each_allocation
@quick(40)
@given(data=st.data())
def test_a_row_gives_what_it_gives_alone(name: str, allocation: str, data: st.DataObject) -> None:
    case = data.draw(cases(name, allocation))
    queries, keys, valid = case.batch()
    method = case.make()
    for layer, (query, key) in enumerate(zip(queries, keys, strict=True)):
        together = method.keep(query, key, layer, valid=valid)
        for row, tokens in enumerate(case.tokens):
            own = slice(case.width - tokens, None)
            alone = method.keep(query[row, None, :, own], key[row, None, :, own], layer)
            assert torch.equal(together[row, :, own], alone[0])
            assert not together[row, :, : own.start].any()


@each_scored_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_changes_no_bit_at_a_models_size(name: str, dtype: torch.dtype) -> None:
    """With ordinary numbers, whose sums depend on their order, and NaN where nobody may look."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([1500, 901, 1203])
    valid = torch.arange(1504) >= 1504 - lengths[:, None]
    hidden = ~valid[:, None, :, None]
    query = torch.randn(3, 8, 1504, 128, generator=generator, dtype=dtype)
    key = torch.randn(3, 2, 1504, 128, generator=generator, dtype=dtype)
    query, key = (x.masked_fill(hidden, torch.nan) for x in (query, key))
    extra = {"budget": 256, "window": 32}
    method = some_case(name, settings=extra).make()
    together = method.keep(query, key, 1, valid=valid)
    for row, length in enumerate(lengths.tolist()):
        alone = method.keep(
            query[row, None, :, -length:].contiguous(), key[row, None, :, -length:].contiguous(), 1
        )
        assert torch.equal(together[row, :, -length:], alone[0])
        assert not together[row, :, :-length].any()


@each_method
def test_a_row_without_tokens_keeps_none(name: str) -> None:
    """A batch that was filled up with an empty row is still a batch."""
    masks = some_case(name, tokens=(90, 0)).masks()
    assert not masks[:, 1].any()
    assert masks[:, 0].any(axis=-1).all()


@each_method
def test_rows_do_not_see_one_another(name: str) -> None:
    """The same row gives the same beside any other rows, wherever it stands."""
    case = some_case(name, tokens=(70, 70, 70))
    queries, keys, _ = case.batch()
    method = case.make()
    for layer, (query, key) in enumerate(zip(queries, keys, strict=True)):
        masks = method.keep(query, key, layer)
        assert torch.equal(method.keep(query.flip(0), key.flip(0), layer), masks.flip(0))


@each_scored_method
@pytest.mark.parametrize("tokens", [(90,), (90, 41, 64)])
def test_the_last_window_of_the_query_is_enough(name: str, tokens: tuple[int, ...]) -> None:
    whole = some_case(name, tokens=tokens, whole_query=True)
    assert np.array_equal(whole.masks(), replace(whole, whole_query=False).masks())


@each_scored_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_do_not_lose_precision_with_the_inputs(name: str, dtype: torch.dtype) -> None:
    """These inputs are exact in half precision, so the float32 mask must come out."""
    case = some_case(name, settings={"budget": 40, "window": 8}, tokens=(119, 90))
    assert np.array_equal(replace(case, dtype=dtype).masks(), case.masks())


@each_method
def test_inputs_are_left_as_they_were(name: str) -> None:
    case = some_case(name)
    queries, keys, valid = case.batch()
    before = queries[0].clone(), keys[0].clone(), valid.clone()
    case.make().keep(queries[0], keys[0], 0, valid=valid)
    assert all(map(torch.equal, before, (queries[0], keys[0], valid)))


@each_scored_method
def test_no_state_is_kept_between_prompts(name: str) -> None:
    case = some_case(name, tokens=(60,))
    queries, keys, _ = case.batch()
    method = case.make()
    first = method.keep(queries[0], keys[0], 0)
    method.keep(queries[1][:, :, :30], keys[1][:, :, :30], 1)
    method.keep(torch.cat(queries, dim=2), torch.cat(keys, dim=2), 0)
    assert torch.equal(method.keep(queries[0], keys[0], 0), first)


# --- single methods -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "budget", "first", "second"),
    [
        ("local", 3, [9, 10, 11], [9, 10, 11]),
        ("streaming", 7, [0, 1, 2, 3, 9, 10, 11], [3, 4, 5, 6, 9, 10, 11]),
        ("streaming", 5, [0, 1, 2, 3, 11], [3, 4, 5, 6, 11]),
    ],
)
def test_methods_that_go_by_position(
    name: str, budget: int, first: list[int], second: list[int]
) -> None:
    """The second row is padded by three, so it begins there."""
    valid = torch.arange(12) >= torch.tensor([0, 3])[:, None]
    query, key = torch.randn(2, 4, 12, 4), torch.randn(2, 2, 12, 4)
    mask = make_method(name, ModelShape(1, 4, 2), budget=budget).keep(query, key, 0, valid=valid)
    kept = [[head.nonzero().flatten().tolist() for head in row] for row in mask]
    assert kept == [[first] * 2, [second] * 2]


def test_random_is_drawn_once_and_by_its_seed() -> None:
    chosen = {"budget": 16, "window": 4}
    seeded = [some_case("random", settings=chosen | {"seed": seed}).masks() for seed in (0, 0, 1)]
    assert np.array_equal(seeded[0], seeded[1])
    assert not np.array_equal(seeded[0], seeded[2])
    assert np.array_equal(seeded[0], some_case("random", settings=chosen).masks())
