"""Head scores as an axis of a grid: cells that differ in nothing else, told apart everywhere."""

from pathlib import Path

import numpy as np
import yaml
from typer.testing import CliRunner

from sparsemm_eval.cli import app
from sparsemm_eval.engine.lmms import results_path
from sparsemm_eval.methods import ModelShape, Sensitivity
from sparsemm_eval.methods.sensitivity import Kind
from sparsemm_eval.report.results import load

SHAPE = ModelShape(5, 8, 4)


def test_cells_of_other_head_scores_are_other_rows(tmp_path: Path) -> None:
    losses = {"a": np.eye(5, 4), "b": np.fliplr(np.eye(5, 4))}
    kinds = {name: Kind(loss, 1, 3) for name, loss in losses.items()}
    path = tmp_path / "own.json"
    Sensitivity(SHAPE, 8, kinds, np.zeros((5, 4), dtype=np.int64)).write(path)
    names = ["visual", str(path), f"{path}@share+a+b*2", f"{path}@root+b"]
    grid = {
        "models": [{"name": "reader", "pretrained": "embedded:qwen2vl"}],
        "tasks": ["docvqa_mini"], "methods": ["fullkv", "sparsemm"], "budgets": [24],
        "window": 8, "allocation": "exact", "head_scores": names, "samples": 3,
    }  # fmt: skip
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["sweep", str(tmp_path / "grid.yaml"), "-o", str(out)])
    assert done.exit_code == 0, done.output
    labels = [f"SparseMM (head_scores={name})" for name in names]
    table = (out / "table.md").read_text().replace("\\", "")
    assert all(f"| {label} " in table for label in labels)
    cells = load([out]).cells
    assert set(cells["label"]) == {"FullKV", *labels}
    # Each was answered with its own scores, which share the budget otherwise.
    assert cells["kept_tokens_per_head"].iloc[1:].between(23.9, 24.1).all()
    assert len(list(out.glob("cells/reader/*_results.json"))) == 1 + len(names)


def test_a_file_of_results_has_a_name_of_its_own() -> None:
    def name(**cell: object) -> str:
        return results_path(Path(), "gqa", {"method": "sparsemm", **cell}).name

    assert name(budget=64, ratio=0.5) == "gqa-sparsemm-64-0.5_results.json"
    files = ["a@share", "a_share", "folder/a", "folder_a", "k" * 500, "k" * 501]
    made = {name(budget=64, head_scores=file) for file in files}
    assert len(made) == len(files)
    assert max(map(len, made)) < 160


def test_a_mixture_that_cannot_be_ends_the_sweep_before_it_begins(tmp_path: Path) -> None:
    kinds = {"a": Kind(np.eye(5, 4), 1, 3)}
    path = tmp_path / "own.json"
    Sensitivity(SHAPE, 8, kinds, np.zeros((5, 4), dtype=np.int64)).write(path)
    grid = {
        "models": [{"name": "reader", "pretrained": "embedded:qwen2vl"}],
        "tasks": ["docvqa_mini"], "methods": ["sparsemm"], "budgets": [24], "window": 8,
        "head_scores": f"{path}@root+c", "samples": 2,
    }  # fmt: skip
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    arguments = ["sweep", str(tmp_path / "grid.yaml"), "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    assert "it has no kind c; it has a" in done.stderr
    assert not list(tmp_path.glob("out/answers/**/*.sqlite"))
