"""The whole benchmark: files that say what they are, and options refused in one sentence."""

import inspect
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sparsemm_eval.bench.entries import ENTRIES
from sparsemm_eval.bench.kernels import main
from sparsemm_eval.bench.options import Options
from sparsemm_eval.bench.summary import aims, failures, notes, table
from sparsemm_eval.cli import app
from sparsemm_eval.cli.measure import kernels

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
    assert main([*arguments, *out]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_line_has_the_options_and_defaults_of_the_benchmark() -> None:
    given = inspect.signature(kernels).parameters
    assert {name: parameter.default for name, parameter in given.items()} == asdict(Options())


def test_quick_leaves_alone_what_is_given() -> None:
    quick = Options(quick=True, means="7").checked()
    assert (quick.means, quick.rows, quick.repeats) == ("7", "1", 3)


def test_a_gpu_machine_needs_no_more_than_torch_and_matplotlib(tmp_path: Path) -> None:
    """From a checkout, not installed, as a module."""
    code = (
        "import sys\n"
        "for name in ('lmms_eval', 'pydantic', 'platformdirs', 'typer', 'loguru', 'tabulate'):\n"
        "    sys.modules[name] = None\n"
        "from sparsemm_eval.bench.kernels import main\n"
        f"sys.exit(main({[*SMALL, '--means', '8', '--threads', '1', '--out', str(tmp_path)]!r}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.iterdir())) == 3


def test_aims_are_told_met_or_missed() -> None:
    ours = record("cuda_ext", 10.0, ratio_to_cuda_ext=1.0)
    padded = record("padded_sdpa", 40.0, ratio_to_cuda_ext=4.0)
    copied = record("concatenate", 40.0, ratio_to_cuda_ext=4.0)
    slow = record("concatenate", 9.0, ratio_to_cuda_ext=0.9, rows=4)
    bound = record("bound", 1.0, ratio_to_cuda_ext=0.1)
    three, five, ahead = aims([ours, padded, copied, slow, bound], "cpu")
    assert three.endswith("reached: 4.00; met in all 1 case")
    assert five.endswith("reached: 0.90 to 4.00; MISSED in 2 of 2 cases")
    assert ahead.endswith("reached: 0.90 to 4.00; MISSED in 1 of 2 cases")


def test_aims_of_a_gpu() -> None:
    graph = {"captured": True, "ratio_to_cuda_ext": 1.0}
    records = [
        record("cuda_ext", 5.0, share_of_bound=0.1, **graph),
        record("cuda_ext", 100.0, share_of_bound=0.6, **graph, rows=4),  # not of one row
        record("cuda_ext", 100.0, share_of_bound=0.75, **graph, mean=4096),
    ]
    share, small, ahead = aims(records, "cuda")
    assert share.endswith("reached: 0.75; met in all 1 case")
    assert small.endswith("reached: 5.00; met in all 1 case")
    assert ahead.endswith("not measured")


def test_aims_not_measured_are_not_met() -> None:
    assert all(line.endswith("not measured") for line in aims([], "cpu") + aims([], "cuda"))


def test_failures_name_their_case() -> None:
    broken = record("torch", None, failed=True, note="wrong: off by 1.0e+00")
    assert failures([broken]) == ["torch on vicuna float32 heavy 1 256: wrong: off by 1.0e+00"]


def test_the_table_leaves_out_what_was_never_timed() -> None:
    rows = [
        record("bound", 1.0, ratio_to_cuda_ext=0.1),
        record("cuda_ext", 10.0, ratio_to_cuda_ext=1.0, share_of_bound=0.1),
        record("torch", 123.4, ratio_to_cuda_ext=12.34, share_of_bound=0.01),
        record("varlen", None, note="CUDA only", ratio_to_cuda_ext=None),
    ]
    head, _, row = table(rows).splitlines()
    assert "varlen" not in head
    assert row == "| vicuna | float32 | heavy | 1 | 256 | 10.0 | 123 | 1.0 | 10% | 12.3 |"


def test_disturbed_cases_are_marked() -> None:
    records = [
        record("cuda_ext", 10.0, ratio_to_cuda_ext=1.0, share_of_bound=0.1, disturbed=True),
        record("cuda_ext", 10.0, ratio_to_cuda_ext=1.0, share_of_bound=0.1, rows=4),
    ]
    _, _, marked, calm = table(records).splitlines()
    assert "| 1 | 256* |" in marked
    assert "| 4 | 256 |" in calm
    assert "(1 case)" in notes(records)[0]


@pytest.mark.gpu
def test_on_a_gpu_graphs_are_timed(tmp_path: Path) -> None:
    assert main(["--quick", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.json")
    records = json.loads(path.read_text(encoding="utf-8"))["records"]
    for name in ("cuda_ext", "concatenate", "padded_sdpa", "varlen"):
        of_name = [r for r in records if r["entry"] == name]
        assert len(of_name) == 6
        assert all(r["captured"] and r["eager_us"] > 0 for r in of_name), name
