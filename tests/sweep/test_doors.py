"""The doors for a method and a task of one's own, each from outside the package to a table."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from engine.fixtures import rows
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from sparsemm_eval.cli import app
from sparsemm_eval.methods import registry
from sparsemm_eval.tiny import default_checkpoint

METHOD = '''"""A method that nobody else has."""
from dataclasses import dataclass

import numpy as np
from sparsemm_eval.methods import Allocation, Prompt, register_method


@dataclass(frozen=True)
class EarlyLayers(Allocation):
    """The first half of the layers gets `share` of the budget."""

    share: float = 0.8

    def wants(self, prompt: Prompt) -> np.ndarray:
        layers, heads = prompt.shape.layers, prompt.shape.kv_heads
        early = np.arange(layers) < layers / 2
        weights = np.where(early, self.share / early.sum(), (1 - self.share) / (~early).sum())
        return np.repeat(weights[:, None] * prompt.base * layers, heads, axis=1)

    def paper(self, prompt: Prompt) -> np.ndarray:
        return np.rint(self.wants(prompt)).astype(int)


register_method("early", EarlyLayers)
'''
GRID = {
    "models": [
        {"name": "reader", "pretrained": "embedded:qwen2vl", "settings": {"dtype": "float32"}}
    ],
    "tasks": ["docvqa_mini"],
    "methods": ["fullkv", "early"],
    "budgets": [32],
    "share": [0.6, 0.8],
    "window": 8,
    "samples": 2,
    "batch_size": 2,
}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@pytest.fixture(autouse=True)
def _outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """No method of one test is known to another, and nothing comes from the network."""
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "my_methods.py"
    path.write_text(METHOD)
    return path


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(GRID))
    return path


def run(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


def refused(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 1
    assert done.output.count("\n") == 1, done.output
    return done.output


# --- a method ------------------------------------------------------------------------------------


def test_a_method_of_ones_own_goes_through_a_sweep_to_tables_and_figures(
    plugin: Path, grid: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shown = run("sweep", grid, "-o", out, "--plugin", plugin, "--dry-run")
    assert "method=early,budget=32,window=8,share=0.6" in shown
    shown = run("sweep", grid, "-o", out, "--plugin", plugin)
    assert "early (share=0.6)" in shown
    assert "early (share=0.8)" in shown
    plan = json.loads((out / "plan.json").read_text())
    assert list(plan["plugins"]) == [str(plugin)]
    table = run("table", out)
    assert "early (share=0.6)" in table
    run("figure", out, "-o", tmp_path / "figures")
    run("report", out, "-o", tmp_path / "page", "--no-images")
    assert "early" in (tmp_path / "page" / "index.html").read_text()
    # Another version of the method is another cell: nothing of the old one is taken for it.
    before = {row.key for row in rows(out / "answers" / "reader")}
    other = tmp_path / "other" / "my_methods.py"
    other.parent.mkdir()
    other.write_text(METHOD.replace("layers / 2", "layers / 3"))
    registry._registry.pop("early")
    words = refused("sweep", grid, "-o", out, "--plugin", other)
    assert "plugin" in words
    run("sweep", grid, "-o", tmp_path / "again", "--plugin", other)
    after = {row.key for row in rows(tmp_path / "again" / "answers" / "reader")}
    assert len(after) == len(before) == 6
    assert len(before & after) == 2  # full KV is ours


def test_the_demo_shows_the_method_beside_the_papers(plugin: Path, tmp_path: Path) -> None:
    shown = run(
        "demo", "--out", tmp_path, "--plugin", plugin, "--samples", 2, "--budgets", 32,
        "--tasks", "docvqa_mini", "--models", "qwen2vl", "--masked", 0,
    )  # fmt: skip
    (header,) = (line for line in shown.splitlines() if line.startswith("| budget 32"))
    assert "early" in header
    assert "| early" in (tmp_path / "kept.md").read_text()


def test_jobs_get_the_method_with_their_command(plugin: Path, grid: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["submit", grid, "-o", out, "--plugin", plugin.name, "--shards", 2]
    done = subprocess.run(
        [sys.executable, "-m", "sparsemm_eval", *map(str, words)],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    table = (out / "table.md").read_text()
    assert "early (share=0.6)" in table
    assert len(rows(out / "answers" / "reader")) == 6
    folders = [shutil.copytree(out, tmp_path / name) for name in "ab"]
    assert "0 conflicts" in run("merge", *folders, "-o", tmp_path / "c", "--plugin", plugin)
    assert json.loads((tmp_path / "c" / "plan.json").read_text())["plugins"]


def test_plain_lmms_eval_takes_the_method_through_model_args(plugin: Path, tmp_path: Path) -> None:
    model_args = (
        f"pretrained={default_checkpoint()},dtype=float32,method=early,budget=32,window=8,"
        f"share=0.6,plugin={plugin},answers={tmp_path / 'answers'}"
    )
    tasks = Path(__file__).parents[2] / "tasks"
    done = subprocess.run(
        [sys.executable, "-m", "lmms_eval", "--model", "qwen2vl_sparsemm", "--model_args",
         model_args, "--tasks", "docvqa_mini", "--limit", "2", "--include_path", str(tasks),
         "--output_path", str(tmp_path / "runs")],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert list((tmp_path / "runs").rglob("*_results.json")), done.stdout + done.stderr
    assert "| early" in run("table", tmp_path / "runs")
    (first, second) = rows(tmp_path / "answers")
    assert first.cell == second.cell
    assert "early(" in first.cell
    assert "share=0.6" in first.cell


@pytest.mark.parametrize(("changed", "words"), [
    ({"shares": [0.6]}, "shares: a grid has no such key; it knows name, models, tasks, methods"),
    ({"share": [0.6, "much"]}, "share[1]='much': it must be a number"),
    ({"methods": ["fullkv", "late"]}, "methods[1]: method='late': it must be one of fullkv"),
    ({"plugin": "my_methods.py"}, "plugin: a grid has no such key"),
])  # fmt: skip
def test_what_cannot_be_names_what_is_known(
    changed: dict, words: str, plugin: Path, grid: Path, tmp_path: Path
) -> None:
    grid.write_text(yaml.safe_dump({**GRID, **changed}))
    said = refused("sweep", grid, "-o", tmp_path / "out", "--plugin", plugin)
    assert words in said
    if "no such key" in words:
        assert "share" in said.split("it knows")[1]


def test_without_the_plugin_its_method_and_its_setting_are_unknown(
    grid: Path, tmp_path: Path
) -> None:
    assert "share: a grid has no such key" in refused("sweep", grid, "-o", tmp_path / "out")


@pytest.mark.parametrize(("text", "words"), [
    ("import nothing_like_it\n", "cannot be imported (ModuleNotFoundError"),
    ("def f(:\n", "cannot be imported (SyntaxError"),
    ("register_method = None\n", "it registers neither a method nor a family; let it call"),
    (METHOD.replace('"early"', '"snapkv"'), "method 'snapkv' is registered already"),
    (METHOD.replace("    share: float", "    window: float"), "two settings named window"),
])  # fmt: skip
def test_a_broken_plugin_is_one_sentence(
    text: str, words: str, plugin: Path, grid: Path, tmp_path: Path
) -> None:
    plugin.write_text(text)
    said = refused("sweep", grid, "-o", tmp_path / "out", "--plugin", plugin)
    assert words in said
    assert str(plugin) in said
    assert "there is no such file" in refused("sweep", grid, "--plugin", tmp_path / "no.py")


def test_installed_packages_bring_methods(tmp_path: Path) -> None:
    """Through an entry point, in a process of its own that has the package on its path."""
    (tmp_path / "their_methods").mkdir()
    (tmp_path / "their_methods" / "__init__.py").write_text(METHOD)
    info = tmp_path / "their_methods-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-methods\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[sparsemm_eval.methods]\nearly = their_methods\n")
    code = (
        "from sparsemm_eval.methods import method_digest, method_names, method_settings;"
        "print(method_names()[-1], 'share' in method_settings('early'), method_digest('early'))"
    )
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"]
    name, share, digest = subprocess.check_output(command, text=True).split()
    assert (name, share) == ("early", "True")
    assert len(digest) == 64
    (tmp_path / "their_methods" / "__init__.py").write_text("raise RuntimeError('worn out')\n")
    done = subprocess.run(command, capture_output=True, text=True)
    assert "the installed package their-methods (entry point early) cannot be" in done.stderr


def test_silenced_heads_are_rows_of_their_own(grid: Path, tmp_path: Path) -> None:
    values = {**GRID, "methods": ["fullkv", "snapkv"], "mask_heads": ["none", "visual:0.1"]}
    values.pop("share")
    grid.write_text(yaml.safe_dump(values))
    shown = run("sweep", grid, "-o", tmp_path / "out")
    rows_of = {line.split("|")[1].strip() for line in shown.splitlines() if line.startswith("| ")}
    masked = {"FullKV (mask_heads=visual:0.1)", "SnapKV (mask_heads=visual:0.1)"}
    assert rows_of == {"method", "FullKV", "SnapKV", *masked}
    cells = json.loads((tmp_path / "out" / "summary.json").read_text())["cells"]
    scores = {cell["label"]: cell["score"] for cell in cells}
    assert scores["FullKV"] > scores["FullKV (mask_heads=visual:0.1)"]
    assert "FullKV (mask_heads=visual:0.1)" in run("table", tmp_path / "out")


# --- a task --------------------------------------------------------------------------------------

TASK = """
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function colours.visual
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 4}}
process_results: !function colours.results
metric_list:
  - {{metric: length, aggregation: mean, higher_is_better: false}}
  - {{metric: hit, aggregation: mean, higher_is_better: true}}
"""
CODE = """from PIL import Image


def visual(doc):
    return [Image.open(doc["image"]).convert("RGB")]


def results(doc, answers):
    return {"length": len(answers[0]), "hit": float(answers[0].strip() == doc["answer"])}
"""


@pytest.fixture
def own_tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "own"
    folder.mkdir()
    lines = []
    for number, colour in enumerate(("red", "green", "blue")):
        image = Image.new("RGB", (160, 120), "white")
        ImageDraw.Draw(image).ellipse((40, 30, 100, 90), fill=colour)
        image.save(folder / f"{colour}.png")
        line = {"image": str(folder / f"{colour}.png"), "answer": colour, "id": number}
        lines.append(json.dumps({**line, "question": "what colour is the circle?"}))
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "colours.yaml").write_text(TASK.format(data=folder / "data.jsonl"))
    (folder / "colours.py").write_text(CODE)
    return folder


def test_readmes_task_goes_through_a_sweep_to_a_table(
    own_tasks: Path, grid: Path, tmp_path: Path
) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    folder = tmp_path / "my_tasks"
    folder.mkdir()
    for kind, name in (("yaml", "colours.yaml"), ("python", "colours.py")):
        (text,) = re.findall(rf"```{kind}\n(# my_tasks/{name}\n.*?)```", readme, re.DOTALL)
        (folder / name).write_text(text.replace("colours.jsonl", str(own_tasks / "data.jsonl")))
    grid.write_text(yaml.safe_dump({**GRID, "tasks": ["colours"], "methods": ["fullkv", "early"]}))
    plugin = tmp_path / "my_methods.py"
    blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (text,) = [block for block in blocks if "register_method(" in block]
    plugin.write_text(text)
    out = tmp_path / "out"
    shown = run("sweep", grid, "-o", out, "--include_path", folder, "--plugin", plugin)
    assert "colours: hit" in shown
    assert "early (share=0.6)" in shown


def test_a_task_of_ones_own_goes_through_a_sweep_and_jobs_to_a_table(
    own_tasks: Path, grid: Path, tmp_path: Path
) -> None:
    values = {**GRID, "tasks": ["colours"], "methods": ["fullkv", "snapkv"]}
    values.pop("share")
    grid.write_text(yaml.safe_dump(values))
    assert "there is no task colours" in refused("sweep", grid, "-o", tmp_path / "none")
    out = tmp_path / "out"
    run("sweep", grid, "-o", out, "--include_path", own_tasks, "--dry-run")
    shown = run("sweep", grid, "-o", out, "--include_path", own_tasks)
    assert "colours: length" in shown
    assert "SnapKV" in shown
    frame = json.loads((out / "summary.json").read_text())["cells"]
    assert {cell["metric"] for cell in frame} == {"length"}
    assert "colours" in run("table", out)
    words = ["submit", grid, "-o", tmp_path / "jobs", "--include_path", own_tasks.name]
    done = subprocess.run(
        [sys.executable, "-m", "sparsemm_eval", *map(str, words)],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "jobs" / "table.md").read_text() == (out / "table.md").read_text()
