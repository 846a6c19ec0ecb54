"""The paper's numbers, in the form of one's own results."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from importlib.resources import files
from io import StringIO
from typing import Any

import pandas as pd

from sparsemm_eval.errors import UserError
from sparsemm_eval.report.cells import cells_frame
from sparsemm_eval.report.names import BENCHMARKS, METHOD_NAMES, method_label

_FILES = {
    "table1": "table1_ratio_ablation.csv",
    "table2": "table2_component_ablation.csv",
    "table3": "table3_ocr_rich.csv",
    "table4": "table4_general.csv",
}
TABLES = tuple(_FILES)
# They vary one setting at one budget, or parts of the cache: no comparison of methods.
STUDIES = ("table1", "table2")
_TASKS = {benchmark.title: task for task, benchmark in BENCHMARKS.items()}
_METHODS = {label: method for method, label in METHOD_NAMES.items()}
# Table 2's parts of the cache (local window, uniform, by score), as methods and settings.
_PARTS = {
    ("1", "0", "0"): {"method": "local"},
    ("1", "1", "0"): {"method": "sparsemm", "ratio": 1.0},
    ("1", "1", "1"): {"method": "sparsemm", "ratio": 0.1},
}


def paper_cells(like: str | None = None) -> pd.DataFrame:
    """The paper's scores as cells: the columns of `sparsemm_eval.report.results.Results.cells`.

    Parameters
    ----------
    like : {"table1", "table2", "table3", "table4"}, optional
        One table alone, Figure 4's with Table 3's; default all, told apart by `source`.

    Returns
    -------
    DataFrame
        Tasks are benchmarks' short names, such as "docvqa". A score in percent becomes 0 to 1 such
        that ``f"{100 * score:.{digits}f}"`` is what is printed. Table 1's cells are sparsemm with
        its ratios; Table 2's are local, sparsemm with ratio 1 and sparsemm with ratio 0.1.
    """
    if like is not None and like not in TABLES:
        raise UserError(f"like={like}: it must be one of {', '.join(TABLES)}")
    names = TABLES if like is None else (like,)
    return cells_frame(row for name in names for row in _rows(name))


def paper_efficiency() -> pd.DataFrame:
    """Decode time and peak memory, read off the paper's figure.

    Returns
    -------
    DataFrame
        Columns model, method (as registered), label, budget (NaN for full KV), input_tokens,
        decode_ms_per_token, peak_memory_gb, source.
    """
    frame = pd.read_csv(StringIO(_text("efficiency_digitised.csv")))
    return frame.assign(method=frame["method"].map(_METHODS), label=frame["method"])[
        ["model", "method", "label", "budget", "input_tokens", "decode_ms_per_token",
         "peak_memory_gb", "source"]
    ]  # fmt: skip


def _text(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


def _rows(table: str) -> Iterator[dict[str, Any]]:
    printed = pd.read_csv(StringIO(_text(_FILES[table])), dtype=str, keep_default_na=False)
    for row in printed.to_dict("records"):
        task = _TASKS[row["benchmark"]]
        benchmark = BENCHMARKS[task]
        budget = float(row["budget"]) if row["budget"] else None
        settings = _settings(table, row)
        shown = {"ratio": settings["ratio"]} if "ratio" in settings else {}
        yield {
            "model": row["model"],
            "task": task,
            "benchmark": benchmark.title,
            "metric": benchmark.metric,
            "metric_label": benchmark.label,
            "method": settings["method"],
            "label": method_label(settings["method"], shown),
            "budget": budget,
            "ratio": settings.get("ratio"),
            "settings": settings if budget is None else settings | {"budget": budget},
            "score": float(Decimal(row["score"]) / (100 if benchmark.percent else 1)),
            "seeds": 1,
            "source": row["source"],
            "digits": len(row["score"].partition(".")[2]),
            "higher_is_better": True,
            "bounded": benchmark.bounded,
            "percent": benchmark.percent,
            "files_of": (),
            "samples_files": (),
        }


def _settings(table: str, row: dict[str, str]) -> dict[str, Any]:
    if table == "table1":
        return {"method": "sparsemm", "ratio": float(row["ratio"])}
    if table == "table2":
        return dict(_PARTS[row["local_window"], row["uniform"], row["score_preferred"]])
    return {"method": _METHODS[row["method"]]}
