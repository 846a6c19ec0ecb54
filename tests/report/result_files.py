"""Results and samples files as lmms-eval writes them, made up."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

QUESTIONS = ("What is the total?", "Which year?", "Who signed?", "Which page?")
TARGETS = ("12.50", "1998", "A. Meyer", "7")


def write_cell(
    folder: Path,
    method: str,
    budget: int | None,
    answers: Sequence[str],
    task: str = "docvqa_val",
    metric: str = "anls",
    model: str = "small",
    entry: Mapping[str, Any] | None = None,
    samples_file: bool = True,
    **settings: Any,
) -> Path:
    """Write a cell that answered `QUESTIONS`; an answer scores 1 if it is the target, else 0."""
    given = {"pretrained": f"some/{model}", "method": method} | settings
    if budget is not None:
        given["budget"] = budget
    scores = [float(said == wanted) for said, wanted in zip(answers, TARGETS, strict=False)]
    name = "-".join(map(str, [task, model, method, budget, *settings.values()]))
    content = {
        "results": {task: {f"{metric},none": sum(scores) / len(scores)}},
        "config": {"model_args": ",".join(f"{key}={value}" for key, value in given.items())},
        "n-samples": {task: {"original": len(QUESTIONS), "effective": len(scores)}},
        "throughput": {"avg_kept_tokens_per_head": budget or 300, "avg_kept_kv_bytes": 2**20},
        "git_hash": "abc1234",
        "date": "20260102_030405",
    }
    if entry is not None:
        content["sparsemm_eval"] = dict(entry)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_results.json"
    path.write_text(json.dumps(content))
    if samples_file:
        lines = [
            {"doc_id": place, "input": question, "target": f"['{wanted}']",
             "filtered_resps": said, metric: score}
            for place, (question, wanted, said, score) in enumerate(
                zip(QUESTIONS, TARGETS, answers, scores, strict=False)
            )
        ]  # fmt: skip
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}_samples_{task}.jsonl").write_text(text)
    return path


def write_grid(folder: Path) -> None:
    """Two models on two benchmarks: full KV, and two methods at two budgets, some answers wrong."""
    for model in ("large", "small"):
        for task, metric in (("docvqa_val", "anls"), ("textvqa_val", "exact_match")):
            where = {"task": task, "metric": metric, "model": model}
            write_cell(folder, "fullkv", None, TARGETS, **where)
            for budget, right in ((256, 3), (64, 1)):
                for method, more in (("sparsemm", 1), ("snapkv", 0)):
                    answers = [*TARGETS[: right + more], *["no"] * (len(TARGETS) - right - more)]
                    write_cell(folder, method, budget, answers, **where)
