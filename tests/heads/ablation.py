"""What head scores without labels depend on: prompts, query or KV heads; beside visual scores.

``python tests/heads/ablation.py --out results/sensitivity/ablation.json``

The parts that a grid cannot make: `tasks/grids/ablation_sensitivity.yaml` has the others.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from tqdm import tqdm

from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.errors import check_choice
from sparsemm_eval.heads.calibration import CalibrationPrompt, calibration_prompts
from sparsemm_eval.heads.sensitivity import measure
from sparsemm_eval.methods import HeadScores, Sensitivity
from sparsemm_eval.methods.sensitivity import Kind
from sparsemm_eval.paths import write_whole
from sparsemm_eval.report.provenance import provenance
from sparsemm_eval.report.results import load
from sparsemm_eval.tiny import EMBEDDED, embedded_checkpoints

# In such an order that the first few are of every sort: reading, captions, scenes.
KINDS = (
    "docvqa_mini", "textcaps_mini", "gqa_mini", "ocrbench_mini", "vqav2_mini", "textvqa_mini",
    "chartqa_mini",
)  # fmt: skip
WINDOW, BUDGETS = 8, (64, 32, 16)
# Prompts that query heads are starved on, as there are more of them.
TWIN_PROMPTS = 8 * len(KINDS)
SWEEP = (sys.executable, "-c", "from sparsemm_eval.cli import app; app()", "sweep")


def ablation(model: str, counts: Sequence[int], samples: int, folder: Path) -> dict[str, Any]:
    """Everything of one embedded model.

    Parameters
    ----------
    model : str
        Its name.
    counts : sequence of int
        How many calibration prompts, of all kinds together and in turns.
    samples : int
        Scored of each benchmark.
    folder : Path
        For records, score files and the sweep; what is there is not computed again.

    Returns
    -------
    dict
        By number of prompts: agreement of two disjoint sets of so many, which is the share of a
        budget that they give to the same heads, and of the first with all of the second. Spearman
        of KV heads' visual scores and sensitivity. Query heads against KV heads. And by choice of
        head scores the share of full KV's score that `sparsemm` keeps, mean over the benchmarks.
    """
    checkpoint = Checkpoint(f"{EMBEDDED}{model}", dtype="float32")
    shape = checkpoint.shape
    each = -(-max(counts) // len(KINDS))
    prompts = list(calibration_prompts(checkpoint, ",".join(KINDS), 2 * each))
    records = folder / f"{model}.records.jsonl"
    lost = [
        (prompt, divergence(checkpoint, prompt, records)) for prompt in tqdm(prompts, desc=model)
    ]
    # Whole turns of all kinds go to either set by turns.
    turns = np.arange(len(lost)) // len(KINDS)
    sets = [[lost[place] for place in np.flatnonzero(turns % 2 == half)] for half in (0, 1)]
    one, other = (
        {count: sensitivity_of(checkpoint, of_set[:count]) for count in counts} for of_set in sets
    )
    whole = other[max(counts)].share()
    visual = checkpoint.head_scores("visual").per_kv_head(shape.kv_heads)
    every = sensitivity_of(checkpoint, lost)
    found: dict[str, Any] = {
        "prompts": {
            str(count): {
                "kinds": len(one[count].kinds),
                "two_sets": overlap(one[count].share(), other[count].share()),
                "with_all_of_the_other": overlap(one[count].share(), whole),
            }
            for count in counts
        },
        "visual": {
            "spearman": {
                "all kinds": rank_correlation(visual, every.share()),
                **{
                    kind: rank_correlation(visual, every.share(weights={kind: 1.0}))
                    for kind in every.kinds
                },
            },
            "overlap": overlap(visual / visual.sum(), every.share()),
        },
    }
    names = {"visual": "visual"}
    for count in counts:
        names[f"{count} prompts"] = str(folder / f"{model}-{count}.json")
        one[count].write(Path(names[f"{count} prompts"]))
    if shape.group_size > 1:
        twin = Checkpoint(make_twin(checkpoint.folder, folder / f"{model}-twin"), dtype="float32")
        same = prompts[:TWIN_PROMPTS]
        records = folder / f"{model}-twin.records.jsonl"
        by_head = [
            (prompt, divergence(twin, prompt, records)) for prompt in tqdm(same, desc="twin")
        ]
        of_query, of_kv = (
            sensitivity_of(twin, by_head),
            sensitivity_of(checkpoint, lost[: len(same)]),
        )
        summed = of_query.share().reshape(*of_kv.share().shape, -1).sum(-1)
        found["query_heads"] = {
            "spearman": rank_correlation(summed, of_kv.share()),
            "overlap": overlap(summed, of_kv.share()),
            # A head alone may be stood in for by the other heads of its group.
            "lost_nats": {
                kind: {
                    "kv_heads": float(of_kv.kinds[kind].divergence.sum()),
                    "query_heads": float(of_query.kinds[kind].divergence.sum()),
                }
                for kind in of_kv.kinds
            },
        }
        names["KV heads"] = str(folder / f"{model}-kv.json")
        of_kv.write(Path(names["KV heads"]))
        names["query heads"] = str(folder / f"{model}-query.json")
        HeadScores(of_query.share()).write(names["query heads"])
    found["kept"] = kept(model, names, samples, folder)
    return found


def divergence(checkpoint: Checkpoint, prompt: CalibrationPrompt, records: Path) -> np.ndarray:
    """What starving each KV head loses of one prompt, [L, H] in nats."""
    found = measure(checkpoint, [prompt], 1, window=WINDOW, budgets=(), records=records)
    return found.kinds[prompt.kind].divergence


def sensitivity_of(
    checkpoint: Checkpoint, lost: Sequence[tuple[CalibrationPrompt, np.ndarray]]
) -> Sensitivity:
    """A sensitivity without tables, from what each prompt loses."""
    by_kind: dict[str, list[tuple[CalibrationPrompt, np.ndarray]]] = {}
    for prompt, each in lost:
        by_kind.setdefault(prompt.kind, []).append((prompt, each))
    kinds = {
        kind: Kind(
            np.mean([each for _, each in pairs], 0),
            len(pairs),
            0,
            tuple(prompt.digest for prompt, _ in pairs),
        )
        for kind, pairs in by_kind.items()
    }
    rules = np.zeros((checkpoint.shape.layers, checkpoint.shape.kv_heads), dtype=np.int64)
    return Sensitivity(checkpoint.shape, WINDOW, kinds, rules)


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Share of a budget that two sets of shares give to the same heads."""
    return float(1 - np.abs(one - other).sum() / 2)


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's, over heads."""
    return float(spearmanr(one.ravel(), other.ravel()).statistic)


def make_twin(folder: Path, twin: Path) -> Path:
    """Write a checkpoint that computes the same, where each query head has a KV head of its own."""
    shutil.copytree(folder, twin, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = config["text_config"]
    heads, group = text["num_key_value_heads"], text["num_attention_heads"]
    group //= heads
    text["num_key_value_heads"] *= group
    (twin / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if ".k_proj." in name or ".v_proj." in name:
            by_head = tensor.unflatten(0, (heads, -1))
            tensors[name] = by_head.repeat_interleave(group, 0).flatten(0, 1).contiguous()
    save_file(tensors, twin / "model.safetensors", {"format": "pt"})
    for scores in twin.glob("head_scores*"):
        scores.unlink()
    return twin


def kept(model: str, names: dict[str, str], samples: int, folder: Path) -> dict[str, Any]:
    """Share of full KV's score kept by choice of head scores, and by budget; and each score."""
    grid = {
        "models": [{
            "name": model, "pretrained": f"{EMBEDDED}{model}", "settings": {"dtype": "float32"}
        }],
        "tasks": [*KINDS], "methods": ["fullkv", "sparsemm"], "budgets": [*BUDGETS],
        "window": WINDOW, "allocation": "exact", "head_scores": [*names.values()],
        "samples": samples, "batch_size": 25,
    }  # fmt: skip
    path = folder / f"{model}.yaml"
    path.write_text(yaml.safe_dump(grid), encoding="utf-8")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    out = folder / f"{model}-sweep"
    subprocess.run(
        [*SWEEP, str(path), "-o", str(out)],
        env=environment, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    cells = load([out]).cells
    cells = cells.assign(head_scores=[one.get("head_scores") for one in cells["settings"]])
    full = cells[cells["method"] == "fullkv"].set_index("task")["score"]
    found: dict[str, Any] = {"samples": int(cells["samples"].max()), "share": {}, "scores": {}}
    for name, value in names.items():
        own = cells[cells["head_scores"] == value]
        scores = own.pivot(index="task", columns="budget", values="score")[[*BUDGETS]]
        share = scores.div(full, axis=0).mean()
        found["share"][name] = {str(budget): float(share[budget]) for budget in BUDGETS}
        found["scores"][name] = {
            task: {str(budget): float(row[budget]) for budget in BUDGETS}
            for task, row in scores.iterrows()
        }
    found["full"] = {task: float(score) for task, score in full.items()}
    return found


def tables(models: dict[str, Any]) -> str:
    """All numbers as Markdown."""
    parts = ["# What head scores without labels depend on"]
    for name, found in models.items():
        rows = pd.DataFrame(found["prompts"]).T.rename_axis("prompts")
        share = pd.DataFrame(found["kept"]["share"]).T.rename_axis("head scores")
        share = share.rename(columns=lambda budget: f"kept at {budget}")
        spearman = pd.Series(found["visual"]["spearman"], name="Spearman").rename_axis("prompts")
        parts += [
            f"## {name}",
            "Share of a budget that is given to the same heads: by two disjoint sets of so many "
            "prompts, and by the first set and all prompts of the second.",
            rows.to_markdown(floatfmt=("", ".0f", ".3f", ".3f")),
            f"Share of full KV's score that sparsemm keeps with exact allocation, mean over "
            f"{len(found['kept']['full'])} miniatures of {found['kept']['samples']} samples.",
            share.to_markdown(floatfmt=".3f"),
            "Visual scores of KV heads against the root share of what each kind loses.",
            spearman.to_frame().to_markdown(floatfmt=".2f"),
            f"Both give {found['visual']['overlap']:.0%} of a budget to the same heads.",
        ]
        if "query_heads" in found:
            query = found["query_heads"]
            parts += [
                f"Query heads starved one by one, and summed over each KV head, against KV heads: "
                f"Spearman {query['spearman']:.2f}, {query['overlap']:.0%} of a budget to the same "
                "heads. What is lost, summed over heads:",
                pd.DataFrame(query["lost_nats"]).T.rename_axis("nats").to_markdown(floatfmt=".3f"),
            ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write the outcome as JSON, and as Markdown beside it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=[*embedded_checkpoints()])
    parser.add_argument("--counts", nargs="+", type=int, default=[4, 8, 16, 32, 64, 128])
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--folder", type=Path, help="where a killed run goes on")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    for model in given.models:
        check_choice("models", model, [*embedded_checkpoints()])
    counts = sorted(set(given.counts))
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        models = {model: ablation(model, counts, given.samples, folder) for model in given.models}
    words = [word for word in sys.argv if word != str(given.folder)]
    command = shlex.join(["python", *(word for word in words if word != "--folder")])
    content = {**provenance(command), "window": WINDOW, "kinds": [*KINDS], "models": models}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(given.out, json.dumps(content, indent=1) + "\n")
    write_whole(given.out.with_suffix(".md"), tables(models))
    print(tables(models))


if __name__ == "__main__":
    main()
