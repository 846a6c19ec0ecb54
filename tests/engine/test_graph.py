"""Decoding between static buffers: token for token what transformers' ``generate`` decodes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from cache.models import FAMILIES, SAMPLES, budgeted, method_for, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from sparsemm_eval.engine.decode import Decoded, generate, generate_rows
from sparsemm_eval.engine.graph import StaticDecoder, decoder_of, held_bytes, release
from sparsemm_eval.engine.greedy import bucket, check_cuda_graph, static_kind
from sparsemm_eval.engine.step import _forward
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


def assert_same(found: Sequence[Decoded], wanted: Sequence[Decoded]) -> None:
    """Tokens to the bit, and the same statements on what was kept."""
    assert said(found) == said(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.kept, other.kept)
        assert one.kept_bytes == other.kept_bytes
        assert one.prompt_tokens == other.prompt_tokens
        assert one.backend == "cuda_ext"
        assert all(size > 0 for size in one.cache_bytes)
        for kl, expected in zip(one.kl_full, other.kl_full, strict=True):
            assert (kl is None) == (expected is None)
            assert kl == pytest.approx(expected, abs=1e-4)


def both(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], options: Mapping[str, Any], **more: Any
) -> tuple[list[Decoded], list[Decoded]]:
    """Between static buffers, and as `generate` does it."""
    found, wanted = (
        generate_rows(model, inputs, methods(model), options, cuda_graph=way, **more)
        for way in ("eager", "off")
    )
    return found, wanted


def test_many_rows_and_layers_that_grow(
    model: PreTrainedModel, inputs: Mapping[str, Tensor]
) -> None:
    found, wanted = both(model, inputs, LONG)
    assert_same(found, wanted)
    assert all(len(row) == 60 for of_method in said(found) for row in of_method)


def test_rows_that_end_at_unlike_steps(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens that were said are made ends: rows stop early, late, at once, or not at all."""
    whole = said(generate_rows(model, inputs, methods(model), LONG, cuda_graph="off"))
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
        found, wanted = (
            generate(model, single, method_for(model, name), LONG, cuda_graph=way)
            for way in ("eager", "off")
        )
        assert_same([found], [replace(wanted)])


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


def test_the_step_is_one_graph_to_torch_compile() -> None:
    """Nothing in it asks the host: no break, and no second compilation while lengths grow."""
    model = budgeted("qwen2vl", seed=3)
    inputs = prompt(model, SAMPLES)
    chosen, options = [method_for(model, "sparsemm")], {**LONG, "max_new_tokens": 14}
    wanted = generate_rows(model, inputs, chosen, options, cuda_graph="off")
    generate_rows(model, inputs, chosen, {**options, "max_new_tokens": 2}, cuda_graph="eager")
    (step,) = decoder_of(model).steps.values()
    step.compiled = torch.compile(_forward, fullgraph=True, dynamic=False, backend="aot_eager")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = generate_rows(model, inputs, chosen, options, cuda_graph="eager")
    assert said(found) == said(wanted)
    torch._dynamo.reset()


def kind(model: PreTrainedModel, **more: Any) -> Any:
    asked = {"rows": 3, "longest": 100, "options": LONG, "backend": "auto", "mask": None}
    return static_kind(model, **{**asked, "cuda_graph": "eager", **more})


def test_what_takes_the_plain_path(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kind(model).rows == 4
    assert kind(model, cuda_graph="off") is None
    assert kind(model, cuda_graph="auto") is None, "no GPU"
    assert kind(model, backend="torch") is None
    for option in (
        {"do_sample": True}, {"num_beams": 2}, {"min_new_tokens": 2}, {"bad_words_ids": [[3]]},
        {"no_repeat_ngram_size": 2}, {"prompt_lookup_num_tokens": 3}, {"stop_strings": "."},
    ):  # fmt: skip
        assert kind(model, options={**LONG, **option}) is None, option
    for option in ({"num_beams": 1}, {"temperature": None}, {"min_new_tokens": 1}, {"top_k": 3}):
        assert kind(model, options={**LONG, **option}) is not None, option
    assert kind(model, options={**LONG, "repetition_penalty": 1.05}).penalty == 1.05
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 1.2)
    assert kind(model).penalty == 1.2
    text = model.config.get_text_config()
    monkeypatch.setattr(text, "sliding_window", 99, raising=False)
    assert kind(model) is None
    assert kind(model, longest=99) is not None
    monkeypatch.setattr(text, "rope_parameters", {"rope_type": "dynamic"})
    assert kind(model, longest=99) is None


def test_a_decoder_goes_with_its_model() -> None:
    model = budgeted("mistral", seed=1)
    inputs = prompt(model, SAMPLES[:1])
    assert held_bytes(model) == 0
    generate(model, inputs, method_for(model, "fullkv"), LONG, cuda_graph="eager")
    decoder: StaticDecoder = decoder_of(model)
    assert held_bytes(model) == decoder.bytes() > 0
    assert decoder_of(model) is decoder
    release(model)
    assert held_bytes(model) == 0
    release(model)


@pytest.mark.parametrize(
    ("rows", "size"), [(1, 1), (2, 2), (3, 4), (8, 8), (9, 16), (31, 32), (32, 32), (33, 64)]
)
def test_buckets(rows: int, size: int) -> None:
    assert bucket(rows) == size


def test_the_setting() -> None:
    assert [check_cuda_graph(value) for value in (True, False, "auto", "compile", "eager")] == [
        "auto", "off", "auto", "compile", "eager",
    ]  # fmt: skip
    for value in (1, 0, "on", None):
        with pytest.raises(ValueError, match="cuda_graph="):
            check_cuda_graph(value)
