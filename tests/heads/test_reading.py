"""A model reads: in a padded batch as alone, and prompt and answer as they were generated."""

import pytest
import torch
from models.fixtures import Stock, pages
from models.llava_checkpoints import build_llava

from sparsemm_eval.heads.reading import greedy_answers, read_prompts, teacher_forced
from sparsemm_eval.models.checkpoint import Checkpoint
from sparsemm_eval.tiny import default_checkpoint

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
