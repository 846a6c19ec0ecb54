"""A compressed cache equals full KV in which the evicted tokens are masked, head by head."""

import pytest
import torch
from cache.models import (
    COMPRESSING,
    FAMILIES,
    MORE,
    SAMPLES,
    budgeted,
    build,
    lengths,
    method_for,
    prompt,
)
from cache.oracle import generate_budgeted, generate_masked, logits, new_tokens, run
from transformers import PreTrainedModel

STEPS = 32
BUDGET = 24
each_method = pytest.mark.parametrize(("name", "allocation"), COMPRESSING + MORE)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=[0, 1])
def pair(request: pytest.FixtureRequest, family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same model twice in float32: for the cache, and for the oracle."""
    return budgeted(family, request.param), build(family, request.param)


@pytest.fixture(scope="module")
def exact_pair(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same in float64."""
    return budgeted(family, 2, torch.float64), build(family, 2, torch.float64)


def assert_is_the_oracle(
    pair: tuple[PreTrainedModel, PreTrainedModel],
    name: str,
    allocation: str,
    backend: str,
    within: float,
) -> None:
    """Run both on a left-padded batch of four and compare every logit of every step."""
    model, stock = pair
    inputs = prompt(model, SAMPLES)
    method = method_for(model, name, BUDGET, allocation)
    ours, cache = generate_budgeted(model, inputs, method, backend, max_new_tokens=STEPS)
    masked, oracle = generate_masked(stock, inputs, method, max_new_tokens=STEPS)
    assert cache.backend() == backend
    assert torch.equal(cache.kept(), oracle.counts())
    assert cache.prompt_lengths() == lengths(inputs)
    # Each steps on by its own choice; as long as these agree, both have read the same text. Two
    # logits that are equal but for rounding may part them, and then only by that step's tie.
    agree = new_tokens(ours, inputs) == new_tokens(masked, inputs)
    read_alike = torch.ones_like(agree)
    read_alike[:, 1:] = agree[:, :-1].cumprod(1).bool()
    assert read_alike.float().mean() > 0.85
    assert (logits(ours) - logits(masked))[read_alike].abs().max() < within


@pytest.mark.parametrize("backend", ["cuda_ext", "torch"])
@each_method
def test_equals_the_oracle_in_float32(
    pair: tuple[PreTrainedModel, PreTrainedModel], name: str, allocation: str, backend: str
) -> None:
    assert_is_the_oracle(pair, name, allocation, backend, within=1e-4)


@each_method
def test_backends_give_the_same_tokens(
    pair: tuple[PreTrainedModel, PreTrainedModel], name: str, allocation: str
) -> None:
    model, _ = pair
    inputs, method = prompt(model, SAMPLES), method_for(model, name, BUDGET, allocation)
    one, other = (
        generate_budgeted(model, inputs, method, backend)[0] for backend in ("cuda_ext", "torch")
    )
    agree = new_tokens(one, inputs) == new_tokens(other, inputs)
    for row in (~agree.all(1)).nonzero()[:, 0]:
        # Random weights make ties, which rounding decides; from there on the texts are unlike.
        best = logits(one)[row, agree[row].int().argmin()].topk(2).values
        assert best[0] - best[1] < 1e-5
    assert agree.float().mean() > 0.85


@each_method
def test_equals_the_oracle_in_float64(
    exact_pair: tuple[PreTrainedModel, PreTrainedModel], name: str, allocation: str
) -> None:
    assert_is_the_oracle(exact_pair, name, allocation, "torch", within=1e-11)


@pytest.mark.parametrize("name", ["sparsemm", "adakv"])
def test_beam_search_equals_the_oracles(
    exact_pair: tuple[PreTrainedModel, PreTrainedModel], name: str
) -> None:
    model, stock = exact_pair
    inputs, method = prompt(model, SAMPLES), method_for(model, name, BUDGET)
    beams = {"num_beams": 3, "num_return_sequences": 3, "output_scores": True}
    ours, cache = generate_budgeted(model, inputs, method, **beams)
    masked, oracle = generate_masked(stock, inputs, method, **beams)
    assert torch.equal(cache.kept(), oracle.counts())
    assert torch.equal(ours.sequences, masked.sequences)
    torch.testing.assert_close(ours.sequences_scores, masked.sequences_scores)


def test_the_oracle_without_eviction_is_the_stock_model(family: str) -> None:
    """The measure itself is right: padding, causality, grouped heads and scale."""
    stock, masked = build(family, 2, torch.float64), build(family, 2, torch.float64)
    inputs = prompt(stock, SAMPLES)
    wanted = run(stock, inputs, max_new_tokens=STEPS)
    out, _ = generate_masked(masked, inputs, method_for(masked, "fullkv"), max_new_tokens=STEPS)
    assert (logits(out) - logits(wanted)).abs().max() < 1e-11


@each_method
def test_eviction_is_felt(
    exact_pair: tuple[PreTrainedModel, PreTrainedModel], name: str, allocation: str
) -> None:
    """The comparison is not empty: what is evicted changes the logits of the rows it came from."""
    model, _ = exact_pair
    inputs = prompt(model, SAMPLES)
    steps = {"max_new_tokens": 2}
    full, _ = generate_budgeted(model, inputs, method_for(model, "fullkv"), **steps)
    method = method_for(model, name, BUDGET, allocation)
    small, _ = generate_budgeted(model, inputs, method, **steps)
    moved = (logits(full) - logits(small))[:, 1].abs().amax(-1)
    fits = torch.tensor(lengths(inputs)) <= BUDGET
    assert fits.tolist() == [False, False, True, False]
    assert (moved[~fits] > 1e-2).all()
    assert moved[fits].max() < 1e-11
