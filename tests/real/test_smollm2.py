"""Real weights through the whole package: what stock transformers answers, and what is dropped."""

import pytest
import torch
from cache.oracle import generate_budgeted, run
from real import smollm2
from real.tasks import facts
from transformers import LlamaForCausalLM

from sparsemm_eval.cache import CACHE_ARGUMENT, HeadBudgetCache
from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.requests import read_chat
from sparsemm_eval.methods import make_method

if why := smollm2.missing():
    pytest.skip(why, allow_module_level=True)


@pytest.fixture(scope="module")
def stock() -> LlamaForCausalLM:
    """The language model alone, as transformers has it."""
    return smollm2.stock_model()


@pytest.fixture(scope="module")
def checkpoint(stock: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """LLaVA-NeXT around its weights."""
    folder = smollm2.build(tmp_path_factory.mktemp("smollm2"), stock)
    return Checkpoint(folder, dtype="float32")


@pytest.fixture(scope="module")
def ids(checkpoint: Checkpoint) -> torch.Tensor:
    """A list of eight facts through the chat template, [1, tokens]."""
    question = facts.draw(8, number=0, seed=2)["question"]
    messages = [{"role": "user", "content": [{"type": "text", "text": question}]}]
    chat = read_chat(checkpoint.processor, messages, checkpoint.family())
    assert not chat.visuals
    return checkpoint.processor(text=chat.prompt, return_tensors="pt").input_ids


def new_tokens(sequences: torch.Tensor, ids: torch.Tensor) -> list[int]:
    """What was generated behind the prompt."""
    return sequences[0, ids.shape[1] :].tolist()


def test_logits_of_text_are_the_stock_models(
    checkpoint: Checkpoint, stock: LlamaForCausalLM, ids: torch.Tensor
) -> None:
    with torch.inference_mode():
        ours = checkpoint.model(input_ids=ids).logits
        theirs = stock(ids).logits
    torch.testing.assert_close(ours[..., : theirs.shape[-1]], theirs, rtol=0, atol=1e-4)


def test_the_image_token_is_never_answered(
    checkpoint: Checkpoint, stock: LlamaForCausalLM, ids: torch.Tensor
) -> None:
    image = checkpoint.processor.tokenizer.convert_tokens_to_ids(smollm2.IMAGE)
    with torch.inference_mode():
        logits = checkpoint.model(input_ids=ids).logits
    assert image == stock.config.vocab_size
    assert (logits[..., image] < logits.amax(-1) - 1).all()


def test_keeping_all_answers_as_stock(
    checkpoint: Checkpoint, stock: LlamaForCausalLM, ids: torch.Tensor
) -> None:
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    theirs = new_tokens(stock.generate(**inputs, max_new_tokens=24, do_sample=False), ids)
    for method in (
        make_method("fullkv", checkpoint.shape),
        make_method("snapkv", checkpoint.shape, budget=ids.shape[1]),
    ):
        found, _ = generate_budgeted(checkpoint.model, inputs, method)
        assert new_tokens(found.sequences, ids) == theirs


def test_half_of_the_prompt_is_half_of_the_cache(checkpoint: Checkpoint, ids: torch.Tensor) -> None:
    half = ids.shape[1] // 2
    method = make_method("snapkv", checkpoint.shape, budget=half, allocation="exact")
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found, cache = generate_budgeted(checkpoint.model, inputs, method)
    assert new_tokens(found.sequences, ids)
    assert (cache.kept() == half).all()
    whole = HeadBudgetCache(make_method("fullkv", checkpoint.shape))
    run(checkpoint.model, inputs, **{CACHE_ARGUMENT: whole})
    assert cache.bytes().total < 0.6 * whole.bytes().total
