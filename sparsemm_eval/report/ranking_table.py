"""A ranking as a table, and what it says in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import pandas as pd

from sparsemm_eval.choices import STRATA
from sparsemm_eval.report.cell_text import budget_text
from sparsemm_eval.report.markup import BOLD, ITALIC, Table
from sparsemm_eval.report.ranking import (
    ALONE,
    BEHIND,
    BEST,
    DOCUMENTS,
    FEWER_TASKS,
    NO_BYTES,
    NO_SAMPLES,
    TIE,
    Ranking,
    pareto_front,
)
from sparsemm_eval.report.resampling import RESAMPLES
from sparsemm_eval.report.statistics import LEVEL

_NAMES = ("model", "ranking sees", "budget", "method")
_SEES = dict(zip(STRATA, ("the question", "no question"), strict=True))
_DIGITS = 3
# Methods that a sentence names behind the best.
_NAMED = 3
_RAW = (
    "model", "stratum", "budget", "method", "label", "kept_kv_bytes", "share", "low", "high",
    "tasks", "of_tasks", "group", "verdict", "unranked", "behind", "behind_low", "behind_high", "p",
    "p_corrected", "mean_rank", "won", "shared",
)  # fmt: skip


def ranking_table(
    ranking: Ranking,
    digits: int | None = None,
    percent: bool = False,
    notes: Sequence[str] = (),
) -> Table:
    """One row a model, stratum, budget and method, the best first, and the words before it.

    Parameters
    ----------
    ranking : Ranking
        From `sparsemm_eval.report.ranking.rank_methods`.
    digits : int, optional
        Decimals of shares; default: 3, of percent 1.
    percent : bool
        Whether shares are in percent.
    notes : sequence of str
        Lines that stand below it, too.
    """
    numbers = _Numbers(digits, percent)
    rows = ranking.rows.to_dict("records")
    text = pd.DataFrame([
        {
            "model": row["model"],
            "ranking sees": _SEES[row["stratum"]],
            "budget": budget_text(row["budget"]),
            "method": row["label"],
            "KV MiB": _mebibytes(row["kept_kv_bytes"]),
            "kept of full KV": numbers.interval(row["share"], row["low"], row["high"]),
            "behind the best": _behind(row, numbers),
            "rank": "" if row["unranked"] else f"{row['mean_rank']:.1f}",
            "won": "" if row["unranked"] else f"{row['won']:.0f}+{row['shared']:.0f}",
        }
        for row in rows
    ], dtype=object)  # fmt: skip
    marks = pd.DataFrame("", index=text.index, columns=text.columns)
    tied = ranking.rows.groupby("group")["verdict"].transform(lambda some: some.eq(TIE).any())
    first = ranking.rows["verdict"].isin((BEST, TIE))
    marks.loc[first, "kept of full KV"] = tied[first].map({True: ITALIC, False: BOLD})
    return Table(
        text,
        names=len(_NAMES),
        sparse=len(_NAMES) - 1,
        title="Best at equal bytes: share of full KV's score that is kept",
        caption=(*_caption(ranking), *notes),
        marks=marks,
        plain=ranking.rows[list(_RAW)].map(_raw),
        words=tuple(
            line
            for title, (first, *more) in ranking_words(ranking, numbers)
            for line in (f"{title}: {first}", *more)
        ),
    )


def _raw(value: object) -> str:
    if pd.isna(value):
        return ""
    return f"{value:.8g}" if isinstance(value, float) else str(value)


class _Numbers:
    """How shares are written."""

    def __init__(self, digits: int | None = None, percent: bool = False) -> None:
        self.factor = 100 if percent else 1
        self.digits = (1 if percent else _DIGITS) if digits is None else digits

    def __call__(self, share: float) -> str:
        # Adding zero turns the -0.0 of rounding into 0.0.
        return f"{round(share * self.factor, self.digits) + 0.0:.{self.digits}f}"

    def interval(self, share: float, low: float, high: float) -> str:
        ends = "" if pd.isna(low) else f" [{self(low)}, {self(high)}]"
        return self(share) + ends


def _mebibytes(size: float) -> str:
    return "" if pd.isna(size) else f"{size / 2**20:.3g}"


def _behind(row: Mapping, numbers: _Numbers) -> str:
    if row["unranked"]:
        return _reason(row)
    if row["verdict"] == BEST:
        return "best"
    return numbers.interval(row["behind"], row["behind_low"], row["behind_high"])


def _reason(row: Mapping) -> str:
    """Why a row has no rank, in few words."""
    return {
        FEWER_TASKS: f"{row['tasks']} of {row['of_tasks']} tasks",
        NO_SAMPLES: "no samples",
        DOCUMENTS: "other documents",
        NO_BYTES: "bytes not known",
        ALONE: "unlike bytes",
    }[row["unranked"]]


def _caption(ranking: Ranking) -> tuple[str, ...]:
    """What numbers and marks mean, and what was left out."""
    lines = [
        "Kept: mean over tasks of score / full KV's score (where lower is better, full KV's / "
        "score), on tasks where full KV is above chance, as far as that is known. Rank: mean over "
        "tasks. Won: tasks on which no other is better, alone + shared.",
        "Ranked with each other are methods of one budget that all see the question or all do not, "
        f"and whose kept bytes are within {ranking.tolerance:.0%} of each other on every task; "
        "unlike bytes: there is no other such method.",
    ]
    if ranking.comparisons:
        lines.append(
            "**Bold**: best alone; *italic*: best, or a tie with it. A tie: the interval of the "
            "paired difference reaches 0, or p of a permutation of signs, corrected (Holm) for "
            f"{ranking.comparisons} comparisons, is {1 - LEVEL:.2g} or more."
        )
    if ranking.rows["low"].notna().any():
        lines.append(
            f"Intervals: {LEVEL:.0%} each, not corrected, bootstrap over the documents of each "
            f"task, {RESAMPLES:,} resamples, the same documents for all methods."
        )
    return (*lines, *(f"{note}." for note in ranking.notes))


def ranking_words(
    ranking: Ranking, numbers: _Numbers | None = None
) -> list[tuple[str, tuple[str, ...]]]:
    """Which method is best at which budget: a title and sentences each model and stratum.

    Parameters
    ----------
    ranking : Ranking
        From `sparsemm_eval.report.ranking.rank_methods`.
    numbers : optional
        How shares are written; default: 0 to 1, three decimals.
    """
    numbers = numbers or _Numbers()
    said = []
    for (model, stratum), rows in ranking.rows.groupby(["model", "stratum"], sort=False):
        size = _mebibytes(ranking.full_bytes[model])
        title = f"{model}, {stratum} methods" + (f" (full KV: {size} MiB a prompt)" if size else "")
        here = ranking.comparable.index.intersection(rows.index)
        front = pareto_front(rows.loc[here[rows.loc[here, "share"].gt(0)]])
        said.append((title, (*_said(rows, numbers), *_front(front))))
    return said


def _front(rows: pd.DataFrame) -> Iterator[str]:
    """What lies on the Pareto front of score over bytes."""
    named = [
        f"{label} at {', '.join(map(budget_text, some['budget']))}"
        for label, some in rows.groupby("label", sort=False)
    ]
    if named:
        yield f"No other exceeds these with as few bytes (the front): {'; '.join(named)}."


def _said(rows: pd.DataFrame, numbers: _Numbers) -> Iterator[str]:
    """Sentences on one stratum of one model."""
    if rows["unranked"].isin((NO_SAMPLES, DOCUMENTS)).all():
        yield (
            "There is no ranking: without scores by sample (samples files, --log_samples of "
            "lmms_eval) of the documents that full KV has, no interval can be made."
        )
        return
    if rows["group"].notna().any():
        yield _overall(rows)
    for budget, column in rows.groupby("budget", sort=False):
        at = f"{budget_text(budget)} {'tokens' if budget >= 1 else 'of the prompt'}"
        for _, group in column.groupby("group", sort=False):
            yield _best(group.to_dict("records"), at, numbers)
        bests = column[column["verdict"].eq(BEST)]
        if left := [row for row in column.to_dict("records") if row["unranked"]]:
            named = [
                f"{row['label']} ({_kept_at(row, numbers)}: {_reason(row)}{_exceeds(row, bests)})"
                for row in left
            ]
            yield f"Not ranked at {at}: {', '.join(named)}."


def _overall(rows: pd.DataFrame) -> str:
    """How often each method is best or ties with the best."""
    groups = rows["group"].nunique()
    first = rows[rows["verdict"].isin((BEST, TIE)) & rows["share"].gt(0)]
    counts = first.groupby("label", sort=False)["group"].nunique().sort_values(
        ascending=False, kind="stable"
    )  # fmt: skip
    named = [f"{label} in {count}" for label, count in counts.items()]
    cases = "one comparison" if groups == 1 else f"{groups} comparisons"
    return f"Of {cases} at equal bytes, best or tied with the best: {', '.join(named) or 'none'}."


def _best(group: Sequence[Mapping], at: str, numbers: _Numbers) -> str:
    """The best of methods that keep as many bytes, who ties with it, and who is behind it."""
    best = next(row for row in group if row["verdict"] == BEST)
    ties = [row["label"] for row in group if row["verdict"] == TIE]
    behind = [row for row in group if row["verdict"] == BEHIND]
    at = f"At {at} ({_mebibytes(best['kept_kv_bytes'])} MiB a prompt)"
    if not best["share"] > 0:
        return f"{at} none of {len(group)} methods keeps any of full KV's score."
    share = (best["share"], best["low"], best["high"])
    parts = [
        f"{at} {best['label']} keeps {numbers.interval(*share)} of full "
        f"KV's score over {_tasks(best['tasks'])}"
    ]
    if ties:
        parts.append(f"{_listed(ties)} {'ties' if len(ties) == 1 else 'tie'} with it")
    if behind:
        ends = ("behind", "behind_low", "behind_high")
        named = [
            f"{row['label']} by {numbers.interval(*(row[end] for end in ends))}"
            for row in (behind[:_NAMED] if len(behind) > _NAMED + 1 else behind)
        ]
        if len(behind) > len(named):
            more = len(behind) - len(named)
            named.append(f"{more} more by up to {numbers(behind[-1]['behind'])}")
        parts.append(f"behind it: {_listed(named)}")
    return "; ".join(parts) + "."


def _exceeds(row: Mapping, bests: pd.DataFrame) -> str:
    """That a method without rank keeps more score in fewer bytes than one that is best."""
    less = bests["kept_kv_bytes"].gt(row["kept_kv_bytes"]) & bests["share"].lt(row["share"])
    if row["unranked"] != ALONE or not less.any():
        return ""
    return f", and more in the mean than {_listed(bests.loc[less, 'label'])} in fewer bytes"


def _kept_at(row: Mapping, numbers: _Numbers) -> str:
    size = _mebibytes(row["kept_kv_bytes"])
    return f"keeps {numbers(row['share'])}" + (f" at {size} MiB" if size else "")


def _tasks(count: int) -> str:
    return "one task" if count == 1 else f"{count} tasks"


def _listed(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last
