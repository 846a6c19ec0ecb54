"""The acceptance command: what it runs, that it goes on, and that it needs little."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparsemm_eval.bench.__main__ import (
    ROOT,
    TESTS,
    Part,
    main,
    parts_for,
    run_acceptance,
    summary,
)

# Not on a machine that only measures; transformers needs tqdm itself.
ABSENT = (
    "accelerate", "datasets", "lmms_eval", "loguru", "platformdirs", "psutil", "pydantic", "rich",
    "submitit", "tabulate", "tenacity", "typer", "xdist",
)  # fmt: skip
MADE = {"schema": 1, "code": "a", "versions": {"torch": "2"}}


def python(code: str) -> tuple[str, ...]:
    return ("-c", code)


def states(records: list[dict[str, Any]]) -> dict[str, str]:
    return {record["name"]: record["state"] for record in records}


def test_everything_on_a_cpu_where_little_is_installed(tmp_path: Path) -> None:
    """Every process of it: modules that are not there are refused by the interpreter itself."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nfor name in {ABSENT!r}:\n    sys.modules[name] = None\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # of xdist, which is not there
        "OMP_NUM_THREADS": "1",
    }
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "sparsemm_eval.bench", "--quick", "--device", "cpu", "--out", out],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = out.iterdir()
    whole = json.loads((folder / "acceptance.json").read_text(encoding="utf-8"))
    assert {part["state"] for part in whole["parts"]} == {"passed"}
    for name in ("efficiency", "kernels"):
        assert len(list((folder / name).glob("*.json"))) == 1
    assert (folder / "shared_prefill.json").is_file()
    # A short table last, and in a file.
    text = (folder / "acceptance.md").read_text(encoding="utf-8")
    assert done.stdout.endswith(text)
    assert "| efficiency | passed |" in text
    assert "- aim: vicuna-small, 64 tokens" in text
    assert "shared prefill, 31 cells of qwen2vl" in text


def test_parts_that_passed_are_not_run_again(tmp_path: Path) -> None:
    count = tmp_path / "count"
    touch = f"open({str(count)!r}, 'a').write('x')"
    parts = [
        Part("one", python(f"{touch}; print('done')")),
        Part("two", python(f"{touch}; raise SystemExit('no')")),
    ]
    first = run_acceptance(parts, tmp_path, MADE, 60)
    assert states(first) == {"one": "passed", "two": "FAILED"}
    assert [record["last"] for record in first] == ["done", "no"]
    assert states(run_acceptance(parts, tmp_path, MADE, 60)) == states(first)
    assert count.read_text() == "xxx"
    run_acceptance(parts, tmp_path, {**MADE, "code": "b"}, 60)
    assert count.read_text() == "xxxxx", "other code: all of it again"


def test_what_does_not_fit_in_is_left_for_the_next_call(tmp_path: Path) -> None:
    forever = "import time\nprint('begun', flush=True)\ntime.sleep(600)"
    parts = [Part("long", python(forever)), Part("short", python("print('ok')"))]
    first = run_acceptance(parts, tmp_path, MADE, 3)
    assert states(first) == {"long": "stopped", "short": "left"}
    text = summary(first, tmp_path)
    assert "2 parts are left: run the same command again" in text
    again = run_acceptance(parts[1:], tmp_path, MADE, 60)
    assert states(again) == {"short": "passed"}


@pytest.mark.parametrize(("device", "quick"), [("cpu", False), ("cuda", True), ("cuda", False)])
def test_parts_write_into_the_devices_folder(device: str, quick: bool, tmp_path: Path) -> None:
    parts = parts_for(device, tmp_path, quick)
    assert len({part.name for part in parts}) == len(parts)
    for part in parts[2:]:
        assert any(str(tmp_path) in word for word in part.arguments), part
    words = [word for part in parts for word in part.arguments]
    for module in ("efficiency", "kernels", "shared_prefill"):
        assert f"sparsemm_eval.bench.{module}" in words


def test_the_tests_it_runs_are_there() -> None:
    for path in TESTS:
        assert "gpu" in (ROOT / path).read_text(encoding="utf-8")


def test_no_time_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["--minutes", "0", "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == "sparsemm-eval: minutes=0.0: it must be above 0\n"
    assert not (tmp_path / "out").exists()
