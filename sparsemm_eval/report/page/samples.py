"""Samples whose answer is not full KV's, as the page's own script reads them, and their images."""

from __future__ import annotations

import io
import re
from ast import literal_eval
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from PIL import Image

from sparsemm_eval.report.page.leaderboard import by_budget, choices
from sparsemm_eval.report.samples import NoScores, read_samples

LONGEST_SIDE = 384  # pixels of an image
_QUALITY = 60  # text stays legible
# A list of texts and numbers as Python writes it. Only its texts are evaluated, one by one: an
# expression that a file made up can exhaust Python's own parser.
_ENTRY = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[\w.+-]+""")
_LIST = re.compile(rf"\[(?:(?:{_ENTRY.pattern})(?:, (?:{_ENTRY.pattern}))*)?\]")
Visuals = Callable[[str, Sequence[int]], Mapping[int, Sequence[Image.Image]]]
Lines = Mapping[int, Mapping[str, Any]]
Scores = Mapping[tuple[int, int], float]
_ALL_EQUAL = "No answer differs from full KV's."
_NOTHING_TO_COMPARE = (
    "There is nothing to compare: this takes samples files of full KV and of another method on one "
    "benchmark, which the demo and a sweep write, and lmms-eval with --log_samples."
)


@dataclass(frozen=True, eq=False)
class Comparison:
    """A cell's answers beside full KV's.

    Parameters
    ----------
    index, reference : int
        Labels of the cell, and of its model's full KV on the same task, in the frame of cells.
    own, full : mapping
        Lines of their samples files by document.
    differing : tuple of int
        Documents answered in another way than by full KV, those of the most different scores
        first.
    compared : int
        Documents that both answered.
    """

    index: int
    reference: int
    own: Lines
    full: Lines
    differing: tuple[int, ...]
    compared: int


def compare(cells: pd.DataFrame, scores: Scores) -> tuple[list[Comparison], list[str]]:
    """Compare the answers of every cell with full KV's.

    Parameters
    ----------
    cells : DataFrame
        As `sparsemm_eval.report.results.load` gives them, seeds not joined.
    scores : mapping
        Score of a sample by (label of its cell, document), where it is known.

    Returns
    -------
    tuple of list
        A comparison each cell that has a samples file and a full KV; sentences on what could not
        be compared, and why.
    """
    measured = cells[(cells["source"] == "measured") & cells["samples_files"].map(bool)]
    lines: dict[int, Lines] = {}
    notes: dict[str, None] = {}
    for index, paths in measured["samples_files"].items():
        try:
            lines[index] = {line["doc_id"]: line for path in paths for line in read_samples(path)}
        except NoScores as error:
            notes[f"Not compared: {error}."] = None
    readable = measured[measured.index.isin(lines)]
    full = readable["method"] == "fullkv"
    comparisons = []
    for index, cell in by_budget(readable[~full]).iterrows():
        reference = _reference(cell, readable[full])
        if reference is not None:
            comparisons.append(_compared(index, reference, lines, scores))
    return comparisons, list(notes)


def unlike_counts(
    comparisons: Sequence[Comparison], origin: Mapping[int, int]
) -> dict[int, tuple[int, int, int]]:
    """Answers unlike full KV's, answers compared, and the first cell to look at, by cell.

    Parameters
    ----------
    comparisons : sequence of Comparison
        From `compare`.
    origin : mapping
        Where the count of a cell goes: seeds that were joined count together.
    """
    counted: dict[int, tuple[int, int, int]] = {}
    for one in comparisons:
        unlike, compared, first = counted.get(origin[one.index], (0, 0, one.index))
        counted[origin[one.index]] = unlike + len(one.differing), compared + one.compared, first
    return counted


def _reference(cell: pd.Series, full: pd.DataFrame) -> int | None:
    """Full KV on the same model and task; of several, the one of the most equal settings."""
    there = full[(full["model"] == cell["model"]) & (full["task"] == cell["task"])]
    if there.empty:
        return None
    equal = [
        sum(cell["settings"].get(name) == value for name, value in settings.items())
        for settings in there["settings"]
    ]
    return there.index[equal.index(max(equal))]


def _compared(index: int, reference: int, lines: Mapping[int, Lines], scores: Scores) -> Comparison:
    own, full = lines[index], lines[reference]
    both = [doc for doc in own if doc in full]
    unlike = [doc for doc in both if answer(own[doc]) != answer(full[doc])]

    def closeness(doc: int) -> tuple[float, int]:
        pair = (scores.get((index, doc)), scores.get((reference, doc)))
        return (0.0 if None in pair else -abs(pair[0] - pair[1]), doc)

    return Comparison(index, reference, own, full, tuple(sorted(unlike, key=closeness)), len(both))


def answer(line: Mapping[str, Any]) -> str:
    """What was answered, as one text."""
    text = line.get("filtered_resps", line.get("resps", ""))
    while isinstance(text, list) and len(text) == 1:
        text = text[0]
    return text if isinstance(text, str) else str(text)


def browse(
    cells: pd.DataFrame,
    comparisons: Sequence[Comparison],
    scores: Scores,
    count: int,
    visuals: Visuals | None,
) -> dict[str, Any]:
    """Collect what the browser shows: the first `count` samples of each cell, their images once.

    Parameters
    ----------
    cells : DataFrame
        Those that were compared.
    comparisons : sequence of Comparison
        From `compare`.
    scores : mapping
        As for `compare`.
    count : int
        Samples of a cell.
    visuals : callable, optional
        Images of documents by task and document number; None leaves images out. If it raises a
        ValueError or OSError, the page has no images of that task and says why.

    Returns
    -------
    dict
        As the page's template reads it: data (``cells``, and their ``documents`` by model and
        task), images (data URI, width and height of each), notes (sentences above them).
    """
    data: dict[str, list[Any]] = {"cells": [], "documents": []}
    shown = [one for one in comparisons if one.differing]
    if not shown:
        notes = [_ALL_EQUAL if comparisons else _NOTHING_TO_COMPARE]
        return {"data": data, "images": [], "notes": notes}
    tasks: dict[str, set[int]] = {}
    for one in shown:
        tasks.setdefault(cells.at[one.index, "task"], set()).update(one.differing[:count])
    images, notes = Images(), []
    places = _images(tasks, visuals, images, notes)
    groups: dict[int, int] = {}
    named = choices(cells)
    for one in shown:
        task = cells.at[one.index, "task"]
        if one.reference not in groups:
            groups[one.reference] = len(groups)
            data["documents"].append({})
        documents = data["documents"][groups[one.reference]]
        rows = []
        for doc in one.differing[:count]:
            line = one.full[doc]
            documents[doc] = (
                str(line.get("input", "")), target(line), answer(line), places.get((task, doc), ()),
            )  # fmt: skip
            pair = (scores.get((each, doc)) for each in (one.index, one.reference))
            rows.append((doc, answer(one.own[doc]), *pair))
        data["cells"].append(
            {
                "cell": int(one.index),
                **named.loc[one.index],
                "documents": groups[one.reference],
                "differ": len(one.differing),
                "of": one.compared,
                "samples": rows,
            }
        )
    return {"data": data, "images": images.kept, "notes": notes}


def _images(
    tasks: Mapping[str, set[int]], visuals: Visuals | None, images: Images, notes: list[str]
) -> dict[tuple[str, int], tuple[int, ...]]:
    """Take the images of documents in, and return their places by task and document."""
    places: dict[tuple[str, int], tuple[int, ...]] = {}
    if visuals is None:
        notes.append("Images were left out.")
        return places
    for task, docs in tasks.items():
        try:
            of_task = visuals(task, sorted(docs))
        except (ValueError, OSError) as error:
            notes.append(f"{task} is shown without images: {' '.join(str(error).split())}.")
            continue
        for doc, pictures in of_task.items():
            places[task, doc] = tuple(images.add(picture) for picture in pictures)
    return places


def target(line: Mapping[str, Any]) -> str:
    """What was to be answered; of a list, which lmms-eval writes as text, each entry once."""
    text = str(line.get("target", ""))
    if not _LIST.fullmatch(text):
        return text
    entries = _ENTRY.findall(text)
    try:
        texts = [literal_eval(entry) if entry[0] in "'\"" else entry for entry in entries]
    except (ValueError, SyntaxError):
        return text
    return "\n".join(dict.fromkeys(texts))


class Images:
    """Images of a page, equal ones kept once.

    Attributes
    ----------
    kept : list of tuple
        (data URI, width, height) of each, in pixels.
    """

    def __init__(self) -> None:
        self.kept: list[tuple[str, int, int]] = []
        self._places: dict[str, int] = {}

    def add(self, image: Image.Image) -> int:
        """Take an image in, and return its place in `kept`."""
        image = _small(image)
        uri = _data_uri(image)
        if uri not in self._places:
            self._places[uri] = len(self.kept)
            self.kept.append((uri, *image.size))
        return self._places[uri]


def _small(image: Image.Image) -> Image.Image:
    """In plain colours or greys, its longest side at most `LONGEST_SIDE`."""
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")  # what is transparent is read on white
        image = Image.alpha_composite(paper, image).convert("RGB")
    longest = max(image.size)
    if longest <= LONGEST_SIDE:
        return image
    size = tuple(max(1, round(side * LONGEST_SIDE / longest)) for side in image.size)
    return image.resize(size, Image.Resampling.LANCZOS)


def _data_uri(image: Image.Image) -> str:
    """As WebP or PNG, whichever is smaller."""
    forms = {"webp": {"quality": _QUALITY, "method": 4}, "png": {}}
    files = {}
    for form, options in forms.items():
        file = io.BytesIO()
        image.save(file, form, **options)
        files[form] = file.getvalue()
    form = min(files, key=lambda name: len(files[name]))
    return f"data:image/{form};base64,{b64encode(files[form]).decode('ascii')}"
