"""What a score is worth: an interval a cell, and paired differences from a baseline."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from sparsemm_eval.errors import UserError
from sparsemm_eval.report.baselines import BEST, baselines, ranks
from sparsemm_eval.report.resampling import RESAMPLES, bootstrap, holm, mcnemar, sign_flips

__all__ = ["add_statistics", "bootstrap", "holm", "mcnemar", "sign_flips"]

LEVEL = 0.95
# What a comparison with the baseline adds.
COMPARED = (
    "baseline", "difference", "difference_low", "difference_high", "pairs", "p", "p_corrected",
    "comparison", "test", "better", "worse",
)  # fmt: skip
Pair = tuple[Hashable, Hashable]


@dataclass(frozen=True)
class Comparison:
    """The first of two cells minus the second, over the documents that both have."""

    difference: float
    low: float
    high: float
    documents: int
    p: float
    test: str


def add_statistics(
    cells: pd.DataFrame,
    scores: pd.DataFrame,
    against: str = BEST,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> pd.DataFrame:
    """Add an interval to each cell, its rank, and its paired difference from a baseline.

    All cells of a model and task share one draw of samples. A cell's interval is over its own
    samples, a difference over those that both cells have. Two cells are compared once, whichever
    is the baseline of the other, and p is corrected (Holm) over all comparisons of the frame.

    Parameters
    ----------
    cells : DataFrame
        Of `results.load`, one row a cell, seeds joined.
    scores : DataFrame
        Of `samples.sample_scores`: cell (label of `cells`' index), doc_id, score; several rows of
        one document, such as one a seed, are averaged.
    against : str
        "best": the best other compression method at the same model, task and budget; "fullkv"; or
        a method by its name or label, at the same budget.
    level : float
        Coverage of the intervals; a difference counts where the corrected p is below 1 - level.
    resamples, seed : int
        Of the bootstrap; the seed of the permutation test, too.

    Returns
    -------
    DataFrame
        `cells` and: low, high · rank (among compressed cells of one budget, 1 the best) · baseline
        (label) · difference, difference_low, difference_high · pairs (documents both have) · p,
        p_corrected, comparison (its number), test ("McNemar" for right and wrong, else
        "permutation") · better, worse.
        NaN, "" and False where there are no samples; `difference` is then that of the scores, if
        the numbers of samples do not contradict.

    Raises
    ------
    ValueError
        If `against` is no method of the cells, or several, or the index has duplicates.
    """
    if not cells.index.is_unique:
        raise UserError("cells: their index has duplicates; give each cell a label of its own")
    baseline_of = baselines(cells, against)
    place = {cell: number for number, cell in enumerate(cells.index)}
    ends: dict[Hashable, tuple[float, float]] = {}
    compared: dict[Pair, Comparison] = {}
    scored = scores[scores["cell"].isin(cells.index)]
    group_of = cells.groupby(["model", "task"], dropna=False, sort=False).ngroup()
    for _, some in scored.groupby(scored["cell"].map(group_of), sort=False):
        matrix = some.pivot_table(index="doc_id", columns="cell", values="score", aggfunc="mean")
        # Either is the other's baseline where they are the two best: one comparison all the same.
        pairs = {
            tuple(sorted((cell, baseline_of[cell]), key=place.__getitem__))
            for cell in matrix
            if baseline_of[cell] in matrix
        }
        intervals, differences = _resample(matrix, sorted(pairs), level, resamples, seed)
        ends |= intervals
        compared |= differences
    corrected = holm(np.array([one.p for one in compared.values()]))
    corrected_of = dict(zip(compared, enumerate(corrected), strict=True))
    rows = []
    for cell, other in baseline_of.items():
        row = {"low": np.nan, "high": np.nan, "baseline": "", "test": ""}
        row |= dict(zip(("low", "high"), ends.get(cell, ()), strict=False))
        row |= _against(cells, cell, other, compared, corrected_of)
        rows.append(row)
    added = pd.DataFrame(rows, index=cells.index)
    counts = added["p_corrected"] < 1 - level
    gain = added["difference"].where(cells["higher_is_better"], -added["difference"])
    return cells.assign(
        **added,
        rank=ranks(cells),
        better=counts & (gain > 0),
        worse=counts & (gain < 0),
    )


def _against(
    cells: pd.DataFrame,
    cell: Hashable,
    other: Hashable | None,
    compared: dict[Pair, Comparison],
    corrected: dict[Pair, tuple[int, float]],
) -> dict[str, float | str]:
    """What a cell's row says of its baseline."""
    numbers = (
        "difference", "difference_low", "difference_high", "pairs", "p", "comparison",
        "p_corrected",
    )  # fmt: skip
    row: dict[str, float | str] = dict.fromkeys(numbers, np.nan)
    if other is None:
        return row
    row["baseline"] = cells.at[other, "label"]
    pair, sign = ((cell, other), 1) if (cell, other) in compared else ((other, cell), -1)
    if pair not in compared:
        return row | {"difference": _plain_difference(cells, cell, other)}
    one = compared[pair]
    low, high = sorted((sign * one.low, sign * one.high))
    values = (sign * one.difference, low, high, one.documents, one.p, *corrected[pair])
    return row | dict(zip(numbers, values, strict=True)) | {"test": one.test}


def _resample(
    matrix: pd.DataFrame, pairs: list[Pair], level: float, resamples: int, seed: int
) -> tuple[dict[Hashable, tuple[float, float]], dict[Pair, Comparison]]:
    """Intervals of one model's cells on one task, and comparisons of pairs of them.

    Parameters
    ----------
    matrix : DataFrame
        [documents, cells], NaN where a cell lacks a document.
    pairs : list of tuple
        Cells to compare, first minus second.
    """
    table = matrix.to_numpy(dtype=np.float64)
    cells = table.shape[1]
    first, second = (matrix.columns.get_indexer([pair[i] for pair in pairs]) for i in (0, 1))
    # Rounded: equal means over seeds must not differ in their last bit.
    differences = np.round(table[:, first] - table[:, second], 12)
    right_or_wrong = (np.isin(table, (0, 1)) | np.isnan(table)).all(axis=0)
    binary = right_or_wrong[first] & right_or_wrong[second]
    columns = np.hstack([table, differences])
    means, low, high, p = np.full((4, columns.shape[1]), np.nan)
    for documents, some in _by_documents(columns):
        part = columns[documents]
        means[some] = part[:, some].mean(axis=0)
        low[some], high[some] = bootstrap(part[:, some], resamples, seed, level)
        ours = some[some >= cells]
        exact = binary[ours - cells]
        p[ours[exact]] = mcnemar(part[:, ours[exact]])
        p[ours[~exact]] = sign_flips(part[:, ours[~exact]], seed)
    shared = np.count_nonzero(~np.isnan(differences), axis=0)
    return (
        dict(zip(matrix.columns, zip(low, high, strict=True), strict=False)),
        {
            pair: Comparison(
                difference=float(means[cells + number]),
                low=float(low[cells + number]),
                high=float(high[cells + number]),
                documents=int(shared[number]),
                p=float(p[cells + number]),
                test="McNemar" if binary[number] else "permutation",
            )
            for number, pair in enumerate(pairs)
            if shared[number]
        },
    )


def _by_documents(columns: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Columns that have the same documents, together: (which documents, which columns)."""
    known = ~np.isnan(columns)
    groups: dict[bytes, list[int]] = defaultdict(list)
    for column in range(columns.shape[1]):
        groups[known[:, column].tobytes()].append(column)
    together = [(known[:, some[0]], np.array(some)) for some in groups.values()]
    return [(documents, some) for documents, some in together if documents.any()]


def _plain_difference(cells: pd.DataFrame, cell: Hashable, other: Hashable) -> float:
    """Of two scores whose samples are not known; NaN where they are of unlike numbers of them."""
    one, two = cells.at[cell, "samples"], cells.at[other, "samples"]
    if pd.notna(one) and pd.notna(two) and one != two:
        return np.nan
    return cells.at[cell, "score"] - cells.at[other, "score"]
