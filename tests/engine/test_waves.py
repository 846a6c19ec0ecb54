"""Methods in waves that fit into memory: whatever is free, the answers are the same."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.fixtures import ask, log, pages, rows
from hypothesis import given
from hypothesis import strategies as st

from sparsemm_eval.cache import CACHE_ARGUMENT, HeadBudgetCache
from sparsemm_eval.engine import batches, wrapper
from sparsemm_eval.engine.answers import SampleFailures
from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.evaluate import make_models
from sparsemm_eval.engine.waves import (
    SHARE,
    free_memory,
    out_of_memory,
    plan_waves,
    row_bytes,
    token_bytes,
)
from sparsemm_eval.engine.wrapper import SparseMMModel
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


def answer_all(
    reader: Checkpoint, folder: Path, count: int = 4, batch_size: int = 4
) -> tuple[list[SparseMMModel], list[list[str]]]:
    """Answers of every cell to some pages."""
    models = make_models(reader, CELLS, batch_size=batch_size, answers=folder)
    return models, [ask(model, pages(count)) for model in models]


@pytest.fixture(scope="module")
def undisturbed(reader: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """Answers with all the memory one could wish."""
    return answer_all(reader, tmp_path_factory.mktemp("undisturbed"))[1]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """State how many bytes are free."""

    def put(free: int) -> None:
        monkeypatch.setattr(batches, "free_memory", lambda model: free)

    return put


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Collect (samples, methods) of all that is decoded together."""
    seen = []
    decode = wrapper.SparseMMModel.decode_batch

    def watched(model: Any, samples: Sequence, inputs: Any, methods: Sequence) -> Any:
        seen.append((len(samples), len(methods)))
        return decode(model, samples, inputs, methods)

    monkeypatch.setattr(wrapper.SparseMMModel, "decode_batch", watched)
    return seen


# --- the plan -----------------------------------------------------------------------------------


@given(
    st.lists(st.none() | st.integers(1, 500), min_size=1, max_size=12),
    st.lists(st.integers(1, 400), min_size=1, max_size=4),
    st.integers(1, 64),
    st.integers(0, 200_000),
)
def test_every_method_has_its_place_and_every_wave_fits(
    budgets: list[int | None], lengths: list[int], new: int, free: int
) -> None:
    methods = [method(budget) for budget in budgets]
    waves = plan_waves(methods, lengths, new, 4, free)
    flat = [place for wave in waves for place in wave]
    assert sorted(flat) == list(range(len(methods)))
    whole = [place for place in flat if budgets[place] is None]
    assert flat == whole + [place for place in range(len(methods)) if budgets[place] is not None]
    needs = [sum(row_bytes(m, n, new, 4) for n in lengths) for m in methods]
    for wave, after in zip(waves, [*waves[1:], []], strict=True):
        need = sum(needs[place] for place in wave)
        assert need <= SHARE * free or len(wave) == 1
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


# --- waves --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "waves"), [(0.0, 5), (0.62, 2), (4.0, 1)])
def test_answers_are_the_same_in_however_many_waves(
    reader: Checkpoint,
    answers: Path,
    undisturbed: list[list[str]],
    memory: Callable[[int], None],
    decodings: list[tuple[int, int]],
    share: float,
    waves: int,
) -> None:
    """Free memory as a share of what full KV's rows and the rest's take together."""
    memory(int(share * 4 * 1000 * token_bytes(reader.model)))
    with log() as lines:
        models, said = answer_all(reader, answers)
    assert said == undisturbed
    assert len(decodings) == waves
    assert sum(methods for _, methods in decodings) == len(CELLS)
    told = [line for line in lines if "waves" in line]
    assert len(told) == (waves > 1)
    stored = rows(answers)
    assert len(stored) == len({row.key for row in stored}) == 4 * len(CELLS)
    compared = {row.cell for row in stored if row.record["kl_full"] is not None}
    assert (len(compared) == 0) == (waves == 5)
    assert models[1].cell_of("pages") not in compared


# --- memory that runs out anyway ------------------------------------------------------------------


def short_of_memory(
    monkeypatch: pytest.MonkeyPatch, error: Exception, fits: Callable[[int, list[str]], bool]
) -> None:
    """Let decoding fail with an error unless so many samples under these methods fit."""
    decode = wrapper.SparseMMModel.decode_batch

    def limited(model: Any, samples: Sequence, inputs: Any, methods: Sequence[Method]) -> Any:
        if not fits(len(samples), [method.name for method in methods]):
            raise error
        return decode(model, samples, inputs, methods)

    monkeypatch.setattr(wrapper.SparseMMModel, "decode_batch", limited)


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
        _, said = answer_all(reader, answers)
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
    models = make_models(reader, CELLS, batch_size=4, answers=answers)
    documents = pages(4)
    for model, expected in zip(models, undisturbed, strict=True):
        if model.method.name == "fullkv":
            with pytest.raises(SampleFailures, match="4 samples failed") as caught:
                ask(model, documents)
            assert "out of memory" in str(caught.value)
        else:
            assert ask(model, documents) == expected
    failed = [row for row in rows(answers) if row.error]
    assert {row.cell for row in failed} == {models[1].cell_of("pages")}
    assert len([row for row in rows(answers) if row.text is not None]) == 4 * 4


def test_a_prompt_that_fits_nowhere_while_it_is_read(
    reader: Checkpoint, answers: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: list[list[str]]
) -> None:
    """The image processor runs out of memory with more than one image."""
    read = wrapper.SparseMMModel.read_batch

    def limited(model: Any, samples: Sequence) -> Any:
        if len(samples) > 1:
            raise ERRORS[3]
        return read(model, samples)

    monkeypatch.setattr(wrapper.SparseMMModel, "read_batch", limited)
    assert answer_all(reader, answers)[1] == undisturbed
