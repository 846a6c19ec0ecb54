"""What a grid is and about what it will cost, with nothing loaded and nothing downloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lmms_eval.tasks import TaskManager
from tabulate import tabulate
from transformers import AutoConfig, PreTrainedConfig

from sparsemm_eval.bench.machine import BANDWIDTHS
from sparsemm_eval.bench.models import DTYPES, shape_config
from sparsemm_eval.engine.cell import budget_bytes
from sparsemm_eval.engine.tasks import find_tasks, obstacle
from sparsemm_eval.families import family_of, find_family
from sparsemm_eval.families.qwen2_vl import QwenVL
from sparsemm_eval.methods import ModelShape
from sparsemm_eval.sweep.checks import free_space, readable_size
from sparsemm_eval.sweep.grid import Grid, ModelSpec
from sparsemm_eval.sweep.status import duration
from sparsemm_eval.tiny import EMBEDDED, find_checkpoint
from sparsemm_eval.tiny.benchmarks import DEFAULT_SAMPLES

_TEXT = 60  # assumed: tokens of chat template, question and instruction
# Measured on the embedded models and 2 CPU cores: seconds for a prompt, and for each cell of it,
# scoring included.
_EMBEDDED_READ, _EMBEDDED_CELL = 0.012, 0.0035
# Measured: bytes of a row in the answers store.
_ANSWER_BYTES = 640
# By data sheet: operations a second of dense half precision, and bytes of memory a second.
DEVICES = {
    "A100 80 GB": (312e12, BANDWIDTHS["a100-80gb"] * 1e9),
    "H100 80 GB": (989e12, BANDWIDTHS["h100"] * 1e9),
}
# Assumed shares of these that are reached.
_FLOPS_SHARE, _BANDWIDTH_SHARE = 0.4, 0.6
# A layer's launches, whatever it computes: the paper's figure has 36 to 47 ms a token at batch 1,
# for 28 and 32 layers, where little is read.
_LAYER_SECONDS = 1.3e-3
# The paper's models, by the shapes that `bench` has of them.
_PAPER = {
    "llava-hf/llava-v1.6-vicuna-7b-hf": "vicuna",
    "llava-hf/llava-v1.6-mistral-7b-hf": "mistral",
    "Qwen/Qwen2-VL-7B-Instruct": "qwen2vl-7b",
}
_UNKNOWN = "unknown"


@dataclass(frozen=True)
class Usual:
    """A usual sample of one of the paper's benchmarks, or of one of videos.

    Parameters
    ----------
    task : str
        lmms-eval's name of it.
    samples : int
        The published split's.
    image : (int, int)
        Assumed: width and height in pixels, of a video's frames.
    answer : int
        Assumed: tokens.
    embedded : (int, int), optional
        Measured in miniature, results/demo/summary.json: tokens of a prompt of embedded:qwen2vl
        and embedded:llava_next.
    video : bool
        Whether a video is shown.
    """

    task: str
    samples: int
    image: tuple[int, int]
    answer: int
    embedded: tuple[int, int] | None = None
    video: bool = False


_PUBLISHED = {
    usual.task: usual
    for usual in (
        Usual("docvqa_val", 5349, (1700, 2200), 8, (359, 495)),
        Usual("ocrbench", 1000, (700, 500), 10, (209, 337)),
        Usual("textvqa_val", 5000, (1024, 768), 6, (182, 309)),
        Usual("chartqa", 2500, (850, 600), 5, (171, 298)),
        Usual("textcaps_val", 3166, (1024, 768), 16, (164, 291)),
        Usual("mmbench_en_dev_static", 4329, (512, 384), 2, (243, 370)),
        Usual("gqa", 12578, (500, 375), 3, (182, 309)),
        Usual("vqav2_val", 214354, (640, 480), 3, (177, 304)),
    )
}
_MINIATURE = {f"{task.split('_')[0]}_mini": usual for task, usual in _PUBLISHED.items()}
_VIDEOS = {"videomme": Usual("videomme", 2700, (1280, 720), 2, video=True)}
_USUAL = _PUBLISHED | _MINIATURE | _VIDEOS


def _llava_next_tokens(width: int, height: int, settings: Mapping[str, Any]) -> int:
    """The image once on 24 x 24 patches, and on 2 x 2 tiles, without what pads it to a square.

    Each row of the tiles ends in a token of its own.
    """
    other = round(48 * min(width, height) / max(width, height))
    rows, columns = (48, other) if height > width else (other, 48)
    return 24**2 + rows * (columns + 1)


def _qwen2_vl_tokens(width: int, height: int, settings: Mapping[str, Any]) -> int:
    """A token is 28 x 28 pixels of the image, scaled into the limits."""
    pixels = min(width * height, settings.get("max_pixels", width * height))
    return max(pixels, settings.get("min_pixels", 0)) // 28**2


@dataclass(frozen=True)
class Vision:
    """How the paper's models of one model_type read an image.

    Parameters
    ----------
    tokens : callable
        Tokens of an image by its width and height in pixels and the model's settings.
    layers, width, mlp : int
        The vision tower's, and the width of its MLPs.
    patches : int
        Patches of the tower that become one token.
    together : int, optional
        Patches that attend to each other, those of a tile; without it all of an image.
    """

    tokens: Callable[[int, int, Mapping[str, Any]], int]
    layers: int
    width: int
    mlp: int
    patches: int
    together: int | None = None

    def flops(self, tokens: int) -> float:
        """Operations for an image of so many tokens."""
        patches = tokens * self.patches
        seen = min(patches, self.together or patches)
        patch = 2 * (4 * self.width**2 + 2 * self.width * self.mlp) + 4 * self.width * seen
        return self.layers * patch * patches


_VISION = {
    "llava_next": Vision(_llava_next_tokens, 24, 1024, 4096, 1, 577),
    "qwen2_vl": Vision(_qwen2_vl_tokens, 32, 1280, 5120, 4),
}


def config_of(model: ModelSpec) -> PreTrainedConfig | None:
    """A model's config: the paper's models by name, others where their config is local."""
    if model.pretrained in _PAPER:
        return shape_config(_PAPER[model.pretrained])
    try:
        return AutoConfig.from_pretrained(
            find_checkpoint(model.pretrained), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError):
        return None


def shape_of(model: ModelSpec) -> ModelShape | None:
    """Layers and heads of a model's decoder; None where its config is not here."""
    config = config_of(model)
    try:
        return None if config is None else ModelShape.from_config(config)
    except ValueError:
        return None


def decoder_weights(config: PreTrainedConfig) -> int:
    """Parameters that every decoded token reads."""
    text, shape = config.get_text_config(), ModelShape.from_config(config)
    attention = 2 * text.hidden_size * shape.head_dim * (shape.query_heads + shape.kv_heads)
    layer = attention + 3 * text.hidden_size * text.intermediate_size
    return shape.layers * layer + text.hidden_size * text.vocab_size


def kv_bytes(shape: ModelShape, tokens: int, size: int) -> int:
    """Bytes of so many tokens in every KV head, ``size`` bytes a number."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * size * tokens


def _kept(budget: int | float | str | None, prompt: int, one: int) -> int:
    """Tokens of a prompt that a grid's budget keeps; `one` is the bytes of a token."""
    if budget is None:
        return prompt
    if isinstance(budget, str):
        budget = budget_bytes(budget) // one
    return min(prompt, int(budget * prompt) if budget < 1 else budget)


def samples_of(task: str, grid: Grid) -> int | None:
    """How many samples of a task a grid takes; None where that is not known without its data."""
    if task not in _USUAL:
        return None
    size = DEFAULT_SAMPLES if task in _MINIATURE else _USUAL[task].samples
    return size if grid.samples is None else min(size, grid.samples)


def prompt_tokens(model: ModelSpec, task: str) -> int | None:
    """Tokens of a usual prompt; None where there is no ground for a guess."""
    embedded = (f"{EMBEDDED}qwen2vl", f"{EMBEDDED}llava_next")
    if task in _MINIATURE and model.pretrained in embedded:
        return _MINIATURE[task].embedded[embedded.index(model.pretrained)]
    config = config_of(model)
    if task not in _PUBLISHED | _VIDEOS or model.pretrained in embedded or config is None:
        return None
    vision, usual = _VISION.get(config.model_type), _USUAL[task]
    if vision is None or (steps := _steps(model, task)) is None:
        return None
    preset = find_family(config.model_type).protocols.get(model.settings.get("protocol"), {})
    given = {**preset, **model.settings}
    if usual.video:
        prefix = "video_"
        given = {
            name.removeprefix(prefix): value
            for name, value in given.items()
            if name.startswith(prefix)
        }
    return _TEXT + steps * vision.tokens(*usual.image, given)


def _steps(model: ModelSpec, task: str) -> int | None:
    """How many grids of tokens a usual prompt has: one of an image, of a video one of two frames.

    None where the model's family reads no videos.
    """
    if not _USUAL[task].video:
        return 1
    family = family_of(config_of(model))
    return model.settings.get("frames", family.frames) // 2 if issubclass(family, QwenVL) else None


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
    samples, prompt = samples_of(task, grid), prompt_tokens(model, task)
    new = _USUAL[task].answer if task in _USUAL else None
    if samples is None or prompt is None or new is None:
        return Cost(samples, prompt, new, None, {})
    config = config_of(model)
    shape = ModelShape.from_config(config)
    dtype = DTYPES.get(model.settings.get("dtype"), config.dtype or torch.float16)
    one = kv_bytes(shape, 1, dtype.itemsize)
    kept = sum(_kept(cell.get("budget"), prompt, one) + new for cell in cells)
    cache = one * kept * grid.batch_size
    seconds = {}
    if task in _MINIATURE:
        seconds["2 CPU cores"] = samples * (_EMBEDDED_READ + _EMBEDDED_CELL * len(cells))
    # Data sheets do not say what single precision without tensor cores reaches.
    elif dtype.itemsize == 2:
        weights, rows = decoder_weights(config), len(cells) * grid.batch_size
        heads = shape.query_heads * shape.head_dim
        steps = _steps(model, task)
        image = steps * _VISION[config.model_type].flops((prompt - _TEXT) // steps)
        read = 2 * weights * prompt + 2 * shape.layers * heads * prompt**2 + image
        for name, (peak, bandwidth) in DEVICES.items():
            flops = peak * _FLOPS_SHARE
            step = max(
                (weights * dtype.itemsize + cache) / (bandwidth * _BANDWIDTH_SHARE),
                2 * weights * rows / flops,
                shape.layers * _LAYER_SECONDS,
            )
            batch = grid.batch_size * read / flops + new * step
            seconds[name] = samples / grid.batch_size * batch
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
        From `find_tasks`; default one of lmms-eval's tasks and ours.

    Raises
    ------
    UserError
        For a task that there is not.
    """
    manager = manager or find_tasks(grid.tasks)
    cells = grid.cells()
    lacks = [cause for task in grid.tasks if (cause := obstacle(manager, task))]
    costs = {
        (model.name, task): cost(grid, model, task, cells)
        for model in grid.models
        for task in grid.tasks
    }
    parts = [
        f"{grid.name}: {_count(len(grid.models), 'model')} x {_count(len(grid.tasks), 'task')} x "
        f"{_count(len(cells), 'cell')} = {_count(len(costs) * len(cells), 'result')}",
        _section("models", [_model_line(model) for model in grid.models]),
        _section("cells, of every model and task", [_settings_line(cell) for cell in cells]),
        _section("jobs", _job_lines(grid, len(cells))),
        _section("notes: in what the runs differ from the paper's", grid.notes),
        _section("before it can run", lacks),
        _section("estimate, not measured", _estimate(grid, costs, len(cells), out)),
    ]
    return "\n\n".join(part for part in parts if part)


def _model_line(model: ModelSpec) -> str:
    shape = shape_of(model)
    heads = (
        f"{shape.layers} layers of {shape.query_heads} query and {shape.kv_heads} KV heads"
        if shape
        else f"shape {_UNKNOWN}: its config is not here"
    )
    settings = _settings_line(model.settings)
    return "  ".join(part for part in (model.name, model.pretrained, settings, heads) if part)


def _settings_line(settings: Mapping[str, Any]) -> str:
    return ",".join(f"{name}={value}" for name, value in settings.items())


def _job_lines(grid: Grid, cells: int) -> list[str]:
    table = []
    for job in grid.jobs():
        samples = answers = samples_of(job.task, grid)
        if samples is not None:
            samples = len(range(job.shard, samples, job.shards))
            answers = samples * cells
        table.append((job.name, _shown(samples), "samples", _shown(answers), "answers"))
    return _table(table, "lrlrl")


def _estimate(
    grid: Grid, costs: Mapping[tuple[str, str], Cost], cells: int, out: Path | None
) -> list[str]:
    places = list(dict.fromkeys(place for one in costs.values() for place in one.seconds))
    table = [
        (
            *names,
            *(_shown(number) for number in (one.samples, one.prompt, one.new)),
            _shown(one.cache_bytes, readable_size),
            *(_shown(one.seconds.get(place), duration) for place in places),
        )
        for names, one in costs.items()
    ]
    heads = ("model", "task", "samples", "prompt", "answer", "KV of a batch", *places)
    lines = _table(table, "llrrrr" + "r" * len(places), heads)
    for place in places:
        here = [one.seconds[place] for one in costs.values() if place in one.seconds]
        left = len(costs) - len(here)
        rest = f", without {_count(left, 'line')} above" if left else ""
        lines.append(f"in all, on {place}: {duration(sum(here))}{rest}")
    prompts = sum(one.samples or 0 for one in costs.values())
    known = "at least " if any(one.samples is None for one in costs.values()) else ""
    lines.append(
        f"prompts read: {known}{prompts:,}; {prompts * cells:,} if each cell ran by itself"
    )
    free = f"; free there: {readable_size(free_space(out))}" if out is not None else ""
    lines.append(f"answers on disk: {known}{readable_size(prompts * cells * _ANSWER_BYTES)}{free}")
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


def _table(rows: Sequence[Sequence[str]], alignment: str, heads: Sequence[str] = ()) -> list[str]:
    """Lines of a table, its columns aligned by "l" and "r"."""
    sides = [{"l": "left", "r": "right"}[letter] for letter in alignment]
    return tabulate(rows, heads, tablefmt="plain", colalign=sides).splitlines()


def _section(title: str, lines: Sequence[str]) -> str:
    return "\n".join([title, *(f"  {line}" for line in lines)]) if lines else ""


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _shown(value: float | None, form: Callable[[Any], str] = "{:,}".format) -> str:
    return _UNKNOWN if value is None else form(value)
