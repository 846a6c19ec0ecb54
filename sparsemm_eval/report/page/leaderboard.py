"""The leaderboard, one row a cell, and the runs that its numbers lead to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from sparsemm_eval.report.cell_text import budget_text
from sparsemm_eval.report.names import in_order


@dataclass(frozen=True)
class Column:
    """A column and what it is called."""

    title: str
    kind: str = "text"  # or "number"
    note: str = ""


@dataclass(frozen=True)
class Field:
    """What a row says in a column.

    Parameters
    ----------
    text : str
        What is shown.
    sort : str
        What a number is sorted by; empty ones come last.
    mark : str
        "better" or "worse" than the baseline, or nothing.
    """

    text: str
    sort: str = ""
    mark: str = ""


_BASELINES = {"best": "the best other method at the same budget", "fullkv": "full KV"}
_FIRST = "1e18"  # sorted before any budget: full KV has none
CHOICES = {
    "model": ("source", "model"),
    "benchmark": ("source", "model", "benchmark", "task"),
    "method": ("method", "label"),
    "budget": ("budget",),
}
# What is compared stands together: the methods at one budget.
_ORDER = ("source", "model", "benchmark", "task", "budget", "method", "label")

COLUMNS = (
    Column("model"),
    Column("benchmark"),
    Column("method"),
    Column("budget", "number", "mean tokens per KV head of the prompt, window included"),
    Column("score", "number", "0 to 1, CIDEr as lmms-eval has it"),
    Column("95% interval", "number", "bootstrap over samples"),
    Column("difference", "number", "from the baseline, with its 95% interval"),
    Column("p", "number", "corrected for the number of comparisons (Holm)"),
    Column("baseline"),
    Column("kept", "number", "tokens per KV head that were really kept"),
    Column("KV MiB", "number", "bytes of keys and values kept, per sample"),
    Column("n", "number", "samples that were scored"),
)


def by_budget(cells: pd.DataFrame) -> pd.DataFrame:
    """Cells in the order of the page: measured ones first, and methods at one budget together."""
    return in_order(cells, _ORDER)


def choices(cells: pd.DataFrame) -> pd.DataFrame:
    """Name cells by `CHOICES`, as text, with the index of `cells`.

    A benchmark that a model ran as several tasks is named with each.
    """
    several = cells.groupby(["model", "benchmark"])["task"].transform("nunique").gt(1)
    named = cells["benchmark"] + ", " + cells["task"]
    return pd.DataFrame(
        {
            "model": cells["model"],
            "benchmark": named.where(several, cells["benchmark"]),
            "method": cells["label"],
            "budget": [budget_text(budget, none="all") for budget in cells["budget"]],
        },
        index=cells.index,
    )


def leaderboard(
    cells: pd.DataFrame, unlike: Mapping[int, tuple[int, int, int]], against: str
) -> dict[str, Any]:
    """Lay cells out as rows.

    Parameters
    ----------
    cells : DataFrame
        Cells with their statistics, as `add_statistics` gives them.
    unlike : mapping
        By index of a cell, as `unlike_counts` gives it.
    against : str
        What the baseline is, as for `add_statistics`.

    Returns
    -------
    dict
        As the page's template reads it: columns, rows, filters (what they can be filtered by),
        baseline (in words), has_samples.
    """
    cells = by_budget(cells)
    named = choices(cells)
    rows = zip(cells.iterrows(), named.to_dict("records"), strict=True)
    return {
        "columns": COLUMNS,
        "rows": [_row(cell, names, unlike.get(index)) for (index, cell), names in rows],
        "filters": {
            name: list(dict.fromkeys(named.loc[in_order(cells, by).index, name]))
            for name, by in CHOICES.items()
        },
        "baseline": _BASELINES.get(against, against),
        "has_samples": bool(unlike),
    }


def _row(
    cell: pd.Series, names: Mapping[str, str], unlike: tuple[int, int, int] | None
) -> dict[str, Any]:
    """A cell: what it is filtered by, its fields, its runs, and which samples it leads to."""
    differ, compared, first = unlike or (None, None, None)
    mark = "better" if cell["better"] else "worse" if cell["worse"] else ""
    budget, measured = names["budget"], cell["source"] == "measured"
    words = f"{differ}" if compared == cell["samples"] else f"{differ} of {compared}"
    return {
        **names,
        "fields": (
            Field(names["model"]),
            Field(f"{names['benchmark']} ({cell['metric_label']})"),
            Field(names["method"]),
            Field(budget, _FIRST if pd.isna(cell["budget"]) else budget),
            _number(cell["score"], lambda value: f"{value:.3f}{_spread(cell)}"),
            _interval(cell["low"], cell["high"]),
            _difference(cell, mark),
            _number(cell["p_corrected"], _p_value),
            Field("" if pd.isna(cell["baseline"]) else str(cell["baseline"])),
            _number(cell["kept_tokens_per_head"], "{:,.1f}".format),
            _number(cell["kept_kv_bytes"] / 2**20, "{:,.3g}".format),
            _count(cell),
        ),
        "unlike": _number(differ, lambda _: words),
        "samples": first if differ else None,
        "runs": [number + 1 for number in cell["files_of"]] if measured else [],
        "source": "" if measured else f"paper, {cell['source']}",
    }


def _number(value: Any, form: Callable[[Any], str]) -> Field:
    if value is None or pd.isna(value):
        return Field("")
    return Field(form(value), f"{float(value):.9g}")


def _spread(cell: pd.Series) -> str:
    """The deviation over seeds, where several were joined."""
    return "" if cell["seeds"] < 2 else f" \N{PLUS-MINUS SIGN} {cell['spread']:.3f}"


def _interval(low: float, high: float) -> Field:
    if pd.isna(low) or pd.isna(high):
        return Field("")
    return Field(f"{low:.3f}\N{EN DASH}{high:.3f}", f"{high - low:.9g}")


def _difference(cell: pd.Series, mark: str) -> Field:
    number = _number(cell["difference"], lambda value: _signed(value))
    if not number.text or pd.isna(cell["difference_low"]):
        return number
    between = f"{_signed(cell['difference_low'])} to {_signed(cell['difference_high'])}"
    return Field(f"{number.text} ({between})", number.sort, mark)


def _signed(value: float) -> str:
    text = f"{value:+.3f}"
    return "0.000" if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def _p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _count(cell: pd.Series) -> Field:
    """How many samples were scored, and of how many, if not of all."""
    scored, expected = cell["samples"], cell["expected"]
    partial = not pd.isna(expected) and not pd.isna(scored) and scored < expected
    return _number(
        scored, lambda value: f"{value:,.0f} of {expected:,.0f}" if partial else f"{value:,.0f}"
    )


def runs(files: pd.DataFrame) -> dict[str, list[dict[str, Any]]]:
    """Number results files as the leaderboard does, and what made them, each once.

    Parameters
    ----------
    files : DataFrame
        Results files, as `sparsemm_eval.report.results.load` lists them.

    Returns
    -------
    dict
        As the page's template reads it: rows, a results file each; makers, with the command (""
        where no file says it) and facts: commit, Python, versions and hardware as (name, value).
    """
    makers: dict[tuple, int] = {}
    rows = []
    for number, file in files.iterrows():
        maker = (_text(file["command"]), tuple(_facts(file)))
        rows.append(
            {
                "number": int(number) + 1,
                "path": str(file["path"]),
                "tool": _text(file["kind"]),
                "settings": _text(file["model_args"]).replace(",", ", "),
                "date": _text(file["date"]),
                "commit": _text(file["commit"]),
                "made_by": makers.setdefault(maker, len(makers) + 1),
            }
        )
    listed = [{"command": command, "facts": facts} for command, facts in makers]
    return {"rows": rows, "makers": listed}


def _facts(file: pd.Series) -> list[tuple[str, str]]:
    facts = [(name, _text(file[name])) for name in ("commit", "python")]
    for name in ("versions", "hardware"):
        if isinstance(file[name], Mapping):
            facts += [(key, _text(value)) for key, value in file[name].items()]
    facts.append(("schema", _text(file["schema"])))
    return [(name.replace("_", " "), value) for name, value in facts if value]


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_text(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return "" if value is None or pd.isna(value) else str(value)
