"""The ends of a miniature benchmark's scale, by lmms-eval's own code on the very samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lmms_eval.api.task import ConfigurableTask
from lmms_eval.tasks import TaskManager, get_task_dict

# Rarer answers gain only where near misses count, and little.
_CANDIDATES = 12


def load_task(name: str, tasks: Path) -> ConfigurableTask:
    """Return the lmms-eval task of a miniature benchmark, its data built if need be.

    Parameters
    ----------
    name : str
        A key of :data:`~sparsemm_eval.tiny.benchmarks.BENCHMARKS`.
    tasks : pathlib.Path
        Folder of the task files.

    Returns
    -------
    ConfigurableTask
    """
    manager = TaskManager("WARNING", include_path=str(tasks), include_defaults=False)
    return get_task_dict([f"{name}_mini"], manager)[f"{name}_mini"]


def right_answers(task: ConfigurableTask) -> list[str]:
    """Return the right answer of every sample, the first where there are several."""
    targets = (task.doc_to_target(document) for document in task.eval_docs_no_media)
    return [target[0] if isinstance(target, list) else target for target in targets]


def score(task: ConfigurableTask, answers: Sequence[str]) -> float:
    """Score one answer a sample by the task's first metric.

    Parameters
    ----------
    task : ConfigurableTask
        As :func:`load_task` gives it.
    answers : sequence of str
        In the order of the samples.

    Returns
    -------
    float
        On the metric's own scale: MMBench's is percent, TextCaps' CIDEr, all others' 0 to 1.
    """
    metric, aggregate = next(iter(task.aggregation().items()))
    pairs = zip(task.eval_docs_no_media, answers, strict=True)
    return float(aggregate([task.process_results(doc, [answer])[metric] for doc, answer in pairs]))


def constant_answer_score(name: str, tasks: Path) -> tuple[str, float]:
    """Return what answering every question alike can score: the level of chance.

    Parameters
    ----------
    name : str
        A key of :data:`~sparsemm_eval.tiny.benchmarks.BENCHMARKS`.
    tasks : pathlib.Path
        Folder of the task files.

    Returns
    -------
    answer : str
        The best of the most common right answers.
    score : float
        Its score on the metric's own scale.
    """
    task = load_task(name, tasks)
    right = right_answers(task)
    common = [answer for answer, _ in Counter(right).most_common(_CANDIDATES)]
    scores = {answer: score(task, [answer] * len(right)) for answer in common}
    best = max(scores, key=lambda answer: scores[answer])
    return best, scores[best]


def right_answer_score(name: str, tasks: Path) -> float:
    """Return what the right answers score: the top of a scale that has none, such as CIDEr's."""
    task = load_task(name, tasks)
    return score(task, right_answers(task))
