"""What a sensitivity costs: beside one answer on full KV, measured; on a 7B model, calculated.

python tests/heads/cost.py --out results/sensitivity/cost.json

A prompt's divergences (all heads one by one, no layer skipped) beside the same prompt answered by
the engine on full KV, prompt by prompt in one run; memory beside what the process holds with the
model and that answer. The calculation counts multiplications and additions.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import torch

from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.decode import decode
from sparsemm_eval.engine.requests import model_inputs
from sparsemm_eval.heads.calibration import calibration_prompts
from sparsemm_eval.heads.starved import AnsweredPrompt
from sparsemm_eval.methods import make_method
from sparsemm_eval.methods.sensitivity import NEWEST, RULES
from sparsemm_eval.paths import write_whole
from sparsemm_eval.report.provenance import provenance

TASKS = "docvqa_mini,textcaps_mini,gqa_mini"
WINDOW = 8
# Vicuna-7B in LLaVA-NeXT; an H100's half precision and float32 products at rates that large ones
# reach, operations a second.
LAYERS, HEADS, DIM, WEIGHTS, PROMPT, ANSWER = 32, 32, 128, 6.6e9, 2_900, 16
HALF, FLOAT = 4e14, 4e13


def measured(name: str, count: int) -> dict[str, float]:
    """Seconds and bytes of one embedded model, medians over prompts."""
    checkpoint = Checkpoint(f"embedded:{name}", dtype="float32")
    model, shape = checkpoint.model, checkpoint.shape
    full = make_method("fullkv", shape)
    answered, starved, rows = [], [], 0
    prompts = list(calibration_prompts(checkpoint, TASKS, count + 1))
    held = peak = 0
    for number, prompt in enumerate(prompts):
        asked = checkpoint.processor, checkpoint.family, [prompt.prompt], [prompt.visuals]
        inputs = model_inputs(*asked)
        begun = time.perf_counter()
        decode(model, inputs, [full], prompt.options)
        between = time.perf_counter()
        held = max(held, psutil.Process().memory_info().rss)
        one = AnsweredPrompt(model, inputs, WINDOW, prompt.options)
        heads = list(np.ndindex(shape.layers, shape.kv_heads))
        counts = np.full((len(heads), shape.layers, shape.kv_heads), one.n)
        for row, head in enumerate(heads):
            counts[(row, *head)] = WINDOW
        one.divergence(np.full_like(counts, NEWEST), counts)
        ended = time.perf_counter()
        peak = max(peak, psutil.Process().memory_info().rss)
        rows = len(heads)
        if number >= 3:  # the first of each kind warm up
            answered.append(between - begun)
            starved.append(ended - between)
    return {
        "prompts": len(answered),
        "rows": rows,
        "seconds_full_kv_answer": round(statistics.median(answered), 4),
        "seconds_all_heads": round(statistics.median(starved), 4),
        "ratio": round(statistics.median(starved) / statistics.median(answered), 2),
        "memory_ratio": round(peak / held, 3),
    }


def calculated(rows: int) -> dict[str, float]:
    """Of one prompt of the 7B model: operations and seconds for so many rows."""
    tokens = rows * (ANSWER - 1)
    weights = 2 * WEIGHTS * tokens
    attention = 4 * DIM * (PROMPT + ANSWER) * LAYERS * HEADS * tokens
    return {
        "rows": rows,
        "operations_weights": weights,
        "operations_attention": attention,
        "seconds": round(weights / HALF + attention / FLOAT, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=8, help="of each of three kinds")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    heads = LAYERS * HEADS
    record = {
        "measured": {name: measured(name, given.prompts) for name in ("qwen2vl", "llava_next")},
        "calculated_7b_h100": {
            "prompt_tokens": PROMPT,
            "answer_tokens": ANSWER,
            "rates": {"half": HALF, "float32": FLOAT},
            "divergences": calculated(LAYERS + heads),
            "round_of_exchange": calculated(1 + 2 * heads),
            "round_of_rules_all_heads": calculated(1 + (len(RULES) - 1) * heads),
        },
        **provenance(shlex.join(["python", "tests/heads/cost.py", *sys.argv[1:]])),
    }
    write_whole(given.out, json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
