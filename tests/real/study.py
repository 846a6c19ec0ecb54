"""What methods keep on real weights: one JSON file and one table of sweeps over lists of facts.

``python tests/real/study.py results/sweeps/smollm2_36 results/sweeps/smollm2_60 -o results/real
--scores results/smollm2/head_scores.sensitivity.provenance.json``
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from scipy.stats import binomtest

from sparsemm_eval.paths import write_whole
from sparsemm_eval.report.provenance import provenance
from sparsemm_eval.stored import read_json

KEPT = (
    "task", "method", "label", "budget", "samples", "score", "same_answer", "compared",
    "first_difference", "kl_full", "prompt_tokens", "kept_tokens_per_head", "kept_kv_bytes",
)  # fmt: skip
# Not its seconds: answers that were there already took none.
MADE = ("commit", "date", "versions", "hardware")
# Of how the scores were made; not where their data lay.
CALIBRATION = (
    "checkpoint_hash", "scores_sha256", "data_sha256", "window", "max_new_tokens", "budgets",
    "kinds", "commit", "date", "versions", "hardware",
)  # fmt: skip
# Both from one file: divergences as head scores, and tables of tokens with rules.
SENSITIVITY = {"sparsemm": "sensitivity, scores", "sensitivity": "sensitivity, joint"}


def read(run: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A sweep's cells with Wilson's 95% intervals, and how it was made."""
    summary = read_json(run / "summary.json")
    cells = []
    for cell in summary["cells"]:
        about = {name: cell.get(name) for name in KEPT}
        about["label"] = SENSITIVITY.get(cell["method"], cell["label"])
        for share, count in (("score", "samples"), ("same_answer", "compared")):
            about[f"{share}_interval"] = _interval(cell[share], int(cell[count]))
        about["share_kept"] = cell["kept_tokens_per_head"] / cell["prompt_tokens"]
        cells.append(about)
    return cells, {name: summary[name] for name in MADE}


def table(cells: list[dict[str, Any]]) -> str:
    """Markdown: score and share of answers equal to full KV's, by task, method and share kept."""
    parts = []
    for task, frame in pd.DataFrame(cells).groupby("task", sort=False):
        full = frame[frame["method"] == "fullkv"].iloc[0]
        parts.append(
            f"## {task}\n\n{int(full['samples'])} lists of {full['prompt_tokens']:.0f} tokens; "
            f"full KV finds {_text(full['score'], full['score_interval'])} of the values."
        )
        for share, title in (
            ("score", "Value asked for, to the digit"),
            ("same_answer", "Answer equal to full KV's, to the token"),
        ):
            rest = frame[frame["method"] != "fullkv"].copy()
            rest["text"] = [
                _text(value, interval)
                for value, interval in zip(rest[share], rest[f"{share}_interval"], strict=True)
            ]
            rest["kept"] = rest["share_kept"].map("{:.2f}".format)
            wide = rest.pivot(index="label", columns="kept", values="text")
            wide = wide.loc[rest["label"].unique(), sorted(wide.columns, reverse=True)]
            parts.append(
                f"{title}, by the share of the prompt that is kept:\n\n{wide.to_markdown()}"
            )
    return "# Facts on real weights\n\n" + "\n\n".join(parts) + "\n"


def _interval(share: float, of: int) -> list[float]:
    return [*binomtest(round(share * of), of).proportion_ci(method="wilson")]


def _text(value: float, interval: list[float]) -> str:
    return f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="Folders of sweeps.")
    parser.add_argument("-o", "--out", type=Path, required=True, help="Folder of both files.")
    parser.add_argument("--scores", type=Path, help="Provenance file of the sensitivity's.")
    given = parser.parse_args()
    scores = read_json(given.scores) if given.scores else None
    read_runs = {run.name: read(run) for run in given.runs}
    cells = [cell for of_run, _ in read_runs.values() for cell in of_run]
    about = {
        **provenance(shlex.join(["python", *sys.argv])),
        "runs": {name: made for name, (_, made) in read_runs.items()},
        "calibration": scores and {name: scores[name] for name in CALIBRATION},
        "cells": cells,
    }
    write_whole(given.out / "facts.json", json.dumps(about, indent=1) + "\n")
    write_whole(given.out / "facts.md", table(cells))


if __name__ == "__main__":
    main()
