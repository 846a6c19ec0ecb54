"""What a task is called, which of its metrics counts, and where its scale ends."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from sparsemm_eval.errors import UserError


@dataclass(frozen=True)
class Benchmark:
    """A benchmark of the paper.

    Parameters
    ----------
    title : str
        Its name.
    metric : str
        lmms-eval's name of the metric that counts.
    label : str
        The metric in prose.
    top : float
        Best score on lmms-eval's own scale; CIDEr has none and is left as it is.
    percent : bool
        Whether the paper prints its scores in percent.
    binary : bool
        Whether a sample is right or wrong and nothing between.
    """

    title: str
    metric: str
    label: str
    top: float = 1.0
    percent: bool = False
    binary: bool = False


# By the task's name without `_val`, `_mini` and the like.
BENCHMARKS = {
    "docvqa": Benchmark("DocVQA", "anls", "ANLS"),
    "ocrbench": Benchmark("OCRBench", "ocrbench_accuracy", "accuracy", binary=True),
    "textvqa": Benchmark("TextVQA", "exact_match", "VQA accuracy"),
    "chartqa": Benchmark("ChartQA", "relaxed_overall", "relaxed accuracy", binary=True),
    "textcaps": Benchmark("TextCaps", "textcaps_CIDEr", "CIDEr"),
    "mmbench": Benchmark(
        "MMBench", "gpt_eval_score", "accuracy", top=100.0, percent=True, binary=True
    ),
    "gqa": Benchmark("GQA", "exact_match", "accuracy", percent=True, binary=True),
    "vqav2": Benchmark("VQAv2", "exact_match", "VQA accuracy", percent=True),
}

# What may follow: other tasks, such as ocrbench_v2 and mmbench_cn_dev, are other benchmarks.
_PARTS = {
    "", "val", "mini", "lite", "val_lite", "en_dev", "en_dev_static", "en_dev_lite",
}  # fmt: skip

# lmms-eval divides by this number whatever the number of samples; our miniature does not.
_DIVISORS = {"ocrbench": 1000}


def find_benchmark(task: str) -> Benchmark | None:
    """The paper's benchmark a task is of, such as of ``docvqa_val`` or ``docvqa_mini``."""
    name, _, rest = task.partition("_")
    return BENCHMARKS.get(name) if rest in _PARTS else None


def benchmark_of(task: str) -> Benchmark:
    """Return the benchmark of a task, such as of ``docvqa_val`` or ``docvqa_mini``.

    Raises
    ------
    ValueError
        If it is none of the paper's.
    """
    found = find_benchmark(task)
    if found is None:
        raise UserError(f"task={task}: it is of none of {', '.join(BENCHMARKS)}")
    return found


def brought_to_one(task: str, score: float, samples: float | None) -> float:
    """A score of a task's metric that counts, from lmms-eval's own scale to one that ends at 1.

    CIDEr, which has no end, and benchmarks that are none of the paper's stay as they are.

    Parameters
    ----------
    task : str
        Such as ``docvqa_val``.
    score : float
        In a results file.
    samples : float or None
        How many were scored, if that is known.
    """
    benchmark = find_benchmark(task)
    scale = 1.0 if benchmark is None else benchmark.top
    if task in _DIVISORS and samples:
        scale *= samples / _DIVISORS[task]
    return score / scale


def main_scores(frame: pd.DataFrame) -> pd.DataFrame:
    """Keep each task's metric that counts, on a scale that ends at 1 where it has an end.

    Parameters
    ----------
    frame : DataFrame
        Of `sparsemm_eval.report.results.read_results`.
    """
    metrics = frame["task"].map(lambda task: benchmark_of(task).metric)
    kept = frame[frame["metric"] == metrics]
    scaled = {
        name: [
            brought_to_one(task, value, samples)
            for task, value, samples in zip(
                kept["task"], kept[name].astype(float), kept["samples"], strict=True
            )
        ]
        for name in ("score", "stderr")
    }
    return kept.assign(**scaled)
