"""Tables in the paper's shape."""

import pandas as pd

# The paper's names, in its order; methods of one's own follow by name.
METHOD_NAMES = {
    "fullkv": "FullKV",
    "sparsemm": "SparseMM",
    "snapkv": "SnapKV",
    "pyramidkv": "PyramidKV",
    "adakv": "AdaKV",
    "random": "Random",
    "local": "Local",
    "streaming": "StreamingLLM",
}


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
    full = frame.loc[frame["budget"].isna(), "score"]
    if len(full):
        table.loc["fullkv"] = full.iloc[0]
    table = table.loc[method_order(list(table.index))]
    table.index = [METHOD_NAMES.get(name, name) for name in table.index]
    table.columns = [str(int(budget)) for budget in table.columns]
    return table.rename_axis("method")


def kept_table(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a cell: nominal budget, what was really kept, and the score."""
    order = {name: place for place, name in enumerate(method_order(list(set(frame["method"]))))}
    ordered = frame.assign(place=frame["method"].map(order)).sort_values(
        ["place", "budget"], ascending=[True, False]
    )
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


def to_markdown(table: pd.DataFrame, digits: int = 3) -> str:
    """A table as GitHub Markdown."""
    return table.to_markdown(
        floatfmt=f".{digits}f",
        index=table.index.name is not None,
        colalign=["left"] + ["right"] * (table.shape[1] - (table.index.name is None)),
        disable_numparse=table.index.name is None,
    )
