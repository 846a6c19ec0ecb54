"""How far a method's next token is from full KV's, from the pass that answers anyway."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from engine.fixtures import LAYOUTS, Stock, ask_all, pages, rows
from torch import Tensor

from sparsemm_eval.cache import CACHE_ARGUMENT, HeadBudgetCache
from sparsemm_eval.engine.answers import Answer, AnswerStore
from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.decode import decode
from sparsemm_eval.engine.lmms import make_runner
from sparsemm_eval.methods import Method, make_method

SHORT = {"max_new_tokens": 4, "do_sample": False}


def methods_for(checkpoint: Checkpoint) -> list[Method]:
    full = make_method("fullkv", checkpoint.shape)
    squeezed = [
        make_method("snapkv", checkpoint.shape, budget=budget, window=8) for budget in (12, 2000)
    ]
    return [squeezed[0], full, squeezed[1]]


def second_logits(checkpoint: Checkpoint, inputs: Mapping[str, Tensor], method: Method) -> Tensor:
    """Logits after prompt and first token, from a call of its own."""
    with torch.no_grad():
        out = checkpoint.model.generate(
            **inputs,
            **{CACHE_ARGUMENT: HeadBudgetCache(method)},
            max_new_tokens=2,
            min_new_tokens=2,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return out.logits[1][0].double()


@pytest.mark.parametrize("number", range(len(LAYOUTS)))
def test_kl_is_that_of_separate_runs(reader: Checkpoint, number: int) -> None:
    inputs = Stock(reader.folder).inputs(pages(len(LAYOUTS))[number])
    methods = methods_for(reader)
    squeezed, full, whole = decode(reader.model, inputs, methods, SHORT)
    p, q = (second_logits(reader, inputs, methods[m]).log_softmax(-1) for m in (1, 0))
    expected = float((p.exp() * (p - q)).sum())
    assert expected > 1e-4
    assert squeezed.kl_full == [pytest.approx(expected, rel=1e-3)]
    # A budget that holds the prompt is full KV by another name; full KV has no one to be far from.
    assert whole.kl_full == [pytest.approx(0, abs=1e-6)]
    assert full.kl_full == [None]


def test_nothing_to_compare_with(reader: Checkpoint) -> None:
    """No full KV, a method alone, or an answer of one token."""
    inputs = Stock(reader.folder).inputs(pages(1)[0])
    squeezed, full, whole = methods_for(reader)
    for methods, options in (
        ([squeezed, whole], SHORT),
        ([squeezed, full], {**SHORT, "max_new_tokens": 1}),
        ([full], SHORT),
    ):
        decoded = decode(reader.model, inputs, methods, options)
        assert [found.kl_full for found in decoded] == [[None]] * len(methods)
    assert decode(reader.model, inputs, [squeezed], SHORT)[0].kl_full == [None]


def test_it_is_stored_with_the_answer_and_not_keyed(reader: Checkpoint, answers: Path) -> None:
    cells = [{"method": "fullkv"}, {"method": "snapkv", "budget": 12, "window": 8}]
    documents = pages(3)
    (texts,) = ask_all(make_runner(reader, cells[1:], answers / "apart", 3), documents)
    assert ask_all(make_runner(reader, cells, answers / "together", 3), documents)[1] == texts
    by_key = {row.key: row for row in rows(answers / "together")}
    for row in rows(answers / "apart"):
        assert row.record["kl_full"] is None
        assert by_key.pop(row.key).record["kl_full"] > 0
    assert [row.record["kl_full"] for row in by_key.values()] == [None] * 3


def test_records_from_before_there_was_any_are_read(reader: Checkpoint, answers: Path) -> None:
    cells = [{"method": "fullkv"}, {"method": "snapkv", "budget": 12, "window": 8}]
    documents = pages(2)
    texts = ask_all(make_runner(reader, cells, answers / "new", 2), documents)
    old = AnswerStore(answers / "old")
    for row in rows(answers / "new"):
        record = {
            name: value for name, value in row.record.items() if name not in ("tokens", "kl_full")
        }
        old.write([Answer(row.key, row.cell, "pages", row.doc_id, row.text, None, record)])
    old.close()
    assert ask_all(make_runner(reader, cells, answers / "old", 2), documents) == texts
    assert len(rows(answers / "old")) == 4
