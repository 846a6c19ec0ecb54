import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from sparsemm_eval.tiny.documents import Layout, Split, draw_document, stream
from sparsemm_eval.tiny.pictures import Kind
from sparsemm_eval.tiny.training import card, train
from sparsemm_eval.tiny.training.evaluate import similarity
from sparsemm_eval.tiny.training.family import FAMILIES
from sparsemm_eval.tiny.training.learner import count_right, rates
from sparsemm_eval.tiny.training.packing import IGNORED, Packing, draw_batch

SMALL = {"qwen2vl": Layout(2, 11, 1, 2), "llava_next": Layout(3, 22, 1, 2)}


def run(family, out, *more):
    options = ["--align-steps", "2", "--eval-questions", "2", "--save-minutes", "0", "--no-compile"]
    options += ["--threads", "1"]
    train.main([family, "--out", str(out), *options, *more])


@pytest.fixture(scope="module", params=list(FAMILIES))
def trained(request, tmp_path_factory):
    """Family, and the folder of four steps of training in two runs."""
    family = request.param
    small = (Packing(SMALL[family], documents=2, tokens=72, onward=1, pictures=0.5),)
    out = tmp_path_factory.mktemp("training")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "STAGES", {family: small})
        patch.setattr(train, "LOG_EVERY", 1)
        patch.setattr(train, "CHECK_EVERY", 2)
        patch.setattr(train, "CHECK_QUESTIONS", 4)
        run(family, out, "--max-steps", "3")
        run(family, out, "--max-steps", "4")
    return family, out


def test_three_steps_export_a_loadable_folder_with_a_card(trained):
    family, out = trained
    AutoProcessor.from_pretrained(out / family)
    model = AutoModelForImageTextToText.from_pretrained(out / family)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    AutoModelForImageTextToText.from_pretrained(out / "step-000002")
    text = (out / family / "README.md").read_text(encoding="utf-8")
    assert "| value | 2 | 0.000 | 0.000 |" in text
    assert (out / family / "train_log.jsonl").is_file()
    assert f"python -m sparsemm_eval.tiny.train {family} --out" in text


def test_a_run_is_logged_and_resumed_where_it_ended(trained):
    _, out = trained
    lines = (out / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["step"] for r in records if "loss" in r and "step" in r] == [1, 2, 3, 4]
    assert [r["step"] for r in records if "held_out_value_exact" in r] == [2, 4]
    assert sum("align_step" in r for r in records) == 1
    state = torch.load(out / "training.pt", weights_only=True)
    assert state["progress"]["step"] == 4


def test_the_rate_warms_up_stays_and_falls_to_zero_at_the_end():
    budget = train.Budget(minutes=1.0, steps=1000)
    shares = [budget.learning_rate(train.Progress(step=step)) for step in (0, 99, 700, 850, 1000)]
    assert shares == pytest.approx([0.01, 1.0, 1.0, 0.5, 0.0])
    assert budget.spent(train.Progress(seconds=45.0)) == pytest.approx(0.75)


def test_counts_are_of_whole_answers():
    packing = Packing(Layout(2, 11, 2, 2), documents=2, tokens=72, onward=1)
    batch = draw_batch(FAMILIES["qwen2vl"](), packing, Split.TRAIN, 0, 0)
    places = batch.labels != IGNORED
    logits = torch.nn.functional.one_hot(batch.labels[places], 104).float()
    perfect = count_right(logits, batch)
    assert torch.equal(perfect[:, 0], perfect[:, 1])
    assert perfect[Kind.VALUE, 1] == (batch.kinds == Kind.VALUE).sum()
    assert set(rates(perfect).values()) == {1.0}
    is_value = batch.kinds[batch.blocks[places]] == Kind.VALUE
    logits[int(is_value.nonzero()[0])] = torch.eye(104)[0]
    missed = perfect - count_right(logits, batch)
    assert missed[Kind.VALUE].tolist() == [1.0, 0.0]
    assert missed.sum() == 1.0


@pytest.mark.parametrize(
    ("said", "expected", "score"),
    [("AB12", "AB12", 1.0), ("AB1", "AB12", 0.75), ("", "AB", 0.0), ("XAB12", "AB12", 0.8)],
)
def test_similarity(said, expected, score):
    assert similarity(said, expected) == pytest.approx(score)


def test_training_and_held_out_pages_never_coincide():
    seen = {draw_document(stream(Split.TRAIN, 0, n)).text for n in range(20)}
    assert seen.isdisjoint(draw_document(stream(Split.HELD_OUT, 0, n)).text for n in range(20))


def test_a_card_written_anew_has_the_benchmarks(trained, tmp_path):
    family, out = trained
    cell = {"model": family, "task": "gqa_mini", "metric": "exact_match", "samples": 50}
    cells = [
        {**cell, "method": "fullkv", "score": 0.75},
        {**cell, "method": "snapkv", "score": 0.1},
    ]
    summary = {"command": "./run_eval.sh", "chance": {"gqa_mini": 0.5}, "cells": cells}
    written = tmp_path / "summary.json"
    written.write_text(json.dumps(summary))
    card.main(out / family, written)
    text = (out / family / "README.md").read_text(encoding="utf-8")
    assert "| gqa_mini | exact_match | 0.750 | 0.500 |" in text
    assert "0.100" not in text
    assert "| value | 2 | 0.000 | 0.000 |" in text
    assert "## Miniature benchmarks" not in card.model_card(out / family, {**summary, "cells": []})
