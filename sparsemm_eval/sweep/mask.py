"""What a benchmark loses without its model's visual heads, and without as many others.

SparseMM's masking study: the top few percent of the heads by visual score are silenced while the
model reads and answers on full KV, then as many random other heads, with several seeds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from sparsemm_eval.engine.answers import SampleFailures
from sparsemm_eval.engine.cell import make_cell
from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.lmms import results_path
from sparsemm_eval.methods import MASK_MODES, Plugin
from sparsemm_eval.paths import write_whole
from sparsemm_eval.report.figures.silenced import score_over_silenced
from sparsemm_eval.report.names import last_part
from sparsemm_eval.report.provenance import provenance
from sparsemm_eval.report.results import load
from sparsemm_eval.report.tables import silenced_table, to_markdown
from sparsemm_eval.sweep.checks import check_models
from sparsemm_eval.sweep.studies import MaskingStudy
from sparsemm_eval.sweep.sweep import run_sweep

_MEASURED = ["task", "metric", "score", "stderr", "samples"]


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
    study: MaskingStudy,
    out: Path,
    plugins: Sequence[Plugin] = (),
    command: str = "sparsemm-eval mask",
) -> Masking:
    """Score full KV with and without visual and random heads; write table, curve and numbers.

    It is a sweep over the heads that are silenced: a second run finds its answers and computes
    only what is missing.

    Parameters
    ----------
    study : MaskingStudy
        By `sparsemm_eval.sweep.studies.masking_study`.
    out : Path
        Folder for everything.
    plugins : sequence of Plugin
        Those that were loaded for the model's family.
    command : str
        What makes it again, for the record.

    Raises
    ------
    UserError
        For settings that cannot be, before the model is loaded.
    SampleFailures
        If a cell has no score.
    """
    start = time.perf_counter()
    grid = study.grid
    modes = grid.axes["mask_mode"]
    done = run_sweep(grid, out, command, plugins=plugins, replace=True)
    if failures := done.status.failures + done.failures:
        raise SampleFailures("; ".join(failures))
    checkpoint = check_models(grid.models)["model"]
    settings = grid.models[0].settings
    scores = {name: path for name, path in settings.items() if name == "head_scores"}
    rows = []
    for cell in sorted(grid.cells(), key=lambda cell: _place(cell, modes)):
        kind, share, seed = study.studied.get(cell.get("mask_heads"), ("none", 0.0, None))
        mask = make_cell(checkpoint, {**cell, **scores}).mask
        paths = [out / results_path(Path("cells") / "model", task, cell) for task in grid.tasks]
        of_cell = load(paths, all_metrics=True).cells[_MEASURED].astype({"samples": int})
        rows.append(
            of_cell.assign(
                silenced=kind,
                share=share,
                seed=seed,
                mode=None if mask is None else mask.mode,
                heads=0 if mask is None else len(mask.heads),
                names="" if mask is None else mask.names,
            )
        )
    frame = pd.concat(rows, ignore_index=True)
    return _write(frame, checkpoint, out, command, time.perf_counter() - start)


def _place(cell: Mapping[str, Any], modes: Sequence[str]) -> int:
    """Where a cell stands: full KV first, then mode by mode."""
    if "mask_heads" not in cell:
        return -1
    return modes.index(cell.get("mask_mode", MASK_MODES[0]))


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
