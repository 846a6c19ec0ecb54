"""Scores of single samples, from the samples files that lie beside results files."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sparsemm_eval.errors import printable
from sparsemm_eval.report.cider import cider, plain_words, treebank_words
from sparsemm_eval.report.names import find_benchmark
from sparsemm_eval.report.results import number
from sparsemm_eval.stored import NotUnderstood, read_json_lines

_DOCUMENTS = range(2**53)  # beyond, a page's script knows no numbers one by one
# Relative; lmms-eval's own means are rounded in their last bits.
_CLOSE = 1e-6
Scores = dict[Any, float]  # by doc_id
_Reader = Callable[[str, list[Path]], list["Scores | NoScores"]]


class NoScores(ValueError):
    """Samples of which no score can be said; the reason in one sentence."""


@dataclass(frozen=True)
class SampleScores:
    """Scores of samples.

    Parameters
    ----------
    frame : DataFrame
        cell (of the index of the cells), doc_id, score: 0 to 1, CIDEr as it is.
    notes : tuple of str
        Which cells' samples files were not used, and why.
    """

    frame: pd.DataFrame
    notes: tuple[str, ...]


def read_samples(path: str | Path) -> list[dict[str, Any]]:
    """Read a samples file, one line an answer.

    Parameters
    ----------
    path : str or Path
        As lmms-eval writes it with ``--log_samples``, or a sweep beside its results.

    Returns
    -------
    list of dict
        doc_id, target, filtered_resps (the answer), input (the question), the metrics by name,
        and what else lmms-eval writes.

    Raises
    ------
    ValueError
        Naming the file and the first line that is broken.
    """
    return list(_lines(Path(path)))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        for place, line in read_json_lines(path):
            doc_id = line.get("doc_id") if isinstance(line, dict) else None
            if not isinstance(doc_id, int) or doc_id not in _DOCUMENTS:
                raise NoScores(f"{path}, line {place}: it is no answer with a doc_id, a number")
            yield line
    except NotUnderstood as error:
        raise NoScores(f"{path}: {error}") from error


def score_samples(cells: pd.DataFrame) -> SampleScores:
    """Score the samples of cells; only of cells whose samples' mean is the cell's score.

    Parameters
    ----------
    cells : DataFrame
        As `sparsemm_eval.report.results.load` gives them; where seeds are joined, a sample's score
        is its mean over them. A sample of MMBench is a question under all orders of its options,
        under the number of the first.
    """
    frames, reasons = [], {}
    sampled = cells[cells["samples_files"].map(len) > 0]
    for (task, metric), some in sampled.groupby(["task", "metric"], sort=False):
        paths = list(dict.fromkeys(path for files in some["samples_files"] for path in files))
        read = dict(zip(paths, _reader(task)(metric, [*map(Path, paths)]), strict=True))
        for cell in some.itertuples():
            try:
                scores = _of_cell(cell, [read[path] for path in cell.samples_files])
            except NoScores as error:
                reasons.setdefault((task, str(error)), []).append(cell.samples_files[0])
                continue
            frames.append(
                pd.DataFrame({"cell": cell.Index, "doc_id": [*scores], "score": [*scores.values()]})
            )
    empty = pd.DataFrame({"cell": [], "doc_id": [], "score": np.empty(0)})
    frame = pd.concat(frames, ignore_index=True) if frames else empty
    return SampleScores(frame, tuple(_note(*key, files) for key, files in reasons.items()))


def _note(task: str, reason: str, files: Sequence[str]) -> str:
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return printable(f"{task}: no scores of single samples from {files[0]}{more}: {reason}")


def _of_cell(cell: Any, read: Sequence[Scores | NoScores]) -> Scores:
    """Means over seeds, if they make up the cell's score."""
    for scores in read:
        if isinstance(scores, NoScores):
            raise scores
    sums: dict[Any, list[float]] = {}
    for scores in read:
        for doc, score in scores.items():
            sums.setdefault(doc, []).append(score)
    means = {doc: sum(values) / len(values) for doc, values in sums.items()}
    mean = float(np.mean([*means.values()])) if means else math.nan
    if not math.isclose(mean, cell.score, rel_tol=_CLOSE, abs_tol=1e-9):
        raise NoScores(f"their mean is {mean:.6g} and the results file says {cell.score:.6g}")
    return means


def _reader(task: str) -> _Reader:
    benchmark = find_benchmark(task)
    if benchmark is None:
        return _stated
    if benchmark.title == "MMBench":
        return _mmbench
    if benchmark.title == "TextCaps":
        return _textcaps_mini if task.endswith("_mini") else _textcaps
    return _stated


def _each(paths: Sequence[Path], read: Callable[[Path], Any]) -> list[Any]:
    """What is read of each file, or why nothing is."""
    outcomes = []
    for path in paths:
        try:
            outcomes.append(read(path))
        except NoScores as error:
            outcomes.append(error)
    return outcomes


# --- benchmarks whose samples files state the score ---------------------------------------------


def _stated(metric: str, paths: list[Path]) -> list[Scores | NoScores]:
    def read(path: Path) -> Scores:
        of_document: dict[Any, list[float]] = {}
        for line in _lines(path):
            value = line.get(metric)
            score = number(value.get("score") if isinstance(value, Mapping) else value)
            if score is None:
                raise NoScores(f"document {line['doc_id']} has no number for {metric}")
            of_document.setdefault(line["doc_id"], []).append(score)
        # A task that repeats its documents has several answers to each.
        return {doc: sum(scores) / len(scores) for doc, scores in of_document.items()}

    return _each(paths, read)


# --- MMBench: one question under several orders of its options ----------------------------------

# The same question with its options in another order has an index this much larger.
_CIRCLE = 1_000_000


_NO_OPTIONS = dict.fromkeys("ABCD")


def _is_choice(item: Any) -> bool:
    """Whether it is what the rule reads: text where it looks for text."""
    return (
        isinstance(item, Mapping)
        and isinstance(item.get("index"), int)
        and isinstance(item.get("answer"), str)
        and "prediction" in item
        and all(isinstance(item.get(option), str | int | float | None) for option in _NO_OPTIONS)
    )


class _Rows(list):
    """As much of a DataFrame as lmms-eval's rule reads; a real one takes a second for 1,000."""

    @property
    def iloc(self) -> list:
        return self


def _mmbench(metric: str, paths: list[Path]) -> list[Scores | NoScores]:
    try:
        from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator
    except ImportError:
        return [NoScores("lmms-eval, whose rule reads the letters, is not installed")] * len(paths)
    evaluator = MMBench_Evaluator()
    # Few answers are unlike: each group of answers to a question is judged once.
    known: dict[tuple, float] = {}

    def judge(group: list[Mapping[str, Any]]) -> float:
        key = tuple((one["index"], str(one["prediction"]), one["answer"]) for one in group)
        if key not in known:
            rows = _Rows(
                {**_NO_OPTIONS, **one, "prediction": str(one["prediction"])} for one in group
            )
            answers = {one["index"]: one["answer"] for one in group}
            known[key] = float(evaluator.eval_sub_data(rows, answers, static_only=True))
        return known[key]

    def read(path: Path) -> Scores:
        groups: dict[int, list[Mapping[str, Any]]] = {}
        documents: dict[int, Any] = {}
        for line in _lines(path):
            item = line.get(metric)
            if not _is_choice(item):
                raise NoScores(f"document {line['doc_id']} has no index, answer and prediction")
            question = item["index"] % _CIRCLE
            groups.setdefault(question, []).append(item)
            if item["index"] == question:
                documents[question] = line["doc_id"]
        ordered = {q: sorted(groups[q], key=lambda one: one["index"]) for q in documents}
        return {documents[question]: judge(group) for question, group in ordered.items()}

    return _each(paths, read)


# --- TextCaps: CIDEr ----------------------------------------------------------------------------


def _is_caption(item: Any) -> bool:
    captions = item.get("answer") if isinstance(item, Mapping) else None
    return (
        isinstance(captions, list)
        and bool(captions)
        and all(isinstance(text, str) for text in captions)
        and isinstance(item.get("image_id"), int | str)
        and isinstance(item.get("pred"), str)
    )


@dataclass(frozen=True)
class _Captions:
    """Answers of one file: document, image and caption of each."""

    answers: tuple[tuple[Any, int, str], ...]


def _textcaps_mini(metric: str, paths: list[Path]) -> list[Scores | NoScores]:
    return _captions(metric, paths, lambda texts: {text: plain_words(text) for text in texts})


def _textcaps(metric: str, paths: list[Path]) -> list[Scores | NoScores]:
    if shutil.which("java") is None:
        return [NoScores("there is no java, which its metric makes words with")] * len(paths)
    return _captions(metric, paths, treebank_words)


def _captions(
    metric: str, paths: list[Path], words_of: Callable[[list[str]], Mapping[str, str]]
) -> list[Scores | NoScores]:
    references: dict[int, list[str]] = {}

    def read(path: Path) -> _Captions:
        answered = []
        for line in _lines(path):
            item = line.get(metric)
            if not _is_caption(item):
                raise NoScores(f"document {line['doc_id']} has no image, captions and answer")
            image = item["image_id"]
            if references.setdefault(image, item["answer"]) != item["answer"]:
                raise NoScores(f"image {image} has other captions than in another file")
            answered.append((line["doc_id"], image, item["pred"]))
        if len({image for _, image, _ in answered}) < len(answered):
            raise NoScores("an image is there twice")
        return _Captions(tuple(answered))

    read_files = _each(paths, read)
    told = [file for file in read_files if isinstance(file, _Captions)]
    texts = {text: None for texts in references.values() for text in texts}
    texts |= {text: None for file in told for _, _, text in file.answers}
    try:
        words = words_of([*texts])
    except OSError as error:
        return [NoScores(f"its words cannot be made ({error})")] * len(paths)
    # The weights of words come from the references of a file: those of fewer images differ.
    corpora: dict[frozenset[int], list[_Captions]] = {}
    for file in told:
        corpora.setdefault(frozenset(image for _, image, _ in file.answers), []).append(file)
    scores = {}
    for images, files in corpora.items():
        answers: dict[int, list[str]] = {}
        for file in files:
            for _, image, text in file.answers:
                answers.setdefault(image, []).append(words[text])
        refs = {image: [words[text] for text in references[image]] for image in images}
        scores[images] = cider(refs, answers)

    def of_file(file: _Captions) -> Scores:
        known = scores[frozenset(image for _, image, _ in file.answers)]
        return {doc: known[image, words[text]] for doc, image, text in file.answers}

    return [of_file(file) if isinstance(file, _Captions) else file for file in read_files]
