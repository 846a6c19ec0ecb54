"""``bench efficiency`` on a CPU: what it writes, that engines agree, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sparsemm_eval.bench.decode import decode_concatenated, decode_ours, decode_plain, decode_stock
from sparsemm_eval.bench.efficiency import ENGINES, bandwidth_of, run
from sparsemm_eval.bench.models import Subject, kept_tokens, kv_bytes, token_bytes, weight_bytes
from sparsemm_eval.bench.options import EfficiencyOptions, main
from sparsemm_eval.cache import CACHE_ARGUMENT, HeadBudgetCache
from sparsemm_eval.cli import app
from sparsemm_eval.report.efficiency import read_efficiency

ROOT = Path(__file__).parents[2]
SMALL = ["--quick", "--device", "cpu", "--threads", "1"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["vicuna-small", "mistral-small", "qwen2vl-small"])
def subject(request: pytest.FixtureRequest) -> Subject:
    torch.manual_seed(0)
    made = Subject.load(request.param, CPU, torch.float32)
    for parameter in made.model.parameters():  # so that tokens vary from step to step
        if parameter.ndim > 1:
            parameter.data.mul_(5)
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a quick run."""
    out = tmp_path_factory.mktemp("efficiency")
    done = CliRunner().invoke(app, ["bench", "efficiency", *SMALL, "--out", str(out)])
    assert done.exit_code == 0, done.output
    return out


def test_a_quick_run_measures_every_engine(made: Path) -> None:
    (path,) = made.glob("*.json")
    whole = json.loads(path.read_text(encoding="utf-8"))
    assert whole["kind"] == "efficiency"
    assert whole["hardware"]["kind"] == "cpu"
    assert whole["copy_bytes_per_second"] > 0
    assert len(whole["rows"]) == 2 * 2 * 5
    assert {row["engine"] for row in whole["rows"]} == {
        None, "hf_generate", "hf_static", "concatenate",
    }  # fmt: skip
    for row in [*whole["rows"], *whole["many_rows"]]:
        assert row["decode_ms_per_token"] > 0
        assert row["prefill_seconds"] > 0
        bound = (row["weight_bytes"] + row["kv_bytes_a_step"]) / whole["copy_bytes_per_second"]
        assert row["bound_ms_per_token"] == pytest.approx(1e3 * bound)
        assert row["decode_ms_q1"] <= row["decode_ms_per_token"] <= row["decode_ms_q3"]
    assert [row["rows"] for row in whole["many_rows"]] == [3, 3]
    frame = read_efficiency(path)
    assert len(frame) == len(whole["rows"])


def test_the_page_and_the_figure_lie_beside(made: Path) -> None:
    (text,) = (path.read_text(encoding="utf-8") for path in made.glob("*.md"))
    assert text.count("\n| 64 |") == 2 * 6
    assert "- aim: vicuna-small, 64 tokens, fullkv: no slower" in text
    (picture,) = made.glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_second_run_goes_on(made: Path) -> None:
    """Nothing is measured twice; what is asked for besides is, and the rest is kept."""
    (path,) = made.glob("*.json")
    before = json.loads(path.read_text(encoding="utf-8"))
    more = EfficiencyOptions(
        quick=True, device="cpu", threads=1, methods="fullkv,snapkv", engines="ours", out=made
    )
    done = run(more, "again")
    after = json.loads(path.read_text(encoding="utf-8"))
    assert not done.failures
    for row in before["rows"]:
        assert row in after["rows"]
    new = [row for row in after["rows"] if row not in before["rows"]]
    assert {row["method"] for row in new} == {"snapkv"}


def test_the_hosts_share(tmp_path: Path) -> None:
    """A part of a step."""
    options = EfficiencyOptions(
        models="vicuna-small", lengths="64", engines="ours", methods="sparsemm", rows="1",
        profile=True, quick=True, device="cpu", threads=1, out=tmp_path,
    )  # fmt: skip
    assert not run(options, "profile").failures
    (path,) = tmp_path.glob("*.json")
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 1
    assert 0 <= rows[0]["host_share"] < 1


def test_engines_give_the_same_tokens(subject: Subject) -> None:
    """Full KV however it is held, and a compressed cache however it is appended to."""
    prompt, steps = subject.prompts(90), 25
    full, sparse = subject.method("fullkv", None, 8), subject.method("sparsemm", 24, 8)
    wanted = decode_stock(subject.model, prompt, steps, 0).tokens
    assert len(set(wanted[0].tolist())) > 5
    assert torch.equal(decode_ours(subject.model, prompt, [full], steps).tokens, wanted)
    assert torch.equal(decode_plain(subject.model, prompt, full, steps).tokens, wanted)
    assert torch.equal(decode_stock(subject.model, prompt, steps, 0, static=True).tokens, wanted)
    ours = decode_ours(subject.model, prompt, [sparse], steps)
    plain = decode_plain(subject.model, prompt, sparse, steps)
    assert torch.equal(plain.tokens, ours.tokens)
    assert not torch.equal(ours.tokens, wanted)
    concatenated = decode_concatenated(subject.model, prompt, sparse, steps)
    assert torch.equal(concatenated.tokens, ours.tokens)
    assert concatenated.cache_bytes < ours.cache_bytes, "no slack"
    three = decode_ours(subject.model, prompt, [sparse] * 3, steps)
    assert torch.equal(three.tokens, ours.tokens.expand(3, -1))
    for timed in (ours, plain, concatenated, three):
        assert len(timed.step_ms) == steps
        assert min(timed.step_ms) > 0
    assert 0 < ours.compress_seconds < ours.prefill_seconds


@pytest.mark.parametrize("name", ["fullkv", "sparsemm", "snapkv", "pyramidkv"])
def test_bounds_count_what_is_kept(subject: Subject, name: str) -> None:
    method = subject.method(name, 24, 8)
    cache = HeadBudgetCache(method)
    with torch.inference_mode():
        subject.model(**subject.prompts(90), **{CACHE_ARGUMENT: cache}, logits_to_keep=1)
    assert kept_tokens([method], 90) == int(cache.kept().sum())
    held = cache.bytes()
    assert held.keys + held.values == kept_tokens([method], 90) * token_bytes(subject.model)
    sequences = cache.kept().numel()
    # The mean of three steps reads two tokens more a sequence, and each step writes one.
    read = kept_tokens([method], 90) + 2 * sequences + sequences
    assert kv_bytes(subject.model, [method], 90, 3) == read * token_bytes(subject.model)


def test_weights_that_a_step_reads(subject: Subject) -> None:
    """All but the vision tower and the embeddings, of which a step looks up one row."""
    every = sum(p.nbytes for p in subject.model.parameters())
    inner = subject.model.model
    left_out = [module for name, module in inner.named_children() if name != "language_model"]
    left_out.append(inner.language_model.embed_tokens)
    loose = list(inner.parameters(recurse=False))  # LLaVA-NeXT's newline
    apart = sum(p.nbytes for module in left_out for p in module.parameters())
    assert weight_bytes(subject.model) == every - apart - sum(p.nbytes for p in loose)


def test_a_dry_run_states_the_papers_bounds() -> None:
    """Against the floors worked out by hand for 4.2 TB/s."""
    done = CliRunner().invoke(app, ["bench", "efficiency", "--dry-run", "--bandwidth", "4200"])
    assert done.exit_code == 0, done.output
    cells = [line.split(" | ") for line in done.output.splitlines()]
    rows = {
        (c[0].strip("| "), c[1], c[2], c[3]): float(c[6])
        for c in cells
        if len(c) == 8 and c[3].isdecimal()
    }
    for model, floor in (
        ("LLaVA-NeXT-Vicuna-7B", 3.18), ("LLaVA-NeXT-Mistral-7B", 3.40),
        ("Qwen2-VL-7B-Instruct", 3.37),
    ):  # fmt: skip
        assert rows[model, "sparsemm 256", "32768", "1"] == pytest.approx(floor, abs=0.02)
    full = rows["LLaVA-NeXT-Vicuna-7B", "fullkv", "32768", "1"]
    assert full / rows["LLaVA-NeXT-Vicuna-7B", "sparsemm 256", "32768", "1"] == pytest.approx(
        2.28, abs=0.02
    )
    assert ("LLaVA-NeXT-Vicuna-7B", "sparsemm 256", "2048", "31") in rows


def test_an_embedded_model_has_one_name_with_its_prefix_and_without() -> None:
    shown = []
    for name in ("qwen2vl", "embedded:qwen2vl"):
        options = EfficiencyOptions(dry_run=True, models=name, lengths="64")
        shown.append(run(options, "dry run").text)
    assert shown[0] == shown[1]
    assert "| qwen2vl | sparsemm 256 | 64 | 1 |" in shown[0]


BAD = [
    (["--models", "gpt"], "models='gpt': it must be one of vicuna, mistral, qwen2vl-7b, "),
    (["--lengths", "64,x"], "lengths='x': it must be an integer of at least 1"),
    (["--budgets", "0"], "budgets=0"),
    (["--methods", "magic"], "methods='magic': it must be one of fullkv, "),
    (["--engines", "fast"], f"engines='fast': it must be one of {', '.join(ENGINES)}"),
    (["--steps", "1"], "steps=1"),
    (["--dtype", "int8"], "dtype='int8'"),
    (["--device", "tpu"], "device='tpu'"),
    (["--dry-run", "--bandwidth", "fast"], "bandwidth='fast': it must be GB/s, such as 4200, or"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD)
def test_bad_options_are_one_sentence_and_exit_code_1(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = ["--quick", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["bench", "efficiency", *arguments, *out])
    assert done.exit_code == 1
    assert words in done.output
    assert main("efficiency", [*arguments, *out]) == 1
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bandwidths() -> None:
    assert bandwidth_of("4200") == 4.2e12
    assert bandwidth_of("H100") == 3.35e12
    for word in ("0", "-3", "nan", ""):
        with pytest.raises(ValueError, match="bandwidth="):
            bandwidth_of(word)


def test_it_runs_where_only_torch_and_transformers_are(tmp_path: Path) -> None:
    arguments = [*SMALL, "--models", "qwen2vl-small", "--out", str(tmp_path)]
    code = (
        "import sys\n"
        "for name in ('lmms_eval', 'pydantic', 'platformdirs', 'typer', 'loguru', 'psutil'):\n"
        "    sys.modules[name] = None\n"
        "from sparsemm_eval.bench.options import main\n"
        f"sys.exit(main('efficiency', {arguments!r}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.iterdir())) == 3
