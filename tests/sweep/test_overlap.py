"""A sweep whose method was calibrated on what is scored says so, in every table."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from sparsemm_eval.cli import app
from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.tasks import requests_of, task_manager
from sparsemm_eval.heads.calibration import calibration_prompts
from sparsemm_eval.methods import Sensitivity
from sparsemm_eval.methods.sensitivity import Kind
from sparsemm_eval.report.names import method_label

MODEL, SAMPLES = "embedded:qwen2vl", 4
TASKS = ("docvqa_mini", "gqa_mini", "vqav2_mini")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two methods that read one file: of two scored documents of DocVQA, and of
    documents of GQA that are not scored.
    """
    folder = tmp_path_factory.mktemp("overlap")
    checkpoint = Checkpoint(MODEL, dtype="float32")
    family, shape = checkpoint.family(), checkpoint.shape
    scored = requests_of("docvqa_mini", task_manager(["docvqa_mini"]), 2)
    digests = {
        "docvqa_mini": [one.read(checkpoint.processor, family).digest for one in scored],
        "gqa_mini": [one.digest for one in calibration_prompts(checkpoint, "gqa_mini", 3)],
    }
    worth = np.arange(1.0, 1 + shape.layers * shape.kv_heads).reshape(shape.layers, -1)
    kinds = {name: Kind(worth, len(own), 9, tuple(own)) for name, own in digests.items()}
    rules = np.zeros(worth.shape, dtype=np.int64)
    tables = {16: np.full(worth.shape, 16)}
    Sensitivity(shape, 8, kinds, rules, tables).write(folder / "own.json")
    grid = {
        "models": [{
            "name": "reader", "pretrained": MODEL,
            "settings": {"sensitivity": str(folder / "own.json"),
                         "head_scores": str(folder / "own.json")},
        }],
        "tasks": [*TASKS], "methods": ["fullkv", "snapkv", "sparsemm", "sensitivity"],
        "budgets": [32], "window": 8, "samples": SAMPLES,
    }  # fmt: skip
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    done = CliRunner().invoke(app, ["sweep", str(folder / "grid.yaml"), "-o", str(folder / "out")])
    assert done.exit_code == 0, done.output
    (folder / "out" / "said").write_text(done.stderr)
    return folder / "out"


ON_DOCVQA = f"docvqa_mini (2 documents, 2 of them among the {SAMPLES} scored)"
ON_GQA = f"gqa_mini (3 documents, none of them among the {SAMPLES} scored)"
METHODS = [method_label(name, {}) for name in ("sparsemm", "sensitivity")]


def test_each_table_of_a_task_says_it(out: Path) -> None:
    for name in ("table.md", "kept.md"):
        text = (out / name).read_text()
        for method in METHODS:
            assert text.count(f"{method} was calibrated on {ON_DOCVQA}.") == 1
            assert text.count(f"{method} was calibrated on {ON_GQA}.") == 1
        assert text.count("was calibrated on") == 2 * len(METHODS)


def test_the_command_says_it_in_the_end(out: Path) -> None:
    said = (out / "said").read_text()
    for method in METHODS:
        assert f"sparsemm-eval: {method} was calibrated on {ON_DOCVQA}, {ON_GQA}." in said


def test_tables_and_the_page_say_it(out: Path, tmp_path: Path) -> None:
    lines = [f"{method} was calibrated on {ON_DOCVQA}, {ON_GQA}." for method in METHODS]
    shown = CliRunner().invoke(app, ["table", str(out)]).stdout
    assert all(line in shown for line in lines)
    of_docvqa = CliRunner().invoke(app, ["table", str(out), "--benchmarks", "docvqa"]).stdout
    assert ON_DOCVQA in of_docvqa
    assert ON_GQA not in of_docvqa
    assert (
        "calibrated"
        not in CliRunner().invoke(app, ["table", str(out), "--methods", "snapkv,fullkv"]).stdout
    )
    done = CliRunner().invoke(app, ["report", str(out), "-o", str(tmp_path)])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "index.html").read_text()
    assert all(line in page for line in lines)


def test_each_results_file_states_it(out: Path) -> None:
    """Of every method that reads the file, on every task; the others were not calibrated."""
    found = {}
    for path in (out / "cells").rglob("*_results.json"):
        content = json.loads(path.read_text())
        (task,) = content["results"]
        method = dict(pair.split("=", 1) for pair in content["config"]["model_args"].split(","))[
            "method"
        ]
        found[method, task] = {
            name.removeprefix("avg_calibration_documents"): value
            for name, value in content["throughput"].items()
            if name.startswith("avg_calibration_documents")
        }
    kinds = {"/docvqa_mini": 2, "/gqa_mini": 3}
    assert len(found) == 4 * len(TASKS)
    for (method, task), stated in found.items():
        if method in ("fullkv", "snapkv"):
            assert stated == {}
        else:
            shared = {"_scored/docvqa_mini": 2} if task == "docvqa_mini" else {}
            assert stated == kinds | shared
