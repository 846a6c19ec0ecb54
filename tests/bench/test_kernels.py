"""The whole benchmark: files that say what they are, and options refused in one sentence."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench.broken import Forgetful, NotANumber, Raising, Unmasked, WrongScale
from typer.testing import CliRunner

from sparsemm_eval.bench.entries import ENTRIES, Concatenate, Entry, Padded, Torch
from sparsemm_eval.bench.kernels import (
    TOLERANCES,
    checked,
    failures,
    measure_case,
    share_memory,
    worst_error,
)
from sparsemm_eval.bench.layers import Case, Layers
from sparsemm_eval.bench.options import KernelOptions, main
from sparsemm_eval.bench.timing import DISTURBED, Disturbance, HostClock
from sparsemm_eval.cache.backends import append_attend
from sparsemm_eval.cli import app

ROOT = Path(__file__).parents[2]
SMALL = ["--quick", "--shapes", "qwen2vl", "--means", "8,16", "--device", "cpu"]


def record(entry: str, us: float | None, **about: object) -> dict:
    case = {"shape": "vicuna", "mean": 256, "distribution": "heavy", "rows": 1, "dtype": "float32"}
    return {**case, "entry": entry, "median_us": us, "bytes": 1000, **about}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a quick run."""
    out = tmp_path_factory.mktemp("kernels")
    done = CliRunner().invoke(app, ["bench", "kernels", *SMALL, "--out", str(out)])
    assert done.exit_code == 0, done.output
    return out


def test_a_quick_run_writes_every_case_and_entry(made: Path) -> None:
    (path,) = made.glob("*.json")
    whole = json.loads(path.read_text(encoding="utf-8"))
    assert whole["schema"] == 1
    assert whole["command"].startswith("sparsemm-eval")
    assert whole["hardware"]["kind"] == "cpu"
    assert whole["hardware"]["name"]
    assert whole["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    cases = {(r["mean"], r["distribution"]) for r in whole["records"]}
    assert cases == {(m, d) for m in (8, 16) for d in ("heavy", "uniform")}
    for case in cases:
        found = {r["entry"]: r for r in whole["records"] if (r["mean"], r["distribution"]) == case}
        assert list(found) == ["bound", *ENTRIES]
        ours = found["cuda_ext"]["median_us"]
        for name in ("bound", "concatenate", "padded_sdpa", "torch"):
            assert found[name]["median_us"] > 0
            ratio = found[name]["ratio_to_cuda_ext"]
            assert ratio == (found[name]["median_us"] / ours if ours else None)
        for name, one in found.items():
            assert one["median_us"] or one["note"], name


def test_the_table_and_the_figure_lie_beside(made: Path) -> None:
    (text,) = (path.read_text(encoding="utf-8") for path in made.glob("*.md"))
    assert text.count("\n| qwen2vl | float32 |") == 4
    assert "quick" in text
    assert "- aim: heavy heads at mean 256" in text
    assert "not measured" in text
    (picture,) = made.glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


BAD = [
    (["--shapes", "llama"], "shapes='llama': it must be one of vicuna, mistral, qwen2vl"),
    (["--rows", "0"], "rows=0: it must be an integer of at least 1"),
    (["--means", "64,0"], "means=0: it must be an integer of at least 1"),
    (["--means", "many"], "means='many'"),
    (["--means", ","], "means=',': it must name at least one"),
    (["--dtype", "int8"], "dtype='int8'"),
    (["--entries", "magic"], "entries='magic'"),
    (["--distributions", "odd"], "distributions='odd'"),
    (["--device", "tpu"], "device='tpu'"),
    (["--threads", "-1"], "threads=-1"),
    (["--repeats", "0"], "repeats=0"),
    (["--memory", "-1"], "memory=-1.0"),
    (["--seconds", "nan"], "seconds=nan"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD)
def test_bad_options_are_one_sentence_and_exit_code_1(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = ["--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["bench", "kernels", *arguments, *out])
    assert done.exit_code == 1
    assert words in done.output
    assert done.output.count("\n") == 1
    assert main("kernels", [*arguments, *out]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_quick_leaves_alone_what_is_given() -> None:
    quick = checked(KernelOptions(quick=True, means="7"))
    assert (quick.means, quick.rows, quick.repeats) == ("7", "1", 3)


def test_a_gpu_machine_needs_no_more_than_torch_and_matplotlib(tmp_path: Path) -> None:
    """From a checkout, not installed, as a module."""
    arguments = [*SMALL, "--means", "8", "--threads", "1", "--out", str(tmp_path)]
    code = (
        "import sys\n"
        "for name in ('lmms_eval', 'pydantic', 'platformdirs', 'typer', 'loguru', 'tabulate'):\n"
        "    sys.modules[name] = None\n"
        "from sparsemm_eval.bench.options import main\n"
        f"sys.exit(main('kernels', {arguments!r}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.iterdir())) == 3


def test_failures_name_their_case() -> None:
    broken = record("torch", None, failed=True, note="wrong: off by 1.0e+00")
    assert failures([broken]) == ["torch on vicuna float32 heavy 1 256: wrong: off by 1.0e+00"]


# --- one case: what is right is timed, what is wrong is told, what does not fit is said -----------

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


@pytest.mark.gpu
def test_on_a_gpu_graphs_are_timed(tmp_path: Path) -> None:
    assert main("kernels", ["--quick", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    records = json.loads(path.read_text(encoding="utf-8"))["records"]
    for name in ("cuda_ext", "concatenate", "padded_sdpa", "varlen"):
        of_name = [r for r in records if r["entry"] == name]
        assert len(of_name) == 6
        assert all(r["captured"] and r["eager_us"] > 0 for r in of_name), name
