"""What is known of the paper's benchmarks, models and methods: names, scales, and their order.

This is for showing only. A task, model or method that is not here is shown by its own name, on the
scale and in the direction that lmms-eval states, behind those of the paper.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pandas as pd

from sparsemm_eval.choices import EMBEDDED, STRATA


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
    bounded : bool
        Whether its scale has an end.
    """

    title: str
    metric: str
    label: str
    top: float = 1.0
    percent: bool = False
    bounded: bool = True


# In the paper's order, by the task's name without `_val`, `_mini` and the like.
BENCHMARKS = {
    "docvqa": Benchmark("DocVQA", "anls", "ANLS"),
    "ocrbench": Benchmark("OCRBench", "ocrbench_accuracy", "accuracy"),
    "textvqa": Benchmark("TextVQA", "exact_match", "VQA accuracy"),
    "chartqa": Benchmark("ChartQA", "relaxed_overall", "relaxed accuracy"),
    "textcaps": Benchmark("TextCaps", "textcaps_CIDEr", "CIDEr", bounded=False),
    "mmbench": Benchmark("MMBench", "gpt_eval_score", "accuracy", top=100.0, percent=True),
    "gqa": Benchmark("GQA", "exact_match", "accuracy", percent=True),
    "vqav2": Benchmark("VQAv2", "exact_match", "VQA accuracy", percent=True),
}
OCR_RICH = ("DocVQA", "OCRBench", "TextVQA", "ChartQA", "TextCaps")
GENERAL = ("MMBench", "GQA", "VQAv2")

# What may follow: other tasks, such as ocrbench_v2 and mmbench_cn_dev, are other benchmarks.
_PARTS = {
    "", "val", "mini", "lite", "val_lite", "en_dev", "en_dev_static", "en_dev_lite",
}  # fmt: skip

# lmms-eval divides by this number whatever the number of samples; our miniature does not.
_DIVISORS = {"ocrbench": 1000}

# The paper's names of methods, in its order, then others', ours, and those that never see the
# question.
METHOD_NAMES = {
    "fullkv": "FullKV",
    "sparsemm": "SparseMM",
    "snapkv": "SnapKV",
    "pyramidkv": "PyramidKV",
    "adakv": "AdaKV",
    "random": "Random",
    "mixkv": "MixKV",
    "criticalkv": "CriticalKV",
    "lava": "LAVA",
    "cake": "CAKE",
    "vlcache": "VL-Cache",
    "tgvkv": "TGV-KV",
    "tova": "TOVA",
    "sensitivity": "Sensitivity",
    "expected": "Expected",
    "keydiff": "KeyDiff",
    "knorm": "KNorm",
    "local": "Local",
    "streaming": "StreamingLLM",
}

# Where results do not say whether a method's ranking of tokens sees the question: these do not.
_QUERY_AGNOSTIC = frozenset({"local", "streaming"})

# What the best constant answer scores on our miniatures, 0 to 1, CIDEr as it is; of no other task
# is it known. As `sparsemm_eval.tiny.chance` computes it.
_CHANCE = {
    "docvqa_mini": 0.008, "ocrbench_mini": 0.02, "textvqa_mini": 0.005, "chartqa_mini": 0.055,
    "textcaps_mini": 0.1565, "mmbench_mini": 0.29, "gqa_mini": 0.505, "vqav2_mini": 0.105,
}  # fmt: skip

# The paper's models, in its order.
MODEL_NAMES = ("LLaVA-NeXT-Vicuna-7B", "LLaVA-NeXT-Mistral-7B", "Qwen2-VL-7B-Instruct")

# By the last part of a folder or hub repository, in lower case.
_MODELS = {
    "llava-v1.6-vicuna-7b": MODEL_NAMES[0],
    "llava-v1.6-vicuna-7b-hf": MODEL_NAMES[0],
    "llava-v1.6-mistral-7b": MODEL_NAMES[1],
    "llava-v1.6-mistral-7b-hf": MODEL_NAMES[1],
    **{name.lower(): name for name in MODEL_NAMES},
}

# What a setting is where a results file does not state it, as `sparsemm_eval.methods` and
# `sparsemm_eval.families` have it.
DEFAULTS: Mapping[str, Any] = {
    "window": 32,
    "kernel_size": 5,
    "pooling": "avg",
    "group_reduction": "mean",
    "ratio": 0.1,
    "floor": 0.2,
    "allocation": "paper",
    "seed": 0,
    "sinks": 4,
    "question": "seen",
    "first": 0.5,
    "gamma": 200.0,
    "tau1": 1.0,
    "tau2": 1.0,
    "threshold": 0.01,
    "recent": 0.1,
    "protocol": "plain",
}


def find_benchmark(task: str) -> Benchmark | None:
    """The paper's benchmark a task is of, such as of ``docvqa_val`` or ``docvqa_mini``."""
    name, _, rest = task.partition("_")
    return BENCHMARKS.get(name) if rest in _PARTS else None


def top_score(task: str, metric: str, samples: float | None) -> float:
    """The best score of a task on lmms-eval's scale; 1 where no other is known.

    Parameters
    ----------
    task : str
        Such as ``docvqa_val``.
    metric : str
        lmms-eval's name of it; only the one that counts has a known scale.
    samples : float or None
        How many were scored, if that is known.
    """
    benchmark = find_benchmark(task)
    if benchmark is None or benchmark.metric != metric:
        return 1.0
    scale = benchmark.top
    if task in _DIVISORS and samples:
        scale *= samples / _DIVISORS[task]
    return scale


def chance_score(task: str, metric: str) -> float:
    """What answering every question alike scores, as shown; 0 where it is not known."""
    benchmark = find_benchmark(task)
    known = benchmark is not None and benchmark.metric == metric
    return _CHANCE.get(task, 0.0) if known else 0.0


def stratum_of(method: str, query_aware: float) -> str:
    """One of `STRATA`: whether a method's ranking of tokens sees the question.

    Methods of two strata are never ranked against each other: what is query-agnostic could
    compress before the question is known.

    Parameters
    ----------
    method : str
        Its name.
    query_aware : float
        1 or 0 as its results have it, NaN where they do not.
    """
    aware = method not in _QUERY_AGNOSTIC if pd.isna(query_aware) else bool(query_aware)
    return STRATA[not aware]


def paper_model(name: str) -> str | None:
    """The paper's name of a model; None if it is none of the paper's.

    Parameters
    ----------
    name : str
        A hub repository, a folder, or a name of one's own.
    """
    return _MODELS.get(last_part(name).lower())


def last_part(name: str) -> str:
    """The name of a checkpoint: a repository's or folder's last part, also in the hub's cache."""
    name = name.removeprefix(EMBEDDED)
    parts = [part for part in PurePosixPath(name).parts if part != "/"]
    cached = [part for part in parts if part.startswith("models--")]
    return cached[-1].rpartition("--")[2] if cached else parts[-1] if parts else name


def method_label(method: str, settings: Mapping[str, Any]) -> str:
    """A method's name in tables, with the settings that tell it apart.

    >>> method_label("mixkv+sparsemm", {"ratio": 0.2})
    'MixKV + SparseMM (ratio=0.2)'
    """
    name = " + ".join(METHOD_NAMES.get(one, one) for one in method.split("+"))
    words = ", ".join(f"{key}={_word(value)}" for key, value in settings.items())
    return f"{name} ({words})" if words else name


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


_ORDERS: Mapping[str, Mapping[str, int]] = {
    column: {name: place for place, name in enumerate(names)}
    for column, names in (
        ("benchmark", [benchmark.title for benchmark in BENCHMARKS.values()]),
        ("model", MODEL_NAMES),
        ("method", METHOD_NAMES),
    )
}
# A table's rows; what is wanted side by side comes last.
ROWS = ("benchmark", "task", "model", "method", "label", "source", "budget")


def in_order(cells: pd.DataFrame, by: Iterable[str] = ROWS) -> pd.DataFrame:
    """Sort cells: benchmarks, models and methods as the paper has them, one's own behind by name.

    The one order of tables, figures and the page.

    Parameters
    ----------
    cells : DataFrame
        With the columns named.
    by : iterable of str
        Columns, the outermost first. Budgets fall, and what has none comes first; what was
        measured stands before the paper's; labels ascend by the numbers in them; all else
        ascends, missing values first.
    """
    columns = [[_place(name, value) for value in cells[name]] for name in by]
    keys = list(zip(*columns, strict=True))
    return cells.iloc[sorted(range(len(cells)), key=keys.__getitem__)]


def distinct(cells: pd.DataFrame, column: str) -> list[Any]:
    """What a column of cells holds, each once, in the order of `in_order`; none is left out."""
    return sorted(cells[column].dropna().unique(), key=lambda value: _place(column, value))


def labels_in_order(cells: pd.DataFrame) -> dict[str, str]:
    """Method by label of cells, the paper's methods first and in its order, then by label."""
    ordered = in_order(cells, ("method", "label"))
    return dict(zip(ordered["label"], ordered["method"], strict=True))


def _place(column: str, value: Any) -> tuple:
    if column == "source":
        return (value != "measured",)
    if pd.isna(value):
        return (False,)
    if column == "budget":
        return True, -value
    if column in _ORDERS:
        order = _ORDERS[column]
        return True, order.get(value, len(order)), value
    if column == "label":
        # Text and numbers by turns: ratio=0.3 stands before ratio=1, window=8 before window=16.
        parts = enumerate(re.split(r"(\d+(?:\.\d+)?)", value))
        return True, *(float(part) if i % 2 else (len(part), part) for i, part in parts)
    return True, value
