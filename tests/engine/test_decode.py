"""Decoding between static buffers: token for token what transformers' ``generate`` decodes."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from cache.models import FAMILIES, SAMPLES, Sample, budgeted, method_for, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from sparsemm_eval.cache import HeadBudgetCache
from sparsemm_eval.engine.decode import (
    Decoded,
    _generate,
    check_cuda_graph,
    decode,
    is_greedy,
    prefill,
)
from sparsemm_eval.engine.decoder import Decoder, decoder_of, held_bytes, release
from sparsemm_eval.engine.step import Step, StepKey, _forward
from sparsemm_eval.methods import HeadMask, Method

LONG = {"max_new_tokens": 60, "do_sample": False}  # more than the slack, so that layers are copied
NAMES = ("snapkv", "fullkv", "adakv", "pyramidkv", "sparsemm")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return budgeted(request.param, seed=3)


@pytest.fixture(scope="module")
def inputs(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """Four prompts of unlike length, padded; one without an image."""
    return prompt(model, SAMPLES)


def methods(model: PreTrainedModel) -> list[Method]:
    return [method_for(model, name) for name in NAMES]


def said(decoded: Sequence[Decoded]) -> list[list[list[int]]]:
    return [[row.tolist() for row in found.tokens] for found in decoded]


def assert_same(
    found: Sequence[Decoded], wanted: Sequence[Decoded], backend: str = "cuda_ext"
) -> None:
    """Tokens to the bit, and the same statements on what was kept."""
    assert said(found) == said(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.kept, other.kept)
        assert one.kept_bytes == other.kept_bytes
        assert one.prompt_tokens == other.prompt_tokens
        assert one.backend == other.backend == backend
        assert all(size > 0 for size in one.cache_bytes)


def both(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    options: Mapping[str, Any],
    mask: HeadMask | None = None,
    backend: str = "auto",
) -> tuple[list[Decoded], list[Decoded]]:
    """All methods between static buffers, and each as transformers' `generate` does it."""
    found = decode(model, inputs, methods(model), options, backend, mask)
    with torch.inference_mode():
        wanted = [
            _generate(model, inputs, method, options, backend, mask) for method in methods(model)
        ]
    return found, wanted


def test_many_rows_and_layers_that_grow(
    model: PreTrainedModel, inputs: Mapping[str, Tensor]
) -> None:
    found, wanted = both(model, inputs, LONG)
    assert_same(found, wanted)
    assert all(len(row) == 60 for of_method in said(found) for row in of_method)


def test_plain_torch_has_the_same_face(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a compiler: rows that end early, and layers that grow, on the same path."""
    assert_same(*both(model, inputs, LONG, backend="torch"), backend="torch")
    whole = said(decode(model, inputs, methods(model), LONG))
    ends = [whole[0][0][3], whole[2][1][7], whole[1][3][0]]
    monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
    assert_same(*both(model, inputs, LONG, backend="torch"), backend="torch")


def test_rows_that_end_at_unlike_steps(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens that were said are made ends: rows stop early, late, at once, or not at all."""
    whole = said(decode(model, inputs, methods(model), LONG))
    tokens = sorted({token for of_method in whole for row in of_method for token in row})
    spread = {token: {_steps(token, row) for m in whole for row in m} for token in tokens}
    chosen = sorted(tokens, key=lambda token: -len(spread[token]))[:3]
    assert len(spread[chosen[0]]) > 4
    firsts = {row[0] for row in whole[0]}
    for ends in ([chosen[0]], chosen[1:], sorted(firsts)):
        monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
        found, wanted = both(model, inputs, LONG)
        assert_same(found, wanted)


def _steps(token: int, row: list[int]) -> int:
    return row.index(token) if token in row else len(row)


def test_one_prompt_under_one_method(model: PreTrainedModel) -> None:
    single = prompt(model, SAMPLES[:1])
    for name in NAMES:
        method = method_for(model, name)
        with torch.inference_mode():
            wanted = _generate(model, single, method, LONG, "auto", None)
        assert_same(decode(model, single, [method], LONG), [wanted])


def test_prompts_of_unlike_size_one_after_the_other(model: PreTrainedModel) -> None:
    """Memory and steps are kept in between: nothing of an earlier prompt may be seen."""
    for samples in (SAMPLES[:1], SAMPLES, SAMPLES[2:3], SAMPLES[1:3], SAMPLES[:1]):
        found, wanted = both(model, prompt(model, samples), {**LONG, "max_new_tokens": 20})
        assert_same(found, wanted)


@pytest.mark.parametrize("mode", ["query", "output"])
def test_silenced_heads(model: PreTrainedModel, inputs: Mapping[str, Tensor], mode: str) -> None:
    mask = HeadMask(((0, 1), (2, 0), (2, 3)), mode)
    found, wanted = both(model, inputs, {**LONG, "max_new_tokens": 12}, mask=mask)
    assert_same(found, wanted)
    assert said(found) != said(both(model, inputs, {**LONG, "max_new_tokens": 12})[0])


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(
    most=st.integers(1, 40),
    penalty=st.sampled_from([None, 1.0, 1.3, 0.8]),
    end=st.integers(4, 125) | st.none(),
)
def test_generation_settings(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    most: int,
    penalty: float | None,
    end: int | None,
) -> None:
    options = {"max_new_tokens": most, "do_sample": False, "repetition_penalty": penalty}
    if penalty not in (None, 1.0):
        inputs = prompt(model, SAMPLES[1:2])  # older transformers count padding as said
    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = end
    try:
        found, wanted = both(model, inputs, options)
    finally:
        model.generation_config.eos_token_id = before
    assert_same(found, wanted)


@torch.inference_mode()
def test_the_step_is_one_graph_to_torch_compile() -> None:
    """Nothing in it asks the host: no break, and no second compilation while lengths grow."""
    model = budgeted("qwen2vl", seed=3)
    inputs = prompt(model, SAMPLES)
    chosen, options = [method_for(model, "sparsemm")], {**LONG, "max_new_tokens": 14}
    wanted = said(decode(model, inputs, chosen, options))[0]
    cache = HeadBudgetCache(chosen, buffers=decoder_of(model).buffers)
    start = prefill(model, inputs, options, cache).start
    step = Step(model, cache, StepKey(len(SAMPLES), (), 1.0, None, cache.backend(), "eager"))
    torch._dynamo.reset()
    step.compiled = torch.compile(_forward, fullgraph=True, dynamic=False, backend="aot_eager")
    step.load(cache, start)
    found = [start.ids[:, -1]]
    for number in range(13):
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            step(model)
        found.append(step.ids[:, 0].clone())
    assert torch.stack(found, 1).tolist() == wanted
    torch._dynamo.reset()


def test_what_is_greedy(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_greedy(model, LONG)
    for option in (
        {"do_sample": True}, {"num_beams": 2}, {"min_new_tokens": 2}, {"bad_words_ids": [[3]]},
        {"no_repeat_ngram_size": 2}, {"prompt_lookup_num_tokens": 3}, {"stop_strings": "."},
    ):  # fmt: skip
        assert not is_greedy(model, {**LONG, **option}), option
    for option in (
        {"num_beams": 1}, {"temperature": None}, {"min_new_tokens": 1}, {"top_k": 3},
        {"repetition_penalty": 1.05},
    ):  # fmt: skip
        assert is_greedy(model, {**LONG, **option}), option
    monkeypatch.setattr(model.generation_config, "no_repeat_ngram_size", 3)
    assert not is_greedy(model, LONG)


def test_an_answer_longer_than_a_sliding_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the cache itself refuses it: at the first token that would not see all others."""
    model = budgeted("mistral", seed=3)
    inputs = prompt(model, SAMPLES[:1])
    width = inputs["input_ids"].shape[1]
    text = model.config.get_text_config()
    monkeypatch.setattr(text, "sliding_window", width + 20, raising=False)
    chosen = [method_for(model, "fullkv")]
    assert len(decode(model, inputs, chosen, {**LONG, "max_new_tokens": 21})[0].tokens[0]) == 21
    with pytest.raises(NotImplementedError, match=f"last {width + 20} tokens only"):
        decode(model, inputs, chosen, {**LONG, "max_new_tokens": 22})


def test_layers_of_very_unlike_length_grow_before_the_first_is_full() -> None:
    """PyramidKV keeps least in the last layer, which then has the fewest free slots."""
    model = budgeted("mistral", seed=3)
    inputs = prompt(model, [Sample(600, None, 5)])
    method = method_for(model, "pyramidkv", budget=260)
    (found,) = decode(model, inputs, [method], LONG)
    with torch.inference_mode():
        wanted = _generate(model, inputs, method, LONG, "auto", None)
    assert_same([found], [wanted])
    assert found.kept[0, 0, 0] > 10 * found.kept[0, -1, 0]


def test_a_decoder_goes_with_its_model() -> None:
    model = budgeted("mistral", seed=1)
    inputs = prompt(model, SAMPLES[:1])
    assert held_bytes(model) == 0
    decode(model, inputs, [method_for(model, "fullkv")], LONG)
    decoder: Decoder = decoder_of(model)
    assert held_bytes(model) == decoder.bytes() > 0
    assert decoder_of(model) is decoder
    release(model)
    assert held_bytes(model) == 0
    release(model)


def test_the_setting() -> None:
    assert [check_cuda_graph(value) for value in (True, False, "auto", "compile", "eager")] == [
        "auto", "off", "auto", "compile", "eager",
    ]  # fmt: skip
    for value in (1, 0, "on", None):
        with pytest.raises(ValueError, match="cuda_graph="):
            check_cuda_graph(value)
