"""Efficiency files: decode time and memory over input tokens, ours and the paper's.

An efficiency file is JSON: the entries of `sparsemm_eval.report.provenance.provenance`,
``"kind": "efficiency"`` and ``"rows"``, a list of objects. Each row has

- ``model`` (str; the paper's name where it is one), ``method`` (str, as registered), ``budget``
  (mean tokens per KV head, null where everything is kept), ``input_tokens`` (int, of the prompt);
- ``decode_ms_per_token`` (median milliseconds of a step), or null where it was not measured;
- ``peak_memory_gb`` (GiB, 2**30 bytes, as are the paper's, which prints GB: its lowest would not
  hold the weights otherwise), or null.

It may have ``engine`` (str: what decoded, where that is not this project's own),
``bound_ms_per_token`` (bytes a step must read over the memory's bandwidth), ``prefill_seconds``
and ``cache_bytes``, numbers or null, and any other entry, which is not read here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from sparsemm_eval.errors import UserError, printable, short_repr
from sparsemm_eval.report.names import METHOD_NAMES, paper_model
from sparsemm_eval.report.paper import paper_efficiency
from sparsemm_eval.report.provenance import SCHEMA
from sparsemm_eval.report.results import PAPER, Unreadable, find_files
from sparsemm_eval.stored import NotUnderstood, read_bytes, read_json

KIND = "efficiency"
_LARGEST = 1e15  # of milliseconds, tokens and bytes
_LONGEST = 300  # characters of a name
MEASURES = ("decode_ms_per_token", "peak_memory_gb")
_OPTIONAL = ("bound_ms_per_token", "prefill_seconds", "cache_bytes")
COLUMNS = ("model", "method", "engine", "label", "budget", "input_tokens", *MEASURES, *_OPTIONAL,
           "source", "file")  # fmt: skip


@dataclass(frozen=True)
class Efficiency:
    """What was found.

    Parameters
    ----------
    rows : DataFrame
        One row a measurement, with `COLUMNS`; ``source`` is "measured" or the paper's figure.
    unreadable : tuple of Unreadable
        Files that should hold some and were not read.
    """

    rows: pd.DataFrame
    unreadable: tuple[Unreadable, ...] = ()


def gather_efficiency(results: Iterable[str]) -> Efficiency:
    """Read efficiency files, all in folders, and the paper's figure where the word is ``paper``.

    Parameters
    ----------
    results : iterable of str
        Files; folders, searched for ``*.json`` that state this kind; ``paper``.

    Raises
    ------
    ValueError
        If a path does not exist, nothing could be read, or one measurement is there twice.
    """
    words = list(results)
    frames: list[pd.DataFrame] = []
    given = [Path(word) for word in words if word != PAPER]
    paths, unreadable = find_files(given, (".json",), ("answers", "cells"))
    for path in paths:
        if path not in given and not _states_kind(path):
            continue
        try:
            frames.append(read_efficiency(path))
        except UserError as error:
            unreadable.append(Unreadable(str(path), str(error).removeprefix(f"{path}: ")))
    if PAPER in words:
        paper = paper_efficiency()
        frames.append(paper.assign(label=[*map(_label, paper["method"], paper["budget"])]))
    if not frames:
        where = ", ".join(words) or "nothing given"
        cause = f" ({unreadable[0].path}: {unreadable[0].reason})" if unreadable else ""
        raise UserError(
            f"{where}: there are no efficiency results here{cause}; give files that "
            f"`sparsemm-eval bench efficiency` wrote, folders that hold some, or the word {PAPER}"
        )
    rows = [row for frame in frames for row in frame.to_dict("records")]
    numbers = ("budget", "input_tokens", *MEASURES, *_OPTIONAL)
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    _check_twice(frame)
    as_floats = {name: pd.to_numeric(frame[name]).astype(float) for name in numbers}
    return Efficiency(frame.assign(**as_floats), tuple(unreadable))


def _check_twice(rows: pd.DataFrame) -> None:
    of = ["model", "label", "input_tokens", "source"]
    twice = rows[rows.duplicated(of, keep=False)]
    if len(twice):
        model, label, tokens, _ = twice.iloc[0][of]
        files = twice.loc[(twice[of] == twice.iloc[0][of]).all(axis=1), "file"]
        raise UserError(
            f"{model}, {label}, {tokens} input tokens is there {len(files)} times, in "
            f"{' and '.join(dict.fromkeys(files))}: leave all but one out"
        )


def read_efficiency(path: Path) -> pd.DataFrame:
    """Read one efficiency file.

    Raises
    ------
    ValueError
        In one sentence that names the file, if it is none or a row has a wrong entry.
    """
    try:
        data = read_json(path)
    except NotUnderstood as error:
        raise UserError(f"{path}: it cannot be read as JSON ({error})") from error
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise UserError(f'{path}: it is no efficiency file; its "kind" must be "{KIND}"')
    schema = data.get("schema")
    if schema != SCHEMA:
        raise UserError(f"{path}: its schema is {short_repr(schema)}; this version reads {SCHEMA}")
    rows = data.get("rows")
    if not isinstance(rows, list) or not rows:
        raise UserError(f'{path}: "rows" must be a list of measurements, one or more')
    return pd.DataFrame([_row(row, f"{path}: rows[{i}]", path) for i, row in enumerate(rows)])


def _row(row: Any, place: str, path: Path) -> dict[str, Any]:
    if not isinstance(row, Mapping):
        raise UserError(f"{place} is {short_repr(row)}: it must be an object")
    for name in ("model", "method"):
        if not isinstance(row.get(name), str) or not 0 < len(row[name]) <= _LONGEST:
            raise UserError(f"{place}.{name}={short_repr(row.get(name))}: it must be a name")
    engine = row.get("engine")
    if not isinstance(engine, str | None) or len(engine or "") > _LONGEST:
        raise UserError(f"{place}.engine={short_repr(engine)}: it must be a name or null")
    tokens = row.get("input_tokens")
    if not isinstance(tokens, int) or isinstance(tokens, bool) or not 1 <= tokens <= _LARGEST:
        raise UserError(
            f"{place}.input_tokens={short_repr(tokens)}: it must be an integer of at least 1"
        )
    numbers = {name: _number(row, name, place) for name in ("budget", *MEASURES, *_OPTIONAL)}
    return {
        "model": paper_model(row["model"]) or printable(row["model"]),
        "method": printable(row["method"]),
        "engine": engine,
        "label": printable(_label(row["method"], numbers["budget"], engine)),
        "input_tokens": tokens,
        **numbers,
        "source": "measured",
        "file": str(path),
    }


def _number(row: Mapping[str, Any], name: str, place: str) -> float | None:
    value = row.get(name)
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= _LARGEST:
        raise UserError(f"{place}.{name}={short_repr(value)}: it must be a number above 0, or null")
    return float(value)


def _label(method: str, budget: float | None, engine: str | None = None) -> str:
    """Such as "SparseMM 256" and "FullKV (static cache)"."""
    tokens = "" if budget is None or math.isnan(budget) else f" {budget:g}"
    return f"{METHOD_NAMES.get(method, method)}{tokens}" + (f" ({engine})" if engine else "")


def _states_kind(path: Path) -> bool:
    """Whether a file claims to be one: in folders, JSON of other kinds is no one's fault."""
    try:
        text = read_bytes(path)
    except NotUnderstood:
        return False
    return re.search(rf'"kind"\s*:\s*"{KIND}"'.encode(), text) is not None
