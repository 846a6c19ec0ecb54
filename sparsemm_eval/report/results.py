"""lmms-eval result files to one tidy frame."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

# What our wrappers leave in an lmms-eval results file, beside the scores.
_MEASURED = {
    "avg_kept_tokens_per_head": "kept_tokens_per_head",
    "avg_kept_kv_bytes": "kept_kv_bytes",
    "avg_prompt_tokens": "prompt_tokens",
    "avg_share_uncompressed": "share_uncompressed",
}


def read_results(paths: Iterable[Path]) -> pd.DataFrame:
    """One row a (file, task, metric).

    Parameters
    ----------
    paths : iterable of Path
        Results files as lmms-eval writes them.

    Returns
    -------
    DataFrame
        Columns task, metric, score, stderr, samples, the settings of model_args (method, budget,
        …), what was kept, and file.

    Raises
    ------
    ValueError
        Naming a file that is no lmms-eval results file.
    """
    rows: list[dict[str, Any]] = []
    for path in paths:
        try:
            results = json.loads(Path(path).read_text(encoding="utf-8"))
            rows.extend(_rows(results, Path(path)))
        except (
            json.JSONDecodeError,
            UnicodeDecodeError,
            KeyError,
            AttributeError,
            TypeError,
        ) as error:
            raise ValueError(f"{path}: not an lmms-eval results file ({error!r})") from error
    return pd.DataFrame(rows)


def _rows(results: Mapping[str, Any], path: Path) -> Iterable[dict[str, Any]]:
    settings = parse_model_args(results["config"]["model_args"])
    measured = {name: results.get("throughput", {}).get(key) for key, name in _MEASURED.items()}
    for task, values in results["results"].items():
        for name, score in values.items():
            metric, comma, filter_name = name.partition(",")
            if not comma or metric.endswith(("_stderr", "_stderr_clt", "_stderr_clustered")):
                continue
            if not isinstance(score, int | float):
                continue
            yield {
                "task": task,
                "metric": metric,
                "score": score,
                "stderr": _number(values.get(f"{metric}_stderr,{filter_name}")),
                "samples": results.get("n-samples", {}).get(task, {}).get("effective"),
                **settings,
                **measured,
                "file": str(path),
            }


def parse_model_args(text: str) -> dict[str, Any]:
    """``name=value,…`` with numbers as numbers."""
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    return {name: _value(value) for name, _, value in pairs}


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) else None
