"""Methods in micro-batches that fit into memory: whatever is free, the answers are the same."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.fixtures import ask_all, log, pages, rows
from hypothesis import given
from hypothesis import strategies as st

from sparsemm_eval.cache import CACHE_ARGUMENT, HeadBudgetCache
from sparsemm_eval.engine import runner as runners
from sparsemm_eval.engine.answers import SampleFailures
from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.lmms import make_runner
from sparsemm_eval.engine.memory import (
    SHARE,
    free_memory,
    out_of_memory,
    plan_micro_batches,
    row_bytes,
    token_bytes,
)
from sparsemm_eval.methods import Method, ModelShape, make_method

SHAPE = ModelShape(layers=2, query_heads=4, kv_heads=2)
CELLS = (
    {"method": "snapkv", "budget": 64, "window": 8},
    {"method": "fullkv"},
    {"method": "adakv", "budget": 24, "window": 8},
    {"method": "pyramidkv", "budget": 12, "window": 8},
    {"method": "local", "budget": 24},
)
ERRORS = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."),
    MemoryError("Unable to allocate 3 GiB for an array"),
)


def method(budget: int | None) -> Method:
    """Make full KV, or one that keeps a budget."""
    if budget is None:
        return make_method("fullkv", SHAPE)
    return make_method("local", SHAPE, budget=budget)


def runner_for(reader: Checkpoint, folder: Path) -> runners.Runner:
    return make_runner(reader, CELLS, folder, 4)


@pytest.fixture(scope="module")
def undisturbed(reader: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """Answers with all the memory one could wish."""
    return ask_all(runner_for(reader, tmp_path_factory.mktemp("undisturbed")), pages(4))


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """State how many bytes are free."""

    def put(free: int) -> None:
        monkeypatch.setattr(runners, "free_memory", lambda model: free)

    return put


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Collect (samples, methods) of all that is decoded together."""
    seen = []
    decode = runners.Runner.decode_batch

    def watched(model: Any, samples: Sequence, inputs: Any, cells: Sequence) -> Any:
        seen.append((len(samples), len(cells)))
        return decode(model, samples, inputs, cells)

    monkeypatch.setattr(runners.Runner, "decode_batch", watched)
    return seen


# --- the plan -----------------------------------------------------------------------------------


@given(
    st.lists(st.none() | st.integers(1, 500), min_size=1, max_size=12),
    st.lists(st.integers(1, 400), min_size=1, max_size=4),
    st.integers(1, 64),
    st.integers(0, 200_000),
)
def test_every_method_has_its_place_and_every_batch_fits(
    budgets: list[int | None], lengths: list[int], new: int, free: int
) -> None:
    methods = [method(budget) for budget in budgets]
    batches = plan_micro_batches(methods, lengths, new, 4, free)
    flat = [place for batch in batches for place in batch]
    assert sorted(flat) == list(range(len(methods)))
    whole = [place for place in flat if budgets[place] is None]
    assert flat == whole + [place for place in range(len(methods)) if budgets[place] is not None]
    needs = [sum(row_bytes(m, n, new, 4) for n in lengths) for m in methods]
    for batch, after in zip(batches, [*batches[1:], []], strict=True):
        need = sum(needs[place] for place in batch)
        assert need <= SHARE * free or len(batch) == 1
        # The next one would not have fitted.
        assert not after or need + needs[after[0]] > SHARE * free


def test_a_row_is_no_larger_than_planned(reader: Checkpoint) -> None:
    """Against what the cache itself states, at the last token."""
    length, new = 300, 20
    ids = torch.randint(4, 40, (1, length), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for budget in (None, 16, 128, 400):
        chosen = (
            make_method("fullkv", reader.shape)
            if budget is None
            else make_method("adakv", reader.shape, budget=budget, window=8)
        )
        cache = HeadBudgetCache(chosen)
        reader.model.generate(
            **given,
            **{CACHE_ARGUMENT: cache},
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
        )
        held = cache.bytes()
        planned = row_bytes(chosen, length, new, token_bytes(reader.model))
        assert 0.9 * planned < held.keys + held.values + held.slack
        assert held.keys + held.values < planned


def test_free_memory_is_some(reader: Checkpoint) -> None:
    assert free_memory(reader.model) > 1 << 20


@pytest.mark.gpu
def test_what_torch_holds_and_does_not_use_is_free() -> None:
    model = torch.nn.Linear(8, 8, device="cuda")
    before = free_memory(model)
    held = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    assert before - free_memory(model) == pytest.approx(1 << 28, rel=0.2)
    del held
    assert free_memory(model) == pytest.approx(before, abs=1 << 26)


def test_what_is_out_of_memory() -> None:
    assert all(out_of_memory(error) for error in ERRORS)
    assert not out_of_memory(RuntimeError("shapes do not fit"))
    assert not out_of_memory(ValueError("not enough memory of the question"))


# --- micro-batches ------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "batches"), [(0.0, 5), (0.62, 2), (4.0, 1)])
def test_answers_are_the_same_in_however_many_batches(
    reader: Checkpoint,
    answers: Path,
    undisturbed: list[list[str]],
    memory: Callable[[int], None],
    decodings: list[tuple[int, int]],
    share: float,
    batches: int,
) -> None:
    """Free memory as a share of what full KV's rows and the rest's take together."""
    memory(int(share * 4 * 1000 * token_bytes(reader.model)))
    with log() as lines:
        runner = runner_for(reader, answers)
        said = ask_all(runner, pages(4))
    assert said == undisturbed
    assert len(decodings) == batches
    assert sum(methods for _, methods in decodings) == len(CELLS)
    told = [line for line in lines if "micro-batches" in line]
    assert len(told) == (batches > 1)
    stored = rows(answers)
    assert len(stored) == len({row.key for row in stored}) == 4 * len(CELLS)
    compared = {row.cell for row in stored if row.record["kl_full"] is not None}
    assert (len(compared) == 0) == (batches == 5)
    assert runner.words(runner.cells[1], "pages") not in compared


# --- memory that runs out anyway ------------------------------------------------------------------


def short_of_memory(
    monkeypatch: pytest.MonkeyPatch, error: Exception, fits: Callable[[int, list[str]], bool]
) -> None:
    """Let decoding fail with an error unless so many samples under these methods fit."""
    decode = runners.Runner.decode_batch

    def limited(model: Any, samples: Sequence, inputs: Any, cells: Sequence) -> Any:
        if not fits(len(samples), [cell.method.name for cell in cells]):
            raise error
        return decode(model, samples, inputs, cells)

    monkeypatch.setattr(runners.Runner, "decode_batch", limited)


@pytest.mark.parametrize(
    ("error", "most"), [*((error, 3) for error in ERRORS), (ERRORS[0], 12), (ERRORS[0], 1)]
)
def test_running_out_of_memory_loses_nothing(
    reader: Checkpoint,
    answers: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: list[list[str]],
    error: Exception,
    most: int,
) -> None:
    """Whether 12 rows fit, 3, or only one: methods are halved first, then samples."""
    short_of_memory(monkeypatch, error, lambda samples, names: samples * len(names) <= most)
    with log() as lines:
        said = ask_all(runner_for(reader, answers), pages(4))
    assert said == undisturbed
    stored = rows(answers)
    assert len(stored) == len({row.key for row in stored}) == 4 * len(CELLS)
    assert not [row for row in stored if row.error]
    warned = [line for line in lines if line.startswith("WARNING")]
    assert "4 samples under 5 methods" in warned[0]
    assert all("out of memory" in line or "a batch of" in line for line in warned)
    assert [line for line in warned if "a batch of" in line] or most >= 4


def test_one_method_that_fits_nowhere_fails_alone(
    reader: Checkpoint,
    answers: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: list[list[str]],
) -> None:
    short_of_memory(monkeypatch, ERRORS[0], lambda samples, names: "fullkv" not in names)
    runner = runner_for(reader, answers)
    with pytest.raises(SampleFailures, match="4 samples failed") as caught:
        ask_all(runner, pages(4))
    assert "out of memory" in str(caught.value)
    texts = {(row.cell, row.doc_id): row.text for row in rows(answers)}
    for cell, expected in zip(runner.cells, undisturbed, strict=True):
        if cell.method.name != "fullkv":
            words = runner.words(cell, "pages")
            assert [texts[words, f"test {n}"] for n in range(4)] == expected
    failed = [row for row in rows(answers) if row.error]
    assert {row.cell for row in failed} == {runner.words(runner.cells[1], "pages")}
    assert len([row for row in rows(answers) if row.text is not None]) == 4 * 4


def test_a_prompt_that_fits_nowhere_while_it_is_read(
    reader: Checkpoint, answers: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: list[list[str]]
) -> None:
    """The image processor runs out of memory with more than one image."""
    read = runners.Runner.read_batch

    def limited(model: Any, samples: Sequence) -> Any:
        if len(samples) > 1:
            raise ERRORS[3]
        return read(model, samples)

    monkeypatch.setattr(runners.Runner, "read_batch", limited)
    assert ask_all(runner_for(reader, answers), pages(4)) == undisturbed
