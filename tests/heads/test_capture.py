"""Answers and where heads look while they are written, against softmax and stock transformers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine.fixtures import Stock, pages
from engine.llava_checkpoints import build_llava
from transformers import Cache

from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.errors import UserError
from sparsemm_eval.heads.capture import (
    ArgmaxCapture,
    WeightCapture,
    feed,
    greedy_answers,
    read_prompts,
    teacher_forced,
)
from sparsemm_eval.methods import ModelShape
from sparsemm_eval.tiny import default_checkpoint

N, ROWS = 100, 40  # more rows than a block


def watched(cache: Cache, dtype: torch.dtype, padding: tuple[int, int]) -> torch.Tensor:
    """Show a cache 2 rows of a batch, 4 heads in pairs; the answer's weights [B, Hq, ROWS, N]."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, N, 8).to(dtype), torch.randn(2, 2, N, 8).to(dtype)
    places = torch.arange(N)
    mask = (places <= places[:, None]) & (places >= torch.tensor(padding)[:, None, None, None])
    layer, _ = cache.update(key, key.clone(), 0)
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    layer.attend(module, query, mask if any(padding) else None, scaling=0.4)
    logits = query.float() @ key.float().repeat_interleave(2, 1).transpose(-1, -2)
    weights = (0.4 * logits).masked_fill(~mask, -torch.inf).softmax(-1)
    return weights[:, :, N - ROWS - 1 : N - 1]


@pytest.mark.parametrize("padding", [(0, 0), (0, 45)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_argmax_is_that_of_the_softmax(padding: tuple, dtype: torch.dtype) -> None:
    cache = ArgmaxCapture(ModelShape(1, 4, 2), ROWS)
    weights = watched(cache, dtype, padding)
    assert cache.looked().shape == (2, 1, 4, ROWS)
    assert torch.equal(cache.looked()[:, 0], weights.argmax(-1))


@pytest.mark.parametrize("padding", [(0, 0), (0, 45)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_weights_are_the_mean_of_the_softmax(padding: tuple, dtype: torch.dtype) -> None:
    positions = np.array([3, 50, 51, 98])
    cache = WeightCapture(ModelShape(1, 4, 2), ROWS, positions)
    weights = watched(cache, dtype, padding)
    found = cache.weights()
    assert found.shape == (2, 1, 4, len(positions))
    torch.testing.assert_close(found[:, 0].float(), weights.mean(-2)[..., positions])


TOKENS = 6
DOCUMENTS = pages(2)
IMAGES = [document["images"][0] for document in DOCUMENTS]
QUESTIONS = [document["question"] for document in DOCUMENTS]


@pytest.fixture(scope="module", params=["qwen2_vl", "llama"])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    if request.param == "qwen2_vl":
        return Checkpoint(default_checkpoint(), dtype="float32")
    return Checkpoint(build_llava(request.param, tmp_path_factory.mktemp("model")), dtype="float32")


def test_a_batch_is_answered_as_stock_transformers_answer_each(checkpoint: Checkpoint) -> None:
    inputs = read_prompts(checkpoint.processor, IMAGES, QUESTIONS)
    assert not inputs["attention_mask"].all(), "choose prompts of unlike length"
    stock = Stock(checkpoint.folder)
    answers = greedy_answers(checkpoint, inputs, TOKENS)
    for document, answer, row, mask in zip(
        DOCUMENTS, answers, inputs["input_ids"], inputs["attention_mask"], strict=True
    ):
        alone = stock.inputs(document)
        assert row[mask.bool()].tolist() == alone["input_ids"][0].tolist()
        expected = stock.model.generate(**alone, do_sample=False, max_new_tokens=TOKENS)[0]
        expected = expected[alone["input_ids"].shape[1] :].tolist()
        assert answer == expected[: len(answer)]
        assert len(answer) > 1
        assert expected[len(answer) :] in ([], [stock.model.generation_config.eos_token_id])


@torch.inference_mode()
def test_fed_again_each_answer_follows_from_its_prompt(checkpoint: Checkpoint) -> None:
    inputs = read_prompts(checkpoint.processor, IMAGES, QUESTIONS)
    first, second = greedy_answers(checkpoint, inputs, TOKENS)
    answers = [first[:2], second]
    forced = teacher_forced(inputs, answers, checkpoint.processor.tokenizer.pad_token_id)
    said = checkpoint.model(**forced).logits.argmax(-1)
    for row, answer in enumerate(answers):
        assert forced["input_ids"][row, -len(answer) :].tolist() == answer
        assert said[row, -len(answer) - 1 : -1].tolist() == answer


def test_a_token_of_an_image_ends_an_answer(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, eos = checkpoint.config.image_token_id, checkpoint.processor.tokenizer.eos_token_id
    said = torch.tensor([[7, 8, image, 9], [7, eos, image, 9]])
    monkeypatch.setattr(
        checkpoint.model, "generate", lambda input_ids, **_: torch.cat([input_ids, said], 1)
    )
    inputs = read_prompts(checkpoint.processor, IMAGES, QUESTIONS)
    assert greedy_answers(checkpoint, inputs, 4) == [[7, 8], [7]]


def test_where_heads_look_means_nothing_without_logits(checkpoint: Checkpoint) -> None:
    inputs = read_prompts(checkpoint.processor, IMAGES, QUESTIONS)
    answers = greedy_answers(checkpoint, inputs, 3)
    shape, rows = checkpoint.shape, max(map(len, answers))

    def spoil(_: object, __: object, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(0, torch.tensor([1]), torch.nan)

    feed(checkpoint, inputs, answers, ArgmaxCapture(shape, rows))
    handle = checkpoint.model.lm_head.register_forward_hook(spoil)
    try:
        with pytest.raises(UserError, match="not finite in float32: look at the checkpoint"):
            feed(checkpoint, inputs, answers, ArgmaxCapture(shape, rows))
    finally:
        handle.remove()
