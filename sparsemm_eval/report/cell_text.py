"""What a table's cell may show, as text for readers and as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from sparsemm_eval.errors import UserError
from sparsemm_eval.report.names import DEFAULTS
from sparsemm_eval.report.paper import STUDIES, paper_cells

# What --show takes, and what stands in the table's head for it.
SHOWN = {
    "score": "",
    "interval": "95% interval",
    "kept": "kept tokens/head",
    "bytes": "KV MiB",
    "paper": "paper",
    "from_paper": "from paper",
    "difference": "difference",
    "baseline": "baseline",
    "p": "p",
    "n": "n",
    "spread": "spread",
}
_DIGITS = 3
# Behind a score that is without samples that failed.
MISSING = "†"


def checked_shown(names: Sequence[str]) -> tuple[str, ...]:
    """Names of what is shown, each once.

    Raises
    ------
    ValueError
        If one is unknown, or there is none.
    """
    for name in names:
        if name not in SHOWN:
            raise UserError(f"show={name}: it must be of {', '.join(SHOWN)}")
    if not names:
        raise UserError(f"show: give at least one of {', '.join(SHOWN)}")
    return tuple(dict.fromkeys(names))


def with_paper(cells: pd.DataFrame, like: str | None) -> pd.DataFrame:
    """Add the paper's score of the same model, benchmark, method, budget and ratio: paper_score,
    paper_source, paper_digits; NaN and "" where it has none, and for the paper's own cells.
    """
    reference = paper_cells(like)
    if like is None:
        reference = reference[~reference["source"].isin(STUDIES)]
    key = ["model", "benchmark", "method", "budget", "ratio"]
    reference = reference.assign(ratio=_ratio(reference)).drop_duplicates(key, keep="last")
    wanted = cells[key].assign(ratio=_ratio(cells))
    same = wanted.merge(reference, how="left", on=key).set_axis(cells.index)
    same = same.where(cells["source"].eq("measured"))
    return cells.assign(
        paper_score=same["score"],
        paper_source=same["source"].fillna(""),
        paper_digits=same["digits"],
    )


def _ratio(cells: pd.DataFrame) -> pd.Series:
    """SparseMM's, or its default where none is stated; 0 of other methods."""
    return cells["ratio"].where(cells["method"].eq("sparsemm"), 0.0).fillna(DEFAULTS["ratio"])


def with_scale(
    cells: pd.DataFrame, like: str | None, digits: int | None, percent: bool | None
) -> pd.DataFrame:
    """Add what scores are multiplied by and printed with: factor, decimals.

    As the paper prints the benchmark in a table like one of its own, else 3 decimals of 0 to 1.
    `digits` and `percent`, where given, hold for all; CIDEr and benchmarks whose scale is not
    known are never percent.
    """
    natural = cells["percent"] & (like is not None)
    factor = natural if percent is None else cells["bounded"] & percent
    # Of a score from 0 to 1; in percent two fewer are printed.
    decimals = pd.Series(_DIGITS, index=cells.index)
    if like is not None:
        reference = paper_cells(like)
        exact = reference[~reference["source"].str.endswith("_digitised")]
        printed = cells["benchmark"].map(exact.groupby("benchmark")["digits"].max())
        printed = cells["digits"].astype(float).fillna(printed.astype(float)) + 2 * natural
        decimals = printed.fillna(decimals).astype(int)
    decimals = (decimals - 2 * factor).clip(lower=0)
    return cells.assign(
        factor=np.where(factor, 100, 1), decimals=decimals if digits is None else digits
    )


def evened(cells: pd.DataFrame) -> pd.DataFrame:
    """Cells of `with_scale` with one number of decimals, the fewest, wherever the scale is one."""
    fewest = cells.groupby("factor")["decimals"].transform("min")
    least = cells["kept_kv_bytes"].astype(float).min() / 2**20
    places = 1 if not least > 0 else int(np.clip(1 - np.floor(np.log10(least)), 1, 6))
    return cells.assign(decimals=fewest, mebibyte_decimals=places)


def budget_text(budget: float, none: str = "") -> str:
    """A budget in tables and on the page, tokens or a share of the prompt.

    `none` for what has none, such as full KV.
    """
    if pd.isna(budget):
        return none
    return f"{100 * budget:g}%" if budget < 1 else f"{budget:g}"


def cell_texts(cells: pd.DataFrame, shown: Sequence[str], plain: bool = False) -> pd.DataFrame:
    """One row a cell, one column a thing shown; "" where it is not known.

    Parameters
    ----------
    cells : DataFrame
        With statistics, `with_paper` and `with_scale`.
    shown : sequence of str
        Names in `SHOWN`.
    plain : bool
        Without signs around numbers: no ≈, no †, no n of a partial score.
    """
    # Where all are of the same samples the caption says of how many.
    alike = len(cells[["samples", "expected"]].drop_duplicates()) == 1
    cells = cells.assign(partial=cells["samples"].lt(cells["expected"]) & (not alike))
    rows = [[_TEXTS[name](row, plain) for name in shown] for row in cells.to_dict("records")]
    return pd.DataFrame(rows, index=cells.index, columns=list(shown), dtype=object)


def _score(row: Mapping, plain: bool) -> str:
    text = _number(row["score"], row)
    if plain or not text:
        return text
    partial = f" (n={row['samples']:.0f})" if row["partial"] else ""
    missing = MISSING if row["failed"] > 0 else ""
    return _digitised(row["source"]) + text + missing + partial


def _interval(row: Mapping, plain: bool) -> str:
    if pd.isna(row["low"]):
        return ""
    return f"[{_number(row['low'], row)}, {_number(row['high'], row)}]"


def _kept(row: Mapping, plain: bool) -> str:
    return "" if pd.isna(row["kept_tokens_per_head"]) else f"{row['kept_tokens_per_head']:.1f}"


def _bytes(row: Mapping, plain: bool) -> str:
    if pd.isna(row["kept_kv_bytes"]):
        return ""
    mebibytes = row["kept_kv_bytes"] / 2**20
    if "mebibyte_decimals" in row:
        return f"{mebibytes:.{row['mebibyte_decimals']}f}"
    return f"{mebibytes:.1f}" if mebibytes >= 10 else f"{mebibytes:.3g}"


def _paper(row: Mapping, plain: bool) -> str:
    if pd.isna(row["paper_score"]):
        return ""
    places = row["paper_digits"] + 2 * row["percent"] - (2 if row["factor"] == 100 else 0)
    text = f"{row['paper_score'] * row['factor']:.{min(max(places, 0), row['decimals'])}f}"
    return text if plain else _digitised(row["paper_source"]) + text


def _from_paper(row: Mapping, plain: bool) -> str:
    return _signed(row["score"] - row["paper_score"], row)


def _difference(row: Mapping, plain: bool) -> str:
    text = _signed(row["difference"], row)
    if not text or plain or pd.isna(row["difference_low"]):
        return text
    low, high = (_signed(row[name], row) for name in ("difference_low", "difference_high"))
    return f"{text} [{low}, {high}]"


def _baseline(row: Mapping, plain: bool) -> str:
    return row["baseline"]


def _p(row: Mapping, plain: bool) -> str:
    p = row["p_corrected"]
    if pd.isna(p):
        return ""
    if plain:
        return f"{p:.4g}"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _n(row: Mapping, plain: bool) -> str:
    return "" if pd.isna(row["samples"]) else f"{row['samples']:.0f}"


def _spread(row: Mapping, plain: bool) -> str:
    text = _number(row["spread"], row)
    return text if plain or not text else f"±{text} ({row['seeds']} seeds)"


_TEXTS = {
    "score": _score, "interval": _interval, "kept": _kept, "bytes": _bytes, "paper": _paper,
    "from_paper": _from_paper, "difference": _difference, "baseline": _baseline, "p": _p, "n": _n,
    "spread": _spread,
}  # fmt: skip


def _digitised(source: str) -> str:
    return "≈" if source.endswith("_digitised") else ""


def _number(value: float, row: Mapping) -> str:
    return "" if pd.isna(value) else f"{value * row['factor']:.{row['decimals']}f}"


def _signed(value: float, row: Mapping) -> str:
    if pd.isna(value):
        return ""
    # Adding zero turns the -0.0 of rounding into 0.0.
    return f"{round(value * row['factor'], row['decimals']) + 0.0:+.{row['decimals']}f}"
