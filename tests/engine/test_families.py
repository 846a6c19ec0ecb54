"""The third door: a family in a file of the user's, from outside the package to a table."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from engine.fixtures import SHORT, Stock, ask, pages, rows
from engine.llava_checkpoints import build_llava_15
from typer.testing import CliRunner

from sparsemm_eval.cli import app
from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.lmms import SparseMM
from sparsemm_eval.errors import UserError
from sparsemm_eval.families import (
    Family,
    families,
    find_family,
    register_family,
    registry,
    video_families,
)
from sparsemm_eval.heads.regions import regions_of

FAMILY = '''"""LLaVA 1.5 on a head-budgeted cache."""
from dataclasses import dataclass
from typing import ClassVar

from sparsemm_eval.families import Family, register_family


@register_family
@dataclass(frozen=True)
class Llava15(Family):
    model_type: ClassVar[str] = "llava"
    lmms_name: ClassVar[str] = "llava15_sparsemm"
'''


@pytest.fixture(autouse=True)
def _outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """No family of one test is known to another, and nothing comes from the network."""
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)


@pytest.fixture(scope="module")
def llava_15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_llava_15(tmp_path_factory.mktemp("families") / "llava_15")


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "my_family.py"
    path.write_text(FAMILY)
    return path


def test_an_unknown_family_is_refused_before_weights_load(
    llava_15: Path, answers: Path, unloaded: None
) -> None:
    with pytest.raises(UserError, match="no family is known for model_type=llava:"):
        SparseMM(str(llava_15), method="fullkv", answers=answers)


def test_its_full_kv_is_stock_and_methods_compress(
    llava_15: Path, plugin: Path, answers: Path
) -> None:
    given = {"pretrained": str(llava_15), "dtype": "float32", "answers": answers, "batch_size": 3}
    documents = pages(3)
    full = SparseMM(**given, method="fullkv", plugin=str(plugin))
    stock = Stock(llava_15)
    assert ask(full, documents) == [stock.answer(document) for document in documents]
    ask(SparseMM(**given, method="snapkv", budget=24, window=8), documents)
    kept = {row.cell.split()[2].split("(")[0]: row.record["kept_per_head"] for row in rows(answers)}
    assert kept["snapkv"] == 24 < kept["fullkv"]
    assert all(row.cell.startswith("llava15_sparsemm ") for row in rows(answers))
    with pytest.raises(UserError, match="a llava model lie is not known; it is for"):
        regions_of("llava")


def test_through_a_sweep_to_a_table(llava_15: Path, plugin: Path, tmp_path: Path) -> None:
    model = {"name": "mine", "pretrained": str(llava_15), "settings": {"dtype": "float32"}}
    grid = {
        "models": [model],
        "tasks": ["docvqa_mini"], "methods": ["fullkv", "snapkv"], "budgets": [24], "window": 8,
        "samples": 2, "batch_size": 2,
    }  # fmt: skip
    path, out = tmp_path / "mine.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(grid))
    done = CliRunner().invoke(app, ["sweep", str(path), "-o", str(out), "--plugin", str(plugin)])
    assert done.exit_code == 0, done.output
    assert "| SnapKV" in (out / "table.md").read_text()
    assert list(json.loads((out / "plan.json").read_text())["plugins"]) == [str(plugin)]


def test_through_lmms_eval_itself(llava_15: Path, plugin: Path, tmp_path: Path) -> None:
    """Its own command line, in a process of its own; another source is another answer."""
    for version in (FAMILY, FAMILY + "# another version\n"):
        plugin.write_text(version)
        arguments = (
            f"pretrained={llava_15},plugin={plugin},method=snapkv,budget=24,window=8,"
            f"dtype=float32,answers={tmp_path / 'answers'}"
        )
        command = [
            sys.executable, "-m", "sparsemm_eval", "eval", "--model", "sparsemm", "--tasks",
            "docvqa_mini", "--limit", "2", "--model_args", arguments, "--output_path",
            str(tmp_path / "runs"),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    assert list((tmp_path / "runs").rglob("*_results.json"))
    assert len({row.key for row in rows(tmp_path / "answers")}) == 2 * 2


# --- what cannot be a family ----------------------------------------------------------------------


def test_what_cannot_be_a_family_is_one_sentence() -> None:
    class Plain(Family):
        model_type = "x"

    @dataclass(frozen=True)
    class Nameless(Family):
        model_type = "x"

    @dataclass(frozen=True)
    class Second(Family):
        model_type = "qwen2_vl"
        lmms_name = "second"

    for given, words in (
        (int, "must be a class deriving from Family"),
        (Plain, "must be a frozen dataclass"),
        (Nameless, "states no lmms_name"),
        (Second, "model_type 'qwen2_vl' is registered already"),
    ):
        with pytest.raises(UserError, match=words):
            register_family(given)


def test_every_family_of_the_package_says_what_it_is() -> None:
    assert {"llava_next", "qwen2_vl", "qwen2_5_vl"} <= set(families())
    names = [family.lmms_name for family in families().values()]
    assert len(names) == len(set(names))
    for model_type in families():
        assert find_family(model_type).model_type == model_type
        given = {"frames": 32} if model_type in video_families() else {}
        plain = dict.fromkeys(find_family(model_type).setting_names()) | given
        assert find_family(model_type)().settings == plain


def test_a_checkpoint_of_another_family_than_the_name(reader: Checkpoint, answers: Path) -> None:
    """``--model sparsemm`` takes any; answers are those of the family's own name."""
    model = SparseMM(checkpoint=reader, method="fullkv", answers=answers)
    ask(model, pages(1), SHORT)
    (row,) = rows(answers)
    assert row.cell == "qwen2vl_sparsemm pages fullkv()"
