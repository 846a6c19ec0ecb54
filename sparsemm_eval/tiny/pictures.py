"""Pictures beside the documents: signs, charts and scenes, each with the questions it can answer.

Drawn on the same grid of cells as a document, so that to the tiny models they are images of the
same world: letters, and cells of colour.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from .documents import KEYS, NOISE, Layout, Question, draw_ink, draw_value

PICTURE = Layout(7, 22)
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (205, 45, 45),
    "green": (40, 150, 70),
    "blue": (50, 80, 205),
    "yellow": (235, 190, 40),
    "purple": (145, 65, 175),
    "black": (35, 35, 35),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
BLOCK, BAR = "block", "bar"
# Always in this order: five layers that find a colour have none left to look it up in a list.
CHOICES = dict(zip("ABCD", COLORS, strict=False))
OPTIONS = "There are several options:"

CAPTION_PROMPT = "Caption:"
WORD_PROMPT = "What is written in the image?"


class Kind(IntEnum):
    """What a question asks for."""

    TRANSCRIPT = 0
    ONWARD = 1
    VALUE = 2
    WORD = 3
    SIGN = 4
    CAPTION = 5
    BAR = 6
    EXTREME = 7
    COUNT = 8
    COLOR = 9
    RELATION = 10
    EXISTENCE = 11
    CHOICE = 12


@dataclass(frozen=True)
class Mark:
    """A cell of colour: a shape, a ``block`` that fills it, or ``width`` pixels of a ``bar``."""

    color: str
    shape: str
    row: int
    column: int
    width: int = 16


@dataclass(frozen=True)
class Picture:
    """A drawn picture and what can be asked about it.

    Attributes
    ----------
    image : PIL.Image.Image
        RGB image of ``layout.size`` pixels.
    layout : Layout
        Its grid of cells.
    questions : tuple of (Kind, Question)
        Questions with one right answer each.
    """

    image: Image.Image
    layout: Layout
    questions: tuple[tuple[Kind, Question], ...]


def paint(
    rng: np.random.Generator,
    cells: list[tuple[str, int, int]],
    marks: list[Mark],
    layout: Layout = PICTURE,
) -> np.ndarray:
    """Draw characters and marks.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of face, shades, jitter and noise.
    cells : list of (str, int, int)
        Character, row and column of every glyph.
    marks : list of Mark
        Cells of colour.
    layout : Layout
        Shape of the picture.

    Returns
    -------
    numpy.ndarray
        RGB image, uint8, shape (height, width, 3).
    """
    ink, _ = draw_ink(rng, cells, layout)
    pixels = np.repeat(255 - ink[:, :, None], 3, axis=2)
    shades = {name: np.array(rgb) + rng.uniform(-18, 18, 3) for name, rgb in COLORS.items()}
    side = layout.cell
    for mark in marks:
        cover = _cover(mark.shape, mark.width, side)
        if mark.shape in SHAPES:
            cover = np.roll(cover, tuple(rng.integers(-1, 2, 2)), (0, 1))
        y, x = mark.row * side, mark.column * side
        place = pixels[y : y + side, x : x + side]
        place += cover[:, :, None] * (np.float32(shades[mark.color]) - place)
    pixels += np.float32(NOISE * 255) * rng.standard_normal(pixels.shape, dtype=np.float32)
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)


@cache
def _cover(shape: str, width: int, side: int) -> np.ndarray:
    """How much of each pixel of a cell a shape covers, float32 of shape (side, side)."""
    fine = 8
    canvas = Image.new("L", (side * fine, side * fine))
    draw = ImageDraw.Draw(canvas)
    if shape == BLOCK:
        draw.rectangle((0, 0, side * fine, side * fine), fill=255)
    elif shape == BAR:
        draw.rectangle((0, 2 * fine, width * fine - 1, (side - 2) * fine), fill=255)
    elif shape == "circle":
        draw.ellipse((2 * fine, 2 * fine, (side - 2) * fine, (side - 2) * fine), fill=255)
    else:
        center, radius = side * fine / 2, (side / 2 - 2) * fine
        points = [(center + radius * x, center + radius * y) for x, y in _outline(shape)]
        draw.polygon(points, fill=255)
    return np.asarray(canvas.resize((side, side), Image.Resampling.BOX), np.float32) / 255


def _outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape within -1..1, y downward."""
    if shape == "square":
        return [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]
    if shape == "triangle":
        return [(0, -1), (1, 0.9), (-1, 0.9)]
    if shape == "diamond":
        return [(0, -1), (0.8, 0), (0, 1), (-0.8, 0)]
    if shape == "cross":
        arm = 0.33
        return [
            (-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm),
            (arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm),
        ]  # fmt: skip
    angles = np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2, 0.45, 1.1)
    return list(zip(radii * np.sin(angles), -radii * np.cos(angles), strict=True))


def _write(text: str, row: int, column: int) -> list[tuple[str, int, int]]:
    return [(char, row, column + offset) for offset, char in enumerate(text)]


def draw_signs(rng: np.random.Generator, least: int = 1, most: int = 4) -> Picture:
    """Draw signs, each a text in a frame of a colour of its own.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of all randomness.
    least, most : int
        Bounds (inclusive) of the number of signs, within 1 and 4.

    Returns
    -------
    Picture
        A lone sign is asked for its caption and its text, several for the text on each.
    """
    count = int(rng.integers(least, most + 1))
    places = rng.choice(4, count, replace=False)
    colors = rng.choice(list(COLORS), count, replace=False)
    cells, marks, questions = [], [], []
    for place, color in zip(places, colors, strict=True):
        text = draw_value(rng)
        row, slot = 4 * (int(place) // 2), 11 * (int(place) % 2)
        column = slot + int(rng.integers(0, 11 - len(text) - 2))
        cells += _write(text, row + 1, column + 1)
        for x in range(column, column + len(text) + 2):
            for y in range(row, row + 3):
                if y != row + 1 or x in (column, column + len(text) + 1):
                    marks.append(Mark(str(color), BLOCK, y, x))
        questions.append((Kind.SIGN, Question(f"What is on the {color} sign?", text)))
    if count == 1:
        questions.append((Kind.CAPTION, Question(CAPTION_PROMPT, captions(str(color), text)[0])))
        questions.append((Kind.WORD, Question(WORD_PROMPT, text)))
    return Picture(Image.fromarray(paint(rng, cells, marks)), PICTURE, tuple(questions))


def captions(color: str, text: str) -> tuple[str, ...]:
    """Return ways to describe a sign, the plainest first."""
    return (
        f"a {color} sign says {text}",
        f"a {color} sign that says {text}",
        f"a sign in {color} with the text {text}",
        f"a {color} sign reads {text}",
        f"a {color} board that says {text}",
    )


def draw_word(rng: np.random.Generator) -> Picture:
    """Draw one word somewhere on an empty picture."""
    text = draw_value(rng)
    row, column = int(rng.integers(PICTURE.rows)), int(rng.integers(PICTURE.columns - len(text)))
    image = Image.fromarray(paint(rng, _write(text, row, column), []))
    return Picture(image, PICTURE, ((Kind.WORD, Question(WORD_PROMPT, text)),))


def draw_chart(rng: np.random.Generator) -> Picture:
    """Draw a chart of horizontal bars, each with its label and its number before it."""
    count = int(rng.integers(3, 7))
    rows = np.sort(rng.choice(PICTURE.rows, count, replace=False))
    labels = [KEYS[i] for i in rng.choice(len(KEYS), count, replace=False)]
    # Five apart: a bar that is a little longer is still seen to be longer.
    values = 10 + 5 * rng.choice(18, count, replace=False) + rng.integers(0, 5)
    color = str(rng.choice(list(COLORS)))
    cells, marks, questions = [], [], []
    for row, label, value in zip(rows, labels, values, strict=True):
        cells += _write(f"{label}:{value}", int(row), 0)
        length = round(15 * 16 * int(value) / 100)
        for column in range(-(-length // 16)):
            width = min(16, length - 16 * column)
            marks.append(Mark(color, BAR, int(row), 7 + column, width))
        questions.append((Kind.BAR, Question(f"?{label}:", str(value))))
    largest, smallest = labels[int(values.argmax())], labels[int(values.argmin())]
    questions.append((Kind.EXTREME, Question("Which bar is the longest?", largest)))
    questions.append((Kind.EXTREME, Question("Which bar is the shortest?", smallest)))
    return Picture(Image.fromarray(paint(rng, cells, marks)), PICTURE, tuple(questions))


def draw_scene(rng: np.random.Generator, least: int = 2) -> Picture:
    """Draw a scene of shapes in colours, and ask about counts, colours and places.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of all randomness.
    least : int
        Shapes that stand alone, at least; 3 at most.

    Returns
    -------
    Picture
        Only two shapes that stand alone are asked for their places.
    """
    shapes = [str(shape) for shape in rng.permutation(SHAPES)]
    # Some shapes stand alone; one comes in a number that is worth asking for.
    lone = shapes[: int(rng.integers(least, 4))]
    many = [shapes[3]] * int(rng.integers(0, 6))
    things = [*lone, *many]
    places = rng.choice(PICTURE.image_tokens, len(things), replace=False)
    marks = [
        Mark(str(rng.choice(list(COLORS))), shape, *divmod(int(place), PICTURE.columns))
        for shape, place in zip(things, places, strict=True)
    ]
    questions = _scene_questions(rng, marks, lone, shapes[3])
    return Picture(Image.fromarray(paint(rng, [], marks)), PICTURE, tuple(questions))


def _scene_questions(
    rng: np.random.Generator, marks: list[Mark], lone: list[str], repeated: str
) -> list[tuple[Kind, Question]]:
    questions = []
    for shape in (repeated, lone[0]):
        count = sum(mark.shape == shape for mark in marks)
        questions.append((Kind.COUNT, Question(f"How many {_plural(shape)}?", str(count))))
        questions.append((Kind.EXISTENCE, _existence(str(rng.choice(SHAPES)), marks)))
    single = {mark.shape: mark for mark in marks if mark.shape in lone}
    for shape in lone:
        color = single[shape].color
        questions.append((Kind.COLOR, Question(f"What color is the {shape}?", color)))
        if color in CHOICES.values():
            questions.append((Kind.CHOICE, _choice(shape, color)))
    for first, second in zip(lone[:2], lone[1::-1], strict=False):
        left, right = single[first].column, single[second].column
        if abs(left - right) >= 2:
            answer = "yes" if left < right else "no"
            text = f"Is the {first} left of the {second}?"
            questions.append((Kind.RELATION, Question(text, answer)))
    return questions


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _existence(shape: str, marks: list[Mark]) -> Question:
    answer = "yes" if any(mark.shape == shape for mark in marks) else "no"
    return Question(f"Is there a {shape}?", answer)


def _choice(shape: str, color: str) -> Question:
    listed = [f"{letter}. {option}" for letter, option in CHOICES.items()]
    (answer,) = (letter for letter, option in CHOICES.items() if option == color)
    return Question("\n".join([f"What color is the {shape}? {OPTIONS}", *listed, ""]), answer)
