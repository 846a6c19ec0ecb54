"""What a grid is and about what it will cost, with nothing loaded and nothing downloaded."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmms_eval.tasks import TaskManager
from tabulate import tabulate
from transformers import AutoConfig, PreTrainedConfig

from sparsemm_eval.bench.models import shape_config
from sparsemm_eval.engine.tasks import find_tasks, obstacle
from sparsemm_eval.methods import ModelShape
from sparsemm_eval.sweep.grid import Grid, Job, ModelSpec
from sparsemm_eval.tiny import find_checkpoint

# Of the published splits.
_SAMPLES = {
    "docvqa_val": 5349, "ocrbench": 1000, "textvqa_val": 5000, "chartqa": 2500,
    "textcaps_val": 3166, "mmbench_en_dev_static": 4329, "gqa": 12578, "vqav2_val": 214354,
}  # fmt: skip
_MINIATURE = 200
# Assumed: a usual image of each benchmark (width, height) and a usual answer, in tokens.
_IMAGES = {
    "docvqa": (1700, 2200), "ocrbench": (700, 500), "textvqa": (1024, 768), "chartqa": (850, 600),
    "textcaps": (1024, 768), "mmbench": (512, 384), "gqa": (500, 375), "vqav2": (640, 480),
}  # fmt: skip
_ANSWERS = {
    "docvqa": 8, "ocrbench": 10, "textvqa": 6, "chartqa": 5, "textcaps": 16, "mmbench": 2,
    "gqa": 3, "vqav2": 3,
}  # fmt: skip
_TEXT = 60  # assumed: chat template, question and instruction
# Measured on the miniatures, results/demo/summary.json: tokens of a prompt.
_EMBEDDED_PROMPTS = {
    "embedded:qwen2vl": {
        "docvqa": 359, "ocrbench": 209, "textvqa": 182, "chartqa": 171, "textcaps": 164,
        "mmbench": 243, "gqa": 182, "vqav2": 177,
    },
    "embedded:llava_next": {
        "docvqa": 495, "ocrbench": 337, "textvqa": 309, "chartqa": 298, "textcaps": 291,
        "mmbench": 370, "gqa": 309, "vqav2": 304,
    },
}  # fmt: skip
# Measured with them on 2 CPU cores: seconds for a prompt, and for each cell, scoring included.
_EMBEDDED_READ, _EMBEDDED_CELL = 0.012, 0.0035
# Measured: bytes of a row in the answers store.
_ANSWER_BYTES = 640
_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
_UNKNOWN = "unknown"


@dataclass(frozen=True)
class Device:
    """A GPU by its data sheet.

    Parameters
    ----------
    flops : float
        Of dense half precision, a second.
    bandwidth : float
        Bytes of memory a second.
    """

    flops: float
    bandwidth: float


DEVICES = {"A100 80 GB": Device(312e12, 2.04e12), "H100 80 GB": Device(989e12, 3.35e12)}
# Assumed shares of these that are reached.
_FLOPS_SHARE, _BANDWIDTH_SHARE = 0.4, 0.6
# A layer's launches, whatever it computes: the paper's figure has 36 to 47 ms a token at batch 1,
# for 28 and 32 layers, where little is read.
_LAYER_SECONDS = 1.3e-3


@dataclass(frozen=True)
class Shape:
    """What decides the cost of a model.

    Parameters
    ----------
    layers, hidden, intermediate, query_heads, kv_heads, head_dim, vocab : int
        Of the decoder.
    vision_layers, vision_width, vision_mlp : int
        Of the vision tower.
    merge : int
        Patches that become one token; 1: LLaVA-NeXT, whose patches attend within tiles.
    dtype : str
        Of the checkpoint.
    """

    layers: int
    hidden: int
    intermediate: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    vision_layers: int
    vision_width: int
    vision_mlp: int
    merge: int
    dtype: str = "float16"

    @property
    def weights(self) -> int:
        """Parameters that every decoded token reads."""
        attention = 2 * self.hidden * self.head_dim * (self.query_heads + self.kv_heads)
        layer = attention + 3 * self.hidden * self.intermediate
        return self.layers * layer + self.hidden * self.vocab

    def prefill_flops(self, tokens: int) -> float:
        """Of one prompt, its image included."""
        heads = self.query_heads * self.head_dim
        decoder = 2 * self.weights * tokens + 2 * self.layers * heads * tokens**2
        patches = max(tokens - _TEXT, 0) * self.merge
        width = self.vision_width
        seen = patches if self.merge > 1 else min(patches, 577)
        patch = 2 * (4 * width**2 + 2 * width * self.vision_mlp) + 4 * width * seen
        return decoder + self.vision_layers * patch * patches

    def kv_bytes(self, tokens: int, size: int) -> int:
        """Of so many tokens in every KV head, ``size`` bytes a number."""
        return 2 * self.layers * self.kv_heads * self.head_dim * size * tokens


def _shape(text: PreTrainedConfig, *vision: int, dtype: str) -> Shape:
    """A decoder's shape with a vision tower's layers, width, width of its MLPs, and merge."""
    heads = ModelShape.from_config(text)
    return Shape(
        heads.layers,
        text.hidden_size,
        text.intermediate_size,
        heads.query_heads,
        heads.kv_heads,
        heads.head_dim,
        text.vocab_size,
        *vision,
        dtype=dtype,
    )


_CLIP = (24, 1024, 4096, 1)
_SHAPES = {
    "llava-hf/llava-v1.6-vicuna-7b-hf": _shape(
        shape_config("vicuna").text_config, *_CLIP, dtype="float16"
    ),
    "llava-hf/llava-v1.6-mistral-7b-hf": _shape(
        shape_config("mistral").text_config, *_CLIP, dtype="float16"
    ),
    "Qwen/Qwen2-VL-7B-Instruct": _shape(
        shape_config("qwen2vl-7b").text_config, 32, 1280, 5120, 4, dtype="bfloat16"
    ),
}


def shape_of(model: ModelSpec) -> Shape | None:
    """A model's shape: the paper's models by name, others by their config where it is local."""
    if model.pretrained in _SHAPES:
        return _SHAPES[model.pretrained]
    try:
        config = AutoConfig.from_pretrained(
            find_checkpoint(model.pretrained), local_files_only=True
        )
        text, vision = config.get_text_config(), config.vision_config
        # A Qwen2-VL tower has other names for what CLIP's has.
        qwen = hasattr(vision, "embed_dim")
        width = vision.embed_dim if qwen else vision.hidden_size
        return _shape(
            text,
            vision.depth if qwen else vision.num_hidden_layers,
            width,
            int(width * vision.mlp_ratio) if qwen else vision.intermediate_size,
            vision.spatial_merge_size**2 if qwen else 1,
            dtype=str(config.dtype or "float16").removeprefix("torch."),
        )
    except (OSError, ValueError, AttributeError):
        return None


def samples_of(task: str, grid: Grid) -> int | None:
    """How many samples of a task a grid takes; None where that is not known without its data."""
    size = _size(task)
    return size if size is None or grid.samples is None else min(size, grid.samples)


def prompt_tokens(model: ModelSpec, task: str, shape: Shape | None) -> int | None:
    """Tokens of a usual prompt; None where there is no ground for a guess."""
    benchmark = task.split("_")[0]
    if task.endswith("_mini"):
        return _EMBEDDED_PROMPTS.get(model.pretrained, {}).get(benchmark)
    if task not in _SAMPLES or shape is None or model.pretrained.startswith("embedded:"):
        return None
    width, height = _IMAGES[benchmark]
    if shape.merge > 1:
        # A token is 28 x 28 pixels of the image, scaled into the limits.
        pixels = min(width * height, model.settings.get("max_pixels", width * height))
        return _TEXT + max(pixels, model.settings.get("min_pixels", 0)) // 28**2
    # The image once on 24 x 24 patches, and on 2 x 2 tiles, without what pads it to a square;
    # each row ends in a token of its own.
    long, short = max(width, height), min(width, height)
    other = round(48 * short / long)
    rows, columns = (48, other) if height > width else (other, 48)
    return _TEXT + 24**2 + rows * (columns + 1)


@dataclass(frozen=True)
class Cost:
    """One model on one task under all cells; None where it is not known.

    Parameters
    ----------
    samples, prompt, new : int or None
        Samples, tokens of a prompt, tokens of an answer.
    cache_bytes : int or None
        Keys and values of all rows of a batch, when its answers end.
    seconds : mapping
        By where it would run; empty if it is not known.
    """

    samples: int | None
    prompt: int | None
    new: int | None
    cache_bytes: int | None
    seconds: Mapping[str, float]


def cost(grid: Grid, model: ModelSpec, task: str, cells: Sequence[Mapping[str, Any]]) -> Cost:
    """Estimate one model on one task: each prompt read once, then a step a token for all rows."""
    shape, samples = shape_of(model), samples_of(task, grid)
    prompt, new = prompt_tokens(model, task, shape), _ANSWERS.get(task.split("_")[0])
    if shape is None or prompt is None or new is None:
        return Cost(samples, prompt, new, None, {})
    dtype = model.settings.get("dtype", "auto")
    size = _SIZES[shape.dtype if dtype == "auto" else dtype]
    kept = sum(min(cell.get("budget", prompt), prompt) + new for cell in cells)
    cache = shape.kv_bytes(kept, size) * grid.batch_size
    if samples is None:
        return Cost(samples, prompt, new, cache, {})
    if model.pretrained.startswith("embedded:"):
        each = _EMBEDDED_READ + _EMBEDDED_CELL * len(cells)
        return Cost(samples, prompt, new, cache, {"2 CPU cores": samples * each})
    if size > 2:
        # Data sheets do not say what single precision without tensor cores reaches.
        return Cost(samples, prompt, new, cache, {})
    seconds = {}
    rows = len(cells) * grid.batch_size
    for name, device in DEVICES.items():
        flops, bandwidth = device.flops * _FLOPS_SHARE, device.bandwidth * _BANDWIDTH_SHARE
        step = max(
            (shape.weights * size + cache) / bandwidth,
            2 * shape.weights * rows / flops,
            shape.layers * _LAYER_SECONDS,
        )
        read = grid.batch_size * shape.prefill_flops(prompt) / flops
        seconds[name] = samples / grid.batch_size * (read + new * step)
    return Cost(samples, prompt, new, cache, seconds)


def describe(grid: Grid, out: Path | None = None, manager: TaskManager | None = None) -> str:
    """All that ``--dry-run`` prints: models, cells, jobs, what differs from the paper, an estimate.

    Parameters
    ----------
    grid : Grid
        What would run.
    out : Path, optional
        Where to; the space that is free there is stated.
    manager : TaskManager, optional
        Of `find_tasks`; default one of lmms-eval's tasks and ours.

    Raises
    ------
    UserError
        For a task that there is not.
    """
    manager = manager or find_tasks(grid.tasks)
    cells = grid.cells()
    costs = {
        (model.name, task): cost(grid, model, task, cells)
        for model in grid.models
        for task in grid.tasks
    }
    parts = [
        f"{grid.name}: {_count(len(grid.models), 'model')} x {_count(len(grid.tasks), 'task')} x "
        f"{_count(len(cells), 'cell')} = {_count(len(costs) * len(cells), 'result')}",
        _section("models", [_model_line(model) for model in grid.models]),
        _section("cells, of every model and task", [_cell_line(cell) for cell in cells]),
        _section("jobs", _job_lines(grid, len(cells))),
        _section("notes: in what the runs differ from the paper's", grid.notes),
        _section("before it can run", _lacks(manager, grid.tasks)),
        _section("estimate, not measured", _estimate(grid, costs, len(cells), out)),
    ]
    return "\n\n".join(part for part in parts if part)


def _size(task: str) -> int | None:
    name = task.removesuffix("_mini")
    return _MINIATURE if task != name and name in _IMAGES else _SAMPLES.get(task)


def _model_line(model: ModelSpec) -> str:
    shape = shape_of(model)
    heads = (
        f"{shape.layers} layers of {shape.query_heads} query and {shape.kv_heads} KV heads"
        if shape
        else f"shape {_UNKNOWN}: its config is not here"
    )
    settings = ",".join(f"{name}={value}" for name, value in model.settings.items())
    return "  ".join(part for part in (model.name, model.pretrained, settings, heads) if part)


def _cell_line(cell: Mapping[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in cell.items())


def _job_lines(grid: Grid, cells: int) -> list[str]:
    table = []
    for job in grid.jobs():
        samples = _samples_of_job(job, grid)
        answers = None if samples is None else samples * cells
        table.append((job.name, _number(samples), "samples", _number(answers), "answers"))
    return tabulate(
        table, tablefmt="plain", colalign=("left", "right", "left", "right", "left")
    ).splitlines()


def _samples_of_job(job: Job, grid: Grid) -> int | None:
    samples = samples_of(job.task, grid)
    return None if samples is None else len(range(job.shard, samples, job.shards))


def _lacks(manager: TaskManager, tasks: Sequence[str]) -> list[str]:
    return [cause for task in tasks if (cause := obstacle(manager, task))]


def _estimate(
    grid: Grid, costs: Mapping[tuple[str, str], Cost], cells: int, out: Path | None
) -> list[str]:
    places = list(dict.fromkeys(place for one in costs.values() for place in one.seconds))
    heads = ["model", "task", "samples", "prompt", "answer", "KV of a batch", *places]
    table = [
        (
            *names,
            _number(one.samples),
            _number(one.prompt),
            _number(one.new),
            _bytes(one.cache_bytes),
            *(_time(one.seconds.get(place)) for place in places),
        )
        for names, one in costs.items()
    ]
    aligned = ("left", "left", *["right"] * (len(heads) - 2))
    lines = tabulate(table, heads, tablefmt="plain", colalign=aligned).splitlines()
    for place in places:
        here = [one.seconds[place] for one in costs.values() if place in one.seconds]
        left = len(costs) - len(here)
        rest = f", without {_count(left, 'line')} above" if left else ""
        lines.append(f"in all, on {place}: {_time(sum(here))}{rest}")
    prompts = sum(one.samples or 0 for one in costs.values())
    known = "at least " if any(one.samples is None for one in costs.values()) else ""
    lines.append(
        f"prompts read: {known}{prompts:,}; {prompts * cells:,} if each cell ran by itself"
    )
    free = f"; free there: {_bytes(_free(out))}" if out is not None else ""
    lines.append(f"answers on disk: {known}{_bytes(prompts * cells * _ANSWER_BYTES)}{free}")
    return [*lines, *_sources(places)]


def _sources(places: Sequence[str]) -> list[str]:
    """Where the numbers come from; no more of it than the table needs."""
    lines = [
        f"From: {_ANSWER_BYTES} bytes an answer (measured, without lmms-eval's own files); prompt "
        "and answer are tokens of a usual sample, KV what all cells of a batch of "
        "samples hold when their answers end."
    ]
    if any(place in DEVICES for place in places):
        lines.append(
            "GPU: one, from its data sheet. Prefill: operations of the shapes, once a sample, at "
            f"{_FLOPS_SHARE:.0%} of the peak (assumed). Decoding: a step a token for all cells "
            "together, the longest of its bytes at "
            f"{_BANDWIDTH_SHARE:.0%} of the bandwidth (assumed), its operations, and "
            f"{_LAYER_SECONDS * 1000:.1f} ms a layer (the paper's efficiency figure). Image sizes "
            "and lengths of answers are assumed; a cell that does not end its answer makes it "
            "longer. Scoring, loading and downloads come on top."
        )
    if any(place not in DEVICES for place in places):
        lines.append(
            f"Embedded models: {_EMBEDDED_READ} s a sample and {_EMBEDDED_CELL} s a cell of it, "
            "measured on 2 CPU cores in batches of 25; tokens of prompts are the demo's."
        )
    return lines


def _section(title: str, lines: Sequence[str]) -> str:
    return "\n".join([title, *(f"  {line}" for line in lines)]) if lines else ""


def _free(out: Path) -> int:
    """Space where a folder is or will be."""
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _number(value: int | None) -> str:
    return _UNKNOWN if value is None else f"{value:,}"


def _bytes(value: int | None) -> str:
    if value is None:
        return _UNKNOWN
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if value >= 1 << power:
            return f"{value / (1 << power):.1f} {unit}"
    return f"{value} bytes"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return _UNKNOWN
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"
