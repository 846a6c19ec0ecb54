"""Tables of cells: the ones of a sweep, the demo and the masking study."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import pandas as pd

from sparsemm_eval.errors import UserError
from sparsemm_eval.report.cell_text import MISSING, SHOWN, budget_text, cell_texts, with_scale
from sparsemm_eval.report.markup import Table, to_markdown
from sparsemm_eval.report.names import distinct, in_order, labels_in_order, top_score

__all__ = [
    "calibration_lines", "empty_line",
    "fidelity_table", "kept_table", "notes_below", "overview_table", "score_tables", "side_by_side",
    "silenced_table", "to_markdown",
]  # fmt: skip

# Cells that a line names.
_NAMED = 5
Chance = Mapping[str, tuple[str, float]]


def side_by_side(
    cells: pd.DataFrame,
    names: Sequence[str],
    row: str,
    column: str,
    heads: Mapping[Hashable, str],
    texts: pd.DataFrame,
) -> pd.DataFrame:
    """Texts of cells, [cells, shown], to where they stand: a row each name that is in `row`.

    Parameters
    ----------
    cells : DataFrame
        In order.
    names : sequence of str
        What the parts of a row's name are.
    row, column : str
        Columns of `cells` that hold the names of its row, a tuple, and of its column. Full KV,
        which has no budget, stands in every column.
    heads : mapping
        What stands over each column, by what `column` holds.
    texts : DataFrame
        [cells, shown].

    Raises
    ------
    UserError
        If two cells have one place.
    """
    known = texts.to_numpy()
    place: dict[tuple, Sequence[str]] = {}
    for where, value, shown in zip(cells[row], cells[column], known, strict=True):
        for each in heads if pd.isna(value) else [value]:
            if (where, each) in place:
                raise UserError(
                    f"{', '.join(filter(None, where))} at {column}={heads[each]}: there are two "
                    "such cells; leave one out, as by --models or --methods"
                )
            place[where, each] = shown
    empty = [""] * texts.shape[1]
    lines = [
        [*where, *(text for each in heads for text in place.get((where, each), empty))]
        for where in dict.fromkeys(cells[row])
    ]
    columns = [(name, "") for name in names]
    columns += [(head, SHOWN.get(name, name)) for head in heads.values() for name in texts]
    return pd.DataFrame(lines, columns=pd.MultiIndex.from_tuples(columns), dtype=object)


def score_tables(frame: pd.DataFrame, chance: Chance) -> Iterator[tuple[str, Table]]:
    """Scores of one model, a table a task: by method and budget, the largest budget first.

    Parameters
    ----------
    frame : DataFrame
        One model's cells, as `sparsemm_eval.report.results.load` gives them.
    chance : mapping
        Best constant answer and its score on the task's own scale, by task, where it is known.

    Yields
    ------
    tuple of str and Table
        Benchmark, metric and chance in words, and the table.
    """
    for task, cells in frame.groupby("task", sort=False):
        first = cells.iloc[0]
        title = f"{first['benchmark']}: {first['metric_label']}"
        if task in chance:
            answer, score = chance[task]
            score /= top_score(task, first["metric"], None)
            title += f" (chance {score:.3f}, answering “{answer}”)"
        ordered = in_order(cells, ("method", "label"))
        heads = {budget: budget_text(budget) for budget in distinct(cells, "budget")}
        rows = [(label,) for label in ordered["label"]]
        yield title, _scores(ordered.assign(row=rows), "method", "budget", heads)


def overview_table(frame: pd.DataFrame, budget: int, chance: Chance) -> Table:
    """One row a benchmark: all methods at one budget, beside full KV and chance.

    Parameters
    ----------
    frame : DataFrame
        One model's cells, as `sparsemm_eval.report.results.load` gives them.
    budget : int
        Which cells are shown.
    chance : mapping
        Best constant answer and its score on the task's own scale, by task.
    """
    cells = frame[frame["budget"].isna() | frame["budget"].eq(budget)]
    heads = {label: label for label in (*labels_in_order(cells), "chance")}
    constant = cells.drop_duplicates("task").assign(label="chance")
    constant["score"] = [
        chance[task][1] / top_score(task, metric, None)
        for task, metric in zip(constant["task"], constant["metric"], strict=True)
    ]
    both = pd.concat([cells, constant], ignore_index=True)
    titles = both["benchmark"] + " (" + both["metric_label"] + ")"
    rows = [(title,) for title in titles]
    return _scores(both.assign(row=rows), f"budget {budget}", "label", heads)


def _scores(cells: pd.DataFrame, name: str, column: str, heads: Mapping[Hashable, str]) -> Table:
    texts = cell_texts(with_scale(cells, None, None, None), ("score",), plain=True)
    texts["score"] += cells["failed"].gt(0).map({True: MISSING, False: ""})
    return Table(side_by_side(cells, [name], "row", column, heads, texts))


def kept_table(frame: pd.DataFrame) -> Table:
    """One row a cell: nominal budget, what was really kept, and the score."""
    kibibytes = frame.assign(kept_kv_kib=frame["kept_kv_bytes"] / 1024)
    columns = {
        "kept tokens/head": ("kept_tokens_per_head", ".1f"),
        "KV KiB/sample": ("kept_kv_kib", ".1f"),
        "score": ("score", ".4f"),
        "n": ("samples", ".0f"),
    }
    return _listed(kibibytes, columns)


def missing_line(frame: pd.DataFrame) -> str:
    """What a table's mark means: which of its cells lack how many samples; "" if none does.

    Parameters
    ----------
    frame : DataFrame
        One model's cells on one task.
    """
    short = in_order(frame[frame["failed"].gt(0)], ("method", "label", "budget"))
    if short.empty:
        return ""
    if frame["failed"].nunique() == 1:
        count = f"{short['failed'].iloc[0]:.0f} samples"
    else:
        cells = zip(short["failed"], short["label"], short["budget"], strict=True)
        named = (f"{n:.0f} of {label} {budget_text(budget)}".rstrip() for n, label, budget in cells)
        count = f"samples ({', '.join(named)})"
    return f"{MISSING} Without {count} that failed and have no answer."


def notes_below(cells: pd.DataFrame) -> list[str]:
    """What stands below a table of one model's cells on one task, a paragraph each."""
    return [*filter(None, [missing_line(cells)]), *calibration_lines(cells)]


def missing_notes(frame: pd.DataFrame) -> list[str]:
    """As `missing_line`, a sentence each model and task that lacks samples."""
    return [
        f"{model}, {task}: {line}"
        for (model, task), cells in frame.groupby(["model", "task"], sort=False)
        if (line := missing_line(cells))
    ]


def calibration_lines(frame: pd.DataFrame) -> list[str]:
    """Which cells were calibrated on what they are scored on: a sentence each model and method.

    That is where a cell's task is one of the kinds of prompts that its method was calibrated on, or
    documents of it are scored. None where there is nothing to say.

    Parameters
    ----------
    frame : DataFrame
        Cells of any models and tasks.
    """
    if frame.empty:
        return []
    own = [
        task in (kinds or {}) or scored > 0
        for task, kinds, scored in zip(
            frame["task"], frame["calibrated"], frame["calibration_scored"], strict=True
        )
    ]
    lines = []
    for (model, label), cells in frame[own].groupby(["model", "label"], sort=False):
        alike: dict[tuple[float | None, int, str], list[str]] = {}
        for task, of_task in cells.groupby("task", sort=False):
            first = of_task.iloc[0]
            count = "all" if pd.isna(first["samples"]) else f"the {first['samples']:.0f}"
            scored = int(of_task["calibration_scored"].max())
            alike.setdefault((first["calibrated"].get(task), scored, count), []).append(task)
        whose = f"{model}: " if frame["model"].nunique() > 1 else ""
        parts = [_calibrated(tasks, *numbers) for numbers, tasks in alike.items()]
        lines.append(f"{whose}{label} was calibrated on {', '.join(parts)}.")
    return lines


def _calibrated(tasks: Sequence[str], documents: float | None, scored: int, count: str) -> str:
    """Tasks of equal numbers: kinds of so many documents, or none where they are no kinds."""
    each = " each" if len(tasks) > 1 else ""
    names = ", ".join(tasks)
    if documents is None:
        return f"{scored} of {count} documents{each} of {names} that are scored"
    among = f"{scored or 'none'} of them among {count} scored"
    return f"{names} ({documents:.0f} documents{each}, {among})"


def fidelity_table(frame: pd.DataFrame) -> Table:
    """One row a compressed cell: how near its answers are to full KV's.

    Parameters
    ----------
    frame : DataFrame
        One model's cells on one task: method, label, budget, compared, same_answer,
        first_difference, kl_full, kl_missing.
    """
    columns = {
        "same answer": ("same_answer", ".3f"),
        "first token that differs": ("first_difference", ".1f"),
        "KL (nats)": ("kl_full", ".2e"),
        "n": ("compared", ".0f"),
    }
    cells = in_order(frame[frame["budget"].notna()], ("method", "label", "budget"))
    table = _listed(cells, columns)
    known = cells["compared"] - cells["kl_missing"]
    table.text["KL (nats)"] = [
        f"{text} (n={count:.0f})" if text and missing else text
        for text, count, missing in zip(
            table.text["KL (nats)"], known, cells["kl_missing"], strict=True
        )
    ]
    return table


def _listed(cells: pd.DataFrame, columns: Mapping[str, tuple[str, str]]) -> Table:
    """One row a cell: its method, its budget, and numbers of the frame, each in its format."""
    cells = in_order(cells, ("method", "label", "budget"))
    text = {"method": cells["label"], "budget": cells["budget"].map(budget_text)}
    for head, (name, form) in columns.items():
        text[head] = ["" if pd.isna(value) else format(value, form) for value in cells[name]]
    return Table(pd.DataFrame(text, dtype=object))


def silenced_table(frame: pd.DataFrame, total: int) -> Table:
    """Score by how many heads are silenced: visual ones beside as many random others.

    Parameters
    ----------
    frame : DataFrame
        One task and metric: silenced ("none", "visual" or "random"), share, mode, heads, score.
    total : int
        Query heads of the model.
    """
    whole = frame.loc[frame["silenced"] == "none", "score"].iloc[0]
    rows: list[dict[str, Any]] = [
        {"mode": "", "share": "none", "heads": f"0 of {total}", "visual": whole}
    ]
    masked = frame[frame["silenced"] != "none"]
    for (mode, share), cells in masked.groupby(["mode", "share"], sort=False):
        random = cells.loc[cells["silenced"] == "random", "score"]
        rows.append(
            {
                "mode": mode,
                "share": f"{share:.3g}",
                "heads": f"{cells['heads'].iloc[0]} of {total}",
                "visual": cells.loc[cells["silenced"] == "visual", "score"].iloc[0],
                "random, mean": random.mean(),
                "lowest": random.min(),
                "highest": random.max(),
            }
        )

    def text(value: Any) -> str:
        return value if isinstance(value, str) else "" if pd.isna(value) else f"{value:.3f}"

    return Table(pd.DataFrame(rows).map(text))


def empty_line(frame: pd.DataFrame) -> str | None:
    """Say of which cells how many answers are empty, in one line; None if there are none.

    An empty answer is scored as it is. Many of them are seldom what a method does to a model.

    Parameters
    ----------
    frame : DataFrame
        One row a cell.
    """
    cells = frame[frame["empty"].gt(0)] if len(frame) else frame
    if cells.empty:
        return None
    named = [
        f"{row.empty:.0f} of {row.samples * row.seeds:.0f} of "
        f"{row.label} {budget_text(row.budget)}".rstrip()
        + f" on {row.task} ({row.model})"
        for row in cells.itertuples()
    ]
    more = f"; and of {len(named) - _NAMED} more cells" if len(named) > _NAMED else ""
    return f"empty answers: {'; '.join(named[:_NAMED])}{more}"
