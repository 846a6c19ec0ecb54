"""A row is a sample under a method: rows know nothing of each other, nor of their padding."""

from collections.abc import Sequence

import pytest
import torch
from cache.models import (
    COMPRESSING,
    FAMILIES,
    METHODS,
    MORE,
    SAMPLES,
    Sample,
    budgeted,
    lengths,
    method_for,
    prompt,
)
from cache.oracle import generate_budgeted, logits, new_tokens, run, visual_of
from torch import Tensor
from transformers import PreTrainedModel

from sparsemm_eval.cache import CACHE_ARGUMENT, HeadBudgetCache
from sparsemm_eval.methods import Method

STEPS = 24
each_method = pytest.mark.parametrize("name", [*METHODS, "lava", "criticalkv+cake"])


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return budgeted(request.param, seed=6)


def test_many_methods_in_one_cache_equal_their_own_runs(model: PreTrainedModel) -> None:
    """One prefill of B prompts, decoded as B * M rows, sample by sample."""
    every = COMPRESSING + MORE
    methods = [method_for(model, name, 24, allocation) for name, allocation in every]
    methods += [method_for(model, "fullkv"), method_for(model, "snapkv", 40)]
    inputs = prompt(model, SAMPLES)
    tokens, seen, cache = _decode_rows(model, inputs, methods)
    assert cache.prompt_lengths() == [n for n in lengths(inputs) for _ in methods]
    for m, method in enumerate(methods):
        own, own_cache = generate_budgeted(model, inputs, method, max_new_tokens=STEPS)
        rows = slice(m, None, len(methods))
        assert torch.equal(cache.kept()[rows], own_cache.kept())
        assert torch.equal(tokens[rows], new_tokens(own, inputs)), str(method)
        assert (seen[rows] - logits(own)[:, 1:]).abs().max() < 1e-4


def _decode_rows(
    model: PreTrainedModel, inputs: dict[str, Tensor], methods: Sequence[Method]
) -> tuple[Tensor, Tensor, HeadBudgetCache]:
    """Tokens [B * M, STEPS], logits of all but the first, and the cache."""
    cache = HeadBudgetCache(methods, visual=visual_of(model, inputs))
    mask = inputs["attention_mask"]
    given = dict(inputs)
    if "mm_token_type_ids" not in inputs:
        # LLaVA-NeXT's forward counts positions from the padding, generate counts from the text.
        given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(**given, **{CACHE_ARGUMENT: cache}, use_cache=True, logits_to_keep=1)
    if "mm_token_type_ids" in inputs:
        model.model.rope_deltas = model.model.rope_deltas.repeat_interleave(len(methods), 0)
    first = out.logits[:, -1].argmax(-1, keepdim=True)
    ids = torch.cat([inputs["input_ids"], first], 1).repeat_interleave(len(methods), 0)
    mask = torch.cat([mask, torch.ones_like(first)], 1).repeat_interleave(len(methods), 0)
    rows = {"input_ids": ids, "attention_mask": mask}
    rest = run(model, rows, **{CACHE_ARGUMENT: cache}, max_new_tokens=STEPS - 1)
    return rest.sequences[:, inputs["input_ids"].shape[1] :], logits(rest), cache


@each_method
def test_padded_row_equals_its_single_run(model: PreTrainedModel, name: str) -> None:
    inputs = prompt(model, SAMPLES)
    method = method_for(model, name)
    batch, cache = generate_budgeted(model, inputs, method)
    for row, sample in enumerate(SAMPLES):
        alone = prompt(model, [sample])
        single, single_cache = generate_budgeted(model, alone, method)
        assert torch.equal(cache.kept()[row : row + 1], single_cache.kept())
        assert torch.equal(new_tokens(batch, inputs)[row], new_tokens(single, alone)[0])
        assert (logits(batch)[row] - logits(single)[0]).abs().max() < 1e-4


@each_method
def test_rows_do_not_know_each_other(model: PreTrainedModel, name: str) -> None:
    """The other rows are replaced, and with them the padding of the row that stays."""
    method = method_for(model, name)
    others = (Sample(40, (6, 6), 50), SAMPLES[1], Sample(3, (4, 8), 60))
    first, second = prompt(model, SAMPLES), prompt(model, others)
    before, cache = generate_budgeted(model, first, method)
    after, other_cache = generate_budgeted(model, second, method)
    assert torch.equal(cache.kept()[1], other_cache.kept()[1])
    assert torch.equal(new_tokens(before, first)[1], new_tokens(after, second)[1])


@each_method
def test_beam_search_of_a_row_is_its_own(model: PreTrainedModel, name: str) -> None:
    """Beams change places inside their row only."""
    inputs, alone = prompt(model, SAMPLES), prompt(model, SAMPLES[1:2])
    method = method_for(model, name)
    beams = {"num_beams": 3, "output_scores": True}
    batch, cache = generate_budgeted(model, inputs, method, **beams)
    single, single_cache = generate_budgeted(model, alone, method, **beams)
    assert torch.equal(cache.kept()[3:6], single_cache.kept())
    assert cache.prompt_lengths() == [n for n in lengths(inputs) for _ in range(3)]
    assert torch.equal(new_tokens(batch, inputs)[1], new_tokens(single, alone)[0])
    torch.testing.assert_close(batch.sequences_scores[1:2], single.sequences_scores)


def test_return_sequences_are_rows_of_their_own(model: PreTrainedModel) -> None:
    """Several samples of one prompt share what is kept, not what is said."""
    inputs, method = prompt(model, SAMPLES), method_for(model, "adakv")
    torch.manual_seed(0)
    drawn = {"do_sample": True, "num_return_sequences": 3}
    out, cache = generate_budgeted(model, inputs, method, **drawn)
    _, plain = generate_budgeted(model, inputs, method)
    assert torch.equal(cache.kept(), plain.kept().repeat_interleave(3, 0))
    assert len(new_tokens(out, inputs).unique(dim=0)) == 3 * len(SAMPLES)


def test_reset_leaves_nothing_behind(model: PreTrainedModel) -> None:
    method = method_for(model, "sparsemm")
    first, second = prompt(model, SAMPLES), prompt(model, [Sample(30, (6, 6), 70)])
    fresh, fresh_cache = generate_budgeted(model, second, method)
    cache = HeadBudgetCache(method)
    run(model, first, **{CACHE_ARGUMENT: cache})
    cache.reset()
    assert cache.get_seq_length() == 0
    again = run(model, second, **{CACHE_ARGUMENT: cache})
    assert torch.equal(again.sequences, fresh.sequences)
    assert torch.equal(logits(again), logits(fresh))
    assert torch.equal(cache.kept(), fresh_cache.kept())
    assert cache.prompt_lengths() == fresh_cache.prompt_lengths()
    assert cache.bytes() == fresh_cache.bytes()
