"""What a score is worth: its interval and rank, and its paired difference from a baseline."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from sparsemm_eval.errors import UserError
from sparsemm_eval.report.names import stratum_of
from sparsemm_eval.report.resampling import RESAMPLES, bootstrap, holm, mcnemar, sign_flips

BEST = "best"
LEVEL = 0.95
# What a comparison with the baseline adds.
COMPARED = (
    "baseline", "difference", "difference_low", "difference_high", "pairs", "p", "p_corrected",
    "comparison", "test", "better", "worse",
)  # fmt: skip
Pair = tuple[Hashable, Hashable]


# By pair: the first of two cells minus the second, over the documents that both have.
_Compared = dict[Pair, dict[str, Any]]


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
        As `results.load` gives them, one row a cell, seeds joined.
    scores : DataFrame
        From `samples.score_samples`: cell (label of `cells`' index), doc_id, score; several rows of
        one document, such as one a seed, are averaged.
    against : str
        "best": the best other compression method at the same model, task and budget; "fullkv"; or
        a method by its name or label, at the same budget.
    level : float
        Coverage of the intervals; a difference counts where the corrected p is below 1 - level.
    resamples, seed : int
        The bootstrap's; the seed of the permutation test, too.

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
    compared: _Compared = {}
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
    corrected = holm(np.array([one["p"] for one in compared.values()]))
    for number, one in enumerate(compared.values()):
        one |= {"comparison": number, "p_corrected": corrected[number]}
    rows = []
    for cell, other in baseline_of.items():
        low, high = ends.get(cell, (np.nan, np.nan))
        rows.append({"low": low, "high": high, **_against(cells, cell, other, compared)})
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
    cells: pd.DataFrame, cell: Hashable, other: Hashable | None, compared: _Compared
) -> dict[str, Any]:
    """What a cell's row says of its baseline."""
    row = dict.fromkeys(COMPARED[:-2], np.nan) | {"baseline": "", "test": ""}
    if other is None:
        return row
    row["baseline"] = cells.at[other, "label"]
    if (cell, other) in compared:
        return row | compared[cell, other]
    if (turned := compared.get((other, cell))) is not None:
        low, high = -turned["difference_high"], -turned["difference_low"]
        ends = {"difference_low": low, "difference_high": high}
        return row | turned | {"difference": -turned["difference"], **ends}
    return row | {"difference": _plain_difference(cells, cell, other)}


def _resample(
    matrix: pd.DataFrame, pairs: list[Pair], level: float, resamples: int, seed: int
) -> tuple[dict[Hashable, tuple[float, float]], _Compared]:
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
            pair: {
                "difference": float(means[cells + number]),
                "difference_low": float(low[cells + number]),
                "difference_high": float(high[cells + number]),
                "pairs": int(shared[number]),
                "p": float(p[cells + number]),
                "test": "McNemar" if binary[number] else "permutation",
            }
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
    """Between two scores whose samples are not known; NaN where their numbers of samples differ."""
    one, two = cells.at[cell, "samples"], cells.at[other, "samples"]
    if pd.notna(one) and pd.notna(two) and one != two:
        return np.nan
    return cells.at[cell, "score"] - cells.at[other, "score"]


def strata(cells: pd.DataFrame) -> pd.Series:
    """Of which stratum each cell's method is, see `stratum_of`."""
    known = zip(cells["method"], cells["query_aware"], strict=True)
    return pd.Series([stratum_of(*one) for one in known], cells.index, name="stratum")


def ranks(cells: pd.DataFrame) -> pd.Series:
    """Place of each cell among its rivals, 1 the best; ties share one, the next follows at once.

    Parameters
    ----------
    cells : DataFrame
        As `results.load` gives them, seeds joined.

    Returns
    -------
    Series
        By the index of `cells`; NaN for what has no rival.
    """
    places = pd.Series(float("nan"), index=cells.index)
    for _, rivals in _columns(cells):
        if len(rivals) > 1:
            places[rivals.index] = _gain(rivals).round(9).rank(method="dense", ascending=False)
    return places


def baselines(cells: pd.DataFrame, against: str = BEST) -> dict[Hashable, Hashable | None]:
    """The cell that each cell is compared with, or None.

    Parameters
    ----------
    cells : DataFrame
        As `results.load` gives them, seeds joined.
    against : str
        "best", "fullkv", or a method by name or label.

    Returns
    -------
    dict
        Labels of the index of `cells`, in its order.

    Raises
    ------
    ValueError
        If `against` is no method of the cells, or several at one budget.
    """
    baseline_of: dict[Hashable, Hashable | None] = dict.fromkeys(cells.index)
    if against == BEST:
        for here, rivals in _columns(cells):
            gains = _gain(rivals).sort_values(ascending=False, kind="stable")
            best = list(gains.index[:2])
            for cell in here.index:
                baseline_of[cell] = next((other for other in best if other != cell), None)
        return baseline_of
    chosen = cells["label"].eq(against)
    chosen = chosen if chosen.any() else cells["method"].eq(against)
    if not chosen.any():
        known = sorted(set(cells["method"]) | set(cells["label"]))
        raise UserError(f"against={against}: it must be {BEST} or one of {', '.join(known)}")
    for _, group in _groups(cells):
        candidates = group[chosen[group.index]]
        for cell, budget in group["budget"].items():
            there = candidates[candidates["budget"].isna() | candidates["budget"].eq(budget)]
            if len(there) > 1:
                several = ", ".join(there["label"])
                raise UserError(f"against={against}: it is several here, name one of {several}")
            if len(there) and there.index[0] != cell:
                baseline_of[cell] = there.index[0]
    return baseline_of


def _gain(cells: pd.DataFrame) -> pd.Series:
    """Scores, turned round where lower is better."""
    return cells["score"].where(cells["higher_is_better"], -cells["score"])


def _groups(cells: pd.DataFrame) -> Iterator[tuple[tuple, pd.DataFrame]]:
    """One model's cells on one task; the paper's are no rivals of what was measured."""
    measured = cells["source"].eq("measured").rename("measured")
    return iter(cells.groupby(["model", "benchmark", "task", measured], dropna=False, sort=False))


def _columns(cells: pd.DataFrame) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    """What compresses a model's cache on a task to one budget: all cells of a stratum, rivals.

    Full KV and models of other tools are neither. A cell with fewer samples than the others is
    no rival of theirs; nor is one whose method never sees the question of one whose does.
    """
    compressed = cells[
        cells["budget"].notna() & cells["score"].notna() & cells["method"].ne("fullkv")
    ]
    for _, group in _groups(compressed):
        for _, here in group.groupby(["budget", strata(group)]):
            samples = here["samples"]
            yield here, here[samples.isna() | samples.eq(samples.max())]
