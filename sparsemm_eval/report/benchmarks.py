"""What a task is called, which of its metrics counts, and where its scale ends."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd


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
    """

    title: str
    metric: str
    label: str
    top: float = 1.0


# By the task's name without `_val`, `_mini` and the like.
BENCHMARKS = {
    "docvqa": Benchmark("DocVQA", "anls", "ANLS"),
    "ocrbench": Benchmark("OCRBench", "ocrbench_accuracy", "accuracy"),
    "textvqa": Benchmark("TextVQA", "exact_match", "VQA accuracy"),
    "chartqa": Benchmark("ChartQA", "relaxed_overall", "relaxed accuracy"),
    "textcaps": Benchmark("TextCaps", "textcaps_CIDEr", "CIDEr"),
    "mmbench": Benchmark("MMBench", "gpt_eval_score", "accuracy", top=100.0),
    "gqa": Benchmark("GQA", "exact_match", "accuracy"),
    "vqav2": Benchmark("VQAv2", "exact_match", "VQA accuracy"),
}


def benchmark_of(task: str) -> Benchmark:
    """Return the benchmark of a task, such as of ``docvqa_val`` or ``docvqa_mini``.

    Raises
    ------
    ValueError
        If it is none of the paper's.
    """
    name = task.split("_")[0]
    if name not in BENCHMARKS:
        raise ValueError(f"task={task}: it is of none of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def main_scores(frame: pd.DataFrame) -> pd.DataFrame:
    """Keep each task's metric that counts, on a scale that ends at 1 where it has an end.

    Parameters
    ----------
    frame : DataFrame
        Of `sparsemm_eval.report.results.read_results`.
    """
    benchmarks = frame["task"].map(benchmark_of)
    counts = frame["metric"] == benchmarks.map(lambda benchmark: benchmark.metric)
    tops = benchmarks[counts].map(lambda benchmark: benchmark.top)
    kept = frame[counts]
    return kept.assign(score=kept["score"] / tops, stderr=kept["stderr"] / tops)
