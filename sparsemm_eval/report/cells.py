"""Cells of several results files: told apart, labelled, counted once, seeds joined, chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isclose
from typing import Any

import pandas as pd

from sparsemm_eval.errors import UserError
from sparsemm_eval.report.names import DEFAULTS, method_label, paper_model

COLUMNS = (
    "model", "task", "benchmark", "metric", "metric_label", "higher_is_better", "bounded",
    "percent", "method", "label", "budget", "ratio", "allocation", "seed", "window", "settings",
    "score", "spread", "seeds", "stderr", "samples", "expected", "failed", "empty",
    "calibrated", "calibration_scored",
    "kept_tokens_per_head", "kept_kv_bytes", "prompt_tokens", "share_uncompressed", "query_aware",
    "source", "digits", "file", "files_of", "samples_files",
)  # fmt: skip
_NUMBERS = (
    "budget", "ratio", "seed", "window", "score", "spread", "stderr", "samples", "expected",
    "failed", "empty", "calibration_scored",
    "kept_tokens_per_head", "kept_kv_bytes", "prompt_tokens", "share_uncompressed", "query_aware",
)  # fmt: skip
# How a cell is computed, not what: no answer depends on these but by rounding.
NOT_KEYED = frozenset({
    "pretrained", "answers", "batch_size", "max_batch_size", "device", "device_map", "backend",
    "cuda_graph", "attn_implementation", "plugin", "allow_failed",
})  # fmt: skip
_ALWAYS = ("method", "budget")
# A word names a cell if it is what any of these columns holds.
_NAMED_BY = {
    "models": ("model",),
    "benchmarks": ("benchmark", "task"),
    "methods": ("method", "label"),
}


def cells_frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows as a frame with all of `COLUMNS`, unknown values NaN or None."""
    frame = pd.DataFrame(list(rows), columns=list(COLUMNS), dtype=object)
    frame = frame.where(frame.notna(), None)
    numbers = {name: pd.to_numeric(frame[name]).astype(float) for name in _NUMBERS}
    integers = {name: frame[name].astype("Int64") for name in ("file", "digits")}
    flags = {name: frame[name].eq(True) for name in ("higher_is_better", "bounded", "percent")}
    return frame.assign(**numbers, **integers, **flags, seeds=frame["seeds"].astype(int))


def labelled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give rows their label: the method, with those settings that tell its cells apart.

    A setting does so if it varies among the cells of one model, task, method and budget; it is
    then in the label of all cells of that model and method, so that their rows stay whole over
    tasks and budgets.
    """
    varied = _varied(rows)
    return [row | {"label": method_label(row["method"], _chosen(row, varied))} for row in rows]


def _varied(rows: list[dict[str, Any]]) -> dict[tuple, dict[str, None]]:
    """Names of settings that vary, by model and method."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        of = (row["model"], row["method"], row["task"], row["metric"], _budget(row))
        groups.setdefault(of, []).append(keyed(row["settings"]))
    varied: dict[tuple, dict[str, None]] = {}
    for (model, method, *_), settings in groups.items():
        names = varied.setdefault((model, method), {})
        for name in dict.fromkeys(name for one in settings for name in one):
            if any(_of(one, name) != _of(settings[0], name) for one in settings):
                names[name] = None
    return varied


def _chosen(row: Mapping[str, Any], varied: Mapping[tuple, Mapping[str, None]]) -> dict[str, Any]:
    settings = {name: _of(row["settings"], name) for name in varied[row["model"], row["method"]]}
    return {name: value for name, value in settings.items() if value is not None}


def keyed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that decide answers."""
    left_out = (*NOT_KEYED, *_ALWAYS)
    return {name: value for name, value in settings.items() if name not in left_out}


def _of(settings: Mapping[str, Any], name: str) -> Any:
    return settings.get(name, DEFAULTS.get(name))


def _budget(row: Mapping[str, Any]) -> float | None:
    return None if pd.isna(row["budget"]) else float(row["budget"])


def named(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give rows of the paper's models the paper's names.

    Several names of one's own for one such checkpoint tell its cells apart, and stay.
    """
    owns: dict[str, set[str]] = {}
    for row in rows:
        owns.setdefault(_paper_name(row), set()).add(paper_model(row["model"]) or row["model"])
    return [row | {"model": _shown(row, owns)} for row in rows]


def _shown(row: Mapping[str, Any], owns: Mapping[str, set[str]]) -> str:
    if (name := paper_model(row["model"])) is not None:
        return name
    name = _paper_name(row)
    return name if name and len(owns[name]) == 1 else row["model"]


def _paper_name(row: Mapping[str, Any]) -> str:
    """By its own name or its checkpoint's; empty if it is none of the paper's."""
    pretrained = str(row["settings"].get("pretrained", ""))
    return paper_model(row["model"]) or paper_model(pretrained) or ""


def counted_once(
    rows: list[dict[str, Any]], files: list[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Make rows of one cell one, of its newest file.

    Raises
    ------
    ValueError
        If they differ in score or samples; names both files and what else differs.
    """
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(_identity(row), []).append(row)
    return [_one(group, files) for group in groups.values()]


def _identity(row: Mapping[str, Any]) -> tuple:
    settings = {name: value for name, value in DEFAULTS.items() if name != "seed"}
    settings |= {"seed": 0} | keyed(row["settings"])
    words = tuple(sorted((name, str(_plain(value))) for name, value in settings.items()))
    return row["model"], row["task"], row["metric"], row["method"], _budget(row), words


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, int) else value


def _one(group: list[dict[str, Any]], files: list[Mapping[str, Any]]) -> dict[str, Any]:
    newest = max(group, key=lambda row: (files[row["file"]]["date"] or "", row["file"]))
    for row in group:
        equal = isclose(row["score"], newest["score"], rel_tol=1e-9)
        if not equal or row["samples"] != newest["samples"]:
            raise UserError(_conflict(row, newest, files))
    order = [newest, *(row for row in group if row is not newest)]
    samples = next((row["samples_files"] for row in order if row["samples_files"]), ())
    return newest | {
        "files_of": tuple(row["file"] for row in order),
        "samples_files": samples,
    }


def _conflict(
    one: Mapping[str, Any], two: Mapping[str, Any], files: list[Mapping[str, Any]]
) -> str:
    first, second = (_about(row, files[row["file"]]) for row in (one, two))
    differ = [name for name in first | second if first.get(name) != second.get(name)]
    words = [f"{name} ({first.get(name)}, {second.get(name)})" for name in differ]
    budget = "" if pd.isna(one["budget"]) else f" at budget {one['budget']:g}"
    return (
        f"{one['model']}, {one['task']}, {one['method']}{budget} is there twice, with scores "
        f"{one['score']:.6g} in {files[one['file']]['path']} and {two['score']:.6g} in "
        f"{files[two['file']]['path']}; they differ in {', '.join(words) or 'nothing stated'}: "
        "leave one of them out"
    )


def _about(row: Mapping[str, Any], file: Mapping[str, Any]) -> dict[str, Any]:
    settings = {
        name: row["settings"].get(name) for name in sorted(NOT_KEYED & set(row["settings"]))
    }
    about = {name: file[name] for name in ("commit", "python", "versions", "hardware")}
    return {"samples": row["samples"], **settings, **about}


def join_seeds(cells: pd.DataFrame) -> pd.DataFrame:
    """Make cells one that differ in their seed alone: mean score, and spread.

    Parameters
    ----------
    cells : DataFrame
        As `sparsemm_eval.report.results.load` gives them.

    Returns
    -------
    DataFrame
        The same columns; where seeds were joined, `score` and what was kept are means, `spread`
        is the standard deviation over seeds (n - 1), `seeds` their number, `stderr` and `seed`
        NaN, the setting "seed" all of them ("0+1+2"), and `files_of` and `samples_files` those of
        all. Seeds of other numbers of samples stay apart.
    """
    rows = cells.to_dict("records")
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        *where, words = _identity(row)
        unseeded = tuple(word for word in words if word[0] != "seed")
        groups.setdefault((*where, unseeded, row["source"], row["samples"]), []).append(row)
    return cells_frame(labelled_by_source([_joined(group) for group in groups.values()]))


def labelled_by_source(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As `labelled`, the paper's cells apart from one's own; those keep the label they have."""
    labels = iter(labelled([row for row in rows if row["source"] == "measured"]))
    return [next(labels) if row["source"] == "measured" else row for row in rows]


def _joined(group: list[dict[str, Any]]) -> dict[str, Any]:
    if len(group) == 1:
        return group[0]
    frame = pd.DataFrame(group)
    means = (
        "score", "kept_tokens_per_head", "kept_kv_bytes", "prompt_tokens", "share_uncompressed",
    )  # fmt: skip
    seeds = sorted(
        {_of(row["settings"], "seed") for row in group},
        key=lambda seed: (isinstance(seed, str), seed),
    )
    return group[0] | {
        **{name: frame[name].mean() for name in means},
        "spread": frame["score"].std(ddof=1),
        "seeds": len(group),
        "empty": frame["empty"].sum(),
        "seed": None,
        "stderr": None,
        "settings": group[0]["settings"] | {"seed": "+".join(map(str, seeds))},
        "files_of": tuple(dict.fromkeys(file for row in group for file in row["files_of"])),
        "samples_files": tuple(path for row in group for path in row["samples_files"]),
    }


@dataclass(frozen=True)
class Filters:
    """Which cells are shown; no names keep all.

    Parameters
    ----------
    models, benchmarks, methods : sequence of str
        Models; benchmarks or tasks; methods or labels, in whatever case.
    budgets : sequence of float
        Tokens per KV head; what has no budget, such as full KV, is kept in any case.
    """

    models: Sequence[str] = ()
    benchmarks: Sequence[str] = ()
    methods: Sequence[str] = ()
    budgets: Sequence[float] = ()

    def with_full_kv(self) -> Filters:
        """The same, and full KV where methods are named."""
        return replace(self, methods=(*self.methods, "fullkv")) if self.methods else self

    def apply(self, cells: pd.DataFrame) -> pd.DataFrame:
        """Keep the cells named.

        Parameters
        ----------
        cells : DataFrame
            As `results.load` gives them.

        Returns
        -------
        DataFrame
            Rows of `cells`, with its index.

        Raises
        ------
        UserError
            If a name is none of the cells', or none fits all of them.
        """
        kept = pd.Series(True, index=cells.index)
        for name in _NAMED_BY:
            if words := getattr(self, name):
                kept &= _has_name(cells, name, words)
        for budget in self.budgets:
            if not cells["budget"].eq(budget).any():
                known = ", ".join(f"{b:g}" for b in sorted(set(cells["budget"].dropna())))
                raise UserError(
                    f"budgets={budget:g}: it must be of {known or 'none, there is none'}"
                )
        if self.budgets:
            kept &= cells["budget"].isna() | cells["budget"].isin(self.budgets)
        if not kept.any():
            given = [*self.models, *self.benchmarks, *self.methods]
            given += [f"{budget:g}" for budget in self.budgets]
            raise UserError(f"{', '.join(given)}: no cell is all of it; name fewer")
        return cells[kept]


def _has_name(cells: pd.DataFrame, name: str, words: Sequence[str]) -> pd.Series:
    named = pd.Series(False, index=cells.index)
    for word in words:
        here = pd.Series(False, index=cells.index)
        for column in _NAMED_BY[name]:
            here |= cells[column].str.casefold().eq(word.casefold())
        if not here.any():
            known = sorted({str(v) for column in _NAMED_BY[name] for v in cells[column].dropna()})
            raise UserError(f"{name}={word}: it must be of {', '.join(known)}")
        named |= here
    return named
