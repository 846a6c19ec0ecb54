"""``bench selection``: what it measures is what a cache does, and it runs from its command."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from sparsemm_eval.bench.models import grid_methods, heavy_scores
from sparsemm_eval.bench.options import SelectionOptions
from sparsemm_eval.bench.selection import _with_scores, run
from sparsemm_eval.cli import app
from sparsemm_eval.errors import UserError
from sparsemm_eval.methods import ModelShape, PromptLayer, keep_rows, method_names


@pytest.mark.parametrize("large", [False, True])
def test_scores_that_are_given_select_what_scores_that_are_computed_do(large: bool) -> None:
    shape = ModelShape(4, 4, 2)
    methods = grid_methods(shape, heavy_scores(4, 4), large)
    assert len(methods) == 31
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(heads, 2100, 8, generator=generator) for heads in (4, 2))
    scored = _with_scores(methods, methods[1].scorer(query, key))
    layer = PromptLayer(1, query, key)
    assert torch.equal(keep_rows(scored, layer), keep_rows(methods, layer))


def test_runs_from_its_command(tmp_path: Path) -> None:
    arguments = ["--shape", "qwen2vl", "--tokens", "2049", "--repeats", "1", "--out", str(tmp_path)]
    done = CliRunner().invoke(app, ["bench", "selection", *arguments])
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.glob("selection-*.json")
    assert str(path) in done.output
    made = json.loads(path.read_text())
    assert {"command", "commit", "versions", "hardware"} <= set(made)
    for grid in made["grids"].values():
        assert grid["cells"] == 31
        assert grid["kept_tokens"] > 0
        times, shares = grid["milliseconds"], grid["share_of_scoring"]
        assert min(times.values()) > 0
        for part, share in shares.items():
            assert share == pytest.approx(times[part] / times["scoring"], rel=0.05, abs=2e-3)
    methods = made["methods"]
    assert {*methods["milliseconds"]} == {*method_names()} - {"fullkv"}
    for name, share in methods["share_of_reading"].items():
        own = methods["milliseconds"][name] / methods["reading_milliseconds"]
        assert share == pytest.approx(own, rel=0.05, abs=1e-3)


@pytest.mark.parametrize(
    ("settings", "named"), [({"tokens": 2048}, "tokens=2048"), ({"shape": "gpt"}, "shape='gpt'")]
)
def test_settings_that_cannot_be(tmp_path: Path, settings: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        run(SelectionOptions(**settings, out=tmp_path), "selection")
