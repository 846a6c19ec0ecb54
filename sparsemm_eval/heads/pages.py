"""Pages to chase heads on: an image, what asks for its content, and where that stands.

Drawn documents, synthdog-en-detection, COCO detection, or a JSONL file of one's own.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from sparsemm_eval.engine.requests import image_hash, open_image, truncated_images
from sparsemm_eval.errors import UserError, one_line
from sparsemm_eval.families import Box
from sparsemm_eval.stored import NotUnderstood, read_json_as, read_json_lines
from sparsemm_eval.tiny.documents import (
    PAGE,
    Document,
    Layout,
    Split,
    draw_document,
    stream,
    transcript_question,
)

if TYPE_CHECKING:
    import datasets

    from sparsemm_eval.engine.checkpoint import Checkpoint

# Drawn documents of their own: no benchmark, no training page and no test of one is among them.
CHASE_SEED = 7_001
READ_PROMPT = "Provide all the OCR results of this image."
NAME_PROMPT = "Describe the objects in this image."
SYNTHDOG = "nnethercott/synthdog-en-detection"
COCO = "detection-datasets/coco"
# What PIL raises for a file that is no image, or a broken or an enormous one.
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
_MOST_OF_COCO = 1 << 30  # bytes; train2017 has 450 million
# Shorter tokens, such as "a" or "in", stand in some category's name by chance.
SHORTEST_OF_NAME = 3


@dataclass(frozen=True)
class Chunk:
    """Text that stands in one place, and its box in pixels; None for what leaves no ink."""

    text: str
    box: Box | None


@dataclass(frozen=True, eq=False)
class Page:
    """An image and its annotation.

    Parameters
    ----------
    image : Image
        RGB.
    prompt : str
        What asks the model for the content; the chat template goes around it.
    chunks : tuple of Chunk
        What is annotated; none if nothing is.
    aligned : bool
        Whether the chunks are the characters of the whole right answer, in order: then this known
        text is fed, else the model generates.
    shortest : int
        Characters a generated token has at least to belong to a chunk.

    Raises
    ------
    UserError
        If a box is empty or not within the image, or a chunk has no text.
    """

    image: Image.Image
    prompt: str
    chunks: tuple[Chunk, ...]
    aligned: bool = False
    shortest: int = 1

    def __post_init__(self) -> None:
        _check(self.chunks, self.image.size)

    @property
    def text(self) -> str:
        """All chunks in order; where they are aligned, the right answer."""
        return "".join(chunk.text for chunk in self.chunks)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that is asked and annotated."""
        chunks = [(chunk.text, chunk.box) for chunk in self.chunks]
        parts = [image_hash(self.image), self.prompt, chunks, self.aligned, self.shortest]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def read_pages(data: str, count: int, known_text: bool = True) -> Iterator[Page]:
    """The first pages of a data set.

    Parameters
    ----------
    data : str
        "drawn"; "synthdog" and "coco", from the hub, or "synthdog:FOLDER" and "coco:FOLDER" from
        disk; or the path of a JSONL file.
    count : int
        Pages at most.
    known_text : bool
        In which form drawn documents come; see `drawn_pages`.

    Raises
    ------
    UserError
        In one sentence, if there is no such data, or, with the first page, if it cannot be read.
    """
    check_data(data)
    name, _, folder = data.partition(":")
    if data == "drawn":
        return drawn_pages(count, known_text)
    if name == "synthdog":
        return islice(_synthdog(data, folder), count)
    if name == "coco":
        local = folder and not list(Path(folder).rglob("*.parquet"))
        return islice(_coco_files(Path(folder)) if local else _coco(data, folder), count)
    return _jsonl(Path(data), count)


def check_data(data: str) -> None:
    """Raise UserError unless this is the name of a data set that `read_pages` knows, or a file."""
    known = data == "drawn" or data.partition(":")[0] in ("synthdog", "coco")
    if not known and not Path(data).is_file():
        raise UserError(
            f"data={data!r}: it must be drawn, synthdog, coco, synthdog:FOLDER, coco:FOLDER or a "
            "JSONL file that exists"
        )


def drawn_pages(count: int, known_text: bool = True, layout: Layout = PAGE) -> Iterator[Page]:
    """Drawn documents.

    Parameters
    ----------
    count : int
        How many.
    known_text : bool
        Whether their characters are the chunks and their transcription is fed, in the way that
        the embedded models are trained; else the entries are, and what is read is generated.
    layout : Layout
        What every document looks like.
    """
    for number in range(count):
        document = draw_document(stream(Split.HELD_OUT, CHASE_SEED, number), layout)
        if known_text:
            question = transcript_question(document)
            boxes = document.boxes_of(question)
            chunks = tuple(map(Chunk, question.answer, boxes))
            yield Page(document.image, question.prompt, chunks, aligned=True)
        else:
            yield Page(document.image, READ_PROMPT, tuple(_entries(document)))


def pages_for(checkpoint: Checkpoint, data: str, count: int) -> Iterator[Page]:
    """As `read_pages`, with drawn documents in the form that a checkpoint can read best."""
    sample = "KEY:1"
    ids = checkpoint.processor.tokenizer(sample, add_special_tokens=False)["input_ids"]
    # One token a character: an embedded model, trained on these documents and their prompt.
    return read_pages(data, count, len(ids) == len(sample))


def _entries(document: Document) -> Iterator[Chunk]:
    glyphs = iter(document.glyphs)
    for entry in document.entries:
        boxes = [next(glyphs).box for _ in entry.text]
        yield Chunk(entry.text, union(boxes))


def union(boxes: Iterable[Box | None]) -> Box | None:
    """The smallest box around some; None if there is none."""
    known = [box for box in boxes if box is not None]
    if not known:
        return None
    x0, y0, x1, y1 = zip(*known, strict=True)
    return min(x0), min(y0), max(x1), max(y1)


def read_image(file: Path | io.BytesIO, name: str) -> Image.Image:
    """An image of any format that PIL reads, as RGB.

    Raises
    ------
    UserError
        If it cannot be read, or is cut off; `name` says which it is.
    """
    try:
        opened = open_image(file) if isinstance(file, Path) else Image.open(file)
        with truncated_images(False), opened as image:
            return image.convert("RGB")
    except _UNREADABLE as error:
        raise UserError(f"{name} cannot be read ({one_line(error)})") from error


def _synthdog(data: str, folder: str) -> Iterator[Page]:
    """Column 2_coord: a list of chunk and coord, two corners or a polygon in pixels."""
    for number, row in enumerate(_rows(data, folder or SYNTHDOG, "train")):
        column = _column(row, "2_coord", data)
        # As `datasets` gives it, or as older versions did: a dict of lists.
        pairs = (
            zip(column["chunk"], column["coord"], strict=True)
            if isinstance(column, dict)
            else ((one["chunk"], one["coord"]) for one in column)
        )
        yield _page(_image(row, data, number), READ_PROMPT, pairs)


def _coco(data: str, folder: str) -> Iterator[Page]:
    """Columns as in detection-datasets/coco: objects with category and bbox, two corners each."""
    rows = _rows(data, folder or COCO, "val")
    names = _class_names(rows.features)
    for number, row in enumerate(rows):
        objects = _column(row, "objects", data)
        labels = [names[one] if names else str(one) for one in objects["category"]]
        pairs = zip(labels, objects["bbox"], strict=True)
        yield _page(_image(row, data, number), NAME_PROMPT, pairs, SHORTEST_OF_NAME)


def _coco_files(folder: Path) -> Iterator[Page]:
    """COCO's own files: one instances*.json, and images beside it or in a folder beside it."""
    files = sorted(folder.rglob("instances*.json"))
    if len(files) != 1:
        raise UserError(
            f"data=coco:{folder}: it holds {len(files)} instances*.json files; give a folder with "
            "one of them and its images"
        )
    try:
        table = read_json_as(files[0], _Coco, _MOST_OF_COCO)
        names = {one.id: one.name for one in table.categories}
        boxes: dict[int, list[tuple[str, list[float]]]] = {one.id: [] for one in table.images}
        for one in table.annotations:
            if not one.iscrowd:
                x, y, width, height = one.bbox
                corners = [x, y, x + width, y + height]
                boxes[one.image_id].append((names[one.category_id], corners))
    except (NotUnderstood, LookupError) as error:
        raise UserError(f"{files[0]}: not a COCO instances file ({one_line(error)})") from error
    places = {path.name: path for path in sorted(folder.rglob("*")) if path.is_file()}
    for one in table.images:
        name = Path(one.file_name).name
        if name not in places:
            raise UserError(f"{files[0]}: image {one.file_name[:100]} is not in {folder}")
        image = read_image(places[name], f"{files[0]}: the image")
        yield _page(image, NAME_PROMPT, boxes[one.id], SHORTEST_OF_NAME)


@dataclass(frozen=True)
class _CocoCategory:
    id: int
    name: str


@dataclass(frozen=True)
class _CocoImage:
    id: int
    file_name: str


@dataclass(frozen=True)
class _CocoBox:
    """``bbox``: left, top, width and height in pixels."""

    image_id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    iscrowd: int = 0


@dataclass(frozen=True)
class _Coco:
    categories: tuple[_CocoCategory, ...]
    images: tuple[_CocoImage, ...]
    annotations: tuple[_CocoBox, ...]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _ChunkLine(_Strict):
    text: str
    box: tuple[float, float, float, float]


class _Line(_Strict):
    image: str
    chunks: list[_ChunkLine]
    prompt: str = READ_PROMPT


def _jsonl(path: Path, count: int) -> Iterator[Page]:
    """One page a line: {"image": path, "chunks": [{"text": …, "box": [x0, y0, x1, y1]}]}."""
    # All lines before the first page: a fault in the last one must not cost hours.
    for line, chunks, where in list(_lines(path, count)):
        image = read_image(path.parent / line.image, f"{where}: the image")
        yield Page(image, line.prompt, chunks)


def _lines(path: Path, count: int) -> Iterator[tuple[_Line, tuple[Chunk, ...], str]]:
    for number, value in islice(_values(path), count):
        where = f"{path}:{number}"
        try:
            line = _Line.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise UserError(f"{where}: {field or 'line'}: {first['msg']}") from error
        chunks = tuple(Chunk(chunk.text, chunk.box) for chunk in line.chunks)
        try:
            with open_image(path.parent / line.image) as image:
                _check(chunks, image.size)
        except _UNREADABLE as error:
            raise UserError(f"{where}: {one_line(error)}") from error
        yield line, chunks, where


def _values(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        yield from read_json_lines(path)
    except NotUnderstood as error:
        words = str(error)  # "line 3: …", as all errors here name a line, or one of the whole file
        place = f"{path}:" if words.startswith("line ") else f"data={path}: "
        raise UserError(place + words.removeprefix("line ")) from error


def _rows(data: str, source: str, split: str) -> datasets.IterableDataset:
    """A data set of the hub, or in a folder; read as it is used, not downloaded whole."""
    import datasets

    try:
        return datasets.load_dataset(source, split=split, streaming=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"data={data}: {source} cannot be read ({one_line(error)}); a copy on disk is given as "
            f"{data.partition(':')[0]}:FOLDER"
        ) from error


def _column(row: dict[str, Any], name: str, data: str) -> Any:
    if name not in row:
        raise UserError(f"data={data}: it has no column {name}, but {', '.join(row)}")
    return row[name]


def _image(row: dict[str, Any], data: str, number: int) -> Image.Image:
    image = _column(row, "image", data)
    if isinstance(image, dict):  # where the file does not say that the column is an image
        image = read_image(io.BytesIO(image["bytes"]), f"data={data}, image {number}: the image")
    return image.convert("RGB")


def _page(
    image: Image.Image, prompt: str, pairs: Iterable[tuple[str, Any]], shortest: int = 1
) -> Page:
    """A page of annotation that is not ours to mend: boxes are cut at the image's edges."""
    chunks = []
    for text, coord in pairs:
        points = np.asarray(coord, dtype=float).reshape(-1, 2)
        box = _clip((*points.min(0).tolist(), *points.max(0).tolist()), image.size)
        if text.strip() and box is not None:
            chunks.append(Chunk(text, box))
    return Page(image, prompt, tuple(chunks), shortest=shortest)


def _check(chunks: Iterable[Chunk], size: tuple[int, int]) -> None:
    for chunk in chunks:
        if not chunk.text:
            raise UserError(f"the chunk at box {chunk.box} has no text")
        if chunk.box is not None and _clip(chunk.box, size) != chunk.box:
            raise UserError(
                f"box {chunk.box} of chunk {chunk.text!r} is empty or outside its image of "
                f"{size[0]}x{size[1]} pixels"
            )


def _clip(box: Box, size: tuple[int, int]) -> Box | None:
    x0, y0, x1, y1 = box
    clipped = max(x0, 0), max(y0, 0), min(x1, size[0]), min(y1, size[1])
    return clipped if clipped[0] < clipped[2] and clipped[1] < clipped[3] else None


def _class_names(feature: Any) -> list[str] | None:
    """Names of the first class label anywhere in a data set's features."""
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return feature.names
    parts = feature.values() if isinstance(feature, dict) else [getattr(feature, "feature", None)]
    for part in parts:
        if part is not None and (names := _class_names(part)):
            return names
    return None
