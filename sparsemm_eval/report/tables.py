"""Tables in the paper's shape."""

from collections.abc import Iterator, Mapping

import pandas as pd

from sparsemm_eval.report.names import METHOD_NAMES, top_score


def method_order(methods: list[str]) -> list[str]:
    """Methods in the paper's order, others behind them."""
    known = list(METHOD_NAMES)
    return sorted(methods, key=lambda name: (known.index(name) if name in known else 99, name))


def score_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Score by method and budget, largest budget first; full KV, which has none, in every column.

    Parameters
    ----------
    frame : DataFrame
        Of one task and metric, with columns method, budget and score.
    """
    budgeted = frame[frame["budget"].notna()]
    table = budgeted.pivot_table(index="method", columns="budget", values="score", sort=False)
    table = table[sorted(table.columns, reverse=True)]
    for name, cells in frame[frame["budget"].isna()].groupby("method", sort=False):
        table.loc[name] = cells["score"].iloc[0]
    table = table.loc[method_order(list(table.index))]
    table.index = [METHOD_NAMES.get(name, name) for name in table.index]
    table.columns = [str(int(budget)) for budget in table.columns]
    return table.rename_axis("method")


def overview_table(
    frame: pd.DataFrame, budget: int, chance: Mapping[str, tuple[str, float]]
) -> pd.DataFrame:
    """One row a benchmark: all methods at one budget, beside full KV and chance.

    Parameters
    ----------
    frame : DataFrame
        Of one model: `sparsemm_eval.report.results.load`'s cells.
    budget : int
        Which cells are shown.
    chance : mapping
        Best constant answer and its score on the task's own scale, by task.
    """
    shown = frame[frame["budget"].isna() | frame["budget"].eq(budget)]
    table = shown.pivot_table(index="task", columns="method", values="score", sort=False)
    table = table[method_order(list(table.columns))]
    of_task = shown.groupby("task").first()
    table["chance"] = [
        chance[task][1] / top_score(task, of_task.at[task, "metric"], None) for task in table.index
    ]
    table.columns = [METHOD_NAMES.get(name, name) for name in table.columns]
    table.index = [
        f"{of_task.at[task, 'benchmark']} ({of_task.at[task, 'metric_label']})"
        for task in table.index
    ]
    return table.rename_axis(f"budget {budget}")


def score_tables(
    frame: pd.DataFrame, chance: Mapping[str, tuple[str, float]]
) -> Iterator[tuple[str, pd.DataFrame]]:
    """One titled `score_table` a task.

    Parameters
    ----------
    frame : DataFrame
        Of one model: `sparsemm_eval.report.results.load`'s cells.
    chance : mapping
        Best constant answer and its score on the task's own scale, by task, where it is known.

    Yields
    ------
    tuple of str and DataFrame
        Benchmark, metric and chance in words, and the table.
    """
    for task, cells in frame.groupby("task", sort=False):
        first = cells.iloc[0]
        title = f"{first['benchmark']}: {first['metric_label']}"
        if task in chance:
            answer, score = chance[task]
            score /= top_score(task, first["metric"], None)
            title += f" (chance {score:.3f}, answering “{answer}”)"
        yield title, score_table(cells)


def kept_table(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a cell: nominal budget, what was really kept, and the score."""
    ordered = _ordered(frame)
    return pd.DataFrame(
        {
            "method": [METHOD_NAMES.get(name, name) for name in ordered["method"]],
            "budget": ["" if pd.isna(b) else str(int(b)) for b in ordered["budget"]],
            "kept tokens/head": ordered["kept_tokens_per_head"].map("{:.1f}".format).to_list(),
            "KV KiB/sample": (ordered["kept_kv_bytes"] / 1024).map("{:.1f}".format).to_list(),
            "score": ordered["score"].map("{:.4f}".format).to_list(),
            "n": ordered["samples"].map("{:.0f}".format).to_list(),
        }
    )


def fidelity_table(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a compressed cell: how near its answers are to full KV's.

    Parameters
    ----------
    frame : DataFrame
        Of one model and task: method, budget, compared, same_answer, first_difference, kl_full.
    """
    ordered = _ordered(frame[frame["budget"].notna()])
    columns = {"same_answer": ".3f", "first_difference": ".1f", "kl_full": ".2e"}
    shown = {
        name: ["" if pd.isna(value) else f"{value:{form}}" for value in ordered[name]]
        for name, form in columns.items()
    }
    return pd.DataFrame(
        {
            "method": [METHOD_NAMES.get(name, name) for name in ordered["method"]],
            "budget": [str(int(budget)) for budget in ordered["budget"]],
            "same answer": shown["same_answer"],
            "first token that differs": shown["first_difference"],
            "KL (nats)": shown["kl_full"],
            "n": ordered["compared"].map("{:.0f}".format).to_list(),
        }
    )


def silenced_table(frame: pd.DataFrame, total: int) -> pd.DataFrame:
    """Score by how many heads are silenced: visual ones beside as many random others.

    Parameters
    ----------
    frame : DataFrame
        Of one task and metric: silenced ("none", "visual" or "random"), share, mode, heads, score.
    total : int
        Query heads of the model.
    """
    whole = frame.loc[frame["silenced"] == "none", "score"].iloc[0]
    rows = [{"mode": "", "share": "none", "heads": f"0 of {total}", "visual": whole}]
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
    table = pd.DataFrame(rows)
    for name in ("visual", "random, mean", "lowest", "highest"):
        table[name] = ["" if pd.isna(score) else f"{score:.3f}" for score in table[name]]
    return table


def _ordered(frame: pd.DataFrame) -> pd.DataFrame:
    """Methods in the paper's order, largest budget first."""
    order = {name: place for place, name in enumerate(method_order(list(set(frame["method"]))))}
    return frame.assign(place=frame["method"].map(order)).sort_values(
        ["place", "budget"], ascending=[True, False]
    )


def to_markdown(table: pd.DataFrame, digits: int = 3) -> str:
    """A table as GitHub Markdown."""
    return table.to_markdown(
        floatfmt=f".{digits}f",
        index=table.index.name is not None,
        colalign=["left"] + ["right"] * (table.shape[1] - (table.index.name is None)),
        disable_numparse=table.index.name is None,
    )
