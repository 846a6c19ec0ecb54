"""``bench shared-prefill``: what a grid costs in one pass, cell by cell, and one cell alone.

Also ``python -m sparsemm_eval.bench.shared_prefill`` from a checkout, with the same options.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor

from sparsemm_eval.bench.machine import find_device, provenance_on, threads, write_json
from sparsemm_eval.bench.models import LARGE, Subject, grid_methods, kv_bytes, weight_bytes
from sparsemm_eval.bench.options import Benchmark, SharedPrefillOptions, main
from sparsemm_eval.bench.timing import clocked, copy_bandwidth
from sparsemm_eval.engine.decode import Decoded, decode
from sparsemm_eval.errors import check_choice, check_int
from sparsemm_eval.methods import Method
from sparsemm_eval.tiny import EMBEDDED, embedded_checkpoints
from sparsemm_eval.tiny.documents import Split, draw_document, stream, value_question

LARGE_TOKENS, LARGE_NEW_TOKENS = 2000, 32  # of a prompt, and decoded
# New tokens that are enough for any value on a drawn page.
DRAWN_NEW_TOKENS = 8
_SHOWN = ("seconds", "grid_over_one_full", "one_by_one_over_grid", "answers_unlike", "byte_bound")


@dataclass(frozen=True)
class Prompts:
    """What a model reads.

    Parameters
    ----------
    batches : list of mapping
        Inputs of ``generate``.
    new_tokens : int
        Decoded at most.
    """

    batches: list[Mapping[str, Tensor]]
    new_tokens: int


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


def run(options: SharedPrefillOptions, command: str) -> Benchmark:
    """Measure, check that all ways answer alike, and write a JSON file.

    Parameters
    ----------
    options : SharedPrefillOptions
        What is measured; a model of `sparsemm_eval.bench.models.LARGE` has random weights in half
        precision, reads random text and never ends by itself, an embedded one reads drawn pages.
    command : str
        That makes the file again.

    Raises
    ------
    UserError
        For settings that cannot be.
    """
    settings = {name: getattr(options, name) for name in ("samples", "batch_size", "repeats")}
    for name, value in settings.items():
        check_int(name, value, least=1)
    model = options.model.removeprefix(EMBEDDED)
    check_choice("model", model, (*embedded_checkpoints(), *LARGE))
    device, large = find_device(options.device), model in LARGE
    with threads(options.threads):
        dtype = torch.float16 if large else torch.float32
        subject = Subject.load(model, device, dtype, ends=True)
        prompts = (_random if large else _drawn)(subject, options)
        methods = grid_methods(subject.shape, subject.scores, large)
        passes, unlike = _measure(subject, prompts, methods, options.repeats)
        whole = {
            **provenance_on(device, command),
            "model": model,
            **settings,
            "dtype": str(dtype).removeprefix("torch."),
            "cells": len(methods),
            "prompt_tokens": int(prompts.batches[0]["input_ids"].shape[1]),
            "seconds": {name: [round(t, 4) for t in ts] for name, ts in vars(passes).items()},
            **_ratios(passes),
            "answers_unlike": unlike,
        }
        if device.type == "cuda":
            whole["byte_bound"] = _bound(subject, prompts, methods, passes)
    write_json(options.out, whole)
    lines = [f"{name}: {whole[name]}" for name in _SHOWN if name in whole]
    return Benchmark("\n".join(lines), [options.out])


def _random(subject: Subject, options: SharedPrefillOptions) -> Prompts:
    whole = subject.prompts(LARGE_TOKENS, options.samples)
    parts = zip(*(tensor.split(options.batch_size) for tensor in whole.values()), strict=True)
    return Prompts([dict(zip(whole, part, strict=True)) for part in parts], LARGE_NEW_TOKENS)


def _drawn(subject: Subject, options: SharedPrefillOptions) -> Prompts:
    """Held-out pages, each asked for its first value."""
    processor = AutoProcessor.from_pretrained(embedded_checkpoints()[subject.name])
    pages = [draw_document(stream(Split.HELD_OUT, 0, number)) for number in range(options.samples)]
    texts = []
    for page in pages:
        question = {"type": "text", "text": value_question(page, 0).prompt}
        turn = {"role": "user", "content": [{"type": "image"}, question]}
        texts.append(processor.apply_chat_template([turn], add_generation_prompt=True))
    batches = []
    for start in range(0, options.samples, options.batch_size):
        part = slice(start, start + options.batch_size)
        images = [page.image for page in pages[part]]
        inputs = processor(text=texts[part], images=images, padding=True, return_tensors="pt")
        batches.append(inputs.to(subject.model.device))
    return Prompts(batches, DRAWN_NEW_TOKENS)


def _measure(
    subject: Subject, prompts: Prompts, methods: Sequence[Method], repeats: int
) -> tuple[Passes, int]:
    """Seconds of each way in turn, and how many answers differ between one pass and one by one."""
    model, batches = subject.model, prompts.batches
    options = {"max_new_tokens": prompts.new_tokens, "do_sample": False}
    if model.generation_config.pad_token_id is not None:
        options["pad_token_id"] = model.generation_config.pad_token_id

    def alone(method: Method, **more: Any) -> list[Decoded]:
        return [decode(model, inputs, [method], {**options, **more})[0] for inputs in batches]

    def together() -> list[list[Decoded]]:
        return [decode(model, inputs, methods, options) for inputs in batches]

    def one_by_one() -> list[list[Decoded]]:
        return [alone(method) for method in methods]

    def timed(times: list[float], work: Callable[[], Any]) -> Any:
        result, seconds = clocked(work, model.device)
        times.append(seconds)
        return result

    alone(methods[0])  # warm up
    together()
    passes = Passes([], [], [], [])
    for _ in range(repeats):
        timed(passes.prefill, lambda: alone(methods[0], max_new_tokens=1))
        timed(passes.one_full, lambda: alone(methods[0]))
        grid = timed(passes.grid, together)
        single = timed(passes.one_by_one, one_by_one)
    unlike = sum(
        not torch.equal(a, b)
        for m in range(len(methods))
        for number in range(len(batches))
        for a, b in zip(grid[number][m].tokens, single[m][number].tokens, strict=True)
    )
    return passes, unlike


def _ratios(passes: Passes) -> dict[str, float]:
    times = passes.medians()
    return {
        "grid_over_one_full": round(times["grid"] / times["one_full"], 3),
        "one_by_one_over_grid": round(times["one_by_one"] / times["grid"], 2),
        "prefill_share_of_one_full": round(times["prefill"] / times["one_full"], 3),
        "prefill_share_of_grid": round(times["prefill"] / times["grid"], 3),
    }


def _bound(
    subject: Subject, prompts: Prompts, methods: Sequence[Method], passes: Passes
) -> dict[str, float]:
    """Prefill as measured, then weights and all rows' KV once a step at copy bandwidth."""
    model, steps = subject.model, prompts.new_tokens - 1
    read = 0
    for inputs in prompts.batches:
        samples, tokens = inputs["input_ids"].shape
        read += kv_bytes(model, [*methods] * samples, tokens, steps)
    weights = weight_bytes(model) * len(prompts.batches)
    bandwidth = copy_bandwidth(model.device, 1 << 30)
    bound = passes.medians()["prefill"] + steps * (weights + read) / bandwidth
    return {
        "copy_bytes_per_second": bandwidth,
        "weight_bytes_a_step": weights,
        "kv_bytes_a_step": read,
        "seconds": round(bound, 4),
        "grid_over_bound": round(passes.medians()["grid"] / bound, 3),
    }


if __name__ == "__main__":
    sys.exit(main("shared-prefill"))
