"""What a method was calibrated on stands in every result, and what of it is scored there."""

from collections.abc import Callable
from pathlib import Path

import pytest
from engine.fixtures import TASK, ask, log, pages, requests, to_messages

from sparsemm_eval.engine.answers import AnswerStore
from sparsemm_eval.engine.cell import Cell
from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.lmms import CellModel
from sparsemm_eval.engine.requests import read_chat
from sparsemm_eval.engine.runner import Runner
from sparsemm_eval.methods import HeadScores, make_method

COUNT = 3


@pytest.fixture
def stated(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What lmms-eval is told for its results file."""
    told: list[dict] = []

    def note(*_: object, additional_metrics: dict, **__: object) -> None:
        told.append(additional_metrics)

    monkeypatch.setattr("sparsemm_eval.engine.lmms.log_metrics", note)
    return told


@pytest.fixture
def model(reader: Checkpoint, answers: Path) -> Callable[[dict], CellModel]:
    """A model whose head scores were calibrated on documents."""

    def make(documents: dict[str, tuple[str, ...]]) -> CellModel:
        known = reader.head_scores()
        scores = HeadScores(known.values, documents)
        assert scores == known
        cell = Cell(make_method("sparsemm", reader.shape, budget=64, window=8, head_scores=scores))
        family = reader.family()
        return CellModel(Runner(reader, [cell], AnswerStore(answers), family), cell)

    return make


def digests(checkpoint: Checkpoint, documents: list[dict]) -> tuple[str, ...]:
    family = checkpoint.family()
    return tuple(
        read_chat(checkpoint.processor, to_messages(one), family).digest for one in documents
    )


def test_scored_documents_that_were_calibrated_on_are_counted(
    reader: Checkpoint, model: Callable, stated: list[dict]
) -> None:
    seen = digests(reader, pages(2))
    other = digests(reader, pages(2, first=50))
    with log() as lines:
        ask(model({"mine": (*seen, *other), "more": (other[0], other[0])}), pages(COUNT))
    told = {name: value for name, value in stated[-1].items() if "calibration" in name}
    assert told == {
        "calibration_documents/mine": 4,
        "calibration_documents/more": 1,
        f"calibration_documents_scored/{TASK}": 2,
    }
    (line,) = [line for line in lines if "calibrated" in line]
    assert line == (
        "WARNING sparsemm was calibrated on 4 documents (mine, more), of which 2 are among those "
        f"of {TASK} that are scored"
    )


def test_a_task_that_is_a_kind_is_said_where_no_document_is(
    reader: Checkpoint, model: Callable, stated: list[dict]
) -> None:
    with log() as lines:
        ask(model({TASK: digests(reader, pages(2, first=50))}), pages(COUNT))
    assert stated[-1][f"calibration_documents/{TASK}"] == 2
    assert f"calibration_documents_scored/{TASK}" not in stated[-1]
    assert sum("calibrated" in line for line in lines) == 1


def test_answers_from_disk_and_from_memory_know_their_documents(
    reader: Checkpoint, model: Callable, stated: list[dict]
) -> None:
    known = {"mine": digests(reader, pages(1))}
    first = model(known)
    ask(first, pages(COUNT))
    ask(first, pages(COUNT))
    ask(model(known), pages(COUNT))
    counts = [told[f"calibration_documents_scored/{TASK}"] for told in stated]
    assert counts == [1, 1, 1]
    assert [told["samples_found"] for told in stated] == [0, COUNT, COUNT]


def test_apart_or_unknown_nothing_is_warned_of(
    reader: Checkpoint, model: Callable, stated: list[dict]
) -> None:
    with log() as lines:
        ask(model({"other": digests(reader, pages(2, first=50))}), pages(COUNT))
        ask(model({}), pages(COUNT))
    assert not any("calibrated" in line for line in lines)
    assert stated[0]["calibration_documents/other"] == 2
    assert not any("calibration" in name for name in stated[1])


def test_a_sample_that_failed_is_not_scored(
    reader: Checkpoint, model: Callable, stated: list[dict]
) -> None:
    documents = pages(COUNT)
    made = model({"mine": digests(reader, documents)})
    made.runner.allow_failed = 1
    documents[0]["images"] = ["nowhere.png"]
    made.task_dict = {TASK: {"test": documents}}
    made.generate_until(requests(COUNT, {"max_new_tokens": 8}))
    assert stated[-1][f"calibration_documents_scored/{TASK}"] == COUNT - 1
