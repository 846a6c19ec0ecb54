"""The miniature benchmarks: their data, drawn on first use, and metrics of lmms-eval's own scores.

A task file names its data as ``dataset_path: !function mini.docvqa``. The aggregations here stand
in for those of lmms-eval that write files, count over runs or need java; each says which.
"""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from statistics import mean
from typing import Any

from datasets import Dataset, concatenate_datasets, load_dataset
from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator
from pycocoevalcap.cider.cider import Cider

from sparsemm_eval.paths import cache_folder
from sparsemm_eval.tiny.benchmarks import BENCHMARKS, build


def __getattr__(name: str) -> str:
    if name not in BENCHMARKS:
        raise AttributeError(f"no benchmark {name}; there is: {', '.join(BENCHMARKS)}")
    return str(build(name, cache_folder() / "benchmarks"))


def gqa_process_docs(instructions: Dataset) -> Dataset:
    """Join the images to the questions.

    lmms-eval's own function loads the images of the real GQA by name, whatever the task's data.
    """
    images = load_dataset(__getattr__("gqa"), "testdev_balanced_images", split="testdev")
    places = {name: place for place, name in enumerate(images["id"])}
    asked = images.select([places[name] for name in instructions["imageId"]])
    return concatenate_datasets([instructions, asked.select_columns("image")], axis=1)


def ocrbench_accuracy(results: list[dict[str, Any]]) -> float:
    """Share of right answers.

    lmms-eval's own function divides by 1,000 whatever the number of samples, and adds runs of one
    process up.
    """
    return mean(result["score"] for result in results)


def mmbench_accuracy(results: list[dict[str, Any]]) -> float:
    """Accuracy in percent, as lmms-eval's own static evaluation finds it.

    lmms-eval's own function also writes a file, into the working folder if no output is named.
    """
    with redirect_stdout(None):  # it prints a list of categories
        overall, *_ = MMBench_Evaluator().eval_result(results, eval_method="static")
    return 100 * float(overall)


def textcaps_cider(results: list[dict[str, Any]]) -> float:
    """CIDEr of words in lower case without punctuation.

    lmms-eval's own function has a java program, the Penn Treebank tokenizer, make the words.
    """
    references = {r["image_id"]: [_words(caption) for caption in r["answer"]] for r in results}
    answers = {r["image_id"]: [_words(r["pred"])] for r in results}
    score, _ = Cider().compute_score(references, answers)
    return float(score)


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
