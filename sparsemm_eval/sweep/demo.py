"""The demo: every method over a range of budgets on the embedded model, offline, in minutes."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from tqdm import tqdm

from sparsemm_eval.models.checkpoint import Checkpoint
from sparsemm_eval.models.qwen2vl import Qwen2VLSparseMM
from sparsemm_eval.paths import tasks_folder
from sparsemm_eval.report.figures import score_over_budget
from sparsemm_eval.report.provenance import provenance
from sparsemm_eval.report.results import read_results
from sparsemm_eval.report.tables import kept_table, score_table, to_markdown
from sparsemm_eval.tiny import default_checkpoint

TASK, METRIC = "docvqa_mini", "anls"
METHODS = ("sparsemm", "snapkv", "pyramidkv", "adakv", "random")
BUDGETS = (256, 128, 64, 32, 16, 12)
# The questions of drawn documents are 5 to 8 tokens long; the paper's window of 32 is for prompts
# of real benchmarks.
WINDOW = 8


@dataclass(frozen=True)
class Demo:
    """What the demo made.

    Parameters
    ----------
    frame : DataFrame
        One row a cell.
    markdown : str
        Its tables.
    files : tuple of Path
        What was written.
    """

    frame: pd.DataFrame
    markdown: str
    files: tuple[Path, ...]


def run_demo(
    out: Path,
    samples: int,
    batch_size: int,
    budgets: Sequence[int] = BUDGETS,
    pretrained: Path | None = None,
) -> Demo:
    """Run all cells with one live model, score them with lmms-eval, draw table and curve.

    Parameters
    ----------
    out : Path
        Folder for everything: answers, results of each cell, tables, curve. A second run finds
        the answers there and computes only what is missing.
    samples : int
        Documents, 1 to 200.
    batch_size : int
        Documents that are read and decoded together.
    budgets : sequence of int
        Mean tokens per KV head.
    pretrained : Path, optional
        Another checkpoint than the embedded one.

    Raises
    ------
    ValueError, FileNotFoundError
        For settings that cannot be, before the model is loaded.
    """
    start = time.perf_counter()
    if not 1 <= samples <= 200:
        raise ValueError(f"samples={samples}: the demo has 1 to 200 documents")
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    checkpoint = Checkpoint(
        pretrained or default_checkpoint(), "qwen2_vl", dtype="float32", device_map=device
    )
    cells = list(_cells(budgets))
    models = [
        Qwen2VLSparseMM(checkpoint=checkpoint, batch_size=batch_size, answers=out / "answers", **c)
        for c in cells
    ]
    task_manager = TaskManager("WARNING", include_path=str(tasks_folder()))
    paths = []
    # lmms-eval draws three bars a cell: they go to a file, one bar for all stays on the screen.
    bar = tqdm(total=len(cells), desc="cells", file=sys.stderr)
    with bar, (out / "log.txt").open("a", encoding="utf-8") as log, redirect_stderr(log):
        for model, cell in zip(models, cells, strict=True):
            paths.append(_evaluate(model, cell, samples, task_manager, out / "cells"))
            bar.update()
    frame = read_results(paths)
    return _write(frame[frame["metric"] == METRIC], out, time.perf_counter() - start)


def _cells(budgets: Sequence[int]) -> Iterator[dict[str, Any]]:
    yield {"method": "fullkv"}
    for method in METHODS:
        for budget in budgets:
            yield {"method": method, "budget": budget, "window": WINDOW}


def _evaluate(
    model: Qwen2VLSparseMM,
    cell: dict[str, Any],
    samples: int,
    task_manager: TaskManager,
    folder: Path,
) -> Path:
    """One cell through lmms-eval, its results on disk whole or not at all."""
    results = simple_evaluate(
        model=model,
        model_args=",".join(f"{name}={value}" for name, value in cell.items()),
        tasks=[TASK],
        limit=samples,
        task_manager=task_manager,
        log_samples=False,
        verbosity="WARNING",
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ("-".join(str(value) for value in cell.values()) + "_results.json")
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(results, indent=1, default=str), encoding="utf-8")
    os.replace(unfinished, path)
    return path


def _write(frame: pd.DataFrame, out: Path, seconds: float) -> Demo:
    """Tables, curve and summary of all cells."""
    count = int(frame["samples"].iloc[0])
    length = frame["prompt_tokens"].mean()
    markdown = (
        f"# DocVQA in miniature: ANLS by budget\n\n"
        f"{count} drawn documents, the embedded Qwen2-VL (0.9 M parameters, float32), window "
        f"{WINDOW}, prompts of {length:.0f} tokens on average. Budget: mean tokens kept per KV "
        f"head.\n\n{to_markdown(score_table(frame))}\n\n"
        f"## What each cell really kept\n\n{to_markdown(kept_table(frame))}\n"
    )
    table, curve, summary = out / "table.md", out / "score_over_budget.png", out / "summary.json"
    table.write_text(markdown, encoding="utf-8")
    score_over_budget(frame, f"DocVQA in miniature, {count} documents", "ANLS", curve)
    columns = [
        "task", "metric", "method", "budget", "score", "stderr", "samples",
        "kept_tokens_per_head", "kept_kv_bytes", "prompt_tokens",
    ]  # fmt: skip
    cells = json.loads(frame[columns].to_json(orient="records"))
    made = {**provenance("./run_eval.sh"), "seconds": round(seconds, 1), "cells": cells}
    summary.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return Demo(frame, markdown, (table, curve, summary))
