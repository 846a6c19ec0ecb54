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
from sparsemm_eval.report.results import load
from sparsemm_eval.report.samples import score_samples

LEFT_OUT = "mmbench"
DRAWS, SEED = 10_000, 0


def shares(of_task: Mapping[str, np.ndarray], drawn: Mapping[str, np.ndarray]) -> np.ndarray:
    """Mean over tasks of score / full KV's score, [draws]; full KV is the last of two."""
    kept = []
    for task, scores in of_task.items():
        means = scores[:, drawn[task]].mean(-1)  # [2, draws]
        kept.append(means[0] / means[1])
    return np.mean(kept, 0)


def compare(cells: pd.DataFrame, samples: pd.DataFrame, method: str) -> list[dict]:
    """A row a method and budget of one model."""
    scores = {
        place: of_cell.set_index("doc_id")["score"].sort_index()
        for place, of_cell in samples.groupby("cell")
    }
    full = {row.task: scores[row.Index] for row in cells[cells.method == "fullkv"].itertuples()}
    rng = np.random.default_rng(SEED)
    everything = {task: np.arange(len(score))[None] for task, score in full.items()}
    drawn = {task: rng.integers(0, len(score), (DRAWS, len(score))) for task, score in full.items()}
    found = {}
    for (name, budget), some in cells[cells.method != "fullkv"].groupby(["label", "budget"]):
        of_task = {
            row.task: np.stack([scores[row.Index], full[row.task]]) for row in some.itertuples()
        }
        found[name, int(budget)] = (
            float(shares(of_task, everything)[0]),
            shares(of_task, drawn),
            {row.task: float(row.score) for row in some.itertuples()},
        )
    rows = []
    (own,) = cells[cells.method == method]["label"].unique()
    for (name, budget), (kept, draws, by_task) in found.items():
        row = {"method": name, "budget": budget, "kept": kept, "interval": interval(draws)}
        if name != own:
            row["ahead"] = found[own, budget][0] - kept
            row["ahead_interval"] = interval(found[own, budget][1] - draws)
        rows.append({**row, "scores": by_task})
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
