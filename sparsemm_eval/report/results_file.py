"""One results file, ours or plain lmms-eval's: checked, and brought to one form."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsemm_eval.report.names import find_benchmark, last_part, top_score
from sparsemm_eval.report.provenance import OURS, SCHEMA

SUFFIX = "_results.json"
# What our wrappers leave in an lmms-eval results file, beside the scores.
MEASURED = {
    "avg_kept_tokens_per_head": "kept_tokens_per_head",
    "avg_kept_kv_bytes": "kept_kv_bytes",
    "avg_prompt_tokens": "prompt_tokens",
    "avg_share_uncompressed": "share_uncompressed",
}
# Of our entry; what is not there is unknown.
_ENTRY = {
    "schema": int, "command": str, "commit": str, "date": str, "python": str, "versions": dict,
    "hardware": dict, "model": str, "answers": str, "samples": str, "results": str,
}  # fmt: skip
_STDERR = ("_stderr", "_stderr_clt", "_stderr_clustered")


class NotResults(ValueError):
    """A file that cannot be read as results; the reason in one sentence."""


@dataclass(frozen=True)
class ResultsFile:
    """What a results file holds.

    Parameters
    ----------
    about : dict
        What it says of its making.
    rows : list of dict
        One a task that has a score, or one a score.
    without_score : tuple of str
        Its other tasks.
    """

    about: dict[str, Any]
    rows: list[dict[str, Any]]
    without_score: tuple[str, ...]


def read_file(path: Path, all_metrics: bool = False) -> ResultsFile:
    """Read a results file, ours or plain lmms-eval's.

    Parameters
    ----------
    path : Path
        The file.
    all_metrics : bool
        Whether each metric of a task is a row, or only the one that counts.

    Raises
    ------
    NotResults
        If it cannot be read.
    """
    content = _content(path)
    entry = _entry(content)
    config = _dict(content, "config")
    settings = _settings(config.get("model_args"))
    # A group's line repeats its tasks.
    groups = {name for name, tasks in _dict(content, "group_subtasks").items() if tasks}
    tasks = [task for task in _dict(content, "results") if task not in groups]
    scored = {task: rows for task in tasks if (rows := _scored(content, task))}
    if not scored:
        raise NotResults("it holds no scores")
    where = {"model": _model(entry, settings, content, path), **_method(settings, config)}
    measured = _measured(content, len(tasks))
    rows = [
        {**where, **measured, **row, "samples_files": _samples_files(path, task)}
        for task, scores in scored.items()
        for row in (scores if all_metrics else scores[:1])
    ]
    without = tuple(task for task in tasks if task not in scored)
    return ResultsFile(_about(path, content, entry, config), rows, without)


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise NotResults(f"it cannot be opened ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise NotResults("it is no UTF-8 text") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise NotResults(f"it is no JSON, or was cut off ({error})") from error
    if not isinstance(content, dict) or "results" not in content:
        raise NotResults("it is JSON, but no lmms-eval results file: it has no entry results")
    return content


def _entry(content: Mapping[str, Any]) -> dict[str, Any]:
    entry = content.get(OURS, {})
    if not isinstance(entry, dict):
        raise NotResults(f"its entry {OURS} is no mapping")
    for name, kind in _ENTRY.items():
        value = entry.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise NotResults(f"its entry {OURS} has {name}={value!r}: it must be {kind.__name__}")
        # First of all: what follows may look otherwise in a newer one.
        if name == "schema" and (value or 0) > SCHEMA:
            raise NotResults(
                f"it has schema {value} and this version reads up to {SCHEMA}: update sparsemm-eval"
            )
    return entry


def _dict(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = content.get(name) or {}
    if not isinstance(found, dict):
        raise NotResults(f"its entry {name} is no mapping")
    return found


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


def _settings(model_args: Any) -> dict[str, Any]:
    if isinstance(model_args, dict):
        return dict(model_args)
    if model_args is None or isinstance(model_args, str):
        return parse_model_args(model_args or "")
    raise NotResults(f"its config.model_args is {model_args!r}: it must be text or a mapping")


def _method(settings: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Method and its settings; a model that states none is a method of its own.

    Whether another program's model compresses its cache, its results file does not say.
    """
    method = settings.get("method", config.get("model") or "unknown")
    numbers = ("budget", "ratio", "seed", "window")
    found = {name: number(settings.get(name)) for name in numbers}
    if method == "fullkv":
        found["budget"] = None
    found["allocation"] = settings.get("allocation")
    return {"method": str(method), "settings": dict(settings), **found}


def _model(
    entry: Mapping[str, Any],
    settings: Mapping[str, Any],
    content: Mapping[str, Any],
    path: Path,
) -> str:
    """The name in the grid, or the checkpoint's; older files say neither, but their folder does."""
    pretrained = settings.get("pretrained") or settings.get("model")
    if entry.get("model"):
        return entry["model"]
    folder = path.absolute().parent
    if folder.parent.name == "cells":  # a sweep's: cells/MODEL/…
        return folder.name
    if pretrained:
        return last_part(str(pretrained))
    if folder.name == "cells":  # the demo's: MODEL/cells/…, MODEL/mask/cells/…
        parent = folder.parent
        return (parent.parent if parent.name == "mask" else parent).name
    return last_part(str(content.get("model_name") or _dict(content, "config").get("model")))


def _scored(content: Mapping[str, Any], task: str) -> list[dict[str, Any]]:
    """A row a metric that has a score, the one that counts first.

    That is the paper's of a benchmark of the paper, else the first that the task names.
    """
    scores: dict[str, tuple[float, float | None]] = {}
    for metric, pair in scores_of(_dict(_dict(content, "results"), task)):
        scores.setdefault(metric, pair)
    benchmark = find_benchmark(task)
    listed = _dict(_dict(content, "configs"), task).get("metric_list")
    named = [one.get("metric") for one in listed or () if isinstance(one, Mapping)]
    first = [*([] if benchmark is None else [benchmark.metric]), *named, *scores]
    rising = _dict(_dict(content, "higher_is_better"), task)
    counts = _dict(_dict(content, "n-samples"), task)
    samples = number(counts.get("effective"))
    rows = []
    for metric in dict.fromkeys(metric for metric in first if metric in scores):
        known = benchmark is not None and benchmark.metric == metric
        top = top_score(task, metric, samples)
        score, stderr = scores[metric]
        rows.append(
            {
                "task": task,
                "benchmark": task if benchmark is None else benchmark.title,
                "metric": metric,
                "metric_label": benchmark.label if known else metric,
                "higher_is_better": rising.get(metric) is not False,
                "bounded": known and benchmark.bounded,
                "percent": known and benchmark.percent,
                "score": score / top,
                "stderr": None if stderr is None else stderr / top,
                "samples": samples,
                "expected": number(counts.get("original")),
            }
        )
    return rows


def scores_of(values: Mapping[str, Any]) -> Iterator[tuple[str, tuple[float, float | None]]]:
    """Each metric's score and standard error, as lmms-eval names and scales them."""
    for name, value in values.items():
        metric, comma, filter_name = name.partition(",")
        if not comma or metric.endswith(_STDERR):
            continue
        if (score := number(value)) is not None:
            yield metric, (score, number(values.get(f"{metric}_stderr,{filter_name}")))


def number(value: Any) -> float | None:
    """A number that is one; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) else None


def _measured(content: Mapping[str, Any], tasks: int) -> dict[str, float | None]:
    """What was kept; unknown where a file holds several tasks, as lmms-eval adds them up."""
    throughput = _dict(content, "throughput") if tasks == 1 else {}
    return {name: number(throughput.get(key)) for key, name in MEASURED.items()}


def _samples_files(path: Path, task: str) -> tuple[str, ...]:
    found = path.with_name(f"{path.name.removesuffix(SUFFIX)}_samples_{task}.jsonl")
    return (str(found),) if found.is_file() else ()


def _about(
    path: Path, content: Mapping[str, Any], entry: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    model_args = config.get("model_args")
    lmms_eval = content.get("lmms_eval_version")
    return {
        "path": str(path),
        "kind": "sparsemm-eval" if entry else "lmms-eval",
        "schema": entry.get("schema"),
        "command": entry.get("command"),
        "commit": entry.get("commit") or content.get("git_hash"),
        "date": _date(content.get("date")) or entry.get("date"),
        "python": entry.get("python"),
        "versions": entry.get("versions") or ({"lmms-eval": lmms_eval} if lmms_eval else {}),
        "hardware": entry.get("hardware") or {},
        "model_args": model_args if isinstance(model_args, str) else json.dumps(model_args),
        "changed": "results" in entry and entry["results"] != content_hash(content),
    }


def _date(text: Any) -> str | None:
    """lmms-eval's 20261122_004307 as 2026-11-22 00:43:07."""
    day, underscore, time = str(text or "").partition("_")
    if not (underscore and len(day) == 8 and len(time) == 6 and (day + time).isdigit()):
        return None
    return f"{day[:4]}-{day[4:6]}-{day[6:]} {time[:2]}:{time[2:4]}:{time[4:]}"


def content_hash(content: Mapping[str, Any]) -> str:
    """SHA-256 of a results file without our own entry, as a sweep seals it."""
    rest = {name: value for name, value in content.items() if name != OURS}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
