"""What stands below a table: its marks, samples and tests, in two lines."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from sparsemm_eval.report.baselines import BEST
from sparsemm_eval.report.names import METHOD_NAMES
from sparsemm_eval.report.resampling import RESAMPLES
from sparsemm_eval.report.statistics import LEVEL

_KNOWN = (
    "**Bold**: best at its budget, and significantly better than the next; *italic*: best, but not "
    "significantly; <u>underlined</u>: second."
)
_UNKNOWN = (
    "**Bold**: best at its budget; <u>underlined</u>: second; whether the difference is "
    "significant is not known{}, for want of scores by sample."
)
_TESTS = {
    "McNemar": "McNemar's exact test (right or wrong)",
    "permutation": "permutation of signs (graded scores)",
}


def captions(
    cells: pd.DataFrame, shown: Sequence[str], against: str, compared: pd.DataFrame
) -> tuple[str, ...]:
    """Two lines, the second only where there is something to say.

    Parameters
    ----------
    cells : DataFrame
        With statistics against the best other method, and `mark`.
    shown : sequence of str
        What the table shows of each.
    against : str
        What the differences shown are from.
    compared : DataFrame
        The same cells with statistics against that.
    """
    lines = (_marks(cells), _samples(cells, shown, against, compared))
    return tuple(line for line in lines if line)


def _marks(cells: pd.DataFrame) -> str:
    first = cells[cells["rank"].eq(1)]
    known = first["p_corrected"].notna()
    parts = []
    if known.any():
        parts.append(_KNOWN)
        if not known.all():
            parts.append("Where there are no scores by sample, bold is the best all the same.")
    elif len(first):
        parts.append(_UNKNOWN.format(""))
    if cells["source"].str.endswith("_digitised").any():
        parts.append("≈: read off a figure of the paper, to about 0.002.")
    return " ".join(parts)


def _samples(
    cells: pd.DataFrame, shown: Sequence[str], against: str, compared: pd.DataFrame
) -> str:
    parts = []
    counts = cells["samples"].dropna()
    if len(counts):
        low, high = f"{counts.min():,.0f}", f"{counts.max():,.0f}"
        whole = cells["expected"].dropna().unique()
        partial = low == high and len(whole) == 1 and counts.max() < whole[0]
        of = f" of {whole[0]:,.0f}" if partial else ""
        parts.append(f"n = {low}{of}" if low == high else f"n = {low} to {high}")
    tests = [words for name, words in _TESTS.items() if cells["test"].eq(name).any()]
    if tests:
        parts.append(
            f"{' and '.join(tests)} on paired samples, Holm's correction for "
            f"{_comparisons(cells)}, level {1 - LEVEL:.2g}"
        )
    if cells["low"].notna().any() and {"interval", "difference"} & set(shown):
        parts.append(f"intervals: {LEVEL:.0%}, paired bootstrap, {RESAMPLES:,} resamples")
    if {"difference", "p"} & set(shown) and compared["baseline"].ne("").any():
        if against == BEST:
            parts.append("differences are from the best other method at the same budget")
        else:
            name = METHOD_NAMES.get(against, against)
            parts.append(f"differences are from {name}, p corrected for {_comparisons(compared)}")
    line = "; ".join(parts)
    return f"{line[0] if line[0] == 'n' else line[0].upper()}{line[1:]}." if line else ""


def _comparisons(cells: pd.DataFrame) -> str:
    """How many comparisons p was corrected for: two cells may be each other's baseline."""
    known = cells[cells["p"].notna()]
    count = known["comparison"].nunique()
    return f"{count} comparison{'' if count == 1 else 's'}"
