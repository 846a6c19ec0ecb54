"""Samples whose answer is not full KV's, as the page's own script reads them, and their images."""

from __future__ import annotations

import io
from ast import literal_eval
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from sparsemm_eval.report.page.leaderboard import by_budget, choices
from sparsemm_eval.report.samples import NoScores, read_samples

LONGEST_SIDE = 384  # pixels of an image
_QUALITY = 60  # text stays legible
Visuals = Callable[[str, Sequence[int]], Mapping[int, Sequence[Image.Image]]]
_ALL_EQUAL = "No answer differs from full KV's."
_NOTHING_TO_COMPARE = (
    "There is nothing to compare: this takes samples files of full KV and of another method on one "
    "benchmark, which the demo and a sweep write, and lmms-eval with --log_samples."
)


@dataclass(frozen=True)
class Cell:
    """A cell beside full KV.

    Parameters
    ----------
    index : int
        In the frame of cells.
    reference : int
        Index of its model's full KV on the same task.
    differing : tuple of int
        Documents answered in another way than by full KV, those of the most different scores
        first.
    compared : int
        Documents that both answered.
    """

    index: int
    reference: int
    differing: tuple[int, ...]
    compared: int


@dataclass(frozen=True, eq=False)
class Differences:
    """All cells that have samples files and a full KV to be compared with.

    Parameters
    ----------
    cells : tuple of Cell
        One each.
    samples : mapping
        Lines of samples files: by index of a cell, then by document.
    scores : mapping
        Score of a sample by (index of its cell, document), where it is known.
    notes : tuple of str
        What could not be compared, and why.
    """

    cells: tuple[Cell, ...]
    samples: Mapping[int, Mapping[int, Mapping[str, Any]]]
    scores: Mapping[tuple[int, int], float]
    notes: tuple[str, ...]

    def counts(self, origin: Mapping[int, int]) -> dict[int, tuple[int, int, int]]:
        """Answers unlike full KV's, answers compared, and the first cell to look at.

        Parameters
        ----------
        origin : mapping
            Where the count of a cell goes: seeds that were joined count together.
        """
        counted: dict[int, tuple[int, int, int]] = {}
        for cell in self.cells:
            place = origin[cell.index]
            unlike, compared, first = counted.get(place, (0, 0, cell.index))
            counted[place] = (unlike + len(cell.differing), compared + cell.compared, first)
        return counted


def find_differences(cells: pd.DataFrame, scores: pd.DataFrame) -> Differences:
    """Compare the answers of every cell with full KV's.

    Parameters
    ----------
    cells : DataFrame
        As `sparsemm_eval.report.results.load` gives them, seeds not joined.
    scores : DataFrame
        The frame of `score_samples`.
    """
    by_sample = {
        (cell, doc): float(score)
        for cell, doc, score in zip(scores["cell"], scores["doc_id"], scores["score"], strict=True)
    }
    measured = cells[(cells["source"] == "measured") & cells["samples_files"].map(bool)]
    full = measured["method"] == "fullkv"
    samples: dict[int, Mapping[int, Mapping[str, Any]]] = {}
    notes: dict[str, None] = {}
    for index, cell in measured.iterrows():
        try:
            samples[index] = _by_document(cell["samples_files"])
        except NoScores as error:
            notes[f"Not compared: {error}."] = None
    compared = []
    for index, cell in by_budget(measured[~full]).iterrows():
        reference = _reference(cell, measured[full & measured.index.isin(samples)])
        if index in samples and reference is not None:
            compared.append(_compare(index, reference, samples, by_sample))
    return Differences(tuple(compared), samples, by_sample, tuple(notes))


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


def _by_document(paths: Sequence[Path]) -> dict[int, Mapping[str, Any]]:
    return {line["doc_id"]: line for path in paths for line in read_samples(path)}


def _compare(
    index: int,
    reference: int,
    samples: Mapping[int, Mapping[int, Mapping[str, Any]]],
    scores: Mapping[tuple[int, int], float],
) -> Cell:
    own, full = samples[index], samples[reference]
    both = [doc for doc in own if doc in full]
    unlike = [doc for doc in both if answer(own[doc]) != answer(full[doc])]

    def closeness(doc: int) -> tuple[float, int]:
        pair = (scores.get((index, doc)), scores.get((reference, doc)))
        return (0.0 if None in pair else -abs(pair[0] - pair[1]), doc)

    return Cell(index, reference, tuple(sorted(unlike, key=closeness)), len(both))


def answer(line: Mapping[str, Any]) -> str:
    """What was answered, as one text."""
    text = line.get("filtered_resps", line.get("resps", ""))
    while isinstance(text, list) and len(text) == 1:
        text = text[0]
    return text if isinstance(text, str) else str(text)


@dataclass
class Browser:
    """What the samples browser shows.

    Parameters
    ----------
    data : dict
        ``cells``, and their ``documents`` by model and task.
    images : list
        Data URI, width and height of each image.
    notes : list of str
        Sentences above it.
    """

    data: dict[str, list] = field(default_factory=lambda: {"cells": [], "documents": []})
    images: list[tuple[str, int, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def browse(
    cells: pd.DataFrame, differences: Differences, count: int, visuals: Visuals | None
) -> Browser:
    """Collect what the browser shows: the first `count` samples of each cell, their images once.

    Parameters
    ----------
    cells : DataFrame
        Those that were compared.
    differences : Differences
        From `find_differences`.
    count : int
        Samples of a cell.
    visuals : callable, optional
        Images of documents by task and document number; None leaves images out. If it raises a
        ValueError or OSError, the page has no images of that task and says why.
    """
    browser = Browser(notes=list(differences.notes))
    shown = [cell for cell in differences.cells if cell.differing]
    if not shown:
        browser.notes.append(_ALL_EQUAL if differences.cells else _NOTHING_TO_COMPARE)
        return browser
    tasks: dict[str, set[int]] = {}
    for cell in shown:
        tasks.setdefault(cells.at[cell.index, "task"], set()).update(cell.differing[:count])
    images = Images()
    places = _images(tasks, visuals, images, browser.notes)
    groups: dict[int, int] = {}
    named = choices(cells)
    for cell in shown:
        task = cells.at[cell.index, "task"]
        if cell.reference not in groups:
            groups[cell.reference] = len(groups)
            browser.data["documents"].append({})
        documents = browser.data["documents"][groups[cell.reference]]
        own, full = differences.samples[cell.index], differences.samples[cell.reference]
        rows = []
        for doc in cell.differing[:count]:
            line = full[doc]
            documents[doc] = (
                str(line.get("input", "")), target(line), answer(line), places.get((task, doc), ()),
            )  # fmt: skip
            pair = (differences.scores.get((each, doc)) for each in (cell.index, cell.reference))
            rows.append((doc, answer(own[doc]), *pair))
        browser.data["cells"].append(
            {
                "cell": int(cell.index),
                **named.loc[cell.index],
                "documents": groups[cell.reference],
                "differ": len(cell.differing),
                "of": cell.compared,
                "samples": rows,
            }
        )
    browser.images = images.kept
    return browser


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
    if not text.startswith("["):
        return text
    try:
        entries = literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return "\n".join(dict.fromkeys(map(str, entries)))


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
