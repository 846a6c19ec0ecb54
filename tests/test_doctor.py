"""The doctor tries what it reports, and its exit code says whether something is broken."""

import re
from typing import Any

import pytest
from torch import Tensor
from typer.testing import CliRunner

from sparsemm_eval import doctor
from sparsemm_eval.cache import RaggedKV
from sparsemm_eval.cache.extension import ExtensionError
from sparsemm_eval.cli import app


def test_all_is_well_once_it_is_built() -> None:
    done = CliRunner().invoke(app, ["doctor", "--build"])
    assert done.exit_code == 0, done.output
    for backend in ("cuda_ext", "torch"):
        found = re.search(rf"backend={backend} on cpu +right in (.+)", done.output)
        assert found
        assert {"float32", "bfloat16"} <= set(re.findall(r"(\w+) \(off", found[1]))
    assert "sparsemm_cpu.so" in done.output


def test_a_wrong_backend_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = RaggedKV.append_attend

    def off(kv: RaggedKV, *args: Any) -> Tensor:
        return right(kv, *args) + 0.1 * (args[-1] == "torch")

    monkeypatch.setattr(RaggedKV, "append_attend", off)
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert "backend=torch on cpu     WRONG in float32" in done.output


def test_a_failed_build_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(wanted: object) -> None:
        raise ExtensionError("no compiler; install one")

    monkeypatch.setattr(doctor, "build", fail)
    done = CliRunner().invoke(app, ["doctor", "--build"])
    assert done.exit_code == 1
    assert "no compiler; install one" in done.output


def test_arches_are_for_building() -> None:
    done = CliRunner().invoke(app, ["doctor", "--arches", "9.0"])
    assert done.exit_code == 1
    assert "needs --build" in done.output
