"""A sweep's tables and summary, the same bytes from the same answers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from sparsemm_eval.paths import tasks_folder, write_whole
from sparsemm_eval.report.cell_text import budget_text
from sparsemm_eval.report.provenance import provenance
from sparsemm_eval.report.tables import (
    calibration_lines,
    empty_line,
    fidelity_table,
    kept_table,
    notes_below,
    score_tables,
    to_markdown,
)
from sparsemm_eval.tiny.benchmarks import BENCHMARKS
from sparsemm_eval.tiny.chance import constant_answer_score

FIDELITY = ("compared", "same_answer", "first_difference", "kl_full", "kl_missing")
_COLUMNS = [
    "model", "task", "metric", "method", "label", "budget", "score", "stderr", "samples",
    "kept_tokens_per_head", "kept_kv_bytes", "prompt_tokens", *FIDELITY,
]  # fmt: skip


def write_tables(
    markdown: str, frame: pd.DataFrame, out: Path, command: str, about: Mapping[str, Any]
) -> tuple[Path, ...]:
    """Write table.md, kept.md and summary.json.

    Parameters
    ----------
    markdown : str
        The tables.
    frame : DataFrame
        One row a scored cell, of `report.results.load`, with fidelity.
    out : Path
        The sweep's folder.
    command : str
        What makes it again.
    about : mapping
        More for summary.json: what was left out, failed, took.

    Returns
    -------
    tuple of Path
        What was written.
    """
    kept = [
        "\n\n".join(
            [
                "# What each cell really kept",
                f"{name}, {task}",
                to_markdown(kept_table(cells)),
                *calibration_lines(cells),
            ]
        )
        + "\n"
        for (name, task), cells in frame.groupby(["model", "task"], sort=False)
    ]
    settings = [name for name in ("ratio", "allocation", "seed") if frame[name].notna().any()]
    cells = frame[[*_COLUMNS, *settings]]
    summary = {
        **provenance(command),
        **about,
        "cells": json.loads(cells.to_json(orient="records", double_precision=15)),
    }
    written = {
        out / "table.md": markdown,
        out / "kept.md": "\n".join(kept),
        out / "summary.json": json.dumps(summary, indent=1) + "\n",
    }
    for path, text in written.items():
        write_whole(path, text)
    return tuple(written)


def chance_of(tasks: Iterable[str]) -> dict[str, tuple[str, float]]:
    """The best constant answer and its score, of those tasks that are miniatures of ours."""
    return {
        task: constant_answer_score(task.removesuffix("_mini"), tasks_folder())
        for task in tasks
        if task.endswith("_mini") and task.removesuffix("_mini") in BENCHMARKS
    }


def warnings_of(frame: pd.DataFrame) -> list[str]:
    """What should keep one from taking scores as they stand, a line each for all cells.

    Parameters
    ----------
    frame : DataFrame
        One row a scored cell; none if none was scored.
    """
    lines = (uncompressed_cells(frame), empty_line(frame))
    return [*filter(None, lines), *calibration_lines(frame)]


def uncompressed_cells(frame: pd.DataFrame) -> str | None:
    """Say which cells compressed hardly anything, in one line for all; None if there are none.

    Parameters
    ----------
    frame : DataFrame
        One row a scored cell.
    """
    if frame.empty:
        return None
    budgeted = frame[frame["budget"].notna()]
    whole = budgeted[budgeted["share_uncompressed"] > 0.5]
    if whole.empty:
        return None
    where = "; ".join(
        f"{model} at {budget_text(budget)} on {', '.join(dict.fromkeys(cells['task']))}"
        for (model, budget), cells in whole.groupby(["model", "budget"], sort=False)
    )
    return (
        f"{len(whole)} of {len(budgeted)} cells are mostly full KV, as most of their prompts fit "
        f"the budget: {where}"
    )


def sweep_tables(frame: pd.DataFrame, name: str) -> str:
    """Scores and fidelity of each model and task, as Markdown under a title."""
    chance = chance_of(frame["task"].unique())
    parts = [
        f"# {name}",
        "Columns are budgets: mean tokens of the prompt kept per KV head. Below each table, how "
        "near the answers are to full KV's: the share that equal its answer, the place of the "
        "first new token that differs (mean over answers that differ), and the KL divergence of "
        "the next-token distribution from full KV's.",
    ]
    for model, of_model in frame.groupby("model", sort=False):
        parts.append(f"## {model}")
        for _, cells in of_model.groupby("task", sort=False):
            if cells["budget"].isna().all():
                parts += [f"### {cells['task'].iloc[0]}", to_markdown(kept_table(cells))]
                continue
            ((title, table),) = score_tables(cells, chance)
            count = f"{cells['samples'].max():.0f} samples."
            parts += [f"### {title}", count, to_markdown(table), *notes_below(cells)]
            if cells["compared"].sum() > 0:
                parts.append(to_markdown(fidelity_table(cells)))
    return "\n\n".join(parts) + "\n"
