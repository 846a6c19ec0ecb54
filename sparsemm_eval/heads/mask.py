"""What a benchmark loses without its model's visual heads, and without as many others.

SparseMM's masking study: the top few percent of the heads by visual score are silenced while the
model reads and answers on full KV, then as many random other heads, with several seeds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.evaluate import evaluate, make_models
from sparsemm_eval.errors import UserError, check_choice, check_int
from sparsemm_eval.methods import MASK_MODES
from sparsemm_eval.paths import write_whole
from sparsemm_eval.report.figures.silenced import score_over_silenced
from sparsemm_eval.report.names import last_part
from sparsemm_eval.report.provenance import provenance
from sparsemm_eval.report.results import load
from sparsemm_eval.report.tables import silenced_table, to_markdown

SHARES = (0.01, 0.02, 0.05, 0.1)
SEEDS = 3


@dataclass(frozen=True)
class Masking:
    """The scores of a masking study, and its files.

    Parameters
    ----------
    frame : DataFrame
        A row a (cell, task, metric): task, metric, silenced ("none", "visual" or "random"),
        share, seed, mode, heads (how many), names (which), score, stderr, samples.
    markdown : str
        Its tables.
    files : tuple of Path
        What was written.
    """

    frame: pd.DataFrame
    markdown: str
    files: tuple[Path, ...]


def run_masking(
    checkpoint: Checkpoint,
    out: Path,
    tasks: Sequence[str] = ("docvqa_mini",),
    shares: Sequence[float] = SHARES,
    seeds: int = SEEDS,
    modes: Sequence[str] = ("query",),
    samples: int = 100,
    batch_size: int = 8,
    head_scores: Path | None = None,
    command: str = "sparsemm-eval mask",
) -> Masking:
    """Score full KV with and without visual and random heads; write table, curve and numbers.

    Parameters
    ----------
    checkpoint : Checkpoint
        A model with head scores.
    out : Path
        Folder for everything. A second run finds the answers there and computes only what is
        missing.
    tasks : sequence of str
        Known to lmms-eval, or in `tasks/`.
    shares : sequence of float
        Shares of all query heads, each between 0 and 1; at least one head is silenced.
    seeds : int
        Random draws a share.
    modes : sequence of {"query", "output"}
        How heads are silenced; see `sparsemm_eval.methods.HeadMask`.
    samples : int
        The first so many of each task.
    batch_size : int
        Samples that are read and decoded together.
    head_scores : Path, optional
        Score file; default the checkpoint's own.
    command : str
        What makes it again, for the record.

    Raises
    ------
    ValueError, FileNotFoundError
        For settings that cannot be, before the model is loaded.
    """
    start = time.perf_counter()
    for name, value in (("seeds", seeds), ("samples", samples)):
        check_int(name, value, least=1)
    for name, given in (("tasks", tasks), ("shares", shares), ("modes", modes)):
        if not given:
            raise UserError(f"{name} is empty: give at least one")
    for mode in modes:
        check_choice("mode", mode, MASK_MODES)
    cells = list(_cells(dict.fromkeys(shares), seeds, dict.fromkeys(modes)))
    common: dict[str, Any] = {"batch_size": batch_size, "answers": out / "answers"}
    if head_scores is not None:
        common["head_scores"] = head_scores
    models = make_models(checkpoint, [settings for settings, _ in cells], **common)
    paths = evaluate(models, [settings for settings, _ in cells], tasks, samples, out)
    masks = [model.mask for model in models]
    studied = pd.DataFrame(
        {
            **study,
            "heads": 0 if mask is None else len(mask.heads),
            "names": "" if mask is None else mask.names,
            "file": str(path),
        }
        for (_, study), mask, files in zip(cells, masks, paths, strict=True)
        for path in files
    )
    measured = ["file", "task", "metric", "score", "stderr", "samples"]
    results = load((path for files in paths for path in files), all_metrics=True)
    scores = results.cells.assign(file=results.cells["file"].map(results.files["path"]))
    frame = scores[measured].astype({"samples": int}).merge(studied, on="file").drop(columns="file")
    return _write(frame, checkpoint, out, command, time.perf_counter() - start)


def _cells(
    shares: Iterable[float], seeds: int, modes: Iterable[str]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Settings of each model, and what it is in the study."""
    yield {"method": "fullkv"}, {"silenced": "none", "share": 0.0, "seed": None, "mode": None}
    for mode in modes:
        for share in shares:
            for seed in (None, *range(seeds)):
                kind = "visual" if seed is None else "random"
                heads = f"{kind}:{share:g}" + ("" if seed is None else f":{seed}")
                settings = {"method": "fullkv", "mask_heads": heads, "mask_mode": mode}
                yield settings, {"silenced": kind, "share": share, "seed": seed, "mode": mode}


def _write(
    frame: pd.DataFrame, checkpoint: Checkpoint, out: Path, command: str, seconds: float
) -> Masking:
    """Tables, curve and summary of all cells."""
    shape = checkpoint.shape
    total = shape.layers * shape.query_heads
    model = last_part(str(checkpoint.folder))
    parts = [
        "# What is lost without visual heads",
        f"{model} ({shape.layers} layers of {shape.query_heads} query heads) on full KV, "
        f"{frame['samples'].max():.0f} samples a task. Silenced are the best heads by visual "
        f"score, or as many random others ({frame['seed'].nunique()} seeds). Mode query sets a "
        "head's query to zero, so that it attends alike to all it may see; mode output sets what "
        "it says to zero.",
    ]
    for (task, metric), cells in frame.groupby(["task", "metric"], sort=False):
        parts += [f"## {task}: {metric}", to_markdown(silenced_table(cells, total))]
    markdown = "\n\n".join(parts) + "\n"
    table, curve, summary = out / "table.md", out / "masking.png", out / "masking.json"
    write_whole(table, markdown)
    score_over_silenced(frame, total, curve)
    study = {
        **provenance(command),
        "checkpoint_hash": checkpoint.hash,
        "dtype": checkpoint.dtype,
        "query_heads": total,
        "seconds": round(seconds, 1),
        "cells": json.loads(frame.to_json(orient="records")),
    }
    write_whole(summary, json.dumps(study, indent=1) + "\n")
    return Masking(frame, markdown, (table, curve, summary))
