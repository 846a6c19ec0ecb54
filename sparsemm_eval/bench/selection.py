"""``bench selection``: what a grid of cells costs a layer beside the scores that all cells share.

Scoring reads the prompt once for all cells. What the cells add to it is measured apart: selection
(ranks, counts, masks) and packing, whose floor is moving the kept tokens alone.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsemm_eval.bench.machine import describe, find_device, slug, threads
from sparsemm_eval.bench.models import heavy_scores
from sparsemm_eval.bench.shapes import DTYPES, SHAPES
from sparsemm_eval.bench.shared_prefill import grid_methods
from sparsemm_eval.bench.timing import Measure, in_turn
from sparsemm_eval.cache import RaggedKV
from sparsemm_eval.cache.ragged import Buffer
from sparsemm_eval.errors import check_choice, check_int
from sparsemm_eval.methods import Checks, Method, ModelShape, keep_rows
from sparsemm_eval.report.provenance import provenance

LAYERS = 32
GRIDS = {"demo": False, "paper": True}  # budgets 256 to 12 and window 8; 2048 to 64 and window 32


@dataclass(frozen=True, eq=False)
class _Scored:
    """A scorer whose scores are known, so that what comes after them is timed alone."""

    scores: Tensor
    window: int
    least_budget: int = 1

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        return self.scores


def run_selection(
    out: Path,
    shape: str = "vicuna",
    tokens: int = 2900,
    device: str = "",
    dtype: str = "",
    cpu_threads: int = 1,
    repeats: int = 20,
    command: str = "sparsemm-eval bench selection",
) -> tuple[dict[str, Any], Path]:
    """Measure both grids in one layer and write ``OUT/selection-DEVICE.json``.

    Parameters
    ----------
    out : Path
        The folder.
    shape : str
        A name in `sparsemm_eval.bench.shapes.SHAPES`.
    tokens : int
        Of the prompt; more than the largest budget, 2048.
    device : {"", "cpu", "cuda"}
        CUDA where there is one when empty.
    dtype : str
        Of keys and values; float16 on CUDA and float32 on the CPU when empty.
    cpu_threads : int
        0: torch's own choice.
    repeats : int
        Of each measure, in turn.
    command : str
        That makes the file again.

    Returns
    -------
    dict, Path
        What was written, and where.

    Raises
    ------
    UserError
        For settings that cannot be.
    """
    place = find_device(device)
    dtype = dtype or ("float16" if place.type == "cuda" else "float32")
    check_choice("shape", shape, list(SHAPES))
    check_choice("dtype", dtype, list(DTYPES))
    check_int("tokens", tokens, least=2049)
    check_int("repeats", repeats, least=1)
    with threads(cpu_threads), torch.inference_mode():
        inputs = _inputs(shape, tokens, place, DTYPES[dtype])
        made = {
            **provenance(command),
            "shape": shape,
            "tokens": tokens,
            "dtype": dtype,
            "repeats": repeats,
            "grids": {
                name: _measure(inputs, SHAPES[shape].group, large, repeats)
                for name, large in GRIDS.items()
            },
        }
        made["hardware"] |= describe(place)
    path = out / f"selection-{slug(made['hardware'])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return made, path


def _inputs(
    shape: str, tokens: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Random query [1, Hq, n, D], key and value [1, H, n, D], laid out as models lay them."""
    layer = SHAPES[shape]
    generator = torch.Generator(device).manual_seed(0)
    counts = (layer.kv_heads * layer.group, layer.kv_heads, layer.kv_heads)
    query, key, value = (
        torch.randn(
            1, tokens, heads, layer.head_dim, generator=generator, device=device, dtype=dtype
        ).transpose(1, 2)
        for heads in counts
    )
    return query, key, value


def _measure(
    inputs: tuple[Tensor, Tensor, Tensor], group: int, large: bool, repeats: int
) -> dict[str, Any]:
    query, key, value = inputs
    _, kv_heads, tokens, _ = key.shape
    model = ModelShape(LAYERS, kv_heads * group, kv_heads)
    methods = grid_methods(model, heavy_scores(LAYERS, model.query_heads), large)
    layer = LAYERS // 2
    scorer = next(method.scorer for method in methods if method.budget is not None)
    scored = _with_scores(methods, scorer(query[0], key[0]))
    rows = keep_rows(scored, query[0], key[0], layer)
    most = sum(method.most_kept(layer, tokens) for method in methods)
    moved, token = _ready(key, most)
    buffer = Buffer()

    def select(cells: Sequence[Method]) -> Tensor:
        # As in a cache, which looks at all layers' checks at once.
        return keep_rows(cells, query[0], key[0], layer, Checks())

    work: dict[str, Callable[[], Any]] = {
        "scoring": lambda: scorer(query[0], key[0]),
        "selection": lambda: select(scored),
        "selection_cell_by_cell": lambda: [select((method,)) for method in scored],
        "packing": lambda: RaggedKV.pack(key, value, rows, most, buffer),
        "moving_kept_tokens": lambda: [
            torch.index_select(x, 0, token, out=moved) for x in _flat(key, value)
        ],
    }
    samples = in_turn(
        {name: _clocked(do, key.device) for name, do in work.items()}, repeats + 1, float("inf")
    )
    # The first round loads kernels and touches memory.
    spent = {name: [us / 1e3 for us in measured.us[1:]] for name, measured in samples.items()}
    medians = {name: statistics.median(times) for name, times in spent.items()}
    return {
        "cells": len(methods),
        "budgets": sorted({method.budget for method in methods if method.budget}, reverse=True),
        "window": scorer.window,
        "kept_tokens": int(rows.sum()),
        "milliseconds": {name: round(median, 3) for name, median in medians.items()},
        "quartiles": {name: _quartiles(times) for name, times in spent.items()},
        "share_of_scoring": {
            name: round(medians[name] / medians["scoring"], 3)
            for name in medians
            if name != "scoring"
        },
    }


def _with_scores(methods: Sequence[Method], scores: Tensor) -> list[Method]:
    """The methods, which share their scorer's scores without computing them."""
    budgeted = next(method for method in methods if method.budget is not None)
    scored = _Scored(scores, budgeted.scorer.window)
    return [m if m.budget is None else replace(m, scorer=scored) for m in methods]


def _ready(key: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Memory for so many tokens, and which of the layer's to move: all of them, over and over."""
    (flat,) = _flat(key)
    return flat.new_zeros(count, key.shape[-1]), torch.arange(count, device=key.device) % len(flat)


def _flat(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2).reshape(-1, x.shape[-1]) for x in tensors]


def _clocked(work: Callable[[], Any], device: torch.device) -> Measure:
    """A measure in microseconds, the device's work included."""

    def measure() -> list[float]:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter_ns()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return [(time.perf_counter_ns() - began) / 1e3]

    return measure


def _quartiles(times: Sequence[float]) -> list[float]:
    if len(times) == 1:
        return [round(times[0], 3)] * 2
    first, _, third = statistics.quantiles(times, n=4, method="inclusive")
    return [round(first, 3), round(third, 3)]


def describe_selection(made: Mapping[str, Any]) -> str:
    """The measured milliseconds as lines to read."""
    lines = []
    for name, grid in made["grids"].items():
        lines.append(f"{name}: {grid['cells']} cells of budgets {grid['budgets']}")
        for part, median in grid["milliseconds"].items():
            share = grid["share_of_scoring"].get(part, 1)
            lines.append(f"  {part.replace('_', ' '):24} {median:9.2f} ms {share:8.1%} of scoring")
    return "\n".join(lines)
