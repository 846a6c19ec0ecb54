"""Measuring on the embedded models: against plain loops, resumed, ended early, without images."""

from pathlib import Path

import numpy as np
import pytest

from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.errors import UserError
from sparsemm_eval.heads import sensitivity
from sparsemm_eval.heads.calibration import CalibrationPrompt, calibration_prompts
from sparsemm_eval.heads.sensitivity import Records, measure
from sparsemm_eval.heads.starved import AnsweredPrompt
from sparsemm_eval.methods import Sensitivity
from sparsemm_eval.methods.sensitivity import NEWEST
from sparsemm_eval.tiny import embedded_checkpoints

TASKS = "docvqa_mini,gqa_mini"
WINDOW = 8


@pytest.fixture(scope="module", params=["qwen2vl", "llava_next"])
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    return Checkpoint(embedded_checkpoints()[request.param], dtype="float32")


@pytest.fixture(scope="module")
def qwen() -> Checkpoint:
    return Checkpoint(embedded_checkpoints()["qwen2vl"], dtype="float32")


def prompts(checkpoint: Checkpoint, count: int = 2, data: str = TASKS) -> list[CalibrationPrompt]:
    return list(calibration_prompts(checkpoint, data, count))


def read(checkpoint: Checkpoint, prompt: CalibrationPrompt) -> AnsweredPrompt:
    inputs = checkpoint.processor(
        text=[prompt.prompt], images=list(prompt.visuals) or None, return_tensors="pt",
        add_special_tokens=checkpoint.config.model_type != "llava_next",
    )  # fmt: skip
    return AnsweredPrompt(checkpoint.model, inputs, WINDOW, prompt.options)


def test_divergences_are_means_of_each_head_alone(checkpoint: Checkpoint) -> None:
    asked = prompts(checkpoint)
    found = measure(checkpoint, asked, window=WINDOW, budgets=(), nothing=0)
    shape = checkpoint.shape
    for kind in ("docvqa_mini", "gqa_mini"):
        of_kind = [prompt for prompt in asked if prompt.kind == kind]
        wanted, tokens = np.zeros((shape.layers, shape.kv_heads)), 0
        for prompt in of_kind:
            one = read(checkpoint, prompt)
            tokens += len(one.answer) - 1
            for head in np.ndindex(wanted.shape):
                counts = np.full((1, *wanted.shape), one.n)
                counts[(0, *head)] = WINDOW
                lost = one.divergence(np.full_like(counts, NEWEST), counts)
                wanted[head] += lost.mean() / len(of_kind)
        kept = found.kinds[kind]
        np.testing.assert_allclose(kept.divergence, wanted, rtol=1e-3, atol=1e-6)
        assert (kept.prompts, kept.answer_tokens) == (len(of_kind), tokens)
        assert kept.documents == tuple(prompt.digest for prompt in of_kind)
    assert not found.tables


def test_layers_that_lose_nothing_are_not_looked_into(qwen: Checkpoint) -> None:
    asked = prompts(qwen)
    all_of_them = measure(qwen, asked, window=WINDOW, budgets=(), nothing=0)
    some = measure(qwen, asked, window=WINDOW, budgets=(), nothing=0.05)
    for name, kind in some.kinds.items():
        skipped = kind.divergence == 0
        assert skipped.any()
        np.testing.assert_allclose(
            kind.divergence[~skipped], all_of_them.kinds[name].divergence[~skipped], atol=1e-6
        )
    assert 1 - np.abs(some.share() - all_of_them.share()).sum() / 2 > 0.9


def test_a_search_betters_a_table_and_spends_the_same(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "_STEPS", (1.0, 0.5))
    asked = prompts(checkpoint)
    found = measure(checkpoint, asked, window=WINDOW, budgets=(24, 12))
    heads = found.rules.size
    assert {budget: table.sum() for budget, table in found.tables.items()} == {
        12: 12 * heads, 24: 24 * heads
    }  # fmt: skip
    assert found.rules.any()  # some head left SnapKV's rule
    start = sensitivity._table(0.1 / heads + 0.9 * found.share(), 12)
    lost = {"start": 0.0, "found": 0.0}
    for prompt in asked:
        one = read(checkpoint, prompt)
        for name, rules, table in (
            ("start", np.zeros_like(found.rules), start), ("found", found.rules, found.tables[12])
        ):  # fmt: skip
            lost[name] += one.divergence(rules[None], table[None]).clip(max=4).mean()
    assert lost["found"] < 0.5 * lost["start"]


def test_what_was_computed_is_not_computed_again(
    qwen: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "_STEPS", (0.5,))
    asked, records = prompts(qwen), tmp_path / "one.records.jsonl"
    arguments = {"window": WINDOW, "budgets": (12,), "records": records}
    whole = measure(qwen, asked, **arguments)
    lines = records.read_bytes().splitlines(keepends=True)
    # As a kill leaves it: half of the lines, and a part of one.
    half = len(lines) // 2
    records.write_bytes(b"".join(lines[:half]) + lines[half][:20])
    calls = []
    divergence = AnsweredPrompt.divergence
    monkeypatch.setattr(
        AnsweredPrompt,
        "divergence",
        lambda self, *given: calls.append(1) or divergence(self, *given),
    )
    assert measure(qwen, asked, **arguments) == whole
    assert len(calls) == len(lines) - half
    assert records.read_bytes() == b"".join(lines)
    calls.clear()
    assert measure(qwen, asked, **arguments) == whole
    assert not calls


def test_records_of_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    Records(path, {"window": 8}).write("a", "b", [1.0])
    assert Records(path, {"window": 8}).find("a", "b") == [1.0]
    with pytest.raises(UserError, match="another window"):
        Records(path, {"window": 16})
    path.write_text(path.read_text().replace("1.0", "2.0"))
    with pytest.raises(UserError, match="not the records"):
        Records(path, {"window": 8})


def test_prompts_end_when_two_halves_agree(
    qwen: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "SETTLED", 0.0)
    found = measure(qwen, prompts(qwen, 6), window=WINDOW, budgets=())
    # As soon as there are enough of each kind.
    assert {kind.prompts for kind in found.kinds.values()} == {sensitivity._LEAST_PROMPTS}


def test_a_prompt_that_is_there_twice_counts_once(qwen: Checkpoint) -> None:
    one = prompts(qwen, 1)
    assert measure(qwen, one * 2, window=WINDOW, budgets=()).kinds["gqa_mini"].prompts == 1


def test_text_alone(qwen: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "?ABC:?DEF:?GHI:?JKL:"}\n{"question": "*AB:12 CD:34 EF:56 GH"}\n')
    found = measure(qwen, prompts(qwen, 2, str(path)), window=2, budgets=(6,))
    assert found.kinds["questions"].prompts == 2
    assert found.tables[6].sum() == 6 * found.rules.size


def test_nothing_to_measure_on(qwen: Checkpoint) -> None:
    with pytest.raises(UserError, match="no prompts"):
        measure(qwen, [], window=WINDOW)
    with pytest.raises(UserError, match="loses nothing"):
        measure(qwen, prompts(qwen, 1), window=10_000, budgets=())


def test_the_shipped_files_fit_their_checkpoints(checkpoint: Checkpoint) -> None:
    found = checkpoint.sensitivity()
    assert isinstance(found, Sensitivity)
    assert found.shape == checkpoint.shape
    assert {16, 32, 64} <= {*found.tables}
    assert checkpoint.head_scores("sensitivity") == found.head_scores("root")
    assert checkpoint.head_scores("sensitivity@share") == found.head_scores("share")
