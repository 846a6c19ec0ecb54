"""One case: what is right is timed, what is wrong is told, what does not fit is said."""

from itertools import count

import pytest
import torch
from bench.broken import Forgetful, NotANumber, Raising, Unmasked, WrongScale

from sparsemm_eval.bench.entries import ENTRIES, Concatenate, Entry, Padded, Torch
from sparsemm_eval.bench.layers import Layers
from sparsemm_eval.bench.measure import TOLERANCES, measure_case, share_memory, worst_error
from sparsemm_eval.bench.shapes import Case
from sparsemm_eval.bench.timing import DISTURBED, Disturbance, HostClock, Samples, in_turn
from sparsemm_eval.cache.backends import append_attend

HEAVY = Case("qwen2vl", 20, "heavy", 2, "float32")
CPU = torch.device("cpu")
AMPLE = 1 << 30


def measure(case: Case, entries: list[type[Entry]], memory: int = AMPLE) -> dict[str, dict]:
    records = measure_case(
        case, entries, HostClock(1 << 20), repeats=2, seconds=1.0, memory=memory, cold=0
    )
    return {record["entry"]: record for record in records}


@pytest.mark.parametrize("entry", [Concatenate, Padded, Torch])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("distribution", ["heavy", "uniform"])
@pytest.mark.parametrize("shape", ["vicuna", "mistral", "qwen2vl"])
def test_competitors_are_right_in_every_layer(
    shape: str, distribution: str, dtype: str, entry: type[Entry]
) -> None:
    """And again after a rewind, as they are when they are timed."""
    layers = Layers(Case(shape, 9, distribution, 2, dtype), 2, CPU)
    made = entry(layers, 2)
    outs = []
    for _ in range(2):
        layers.rewind()
        outs.append([made.step(layer).clone() for layer in range(2)])
        key, value = made.newest(1)
        assert torch.equal(key, layers.tokens[1].key)
        assert torch.equal(value, layers.tokens[1].value)
    assert worst_error(outs[0][0], layers.wanted) < TOLERANCES[dtype]
    assert torch.equal(outs[0][1], outs[1][1])
    assert not torch.allclose(outs[0][0], outs[0][1])  # buffers of their own


@pytest.mark.parametrize(("broken", "words"), [
    (WrongScale, "wrong: off by"),
    (Unmasked, "wrong: off by"),
    (NotANumber, "wrong: off by inf"),
    (Forgetful, "wrong: did not write the token"),
    (Raising, "failed: out of luck"),
])  # fmt: skip
def test_a_wrong_entry_is_told_and_not_timed(broken: type[Entry], words: str) -> None:
    found = measure(HEAVY, [broken, Concatenate])
    record = found[broken.name]
    assert record["median_us"] is None
    assert "repeats" not in record
    assert record["failed"]
    assert words in record["note"]
    assert found["concatenate"]["median_us"] > 0


def test_records_hold_what_they_say() -> None:
    found = measure(HEAVY, [Torch, Padded])
    bound, padded = found["bound"], found["padded_sdpa"]
    # bytes / (bytes copied per microsecond)
    assert bound["median_us"] == pytest.approx(bound["bytes"] / bound["copy_gb_s"] / 1e3)
    assert padded["bound_us"] == bound["median_us"]
    assert padded["share_of_bound"] == pytest.approx(padded["bound_us"] / padded["median_us"])
    assert padded["q1_us"] <= padded["median_us"] <= padded["q3_us"]
    assert padded["captured"] is False
    assert padded["cold"] is False  # one small layer, over and over
    assert padded["ratio_to_cuda_ext"] is None  # not among the entries
    assert padded["error"] < TOLERANCES["float32"]


def test_ratios_are_to_the_op() -> None:
    class Stand(Torch):
        """In the op's place."""

        name = "cuda_ext"

        def step(self, layer: int) -> torch.Tensor:
            token, store = self.layers.tokens[layer], self.layers.stores[layer]
            return append_attend("torch", *token, store, self.layers.scale)

    found = measure(HEAVY, [Stand, Padded])
    ours, padded = found["cuda_ext"], found["padded_sdpa"]
    assert ours["ratio_to_cuda_ext"] == 1
    assert padded["ratio_to_cuda_ext"] == padded["median_us"] / ours["median_us"]


def test_what_cannot_run_here_says_why() -> None:
    found = measure(HEAVY, [ENTRIES["varlen"], ENTRIES["flashinfer"], Torch])
    assert found["varlen"]["note"] == found["flashinfer"]["note"] == "CUDA only"
    assert found["varlen"]["median_us"] is None


def test_a_layout_that_does_not_fit_is_skipped() -> None:
    case = Case("qwen2vl", 256, "heavy", 4, "float32")
    memory = Layers.bytes(case) + Padded.bytes(case) - 1
    found = measure(case, [Padded, Torch], memory)
    assert found["padded_sdpa"]["note"].startswith("too large")
    assert found["padded_sdpa"]["median_us"] is None
    assert found["torch"]["median_us"] > 0


def test_nothing_runs_where_nothing_fits() -> None:
    found = measure(HEAVY, [Padded, Torch], memory=10)
    assert {record["median_us"] for record in found.values()} == {None}
    assert all(record["note"].startswith("too large") for record in found.values())


def test_cold_caches_take_layers_enough() -> None:
    wanted = 5 * Layers.bytes(HEAVY) - 1
    records = measure_case(
        HEAVY, [Torch], HostClock(1 << 20), repeats=7, seconds=9.0, memory=AMPLE, cold=wanted
    )
    assert records[1]["layers"] == 5
    assert records[1]["cold"] is True
    assert records[1]["repeats"] == 15  # a sweep of all layers, three times


@pytest.mark.parametrize(("limit", "counts"), [
    (1000, {"": 3, "a": 3, "b": 3}),
    (50, {"": 2, "a": 2, "b": 0}),  # b is too large beside the others
    (75, {"": 2, "a": 1, "b": 1}),
    (5, {"": 0, "a": 0, "b": 0}),
])  # fmt: skip
def test_memory_is_shared_in_turn(limit: int, counts: dict[str, int]) -> None:
    assert share_memory(limit, {"": 10, "a": 15, "b": 40}, 3) == counts


def test_entries_take_turns() -> None:
    """Round by round; who has enough, or took long enough after three rounds, is left alone."""
    turns = []

    def measure_once(name: str) -> list[float]:
        turns.append(name)
        return [float(next(numbers))]

    numbers = count()
    found = in_turn({n: lambda n=n: measure_once(n) for n in "ab"}, repeats=4, seconds=9.0)
    assert turns == list("ab") * 4
    assert found["a"].us == [0, 2, 4, 6]
    assert found["a"].quartiles() == (1.5, 3.0, 4.5)
    turns.clear()
    in_turn({n: lambda n=n: measure_once(n) for n in "ab"}, repeats=4, seconds=0.0)
    assert turns == list("ab") * 3


def test_quartiles_of_one_time_are_that_time() -> None:
    assert Samples([5.0]).quartiles() == (5.0, 5.0, 5.0)


@pytest.mark.parametrize(("rates", "tries", "kept"), [
    ([20.0], 1, 20.0),
    ([500.0, 30.0], 2, 30.0),
    ([500.0, 200.0, 300.0], 3, 200.0),  # the calmest, and said to be disturbed
])  # fmt: skip
def test_a_case_is_measured_again_where_others_took_the_cores(
    rates: list[float], tries: int, kept: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []

    class Counted(Torch):
        def step(self, layer: int) -> torch.Tensor:
            steps.append(layer)
            return super().step(layer)

    left = iter(rates)
    monkeypatch.setattr(Disturbance, "per_second", lambda self: next(left))
    record = measure(HEAVY, [Counted])["torch"]
    assert len(steps) == 1 + 2 * tries  # the check, then two of each try
    assert (record["taken_per_s"], record["repeats"]) == (kept, 2)
    assert record["disturbed"] is (kept > DISTURBED)
