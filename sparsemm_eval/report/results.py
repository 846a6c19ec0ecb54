"""Results files, ours and plain lmms-eval's, to one tidy frame."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import pandas as pd

from sparsemm_eval.errors import UserError, printable, short_repr
from sparsemm_eval.report.cells import cells_frame, counted_once, labelled, named
from sparsemm_eval.report.inputs import PAPER, check_inputs
from sparsemm_eval.report.names import find_benchmark, last_part, top_score
from sparsemm_eval.report.paper import paper_cells
from sparsemm_eval.report.provenance import (
    CALIBRATED,
    CALIBRATION_SCORED,
    EMPTY_ANSWERS,
    FAILED_SAMPLES,
    OURS,
    SCHEMA,
    content_hash,
    file_hash,
)
from sparsemm_eval.stored import CHECKSUM, NotUnderstood, checked, read_json

FILE_COLUMNS = (
    "path", "kind", "schema", "command", "commit", "date", "python", "versions", "hardware",
    "model_args",
)  # fmt: skip
# Of no results: stored answers, what metrics write beside, and the study of silenced heads, which
# has full KV of fewer samples.
_NOT_SEARCHED = frozenset({"answers", "submissions", "mask"})
_LEFT_BEHIND = {
    ".unfinished": "it was never finished: its process was ended while writing it",
    ".broken": "it was set aside because it was cut off or changed",
}
SUFFIX = "_results.json"
# What our wrappers leave in an lmms-eval results file, beside the scores.
MEASURED = {
    "avg_kept_tokens_per_head": "kept_tokens_per_head",
    "avg_kept_kv_bytes": "kept_kv_bytes",
    "avg_prompt_tokens": "prompt_tokens",
    "avg_share_uncompressed": "share_uncompressed",
    "avg_query_aware": "query_aware",
}
# Of our entry; what is not there is unknown.
_ENTRY = {
    "schema": int, "command": str, "commit": str, "date": str, "python": str, "versions": dict,
    "hardware": dict, "model": str, "answers": str, "samples": str, "results": str,
    CHECKSUM: str,
}  # fmt: skip
_NAMES = ("model", "task", "benchmark", "metric", "metric_label", "method")
_STDERR = ("_stderr", "_stderr_clt", "_stderr_clustered")
# No metric's value, and no number of tokens or bytes, is larger.
_LARGEST = 1e15
_LONGEST, _LONGEST_SETTINGS = 300, 10_000  # characters of a name, and of all settings
_SINGAPORE = timezone(timedelta(hours=8))  # without the zones' data base


class NotResults(ValueError):
    """A file that cannot be read as results; the reason in one sentence."""


@dataclass(frozen=True)
class Unreadable:
    """A file that should hold results.

    Parameters
    ----------
    path : str
        The file.
    reason : str
        Why it was not read, in one sentence.
    """

    path: str
    reason: str


@dataclass(frozen=True)
class Results:
    """What was found.

    Parameters
    ----------
    cells : DataFrame
        One row a (results file, task), its metric that counts: the columns of
        `sparsemm_eval.report.cells.COLUMNS`. Scores end at 1 where they are ``bounded``: of the
        paper's benchmarks but for CIDEr; all others are as lmms-eval has them.
    files : DataFrame
        One row a results file, by the number in `cells`' ``file``: `FILE_COLUMNS`.
    unreadable : tuple of Unreadable
        Files that should hold results and were not read.
    """

    cells: pd.DataFrame
    files: pd.DataFrame
    unreadable: tuple[Unreadable, ...] = ()


def not_read(unreadable: Iterable[Unreadable]) -> tuple[str, ...]:
    """A sentence each file."""
    return tuple(f"not read: {printable(file.path)}: {file.reason}" for file in unreadable)


def gather(results: Iterable[str], metric: str | None = None) -> Results:
    """As `load`, where ``paper`` stands for the paper's numbers.

    Parameters
    ----------
    results : iterable of str
        Files, folders, ``paper``.
    metric : str, optional
        lmms-eval's name of the metric that is wanted of each task, instead of the one that counts.

    Raises
    ------
    UserError
        As `load`, and if no task has such a metric.
    """
    words = list(results)
    paths = [Path(word) for word in words if word != PAPER]
    every = metric is not None
    own = load(paths, every) if paths or not words else Results(cells_frame([]), _files([]))
    tables = [own.cells, paper_cells()] if PAPER in words else [own.cells]
    cells = pd.concat([frame for frame in tables if len(frame)], ignore_index=True)
    if metric is not None:
        wanted = cells["metric"].eq(metric)
        if not wanted.any():
            known = ", ".join(sorted(set(cells["metric"].dropna())))
            raise UserError(f"metric={short_repr(metric)}: it must be of {known}")
        cells = cells[wanted].reset_index(drop=True)
    return Results(cells, own.files, own.unreadable)


def load(paths: Iterable[Path], all_metrics: bool = False) -> Results:
    """Read results files, and all in folders.

    Parameters
    ----------
    paths : iterable of Path
        Results files; folders are searched for ``*_results.json``, but for those below them named
        answers, submissions (what metrics write) and mask (the study of silenced heads).
    all_metrics : bool
        Whether each metric of a task is a row, or only the one that counts.

    Returns
    -------
    Results
        Files in the order of their paths. A cell that is there twice with the same score is one.

    Raises
    ------
    ValueError
        If a path does not exist, nothing could be read, or one cell has two scores.
    """
    given = [Path(path) for path in paths]
    endings = (SUFFIX, *(f"{SUFFIX}{suffix}" for suffix in _LEFT_BEHIND))
    paths, unreadable = find_files(given, endings, _NOT_SEARCHED)
    rows: list[dict[str, Any]] = []
    files: list[dict[str, Any]] = []
    for path in paths:
        try:
            about, of_file, left_out = _read(path, all_metrics)
        except NotResults as error:
            unreadable.append(Unreadable(str(path), str(error)))
            continue
        place = len(files)
        measured = {"seeds": 1, "source": "measured", "file": place, "files_of": (place,)}
        rows += [row | measured for row in of_file]
        files.append(about)
        unreadable += left_out
    if not rows:
        raise UserError(_nothing(given, unreadable))
    cells = cells_frame(labelled(counted_once(named(rows), files)))
    return Results(cells, _files(files), tuple(unreadable))


def _files(rows: list[dict[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=list(FILE_COLUMNS), dtype=object)
    frame = frame.where(frame.notna(), None)
    return frame.assign(schema=frame["schema"].astype("Int64"))


def find_files(
    given: Iterable[Path], endings: tuple[str, ...], left_out: Collection[str]
) -> tuple[list[Path], list[Unreadable]]:
    """All files, each once, whichever way it was named; and folders that could not be searched.

    Parameters
    ----------
    given : iterable of Path
        Files, and folders that are searched.
    endings : tuple of str
        How the names of files in folders end.
    left_out : collection of str
        Names of folders below them that are not searched.

    Raises
    ------
    UserError
        If a path does not exist.
    """
    files: dict[str, Path] = {}
    closed: list[Unreadable] = []

    def note(error: OSError) -> None:
        reason = f"the folder cannot be searched ({error.strerror})"
        closed.append(Unreadable(str(error.filename), reason))

    def search(folder: Path) -> Iterator[Path]:
        for place, folders, names in os.walk(folder, onerror=note):
            folders[:] = [name for name in folders if name not in left_out]
            yield from (Path(place) / name for name in names if name.endswith(endings))

    given = list(given)
    check_inputs(given)
    for path in given:
        for file in sorted(search(path)) if path.is_dir() else [path]:
            files.setdefault(os.path.realpath(file), file)
    return list(files.values()), closed


def _nothing(given: list[Path], unreadable: list[Unreadable]) -> str:
    where = ", ".join(map(str, given)) or "nothing given"
    if not unreadable:
        return (
            f"{where}: there are no results here; give folders that hold *{SUFFIX} files as "
            f"sparsemm-eval or lmms-eval write them, or the word {PAPER}"
        )
    first = unreadable[0]
    return (
        f"{where}: nothing here could be read, {len(unreadable)} tried, first {first.path}: "
        f"{first.reason}"
    )


# --- one file ------------------------------------------------------------------------------------


def _read(
    path: Path, all_metrics: bool
) -> tuple[dict[str, Any], list[dict[str, Any]], list[Unreadable]]:
    """What a results file says of its making; a row a task, or a score; what is left out of it.

    Raises
    ------
    NotResults
        If it cannot be read.
    """
    if (left := _LEFT_BEHIND.get(path.suffix)) is not None:
        raise NotResults(left)
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
    if where["budget"] is None and isinstance(settings.get("budget"), str) and len(tasks) == 1:
        # It was stated in bytes.
        tokens = number(_dict(content, "throughput").get("avg_nominal_tokens_per_head"))
        where["budget"] = tokens if tokens and 0 < tokens <= _LARGEST else None
    left_out = [
        Unreadable(str(path), f"its task {printable(task)} has no score that counts")
        for task in tasks
        if task not in scored
    ]
    rows = []
    for task, scores in scored.items():
        files, changed = _samples_files(path, task, entry.get("samples"))
        left_out += changed
        rows += [
            _shown({**where, **measured, **row, "samples_files": files})
            for row in (scores if all_metrics else scores[:1])
        ]
    return _about(path, content, entry, config), rows, left_out


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose names can stand anywhere, in one line.

    Raises
    ------
    NotResults
        If a name is too long to be one.
    """
    for name in _NAMES:
        if len(row[name]) > _LONGEST:
            words = f"its {name} {short_repr(row[name])} has {len(row[name]):,} characters"
            raise NotResults(f"{words}: a name has at most {_LONGEST}")
    return row | {name: printable(row[name]) for name in _NAMES}


def _content(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except NotUnderstood as error:
        raise NotResults(str(error)) from error
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
            raise NotResults(
                f"its entry {OURS} has {name}={short_repr(value)}: it must be {kind.__name__}"
            )
        # First of all: what follows may look otherwise in a newer one.
        if name == "schema" and (value or 0) > SCHEMA:
            raise NotResults(
                f"it has schema {value} and this version reads up to {SCHEMA}: update sparsemm-eval"
            )
    try:
        checked(entry)
    except NotUnderstood as error:
        raise NotResults(str(error)) from error
    if entry.get("results", content_hash(content)) != content_hash(content):
        raise NotResults("it was changed since it was written")
    return entry


def _dict(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    mapping = content.get(name) or {}
    if not isinstance(mapping, dict):
        raise NotResults(f"its entry {name} is no mapping")
    return mapping


def parse_model_args(text: str) -> dict[str, Any]:
    """``name=value,…`` with numbers as numbers."""
    pairs = [pair.partition("=") for pair in text.split(",") if pair]
    return {name: _value(value) for name, _, value in pairs}


def _value(text: str) -> Any:
    # Python neither reads nor writes integers of thousands of digits.
    for kind in (int, float) if len(text) <= 20 else (float,):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _settings(model_args: Any) -> dict[str, Any]:
    if model_args is None or isinstance(model_args, str):
        return parse_model_args(printable((model_args or "")[:_LONGEST_SETTINGS]))
    if not isinstance(model_args, dict):
        words = f"its config.model_args is {short_repr(model_args)}"
        raise NotResults(f"{words}: it must be text or a mapping")
    return {
        printable(name[:_LONGEST]): printable(value[:_LONGEST])
        if isinstance(value, str)
        else value
        if isinstance(value, int | float)
        else short_repr(value)
        for name, value in model_args.items()
        if value is not None
    }


def _method(settings: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Method and its settings; a model that states none is a method of its own.

    Whether another program's model compresses its cache, its results file does not say.
    """
    method = settings.get("method", _name(config.get("model")) or "unknown")
    numbers = ("budget", "ratio", "seed", "window")
    stated = {name: number(settings.get(name)) for name in numbers}
    if method == "fullkv":
        stated["budget"] = None
    if stated["budget"] is not None and not 0 < stated["budget"] <= _LARGEST:
        raise NotResults(f"its budget is {stated['budget']:g}: it must be above 0")
    stated["allocation"] = settings.get("allocation")
    return {"method": str(method), "settings": dict(settings), **stated}


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
    config = _dict(content, "config")
    return last_part(_name(content.get("model_name")) or _name(config.get("model")) or "unknown")


def _name(value: Any) -> str:
    """A name that a file states; "" where it states none."""
    return value if isinstance(value, str) else "" if value is None else short_repr(value)


def _scored(content: Mapping[str, Any], task: str) -> list[dict[str, Any]]:
    """A row a metric that has a score, the one that counts first.

    That is the paper's of a benchmark of the paper, else the first that the task names.
    """
    scores: dict[str, tuple[float, float | None]] = {}
    for metric, pair in scores_of(_dict(_dict(content, "results"), task)):
        scores.setdefault(metric, pair)
    benchmark = find_benchmark(task)
    listed = _dict(_dict(content, "configs"), task).get("metric_list")
    listed = listed if isinstance(listed, list) else ()
    named = [_name(one.get("metric")) for one in listed if isinstance(one, Mapping)]
    first = [*([] if benchmark is None else [benchmark.metric]), *named, *scores]
    rising = _dict(_dict(content, "higher_is_better"), task)
    counts = _dict(_dict(content, "n-samples"), task)
    samples, expected = (_count(task, counts, name) for name in ("effective", "original"))
    throughput = _dict(content, "throughput")
    failed = _count(task, throughput, f"avg_{FAILED_SAMPLES}/{task}") or 0
    empty = _count(task, throughput, f"avg_{EMPTY_ANSWERS}/{task}") or 0
    calibrated = f"avg_{CALIBRATED}/"
    kinds = {
        printable(name.removeprefix(calibrated)[:_LONGEST]): _count(task, throughput, name) or 0
        for name in throughput
        if name.startswith(calibrated)
    }
    seen = _count(task, throughput, f"avg_{CALIBRATION_SCORED}/{task}") or 0
    samples = None if samples is None else max(samples - failed, 0)
    rows = []
    for metric in dict.fromkeys(metric for metric in first if metric in scores):
        known = benchmark is not None and benchmark.metric == metric
        top = top_score(task, metric, samples)
        score, stderr = scores[metric]
        if abs(score) > _LARGEST:
            raise NotResults(f"its task {task} has {metric}={score:g}: that is no score")
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
                "expected": expected,
                "failed": failed,
                "empty": empty,
                "calibrated": kinds,
                "calibration_scored": seen,
            }
        )
    return rows


def _count(task: str, counts: Mapping[str, Any], name: str) -> float | None:
    count = number(counts.get(name))
    if count is not None and not 0 <= count <= _LARGEST:
        raise NotResults(f"its task {task} has {name} samples {count:g}: it must be 0 or more")
    return count


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
    # Compared and not asked: an integer may be too large for a float.
    return value if abs(value) <= sys.float_info.max else None


def _measured(content: Mapping[str, Any], tasks: int) -> dict[str, float | None]:
    """What was kept; unknown where a file holds several tasks, as lmms-eval adds them up."""
    throughput = _dict(content, "throughput") if tasks == 1 else {}
    measured = {name: number(throughput.get(key)) for key, name in MEASURED.items()}
    return {
        name: value if value is not None and 0 <= value <= _LARGEST else None
        for name, value in measured.items()
    }


def _samples_files(
    path: Path, task: str, written: str | None
) -> tuple[tuple[str, ...], list[Unreadable]]:
    """The samples file of a task; why there is none, if it is not as it was written."""
    file = path.parent / f"{path.name.removesuffix(SUFFIX)}_samples_{task}.jsonl"
    if "/" in task or not os.path.lexists(file):
        return (), []
    try:
        if written is not None and written != file_hash(file):
            raise NotUnderstood("it was cut off or changed since it was written")
    except NotUnderstood as error:
        return (), [Unreadable(str(file), f"{error}, so that its samples are not used")]
    return (str(file),), []


def _about(
    path: Path, content: Mapping[str, Any], entry: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    model_args = config.get("model_args")
    lmms_eval = content.get("lmms_eval_version")
    stated = {
        "path": str(path),
        "kind": "sparsemm-eval" if entry else "lmms-eval",
        "schema": entry.get("schema"),
        "command": entry.get("command"),
        "commit": entry.get("commit") or content.get("git_hash"),
        "date": _date(content.get("date"), _dict(config, "resolved_cli_args").get("timezone"))
        or entry.get("date"),
        "python": entry.get("python"),
        "versions": entry.get("versions") or ({"lmms-eval": lmms_eval} if lmms_eval else {}),
        "hardware": entry.get("hardware") or {},
        "model_args": model_args if isinstance(model_args, str) else json.dumps(model_args),
    }
    return {
        name: printable(value[:_LONGEST_SETTINGS]) if isinstance(value, str) else value
        for name, value in stated.items()
    }


def _date(text: Any, zone: Any) -> str | None:
    """lmms-eval's 20261122_004307 as 2026-11-21 16:43:07, in UTC.

    It writes the time of the zone in its own --timezone, which is Singapore's if none was given.
    """
    try:
        time = datetime.strptime(str(text)[:40], "%Y%m%d_%H%M%S")
        given = _SINGAPORE if zone in (None, "Asia/Singapore") else ZoneInfo(str(zone)[:40])
        return f"{time.replace(tzinfo=given).astimezone(timezone.utc):%Y-%m-%d %H:%M:%S}"
    except (ValueError, OSError, OverflowError, ZoneInfoNotFoundError):
        return None
