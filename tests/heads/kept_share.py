"""How much of full KV's score methods keep, mean over benchmarks, beside one of them.

python tests/heads/kept_share.py --results results/demo_exact --out results/sensitivity/demo_exact

MMBench is left out: its one letter comes out of the prefill, which no method touches. Intervals are
of a bootstrap over the documents of each benchmark, the same documents for both methods.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from sparsemm_eval.paths import write_whole
from sparsemm_eval.report.names import METHOD_NAMES, find_benchmark, in_order
from sparsemm_eval.report.provenance import provenance
from sparsemm_eval.report.ranking import kept_shares
from sparsemm_eval.report.results import load
from sparsemm_eval.report.samples import score_samples

LEFT_OUT = "mmbench"
DRAWS, SEED = 10_000, 0


def compare(cells: pd.DataFrame, samples: pd.DataFrame, method: str) -> list[dict]:
    """A row a method and budget of one model."""
    kept = kept_shares(cells, samples, DRAWS, SEED)
    (own,) = cells[cells.method == method]["label"].unique()
    ours = {row.budget: row.Index for row in kept.rows.itertuples() if row.label == own}
    rows = []
    for row in kept.rows.itertuples():
        found = {"method": row.label, "budget": int(row.budget), "kept": float(row.share)}
        found["interval"] = interval(kept.draws[row.Index])
        if row.label != own:
            best = ours[row.budget]
            found["ahead"] = float(kept.rows.at[best, "share"] - row.share)
            found["ahead_interval"] = interval(kept.draws[best] - kept.draws[row.Index])
        here = cells[cells["label"].eq(row.label) & cells["budget"].eq(row.budget)]
        scores = dict(zip(here["task"], here["score"].astype(float), strict=True))
        rows.append({**found, "scores": scores})
    return sorted(rows, key=lambda row: (-row["budget"], -row["kept"]))


def interval(draws: np.ndarray) -> list[float]:
    """The middle 95%."""
    return [round(float(value), 4) for value in np.quantile(draws, (0.025, 0.975))]


def markdown(models: Mapping[str, list[dict]], method: str) -> str:
    """A table a model."""
    parts = []
    for model, rows in models.items():
        tasks = list(rows[0]["scores"])
        head = [f"{METHOD_NAMES[method]} ahead by", *map(_title, tasks)]
        parts += [
            f"## {model}\n",
            f"| budget | method | kept of full KV | {' | '.join(head)} |",
            f"| ---: | --- | --- | {' | '.join(['---'] + ['---:'] * len(tasks))} |",
        ]
        for row in rows:
            low, high = row["interval"]
            ahead = "-"
            if "ahead" in row:
                ahead = "{:.3f} ({:.3f} to {:.3f})".format(row["ahead"], *row["ahead_interval"])
            numbers = " | ".join(f"{row['scores'][task]:.3f}" for task in tasks)
            parts.append(
                f"| {row['budget']} | {row['method']} "
                f"| {row['kept']:.3f} ({low:.3f} to {high:.3f}) | {ahead} | {numbers} |"
            )
        parts.append("")
    return "\n".join(parts)


def _title(task: str) -> str:
    known = find_benchmark(task)
    return known.title if known else task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, nargs="+", required=True)
    parser.add_argument("--method", default="sensitivity")
    parser.add_argument("--out", type=Path, required=True, help="without .json and .md")
    given = parser.parse_args()
    results = load(given.results)
    cells = in_order(results.cells[~results.cells["task"].str.startswith(LEFT_OUT)])
    samples = score_samples(cells).frame
    models = {
        model: compare(some, samples, given.method)
        for model, some in cells.groupby("model", sort=False)
    }
    command = shlex.join(["python", "tests/heads/kept_share.py", *sys.argv[1:]])
    record = {"draws": DRAWS, "seed": SEED, "models": models, **provenance(command)}
    write_whole(given.out.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    write_whole(given.out.with_suffix(".md"), markdown(models, given.method))
    print(markdown(models, given.method))


if __name__ == "__main__":
    main()
