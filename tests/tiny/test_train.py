import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from sparsemm_eval.tiny import train
from sparsemm_eval.tiny.documents import Layout, Split, draw_document, stream
from sparsemm_eval.tiny.evaluate import similarity
from sparsemm_eval.tiny.learner import count_right
from sparsemm_eval.tiny.packing import IGNORED, Kind, Packing, draw_batch


def run(out, *more):
    options = ["--align-steps", "2", "--eval-questions", "2", "--save-minutes", "0", "--no-compile"]
    options += ["--threads", "1"]
    train.main(["--out", str(out), *options, *more])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    small = (Packing(Layout(2, 11, 1, 2), documents=2, tokens=72, onward=1),)
    out = tmp_path_factory.mktemp("training")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "STAGES", small)
        patch.setattr(train, "LOG_EVERY", 1)
        patch.setattr(train, "CHECK_EVERY", 2)
        patch.setattr(train, "CHECK_QUESTIONS", 4)
        run(out, "--max-steps", "3")
        run(out, "--max-steps", "4")
    return out


def test_three_steps_export_a_loadable_folder_with_a_card(trained):
    AutoProcessor.from_pretrained(trained / "qwen2vl")
    model = AutoModelForImageTextToText.from_pretrained(trained / "qwen2vl")
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    AutoModelForImageTextToText.from_pretrained(trained / "step-000002")
    card = (trained / "qwen2vl" / "README.md").read_text(encoding="utf-8")
    assert "| value | 2 | 0.000 | 0.000 |" in card
    assert "python -m sparsemm_eval.tiny.train --out" in card


def test_a_run_is_logged_and_resumed_where_it_ended(trained):
    lines = (trained / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["step"] for r in records if "loss" in r and "step" in r] == [1, 2, 3, 4]
    assert [r["step"] for r in records if "held_out_value_exact" in r] == [2, 4]
    assert sum("align_step" in r for r in records) == 1
    state = torch.load(trained / "training.pt", weights_only=True)
    assert state["progress"]["step"] == 4


def test_the_rate_warms_up_stays_and_falls_to_zero_at_the_end():
    budget = train.Budget(minutes=1.0, steps=1000)
    rates = [budget.learning_rate(train.Progress(step=step)) for step in (0, 99, 700, 850, 1000)]
    assert rates == pytest.approx([2e-5, 2e-3, 2e-3, 1e-3, 0.0])
    early = train.Progress(step=425, end=0.5)
    assert budget.learning_rate(early) == pytest.approx(1e-3)
    assert budget.spent(train.Progress(seconds=45.0)) == pytest.approx(0.75)


def test_counts_are_of_whole_answers():
    packing = Packing(Layout(2, 11, 2, 2), documents=2, tokens=72, onward=1)
    batch = draw_batch(packing, Split.TRAIN, 0, 0)
    places = batch.labels != IGNORED
    logits = torch.nn.functional.one_hot(batch.labels[places], 104).float()
    perfect = count_right(logits, batch)
    assert torch.equal(perfect[0::2], perfect[1::2])
    assert perfect[1] == (batch.kinds == Kind.VALUE).sum()
    is_value = batch.kinds[batch.blocks[places]] == Kind.VALUE
    logits[int(is_value.nonzero()[0])] = torch.eye(104)[0]
    assert torch.equal(perfect - count_right(logits, batch), torch.tensor([1.0, 0, 0, 0, 0, 0]))


@pytest.mark.parametrize(
    ("said", "expected", "score"),
    [("AB12", "AB12", 1.0), ("AB1", "AB12", 0.75), ("", "AB", 0.0), ("XAB12", "AB12", 0.8)],
)
def test_similarity(said, expected, score):
    assert similarity(said, expected) == pytest.approx(score)


def test_training_and_held_out_pages_never_coincide():
    seen = {draw_document(stream(Split.TRAIN, 0, n)).text for n in range(20)}
    assert seen.isdisjoint(draw_document(stream(Split.HELD_OUT, 0, n)).text for n in range(20))
