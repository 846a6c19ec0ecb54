"""One declaration: what Typer's commands and plain command lines take, and its defaults."""

import inspect
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from sparsemm_eval.bench import options as declared
from sparsemm_eval.bench.efficiency import ENGINES
from sparsemm_eval.bench.entries import ENTRIES
from sparsemm_eval.bench.layers import DISTRIBUTIONS, LAYERS
from sparsemm_eval.bench.options import BENCHMARKS, Benchmark, KernelOptions, main
from sparsemm_eval.cli import app
from sparsemm_eval.cli.measure import bench_app


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What benchmarks are called with, which measure nothing."""
    calls: list[tuple] = []

    def run(name: str, options: Any, command: str) -> Benchmark:
        calls.append((name, options))
        return Benchmark("measured")

    monkeypatch.setattr("sparsemm_eval.cli.measure.run_benchmark", run)
    monkeypatch.setattr(declared, "run_benchmark", run)
    return calls


@pytest.mark.parametrize("name", BENCHMARKS)
def test_both_command_lines_take_every_option(name: str, asked: list[tuple]) -> None:
    kind = BENCHMARKS[name]
    plain = kind()
    other = {
        field: {str: "x", int: 7, float: 0.5, bool: True}.get(type(value), Path("elsewhere"))
        for field, value in asdict(plain).items()
    }
    arguments: list[str] = []
    for field, value in other.items():
        arguments += [f"--{field.replace('_', '-')}", *([] if value is True else [str(value)])]
    for given, options in (([], plain), (arguments, replace(plain, **other))):
        asked.clear()
        done = CliRunner().invoke(app, ["bench", name, *given])
        assert done.exit_code == 0, done.output
        assert main(name, given) == 0
        assert asked == [(name, options)] * 2


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_option_has_its_help(name: str, capsys: pytest.CaptureFixture) -> None:
    command = typer.main.get_command(bench_app).commands[name]
    helps = {one.name: one.help for one in BENCHMARKS[name].declared()}
    assert all(helps.values())
    assert {one.name: one.help for one in command.params if one.name != "help"} == helps
    with pytest.raises(SystemExit):
        main(name, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert inspect.getdoc(BENCHMARKS[name]) in text


def test_defaults_are_all_there_is() -> None:
    kernels = KernelOptions()
    assert kernels.words("shapes", LAYERS) == list(LAYERS)
    assert kernels.words("distributions", DISTRIBUTIONS) == list(DISTRIBUTIONS)
    assert kernels.words("entries", ENTRIES) == list(ENTRIES)
    help_of = {one.name: one.help for one in BENCHMARKS["efficiency"].declared()}
    assert all(engine in help_of["engines"] for engine in ENGINES)
