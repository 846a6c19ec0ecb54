"""Documents drawn on a grid of glyphs, with the place of every glyph known.

A document is a page of ``KEY:VALUE`` entries. One glyph fills one cell, and one cell becomes one
image token of the tiny model, so visual scores need no annotation. Every answer to a question
about a document is a span of its transcription, and so every character of an answer has a box.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sparsemm_eval.errors import UserError

Box = tuple[int, int, int, int]

_KEY_WORDS = (
    "AGE ARM BAG BED BOX BUS CAR CAT CUP DAY DOB DOG EAR EGG END ETA EYE FAX FEE FLY GAS GPS "
    "HAT ICE INK JAM JOB KEY KIT LAT LEG LEN LON MAP MAX MIN MIX NET OIL PEN PIN QTY REF ROW "
    "RUN SEA SKY SUM SUN TAG TAX TEA TEL TIP TON TOP UID URL VAN VAT WEB WGT YEN ZIP"
)
KEYS: tuple[str, ...] = tuple(_KEY_WORDS.split())
VALUE_CHARACTERS = string.ascii_uppercase + string.digits
ALPHABET = VALUE_CHARACTERS + ":"
SLOT_COLUMNS = 11
VALUE_LENGTHS = (3, 6)
READ_ALL = "*\n"

# Proportional faces are smaller: their widest letters must stay within a cell.
_FONTS = (
    ("DejaVuSansMono.ttf", (13, 14, 15)),
    ("DejaVuSansMono-Bold.ttf", (13, 14, 15)),
    ("DejaVuSans.ttf", (11, 12, 13)),
    ("DejaVuSerif.ttf", (10, 11, 12)),
)
_CONTRAST = (0.7, 1.0)
NOISE = 0.03


class Split(IntEnum):
    """Who draws: the three streams of documents share no seed."""

    TRAIN = 0
    HELD_OUT = 1
    BENCHMARK = 2


def stream(split: Split, seed: int, index: int = 0) -> np.random.Generator:
    """Return the generator of one document, or of one batch.

    Parameters
    ----------
    split : Split
        Purpose of the documents; generators of different splits never share a seed.
    seed : int
        Non-negative seed of the run or of the benchmark.
    index : int
        Non-negative number of the document or batch within the stream.

    Returns
    -------
    numpy.random.Generator
    """
    return np.random.default_rng([int(split), seed, index])


@dataclass(frozen=True)
class Layout:
    """Shape of a document.

    Attributes
    ----------
    rows, columns : int
        Size of the grid in cells; ``columns`` is a multiple of 11, the width of a slot.
    min_entries, max_entries : int
        Bounds (inclusive) of the number of entries.
    cell : int
        Side of a cell in pixels, at least 16.

    Raises
    ------
    ValueError
        If the grid cannot hold the entries, or the cell is too small for a glyph.
    """

    rows: int
    columns: int
    min_entries: int = 1
    max_entries: int = 1
    cell: int = 16

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1 or self.columns % SLOT_COLUMNS:
            raise UserError(f"columns must be a positive multiple of {SLOT_COLUMNS}, rows positive")
        if not 1 <= self.min_entries <= self.max_entries <= min(self.slots, len(KEYS)):
            raise UserError(
                f"entries must lie between 1 and {min(self.slots, len(KEYS))},"
                f" not {self.min_entries} to {self.max_entries}"
            )
        if self.cell < 16:
            raise UserError("a cell is at least 16 pixels wide")

    @property
    def slots(self) -> int:
        """Number of places for an entry."""
        return self.rows * (self.columns // SLOT_COLUMNS)

    @property
    def image_tokens(self) -> int:
        """Number of image tokens of a document: one a cell."""
        return self.rows * self.columns

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the image in pixels."""
        return self.columns * self.cell, self.rows * self.cell


PAGE = Layout(rows=16, columns=22, min_entries=10, max_entries=20)


@dataclass(frozen=True)
class Glyph:
    """A drawn character and the box of its ink, ``(x0, y0, x1, y1)`` in pixels, end exclusive."""

    char: str
    box: Box


@dataclass(frozen=True)
class Entry:
    """A ``KEY:VALUE`` line and the cell of its first character."""

    key: str
    value: str
    row: int
    column: int

    @property
    def text(self) -> str:
        """The entry as the page writes it."""
        return f"{self.key}:{self.value}"


@dataclass(frozen=True)
class Question:
    """A prompt, its answer, and where the answer begins in the document's transcription, if so."""

    prompt: str
    answer: str
    start: int = -1


@dataclass(frozen=True)
class Document:
    """A drawn page.

    Attributes
    ----------
    image : PIL.Image.Image
        RGB image of ``layout.size`` pixels.
    layout : Layout
        Shape of the page.
    entries : tuple of Entry
        Entries in reading order: row by row, left to right.
    glyphs : tuple of Glyph
        One glyph per character of ``text`` other than the newlines, in the same order.
    text : str
        Transcription: the entries in reading order, one a line.
    """

    image: Image.Image
    layout: Layout
    entries: tuple[Entry, ...]
    glyphs: tuple[Glyph, ...]
    text: str

    @property
    def text_boxes(self) -> tuple[Box | None, ...]:
        """Box of every character of ``text``; None for a newline, which leaves no ink."""
        boxes = iter(self.glyphs)
        return tuple(None if char == "\n" else next(boxes).box for char in self.text)

    def boxes_of(self, question: Question) -> tuple[Box | None, ...]:
        """Return the box of every character of a question's answer.

        Parameters
        ----------
        question : Question
            A question about this document.

        Returns
        -------
        tuple of (Box or None)
            As long as ``question.answer``; None for a newline.

        Raises
        ------
        ValueError
            If the answer does not stand in the transcription where the question says.
        """
        stop = question.start + len(question.answer)
        if self.text[question.start : stop] != question.answer:
            raise UserError(f"{question.prompt!r} is not a question about this document")
        return self.text_boxes[question.start : stop]


def value_question(document: Document, index: int) -> Question:
    """Ask for the value of entry ``index``: ``?KEY:``."""
    entry = document.entries[index]
    return Question(f"?{entry.key}:", entry.value, _value_start(document, index))


def onward_question(document: Document, index: int, entries: int = 3) -> Question:
    """Ask to read on from the value of entry ``index``, ``entries`` entries long: ``>KEY:``."""
    chosen = document.entries[index : index + entries]
    answer = "\n".join([chosen[0].value, *(entry.text for entry in chosen[1:])])
    return Question(f">{chosen[0].key}:", answer, _value_start(document, index))


def transcript_question(document: Document) -> Question:
    r"""Ask for the whole page: ``*\n``."""
    return Question(READ_ALL, document.text, 0)


def _value_start(document: Document, index: int) -> int:
    before = sum(len(entry.text) + 1 for entry in document.entries[:index])
    return before + len(document.entries[index].key) + 1


def draw_document(rng: np.random.Generator, layout: Layout = PAGE) -> Document:
    """Draw a page of random entries; the same generator state draws the same page.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of all randomness.
    layout : Layout
        Shape of the page.

    Returns
    -------
    Document
    """
    entries = _random_entries(rng, layout)
    cells = [
        (char, entry.row, entry.column + offset)
        for entry in entries
        for offset, char in enumerate(entry.text)
    ]
    pixels, boxes = draw_cells(rng, cells, layout)
    glyphs = tuple(Glyph(char, box) for (char, _, _), box in zip(cells, boxes, strict=True))
    text = "\n".join(entry.text for entry in entries)
    return Document(Image.fromarray(pixels).convert("RGB"), layout, entries, glyphs, text)


def _random_entries(rng: np.random.Generator, layout: Layout) -> tuple[Entry, ...]:
    count = int(rng.integers(layout.min_entries, layout.max_entries + 1))
    slots = np.sort(rng.choice(layout.slots, count, replace=False))
    keys = rng.choice(len(KEYS), count, replace=False)
    entries = []
    for slot, key in zip(slots, keys, strict=True):
        value = draw_value(rng)
        row, place = divmod(int(slot), layout.columns // SLOT_COLUMNS)
        # The last cell of a slot stays blank, so neighbouring entries never touch.
        offset = int(rng.integers(0, SLOT_COLUMNS - 1 - len(KEYS[key]) - 1 - len(value) + 1))
        entries.append(Entry(KEYS[key], value, row, place * SLOT_COLUMNS + offset))
    return tuple(entries)


def draw_value(rng: np.random.Generator) -> str:
    """Draw what an entry or a sign says: three to six letters and digits."""
    length = int(rng.integers(VALUE_LENGTHS[0], VALUE_LENGTHS[1] + 1))
    letters = rng.integers(0, len(VALUE_CHARACTERS), length)
    return "".join(VALUE_CHARACTERS[letter] for letter in letters)


def draw_cells(
    rng: np.random.Generator, cells: list[tuple[str, int, int]], layout: Layout
) -> tuple[np.ndarray, list[Box]]:
    """Draw characters into cells, in one face, size and contrast, each row a pixel off.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of face, size, contrast, jitter and noise.
    cells : list of (str, int, int)
        Character, row and column of every glyph; one glyph a cell.
    layout : Layout
        Shape of the page.

    Returns
    -------
    pixels : numpy.ndarray
        Grey image, uint8, shape (height, width).
    boxes : list of Box
        Box of every glyph's ink, in the order of ``cells``; it lies within the glyph's cell.
    """
    ink, boxes = draw_ink(rng, cells, layout)
    noise = rng.standard_normal(ink.shape, dtype=np.float32)
    grey = 255 - ink + np.float32(NOISE * 255) * noise
    return np.clip(grey + 0.5, 0, 255).astype(np.uint8), boxes


def draw_ink(
    rng: np.random.Generator, cells: list[tuple[str, int, int]], layout: Layout
) -> tuple[np.ndarray, list[Box]]:
    """Draw characters as :func:`draw_cells` does, on nothing and without noise.

    Returns
    -------
    ink : numpy.ndarray
        How much darker than paper each pixel is, float32 in 0..255, shape (height, width).
    boxes : list of Box
        Box of every glyph's ink.
    """
    face, sizes = _FONTS[int(rng.integers(len(_FONTS)))]
    size = sizes[int(rng.integers(len(sizes)))]
    contrast = rng.uniform(*_CONTRAST)
    jitter = rng.integers(-1, 2, (layout.rows, 2))
    width, height = layout.size
    margin = (layout.cell - 16) // 2
    ink = np.zeros((height, width), np.uint8)
    boxes = []
    for char, row, column in cells:
        mask, left, top = _glyph_mask(face, size, char)
        x0 = column * layout.cell + margin + left + int(jitter[row, 0])
        y0 = row * layout.cell + margin + top + int(jitter[row, 1])
        x1, y1 = x0 + mask.shape[1], y0 + mask.shape[0]
        ink[y0:y1, x0:x1] = mask
        boxes.append((x0, y0, x1, y1))
    return np.float32(contrast) * ink, boxes


@cache
def _glyph_mask(face: str, size: int, char: str) -> tuple[np.ndarray, int, int]:
    """Return a glyph's ink and its left and top offset in a 16-pixel cell."""
    font, baseline = _font(face, size)
    canvas = Image.new("L", (48, 48))
    # Drawn in the middle of a wide canvas: whatever leaves the cell would show.
    start = 24 - round(font.getlength(char) / 2)
    ImageDraw.Draw(canvas).text((start, 16 + baseline), char, fill=255, font=font, anchor="ls")
    x0, y0, x1, y1 = canvas.getbbox()
    return np.asarray(canvas.crop((x0, y0, x1, y1))), x0 - 16, y0 - 16


@cache
def _font(face: str, size: int) -> tuple[ImageFont.FreeTypeFont, int]:
    """Return a font and the baseline that centres the alphabet in a 16-pixel cell."""
    import matplotlib  # for the fonts that come with it

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / face
    font = ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)
    tops, bottoms = zip(*(font.getbbox(c, anchor="ls")[1::2] for c in ALPHABET), strict=True)
    return font, 8 - (min(tops) + max(bottoms)) // 2
