"""Cells and the scores of their samples, made up."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from sparsemm_eval.report.cells import cells_frame
from sparsemm_eval.report.markup import Table
from sparsemm_eval.report.names import method_label

NO_SCORES = pd.DataFrame({"cell": [], "doc_id": [], "score": []})


def cell(
    method: str, budget: float | None, score: float, label: str | None = None, **other: Any
) -> dict[str, Any]:
    """One row of a frame of cells, of DocVQA unless `other` says more."""
    shown = {name: other[name] for name in ("ratio",) if name in other}
    row = {
        "model": "small", "task": "docvqa_val", "benchmark": "DocVQA", "metric": "anls",
        "metric_label": "ANLS", "method": method, "label": label or method_label(method, shown),
        "budget": budget, "settings": {}, "score": score, "seeds": 1, "samples": 200,
        "expected": 200, "kept_tokens_per_head": budget or 300.0, "kept_kv_bytes": 3 * 2**20,
        "source": "measured", "percent": False, "files_of": (), "samples_files": (),
        "higher_is_better": True, "bounded": True,
    }  # fmt: skip
    return row | other


def frames(
    scores: Mapping[tuple[str, float | None], Sequence[float]], **other: Any
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cells of one model and task by (method, budget), and their samples; NaN: none there."""
    rows, samples = [], []
    for number, ((method, budget), values) in enumerate(scores.items()):
        column = pd.Series(values, dtype=float).dropna()
        rows.append(cell(method, budget, column.mean(), samples=len(column), **other))
        samples.append(pd.DataFrame({"cell": number, "doc_id": column.index, "score": column}))
    return cells_frame(rows), pd.concat(samples, ignore_index=True)


def coins(seed: int, samples: int, *chances: float) -> list[np.ndarray]:
    """Right and wrong answers: columns that err on the same hard samples."""
    hard = np.random.default_rng(seed).random(samples)
    return [(hard < chance).astype(float) for chance in chances]


def by_name(table: Table, frame: pd.DataFrame | None = None, names: int | None = None):
    """A table's text, or another frame of it, by the names of its rows."""
    frame = table.text if frame is None else frame
    named = frame.set_index(list(frame.columns[: table.names if names is None else names]))
    return named.rename_axis([head[0] for head in named.index.names])
