"""What --dry-run says: the numbers follow the grid, and what is not known is called so."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from sparsemm_eval.cli import app
from sparsemm_eval.sweep.estimate import (
    DEVICES,
    config_of,
    cost,
    decoder_weights,
    describe,
    kv_bytes,
    prompt_tokens,
    samples_of,
    shape_of,
)
from sparsemm_eval.sweep.grid import Grid, ModelSpec
from sparsemm_eval.sweep.grid_file import grids_folder, read_grid
from sparsemm_eval.tiny import embedded_checkpoints

VICUNA = ModelSpec(
    name="v", pretrained="llava-hf/llava-v1.6-vicuna-7b-hf", settings={"dtype": "float16"}
)
QWEN = ModelSpec(name="q", pretrained="Qwen/Qwen2-VL-7B-Instruct")
TINY = ModelSpec(name="t", pretrained="embedded:qwen2vl", settings={"dtype": "float32"})


def grid_of(model: ModelSpec = VICUNA, **changed: Any) -> Grid:
    values: dict[str, Any] = {"name": "g", "tasks": ["docvqa_val"], "methods": ["fullkv"]}
    return Grid(models=[model], **(values | changed))


def seconds(grid: Grid, task: str = "docvqa_val") -> dict[str, float]:
    return dict(cost(grid, grid.models[0], task, grid.cells()).seconds)


def test_shapes_are_of_models_of_their_size() -> None:
    """Of 7 billion parameters, without the embedding that is only looked up."""
    names = ("vicuna", "mistral", "qwen")
    models = read_grid("paper_ocr").models
    for name, model, billions in zip(names, models, (6.6, 7.1, 7.1), strict=True):
        assert name in model.name.lower()
        config = config_of(model)
        assert config is not None
        assert decoder_weights(config) / 1e9 == pytest.approx(billions, abs=0.1)


def test_a_local_config_gives_the_shape_and_none_is_called_unknown(tmp_path: Path) -> None:
    for name, kv_heads in (("qwen2vl", 4), ("llava_next", 8)):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(embedded_checkpoints()[name] / "config.json", folder)
        shape = shape_of(ModelSpec(name="m", pretrained=str(folder)))
        assert shape == shape_of(ModelSpec(name="m", pretrained=f"embedded:{name}"))
        assert shape is not None
        assert (shape.layers, shape.query_heads, shape.kv_heads, shape.head_dim) == (
            5, 8, kv_heads, 16
        )  # fmt: skip
    stranger = ModelSpec(name="m", pretrained=str(tmp_path / "nothing"))
    assert shape_of(stranger) is None
    assert "unknown: its config is not here" in describe(grid_of(stranger))


def test_kv_bytes_are_those_the_demo_measured() -> None:
    """64 tokens in 4 KV heads of 5 layers, 16 numbers of 4 bytes, keys and values."""
    shape = shape_of(TINY)
    assert shape is not None
    assert kv_bytes(shape, 64, 4) == 64 * 5 * 4 * 16 * 4 * 2


def test_samples_are_the_published_sizes_and_no_more_than_asked() -> None:
    assert samples_of("docvqa_val", grid_of()) == 5349
    assert samples_of("docvqa_mini", grid_of()) == 200
    assert samples_of("docvqa_val", grid_of(samples=10)) == 10
    assert samples_of("docvqa_mini", grid_of(samples=1000)) == 200
    assert samples_of("mme", grid_of()) is None


def test_a_page_in_llava_next_has_the_tokens_it_is_known_to_have() -> None:
    """About 2,400, of tiles of which what pads the page is cut off."""
    assert prompt_tokens(VICUNA, "docvqa_val") == pytest.approx(2400, abs=100)


def test_image_limits_change_the_prompt() -> None:
    free = prompt_tokens(QWEN, "docvqa_val")
    small = QWEN.model_copy(update={"settings": {"max_pixels": 602112}})
    large = QWEN.model_copy(update={"settings": {"min_pixels": 2 * 1700 * 2200}})
    sizes = [prompt_tokens(model, "docvqa_val") for model in (small, QWEN, large)]
    assert sizes == sorted(sizes)
    assert free is not None
    assert free > 4 * sizes[0]
    named = QWEN.model_copy(update={"settings": {"protocol": "lmms-eval"}})
    assert prompt_tokens(named, "docvqa_val") == sizes[0]


def test_frames_of_a_video_are_counted_two_by_two() -> None:
    one = 1280 * 720 // 28**2
    assert prompt_tokens(QWEN, "videomme") == 60 + 16 * one
    fewer = {"frames": 8, "video_max_pixels": 100 * 28**2, "max_pixels": 10_000}
    assert prompt_tokens(QWEN.model_copy(update={"settings": fewer}), "videomme") == 60 + 4 * 100
    assert prompt_tokens(VICUNA, "videomme") is None  # it reads none
    long, short = (
        seconds(grid_of(QWEN.model_copy(update={"settings": one}), tasks=["videomme"]), "videomme")
        for one in ({}, fewer)
    )
    assert all(long[place] > short[place] for place in DEVICES)


def test_where_nothing_is_known_nothing_is_made_up() -> None:
    assert prompt_tokens(VICUNA, "mme") is None
    assert prompt_tokens(TINY, "docvqa_val") is None
    assert prompt_tokens(VICUNA, "docvqa_mini") is None
    single = VICUNA.model_copy(update={"settings": {"dtype": "float32"}})
    assert seconds(grid_of(single)) == {}


def test_more_cells_cost_less_than_as_many_runs() -> None:
    one = seconds(grid_of())
    cells = {"methods": ["fullkv", "snapkv", "adakv"], "budgets": [1024, 256]}
    many = seconds(grid_of(**cells))
    assert one.keys() == many.keys() == DEVICES.keys()
    for name in one:
        assert one[name] <= many[name] < 2 * one[name]


def test_time_and_memory_grow_with_samples_cells_and_batch() -> None:
    grid = grid_of(methods=["fullkv", "snapkv"], budgets=[256])
    half = grid_of(methods=["fullkv", "snapkv"], budgets=[256], samples=5349 // 2)
    for name, whole in seconds(grid).items():
        assert seconds(half)[name] == pytest.approx(whole / 2, rel=0.01)
    memory = [
        cost(g, VICUNA, "docvqa_val", g.cells()).cache_bytes
        for g in (
            grid_of(),
            grid,
            grid_of(methods=["fullkv", "snapkv"], budgets=[256], batch_size=4),
        )
    ]
    assert memory[0] < memory[1] < memory[2] == 4 * memory[1]


def test_dry_run_lists_every_cell_job_and_note_and_needs_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a dry run went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    out = tmp_path / "out"
    for path in grids_folder().glob("*.yaml"):
        done = CliRunner().invoke(
            app, ["sweep", path.stem, "--dry-run", "--skip-missing", "-o", str(out)]
        )
        assert done.exit_code == 0, done.output
        grid = read_grid(path.stem)
        lines = [line.strip() for line in done.output.splitlines()]
        for cell in grid.cells():
            assert lines.count(",".join(f"{name}={cell[name]}" for name in cell)) == 1
        for job in grid.jobs():
            assert sum(line.split(" ")[0] == job.name for line in lines) == 1
        assert set(grid.notes) <= set(lines)
        assert "estimate, not measured" in lines
    assert not out.exists()


def test_shards_share_the_samples_of_a_task() -> None:
    text = describe(grid_of(samples=10, shards=3))
    counts = [int(line.split()[1]) for line in text.splitlines() if "@docvqa_val@" in line]
    assert counts == [4, 3, 3]


def test_java_is_asked_for_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert "textcaps_val needs java" in describe(grid_of(tasks=["textcaps_val"]))


def test_a_task_of_unknown_size_leaves_its_numbers_open() -> None:
    text = describe(grid_of(tasks=["mme", "ocrbench"]))
    assert "without 1 line above" in text
    assert "prompts read: at least 1,000" in text


def test_a_bad_grid_is_one_sentence_and_exit_code_1(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump({"models": [], "budget": 3}))
    done = CliRunner().invoke(app, ["sweep", str(path), "--dry-run"])
    assert done.exit_code == 1
    assert done.output.startswith(f"sparsemm-eval: {path}, line 1: budget: a grid has no such key")
    assert done.output.count("\n") == 1


def test_prompts_of_the_embedded_models_are_those_of_the_demo() -> None:
    """Measured numbers are the committed ones."""
    summary = Path(__file__).parents[2] / "results" / "demo" / "summary.json"
    for cell in json.loads(summary.read_text())["cells"]:
        if cell["method"] == "fullkv":
            model = ModelSpec(name="m", pretrained=f"embedded:{cell['model']}")
            measured = pytest.approx(cell["prompt_tokens"], abs=0.51)
            assert prompt_tokens(model, cell["task"]) == measured
