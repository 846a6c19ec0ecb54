"""Which method is best at equal bytes: the share of full KV's score kept over a model's tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from sparsemm_eval.choices import STRATA
from sparsemm_eval.errors import UserError
from sparsemm_eval.report.names import chance_score, in_order, stratum_of
from sparsemm_eval.report.resampling import RESAMPLES, holm, resampled_means, sign_flips
from sparsemm_eval.report.statistics import LEVEL

TOLERANCE = 0.05
# Why a row has no rank, in the order in which it is said.
FEWER_TASKS, NO_SAMPLES, DOCUMENTS, NO_BYTES, ALONE = (
    "tasks", "samples", "documents", "bytes", "alone"
)  # fmt: skip
BEST, TIE, BEHIND = "best", "tie", "behind"
_ENDS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)


@dataclass(frozen=True, eq=False)
class KeptShares:
    """What methods of one model keep of full KV's score.

    Parameters
    ----------
    rows : DataFrame
        One row a method and budget: method, label, budget, stratum · tasks (how many) · sampled
        (whether there are scores by sample of all) · share (mean over them) with its interval low
        and high · kept_kv_bytes (mean over them, a prompt).
    shares, bytes : DataFrame
        [rows, tasks], NaN where a row lacks a task.
    draws : mapping of int to ndarray
        By row the share in each resample, [resamples]; none where scores by sample lack.
    documents : mapping of str to DataFrame
        By task the scores by sample, [documents, rows], over full KV's score.
    falling : frozenset of str
        Tasks where lower is better.
    full_bytes : float
        Mean over tasks of what full KV keeps a prompt.
    notes : tuple of str
        Which tasks were left out, and why.
    """

    rows: pd.DataFrame
    shares: pd.DataFrame
    bytes: pd.DataFrame
    draws: Mapping[int, np.ndarray]
    documents: Mapping[str, pd.DataFrame]
    falling: frozenset[str]
    full_bytes: float
    notes: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Ranking:
    """Methods of each model, ranked among those that keep as many bytes.

    Parameters
    ----------
    rows : DataFrame
        One row a model, stratum, budget and method, in the order of a table: the columns of
        `KeptShares.rows` and model · of_tasks (how many there are at this budget) · group (number
        of those ranked with each other, NaN of a row without rank) · unranked (why it has no rank,
        or "") · verdict ("best", "tie", "behind" or "") · behind, behind_low, behind_high (the best
        of its group minus it) · p, p_corrected · mean_rank (over tasks, ties share the mean) · won
        and shared (tasks on which it is the best of its group, alone and with others).
    full_bytes : mapping of str to float
        What full KV keeps a prompt, by model.
    tasks : mapping of str to tuple of str
        Tasks that count, by model.
    notes : tuple of str
        Which tasks were left out, and why.
    tolerance : float
        How far apart the bytes of ranked methods may be, as a share of the fewest.
    """

    rows: pd.DataFrame
    full_bytes: Mapping[str, float]
    tasks: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]
    tolerance: float

    @property
    def comparisons(self) -> int:
        """How many differences p is corrected for."""
        return int(self.rows["p"].notna().sum())

    @property
    def comparable(self) -> pd.DataFrame:
        """Rows that have all tasks of their budget, and known bytes."""
        rows = self.rows
        return rows[rows["unranked"].ne(FEWER_TASKS) & rows["kept_kv_bytes"].gt(0)]


def rank_methods(
    cells: pd.DataFrame,
    scores: pd.DataFrame,
    tolerance: float = TOLERANCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Ranking:
    """Rank methods by the share of full KV's score that they keep, over all tasks of a model.

    Ranked with each other are methods of one stratum and nominal budget that have the same tasks
    and whose mean kept bytes are within the tolerance of each other on every task. A method is
    behind the best of them where the interval of their paired difference leaves out 0 and its p,
    of a permutation of signs over the documents of all tasks and corrected (Holm) for all
    differences there are, is below 0.05; else it ties.

    Parameters
    ----------
    cells : DataFrame
        As `results.load` gives them, seeds joined; the paper's are not looked at.
    scores : DataFrame
        From `samples.score_samples`.
    tolerance : float
        How far apart bytes may be, as a share of the fewest.
    resamples, seed : int
        The bootstrap's.

    Raises
    ------
    UserError
        If the tolerance is negative, no model has full KV and a method on one task that counts, or
        a model has a cell twice.
    """
    if not tolerance >= 0:
        raise UserError(f"within={tolerance:g}: it must be 0 or more, such as 0.05")
    measured = in_order(cells[cells["source"].eq("measured")], ("model", "benchmark", "task"))
    frames, full_bytes, tasks, notes = [], {}, {}, []
    for model, own in measured.groupby("model", sort=False):
        kept = kept_shares(own, scores, resamples, seed)
        notes += [f"{model}, {note}" for note in kept.notes]
        if len(kept.rows):
            frames.append(_ranked(kept, tolerance, seed).assign(model=model))
            full_bytes[model] = kept.full_bytes
            tasks[model] = tuple(kept.shares)
    if not frames:
        why = "; ".join(notes) or "there is none"
        raise UserError(f"a ranking needs full KV and methods with budgets on a task: {why}")
    rows = pd.concat(frames, ignore_index=True)
    differences = rows["p"].notna()
    rows.loc[differences, "p_corrected"] = holm(rows.loc[differences, "p"].to_numpy(float))
    lost = rows["p_corrected"].lt(1 - LEVEL) & rows["behind_low"].gt(0)
    rows["verdict"] = rows["verdict"].mask(differences, lost.map({True: BEHIND, False: TIE}))
    return Ranking(_in_order(rows), full_bytes, tasks, tuple(notes), tolerance)


def kept_shares(
    cells: pd.DataFrame, scores: pd.DataFrame, resamples: int = RESAMPLES, seed: int = 0
) -> KeptShares:
    """The share of full KV's score that one model's methods keep on each task, and in the mean.

    Where lower is better it is full KV's score over the method's. Documents are drawn within each
    task, the same for all methods and full KV. A task counts where full KV's score, and the lower
    end of its interval, is above chance, or 0 where chance is not known.

    Parameters
    ----------
    cells : DataFrame
        One model's, as `results.load` gives them, seeds joined.
    scores : DataFrame
        From `samples.score_samples`.
    resamples, seed : int
        The bootstrap's.

    Raises
    ------
    UserError
        If a task has full KV, or a method at one budget, twice.
    """
    draws: dict[int, np.ndarray] = {}
    documents: dict[str, pd.DataFrame] = {}
    counted, full_bytes, notes = [], [], []
    for task, here in cells.groupby("task", sort=False):
        compressed = here[here["budget"].notna() & here["method"].ne("fullkv")]
        if compressed.empty:
            continue
        if not here["method"].eq("fullkv").any():
            notes.append(f"{task}: left out, there is no full KV of it")
            continue
        full = _full_kv(task, here, compressed)
        scored = _with_full_kvs_documents(full.name, scores[scores["cell"].isin(here.index)])
        means = resampled_means(scored, resamples, [seed, *task.encode()]) if len(scored) else []
        drawn = dict(zip(scored, np.transpose(means), strict=True))
        if reason := _not_counted(full, compressed, drawn.get(full.name)):
            notes.append(f"{task}: left out, {reason}")
            continue
        rising, level = full["higher_is_better"], full["score"]
        shares = _share(compressed["score"], level, rising)
        sampled = compressed.index.isin(scores["cell"])
        counted.append(compressed.assign(share=shares, sampled=sampled))
        full_bytes.append(full["kept_kv_bytes"])
        documents[task] = scored[scored.columns.intersection(compressed.index)] / level
        for cell in documents[task]:
            draws[cell] = _share(drawn[cell], drawn[full.name], rising)
    if not counted:
        none = pd.DataFrame()
        return KeptShares(none, none, none, {}, {}, frozenset(), np.nan, tuple(notes))
    return _over_tasks(
        pd.concat(counted), draws, documents, float(np.mean(full_bytes)), tuple(notes)
    )


def _full_kv(task: str, here: pd.DataFrame, compressed: pd.DataFrame) -> pd.Series:
    """The one cell of full KV on a task; UserError if that, or a method's cell, is there twice."""
    full = here[here["method"].eq("fullkv")]
    twice = compressed[compressed.duplicated(["label", "budget"])]
    if len(full) > 1 or len(twice):
        what = ", ".join(full["label"]) if len(full) > 1 else twice["label"].iloc[0]
        raise UserError(
            f"{task}: {what} is there several times, so that no share of full KV's score can be "
            "said; leave one out, as by --models or --methods"
        )
    return full.iloc[0]


def _with_full_kvs_documents(full: int, scores: pd.DataFrame) -> pd.DataFrame:
    """[documents, cells] of a task, of cells that have the documents of full KV; else empty."""
    matrix = scores.pivot_table(index="doc_id", columns="cell", values="score", aggfunc="mean")
    if full not in matrix:
        return pd.DataFrame()
    documents = matrix[full].notna()
    return matrix.loc[documents, matrix.notna().eq(documents, axis="index").all()]


def _not_counted(full: pd.Series, compressed: pd.DataFrame, drawn: np.ndarray | None) -> str:
    """Why no share of full KV's score can be said on a task, or ""."""
    score = full["score"]
    if not full["higher_is_better"]:
        lowest = min(score, compressed["score"].min())
        return "" if lowest > 0 else "a score of 0 has no share where lower is better"
    chance = chance_score(full["task"], full["metric"])
    low = score if drawn is None else np.quantile(drawn, _ENDS[0])
    if min(low, score) > chance:
        return ""
    interval = "" if drawn is None else f" (from {low:.3f})"
    floor = f"chance, {chance:.3f}" if chance else "0"
    return f"full KV's {score:.3f}{interval} is not above {floor}"


def _share(own: pd.Series | np.ndarray, full: float | np.ndarray, rising: bool):
    """Of full KV's score; NaN in a resample where it cannot be said."""
    above, below = (own, full) if rising else (full, own)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = above / below
    return np.where(np.isfinite(shares), shares, np.nan)


def _over_tasks(
    counted: pd.DataFrame,
    draws: Mapping[int, np.ndarray],
    documents: Mapping[str, pd.DataFrame],
    full_bytes: float,
    notes: tuple[str, ...],
) -> KeptShares:
    """Cells of one method and budget joined to a row."""
    rows, drawn = [], {}
    names = ["label", "budget"]
    number = counted.groupby(names, sort=False).ngroup()
    for row, (_, own) in enumerate(counted.groupby(names, sort=False)):
        about = own[["method", *names]].iloc[0].to_dict()
        low = high = np.nan
        if all(cell in draws for cell in own.index):
            drawn[row] = np.mean([draws[cell] for cell in own.index], axis=0)
            low, high = np.nanquantile(drawn[row], _ENDS)
        rows.append({
            **about,
            "stratum": stratum_of(about["method"], own["query_aware"].iloc[0]),
            "tasks": len(own),
            "sampled": bool(own["sampled"].all()),
            "share": own["share"].mean(),
            "low": low,
            "high": high,
            "kept_kv_bytes": own["kept_kv_bytes"].mean(skipna=False),
        })  # fmt: skip
    shares, sizes = (
        counted.assign(row=number).pivot(index="row", columns="task", values=name)[
            [*counted["task"].unique()]
        ]
        for name in ("share", "kept_kv_bytes")
    )
    by_row = {task: frame.rename(columns=number) for task, frame in documents.items()}
    falling = frozenset(counted.loc[~counted["higher_is_better"], "task"])
    frame = pd.DataFrame(rows)
    return KeptShares(frame, shares, sizes, drawn, by_row, falling, full_bytes, notes)


def _ranked(kept: KeptShares, tolerance: float, seed: int) -> pd.DataFrame:
    """Rows of one model with their groups, ranks and differences from the best."""
    rows = kept.rows.assign(
        of_tasks=0, group=np.nan, unranked="", verdict="", won=np.nan, shared=np.nan,
        **dict.fromkeys(("behind", "behind_low", "behind_high", "p", "p_corrected"), np.nan),
        mean_rank=np.nan,
    )  # fmt: skip
    for _, column in rows.groupby("budget"):
        has = kept.shares.loc[column.index].notna().any()
        rows.loc[column.index, "of_tasks"] = int(has.sum())
    rows["unranked"] = np.select(
        [
            rows["tasks"].lt(rows["of_tasks"]),
            ~rows["sampled"],
            [row not in kept.draws for row in rows.index],
            kept.bytes.where(kept.shares.notna(), 0).isna().any(axis=1),
        ],
        [FEWER_TASKS, NO_SAMPLES, DOCUMENTS, NO_BYTES],
        "",
    )
    groups: list[list[int]] = []
    for _, rivals in rows[rows["unranked"].eq("")].groupby(["stratum", "budget"], sort=False):
        for some in matched(kept.bytes.loc[rivals.index], tolerance):
            if len(some) == 1:
                rows.loc[some, "unranked"] = ALONE
                continue
            groups.append(some)
            rows.loc[some, "group"] = len(groups)
            _place(rows, some, kept.shares.loc[some])
    _compare(rows, groups, kept, seed)
    return rows


def matched(sizes: pd.DataFrame, tolerance: float) -> Iterator[list[int]]:
    """Rows that keep as many bytes: the largest such group first, then of those left.

    Parameters
    ----------
    sizes : DataFrame
        [rows, tasks], bytes. NaN where no row has the task.
    tolerance : float
        How far the most may be above the fewest on any task, as a share of the fewest.
    """
    left = [*sizes.mean(axis=1).sort_values(kind="stable").index]
    while left:
        best: list[int] = []
        for begin in range(len(left)):
            end = begin + len(best) + 1
            while end <= len(left) and _alike(sizes.loc[left[begin:end]], tolerance):
                best, end = left[begin:end], end + 1
        yield best
        left = [row for row in left if row not in best]


def _alike(sizes: pd.DataFrame, tolerance: float) -> bool:
    return bool((sizes.max() <= sizes.min() * (1 + tolerance) * (1 + 1e-12)).where(
        sizes.notna().any(), True
    ).all())  # fmt: skip


def _place(rows: pd.DataFrame, some: list[int], shares: pd.DataFrame) -> None:
    """Fill in the places of a group's rows, task by task, and which is the best over all."""
    shares = shares.dropna(axis="columns").round(9)
    rows.loc[some, "mean_rank"] = shares.rank(ascending=False).mean(axis=1)
    top = shares.eq(shares.max())
    alone = top.sum() == 1
    rows.loc[some, "won"] = (top & alone).sum(axis=1)
    rows.loc[some, "shared"] = (top & ~alone).sum(axis=1)
    rows.loc[rows.loc[some, "share"].round(9).idxmax(), "verdict"] = BEST


def _compare(rows: pd.DataFrame, groups: list[list[int]], kept: KeptShares, seed: int) -> None:
    """Fill in how far each row is behind the best of its group."""
    columns = {}
    for some in groups:
        best = rows.loc[some, "verdict"].eq(BEST).idxmax()
        for row in some:
            if row == best:
                continue
            # Rounded: equal shares must not differ in their last bit.
            ahead = np.round(kept.draws[best] - kept.draws[row], 12)
            ends = np.nanquantile(ahead, _ENDS)
            rows.loc[row, ["behind", "behind_low", "behind_high"]] = (
                rows.at[best, "share"] - rows.at[row, "share"], *ends
            )  # fmt: skip
            columns[row] = _by_document(best, row, kept)
    if columns:
        rows.loc[[*columns], "p"] = sign_flips(np.stack([*columns.values()], axis=1), seed)


def _by_document(best: int, row: int, kept: KeptShares) -> np.ndarray:
    """What each document of all tasks adds to the difference of two rows' shares."""
    parts = []
    for task, scores in kept.documents.items():
        if best not in scores or row not in scores:
            parts.append(np.zeros(len(scores)))
            continue
        apart = (scores[best] - scores[row]).to_numpy() / len(scores)
        if task in kept.falling:  # f / a - f / b is (b - a) / f times both shares
            apart = -apart * kept.shares.at[best, task] * kept.shares.at[row, task]
        parts.append(apart)
    return np.round(np.concatenate(parts), 12)


def pareto_front(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows that no other exceeds with as few bytes, by bytes; of equal ones the first.

    Parameters
    ----------
    rows : DataFrame
        With kept_kv_bytes and share.
    """
    ordered = rows.assign(gain=rows["share"].round(9)).sort_values(
        ["kept_kv_bytes", "gain"], ascending=[True, False], kind="stable"
    )
    before = ordered["gain"].cummax().shift(fill_value=-float("inf"))
    return ordered[ordered["gain"] > before].drop(columns="gain")


def _in_order(rows: pd.DataFrame) -> pd.DataFrame:
    """As a table has them: by model, stratum and budget; then groups, the best first."""
    rows = in_order(rows, ("model", "method", "label"))
    models = {model: place for place, model in enumerate(rows["model"].unique())}
    size = rows.groupby(["model", "group"])["group"].transform("size").fillna(0)
    keys = pd.DataFrame({
        "model": rows["model"].map(models), "stratum": rows["stratum"].map(STRATA.index),
        "budget": -rows["budget"], "size": -size, "group": rows["group"],
        "best": rows["verdict"].ne(BEST), "share": -rows["share"].round(9),
    })  # fmt: skip
    return rows.loc[keys.sort_values([*keys], kind="stable").index].reset_index(drop=True)
