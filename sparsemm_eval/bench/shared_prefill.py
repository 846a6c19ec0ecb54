"""``bench shared-prefill``: what a grid costs in one pass, cell by cell, and one cell alone.

Runs as ``sparsemm-eval bench shared-prefill`` or, from a checkout, ``python -m
sparsemm_eval.bench.shared_prefill``, with the same options.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsemm_eval.bench.machine import describe, find_device, threads
from sparsemm_eval.bench.models import LARGE, Subject, subject
from sparsemm_eval.bench.timing import DeviceClock
from sparsemm_eval.engine.decode import Decoded, generate, generate_rows
from sparsemm_eval.errors import check_int, one_line
from sparsemm_eval.methods import HeadScores, Method, ModelShape, make_method, method_settings
from sparsemm_eval.report.provenance import provenance

METHODS = ("sparsemm", "snapkv", "pyramidkv", "adakv", "random")
BUDGETS = {False: (256, 128, 64, 32, 16, 12), True: (2048, 1024, 512, 256, 128, 64)}
WINDOW = {False: 8, True: 32}


@dataclass(frozen=True)
class Passes:
    """Seconds of each way over the same samples, a number a repeat."""

    one_full: list[float]
    grid: list[float]
    one_by_one: list[float]
    prefill: list[float]

    def medians(self) -> dict[str, float]:
        """Median of each way."""
        return {name: statistics.median(times) for name, times in vars(self).items()}


def run_shared_prefill(
    out: Path,
    model: str = "qwen2vl",
    device: str = "",
    samples: int = 40,
    batch_size: int = 8,
    repeats: int = 3,
    cpu_threads: int = 0,
    command: str = "sparsemm-eval bench shared-prefill",
) -> dict[str, Any]:
    """Measure, check that all ways answer alike, and write a JSON file.

    Parameters
    ----------
    out : Path
        The file.
    model : str
        An embedded model, or one of `sparsemm_eval.bench.models.LARGE` with 2,000-token prompts
        and 32 new tokens.
    device : {"", "cpu", "cuda"}
        CUDA where there is one when empty.
    samples, batch_size : int
        Prompts in all, and read together.
    repeats : int
        Of each way, in turn.
    cpu_threads : int
        0: torch's own choice.
    command : str
        That makes the file again.

    Returns
    -------
    dict
        What was written.

    Raises
    ------
    ValueError
        For settings that cannot be.
    """
    settings = {"samples": samples, "batch_size": batch_size, "repeats": repeats}
    for name, value in settings.items():
        check_int(name, value, least=1)
    place = find_device(device)
    with threads(cpu_threads):
        measured = subject(model, place, samples, batch_size)
        methods = grid_methods(measured.shape, measured.heads, model in LARGE)
        passes, unlike = _measure(measured, methods, repeats)
        found = {
            **provenance(command),
            "model": model,
            **settings,
            "dtype": str(measured.model.dtype).removeprefix("torch."),
            "cells": len(methods),
            "prompt_tokens": int(measured.batches[0]["input_ids"].shape[1]),
            "seconds": {name: [round(t, 4) for t in ts] for name, ts in vars(passes).items()},
            **_ratios(passes),
            "answers_unlike": unlike,
        }
        if place.type == "cuda":
            found["byte_bound"] = _bound(measured, methods, passes)
        found["hardware"] |= describe(place)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line, with nothing but torch and transformers; returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m sparsemm_eval.bench.shared_prefill", description=__doc__
    )
    parser.add_argument("--model", default="qwen2vl")
    parser.add_argument("--device", default="")
    for name, default in {"samples": 40, "batch-size": 8, "repeats": 3, "threads": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=Path("results/sweep/shared_prefill.json"))
    given = sys.argv[1:] if arguments is None else arguments
    asked = vars(parser.parse_args(given))
    asked["cpu_threads"] = asked.pop("threads")
    command = shlex.join(["python", "-m", "sparsemm_eval.bench.shared_prefill", *given])
    try:
        found = run_shared_prefill(**asked, command=command)
    except (ValueError, OSError) as error:
        print(f"sparsemm-eval: {one_line(error)}", file=sys.stderr)
        return 1
    shown = ("seconds", "grid_over_one_full", "one_by_one_over_grid", "answers_unlike")
    for name in (*shown, *(["byte_bound"] if "byte_bound" in found else [])):
        print(f"{name}: {found[name]}")
    return 0


def grid_methods(shape: ModelShape, heads: HeadScores, large: bool) -> list[Method]:
    """The cells of a grid of 31: full KV, and five methods at six budgets.

    Parameters
    ----------
    shape : ModelShape
        The decoder.
    heads : HeadScores
        For the methods that take them.
    large : bool
        Budgets 2048 to 64 with a window of 32, as the paper's; else the demo's, 256 to 12 with 8.
    """
    made = [make_method("fullkv", shape)]
    for name in METHODS:
        scores = {"head_scores": heads} if "head_scores" in method_settings(name) else {}
        made += [
            make_method(name, shape, budget=budget, window=WINDOW[large], **scores)
            for budget in BUDGETS[large]
        ]
    return made


def _measure(measured: Subject, methods: Sequence[Method], repeats: int) -> tuple[Passes, int]:
    model, batches = measured.model, measured.batches
    options = {"max_new_tokens": measured.new_tokens, "do_sample": False}
    if model.generation_config.pad_token_id is not None:
        options["pad_token_id"] = model.generation_config.pad_token_id

    def alone(method: Method, **more: Any) -> list[Decoded]:
        return [generate(model, inputs, method, {**options, **more}) for inputs in batches]

    def together() -> list[list[Decoded]]:
        return [generate_rows(model, inputs, methods, options) for inputs in batches]

    def one_by_one() -> list[list[Decoded]]:
        return [alone(method) for method in methods]

    alone(methods[0])  # warm up
    together()
    passes = Passes([], [], [], [])
    for _ in range(repeats):
        _timed(passes.prefill, lambda: alone(methods[0], max_new_tokens=1))
        _timed(passes.one_full, lambda: alone(methods[0]))
        grid = _timed(passes.grid, together)
        single = _timed(passes.one_by_one, one_by_one)
    unlike = sum(
        not torch.equal(a, b)
        for m in range(len(methods))
        for number in range(len(batches))
        for a, b in zip(grid[number][m].tokens, single[m][number].tokens, strict=True)
    )
    return passes, unlike


def _timed(times: list[float], run: Callable[[], Any]) -> Any:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    found = run()  # its tokens are on the host: nothing is left to wait for
    times.append(time.perf_counter() - start)
    return found


def _ratios(passes: Passes) -> dict[str, float]:
    times = passes.medians()
    return {
        "grid_over_one_full": round(times["grid"] / times["one_full"], 3),
        "one_by_one_over_grid": round(times["one_by_one"] / times["grid"], 2),
        "prefill_share_of_one_full": round(times["prefill"] / times["one_full"], 3),
        "prefill_share_of_grid": round(times["prefill"] / times["grid"], 3),
    }


def _bound(measured: Subject, methods: Sequence[Method], passes: Passes) -> dict[str, float]:
    """Prefill as measured, then weights and all rows' KV once a step at copy bandwidth."""
    model, batches = measured.model, measured.batches
    options = {"max_new_tokens": 1, "do_sample": False}
    kept = 0
    for inputs in batches:
        found = generate_rows(model, inputs, methods, {**options, "max_new_tokens": 2})
        kept += sum(sum(decoded.kept_bytes) for decoded in found)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) * len(batches)
    clock = DeviceClock(1 << 30)
    copying = statistics.median(clock.copy()[0] for _ in range(20))
    bandwidth = 2 * (1 << 30) / copying * 1e6  # read and written
    steps = measured.new_tokens - 1
    bound = passes.medians()["prefill"] + steps * (weights + kept) / bandwidth
    return {
        "copy_bytes_per_second": bandwidth,
        "weight_bytes_a_step": weights,
        "kv_bytes_a_step": kept,
        "seconds": round(bound, 4),
        "grid_over_bound": round(passes.medians()["grid"] / bound, 3),
    }


if __name__ == "__main__":
    sys.exit(main())
