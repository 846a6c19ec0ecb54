"""Where nothing is evicted, generation is transformers' own: token by token, in every mode."""

from typing import Any

import pytest
import torch
from cache.models import (
    FAMILIES,
    METHODS,
    SAMPLES,
    Sample,
    budgeted,
    build,
    method_for,
    prompt,
    text_config,
)
from cache.oracle import generate_budgeted, logits, new_tokens, run
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from sparsemm_eval.cache import ATTENTION, CACHE_ARGUMENT, use_head_budget_attention

BATCHES = {"one": SAMPLES[:1], "padded": SAMPLES}
BEAMS: dict[str, Any] = {"num_beams": 3, "output_scores": True}
each_batch = pytest.mark.parametrize("samples", BATCHES.values(), ids=BATCHES.keys())


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=[0, 1, 2, 3])
def pair(request: pytest.FixtureRequest, family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same model on the attention under test and on stock sdpa."""
    return budgeted(family, request.param), build(family, request.param)


@pytest.fixture(scope="module")
def one_pair(family: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    return budgeted(family, 4), build(family, 4)


def assert_same_tokens(
    pair: tuple[PreTrainedModel, PreTrainedModel],
    samples: tuple[Sample, ...],
    name: str = "fullkv",
    **options: Any,
) -> None:
    """Generate with and without the cache under test; the tokens must be the same."""
    model, stock = pair
    inputs = prompt(model, samples)
    method = method_for(model, name, budget=inputs["input_ids"].shape[1])
    torch.manual_seed(5)
    wanted = run(stock, inputs, **options)
    torch.manual_seed(5)
    out, _ = generate_budgeted(model, inputs, method, **options)
    assert new_tokens(wanted, inputs).unique().numel() > 4, "these tokens hardly vary"
    assert torch.equal(out.sequences, wanted.sequences)
    if "num_beams" in options:
        torch.testing.assert_close(out.sequences_scores, wanted.sequences_scores)


@each_batch
def test_full_cache(
    pair: tuple[PreTrainedModel, PreTrainedModel], samples: tuple[Sample, ...]
) -> None:
    assert_same_tokens(pair, samples, max_new_tokens=40)


@each_batch
@pytest.mark.parametrize("name", METHODS)
def test_prompts_within_the_budget(
    one_pair: tuple[PreTrainedModel, PreTrainedModel], samples: tuple[Sample, ...], name: str
) -> None:
    assert_same_tokens(one_pair, samples, name)


@each_batch
def test_beam_search(
    one_pair: tuple[PreTrainedModel, PreTrainedModel], samples: tuple[Sample, ...]
) -> None:
    assert_same_tokens(one_pair, samples, **BEAMS)


def test_all_beams_of_a_beam_search(one_pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    assert_same_tokens(one_pair, SAMPLES, num_return_sequences=3, **BEAMS)


@each_batch
def test_sampling(
    one_pair: tuple[PreTrainedModel, PreTrainedModel], samples: tuple[Sample, ...]
) -> None:
    assert_same_tokens(one_pair, samples, do_sample=True, num_return_sequences=2)


def test_logits_processors(one_pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    assert_same_tokens(one_pair, SAMPLES, repetition_penalty=1.5, no_repeat_ngram_size=2)


def test_prompt_of_one_token(one_pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """The shortest prompt looks like a decoding step, but it is a prompt."""
    assert_same_tokens(one_pair, (Sample(1),))


def test_the_image_is_seen(one_pair: tuple[PreTrainedModel, PreTrainedModel]) -> None:
    """Other pixels, other logits: the prompts here are not text alone."""
    model, _ = one_pair
    inputs = prompt(model, SAMPLES[:1])
    other = {**inputs, "pixel_values": -inputs["pixel_values"]}
    method = method_for(model, "fullkv")
    first, second = (generate_budgeted(model, x, method)[0] for x in (inputs, other))
    assert (logits(first) - logits(second))[:, 0].abs().max() > 1e-2


@each_batch
def test_a_stock_cache_gets_sdpa_to_the_bit(
    one_pair: tuple[PreTrainedModel, PreTrainedModel], samples: tuple[Sample, ...]
) -> None:
    """A model put on this attention can still be used without this cache."""
    model, stock = one_pair
    inputs = prompt(model, samples)
    config = model.config.get_text_config()
    out = run(model, inputs, **{CACHE_ARGUMENT: DynamicCache(config=config)})
    wanted = run(stock, inputs, **{CACHE_ARGUMENT: DynamicCache(config=config)})
    assert torch.equal(out.sequences, wanted.sequences)
    assert torch.equal(logits(out), logits(wanted))


def test_no_cache_gets_sdpa_to_the_bit(
    one_pair: tuple[PreTrainedModel, PreTrainedModel],
) -> None:
    model, stock = one_pair
    inputs = prompt(model, SAMPLES)
    with torch.no_grad():
        out, wanted = (x(**inputs, use_cache=False).logits for x in (model, stock))
    assert torch.equal(out, wanted)


def test_only_the_decoder_changes_its_attention(
    one_pair: tuple[PreTrainedModel, PreTrainedModel],
) -> None:
    model, stock = one_pair
    assert model.config.get_text_config()._attn_implementation == ATTENTION
    tower, stock_tower = (x.config.vision_config._attn_implementation for x in (model, stock))
    assert tower == stock_tower == "sdpa"


def test_model_of_text_alone() -> None:
    """A decoder that is no part of a larger model is put on the attention as a whole."""
    config = LlamaConfig(**text_config(heads=4, kv_heads=2))
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    inputs = {"input_ids": torch.stack([Sample(12, seed=seed).text() for seed in (0, 1)])}
    wanted = run(model, inputs)
    use_head_budget_attention(model)
    assert model.config._attn_implementation == ATTENTION
    out, _ = generate_budgeted(model, inputs, method_for(model, "fullkv"))
    assert torch.equal(out.sequences, wanted.sequences)
