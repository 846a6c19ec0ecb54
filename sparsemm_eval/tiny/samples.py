"""Samples of the eight miniature benchmarks: a drawn image and its question in public columns.

Every prompt is one of :mod:`~sparsemm_eval.tiny.documents` or :mod:`~sparsemm_eval.tiny.pictures`,
and every answer is right because the image was drawn from it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import datasets
import numpy as np
from PIL import Image

from .documents import PAGE, Question, draw_document, value_question
from .pictures import (
    CHOICES,
    OPTIONS,
    Kind,
    Picture,
    captions,
    draw_chart,
    draw_scene,
    draw_signs,
    draw_word,
)

Row = dict[str, Any]
_Asked = tuple[Image.Image, Question]
_Asker = Callable[[np.random.Generator], _Asked]

_STRING, _INTEGER = datasets.Value("string"), datasets.Value("int64")
_STRINGS, _IMAGE = datasets.List(_STRING), datasets.Image()


def _document(rng: np.random.Generator) -> _Asked:
    document = draw_document(rng, PAGE)
    question = value_question(document, int(rng.integers(len(document.entries))))
    # Grey holds all there is, in a third of the space.
    return document.image.convert("L"), question


def _picture(
    rng: np.random.Generator, draw: Callable[[np.random.Generator], Picture], kind: Kind
) -> _Asked:
    """Draw until a picture has questions of the kind, and ask one of them."""
    while True:
        picture = draw(rng)
        asked = [question for of, question in picture.questions if of is kind]
        if kind is Kind.COUNT:
            # The first is for the shape that comes in any number; the other's answer is always 1.
            asked = asked[:1]
        if asked:
            return picture.image, asked[int(rng.integers(len(asked)))]


def _asker(draw: Callable[..., Picture], kind: Kind, **bounds: int) -> _Asker:
    return partial(_picture, draw=partial(draw, **bounds), kind=kind)


_WORD = _asker(draw_word, Kind.WORD)
_LONE_WORD = _asker(draw_signs, Kind.WORD, least=1, most=1)
_CAPTION = _asker(draw_signs, Kind.CAPTION, least=1, most=1)
_SIGN = _asker(draw_signs, Kind.SIGN, least=2, most=4)
_BAR, _EXTREME = _asker(draw_chart, Kind.BAR), _asker(draw_chart, Kind.EXTREME)
_COUNT, _COLOR = _asker(draw_scene, Kind.COUNT), _asker(draw_scene, Kind.COLOR)
_RELATION, _EXISTENCE = _asker(draw_scene, Kind.RELATION), _asker(draw_scene, Kind.EXISTENCE)
_CHOICE = _asker(draw_scene, Kind.CHOICE)

DOCVQA = datasets.Features(
    {
        "questionId": _STRING,
        "question": _STRING,
        "question_types": _STRINGS,
        "image": _IMAGE,
        "docId": _INTEGER,
        "ucsf_document_id": _STRING,
        "ucsf_document_page_no": _STRING,
        "answers": _STRINGS,
        "data_split": _STRING,
    }
)


def docvqa(rng: np.random.Generator, number: int) -> tuple[Row, ...]:
    """A page, asked for one value."""
    image, question = _document(rng)
    return (
        {
            "questionId": str(number),
            "question": question.prompt,
            "question_types": ["form"],
            "image": image,
            "docId": number,
            "ucsf_document_id": f"drawn-{number}",
            "ucsf_document_page_no": "1",
            "answers": [question.answer],
            "data_split": "val",
        },
    )


OCRBENCH = datasets.Features(
    {
        "dataset": _STRING,
        "question": _STRING,
        "question_type": _STRING,
        "answer": _STRINGS,
        "image": _IMAGE,
    }
)
_OCR_TYPES: tuple[tuple[str, _Asker], ...] = (
    ("Regular Text Recognition", _WORD),
    ("Irregular Text Recognition", _LONE_WORD),
    ("Scene Text-centric VQA", _SIGN),
    ("Doc-oriented VQA", _EXTREME),
    ("Key Information Extraction", _document),
    ("Digit String Recognition", _BAR),
)


def ocrbench(rng: np.random.Generator, number: int) -> tuple[Row, ...]:
    """Six of its ten types of question in turn."""
    kind, ask = _OCR_TYPES[number % len(_OCR_TYPES)]
    image, question = ask(rng)
    return (
        {
            "dataset": "drawn",
            "question": question.prompt,
            "question_type": kind,
            "answer": [question.answer],
            "image": image,
        },
    )


TEXTVQA = datasets.Features(
    {
        "image_id": _STRING,
        "question_id": _INTEGER,
        "question": _STRING,
        "image": _IMAGE,
        "answers": _STRINGS,
        "answer": _STRING,
        "ocr_tokens": _STRINGS,
    }
)


def textvqa(rng: np.random.Generator, number: int) -> tuple[Row, ...]:
    """Two to four signs, asked for the text of one; its ten annotators agree."""
    image, question = _SIGN(rng)
    return (
        {
            "image_id": f"drawn-{number}",
            "question_id": number,
            "question": question.prompt,
            "image": image,
            "answers": [question.answer] * 10,
            "answer": question.answer,
            # No OCR system read the image, and the answer is not given away.
            "ocr_tokens": [],
        },
    )


CHARTQA = datasets.Features(
    {"type": _STRING, "question": _STRING, "answer": _STRING, "image": _IMAGE}
)


def chartqa(rng: np.random.Generator, number: int) -> tuple[Row, ...]:
    """In turn the longest or shortest bar, and the number of a bar."""
    kind, ask = (("human_test", _EXTREME), ("augmented_test", _BAR))[number % 2]
    image, question = ask(rng)
    return ({"type": kind, "question": question.prompt, "answer": question.answer, "image": image},)


TEXTCAPS = datasets.Features(
    {
        "question_id": _STRING,
        "question": _STRING,
        "image": _IMAGE,
        "image_id": _INTEGER,
        "caption_str": _STRINGS,
    }
)


def textcaps(rng: np.random.Generator, number: int) -> tuple[Row, ...]:
    """A lone sign and five ways to describe it."""
    image, question = _CAPTION(rng)
    _, color, *_, text = question.answer.split()
    return (
        {
            "question_id": str(number),
            "question": question.prompt,
            "image": image,
            "image_id": number,
            "caption_str": list(captions(color, text)),
        },
    )


MMBENCH = datasets.Features(
    {
        "index": _INTEGER,
        "question": _STRING,
        "hint": _STRING,
        "answer": _STRING,
        **dict.fromkeys(CHOICES, _STRING),
        "category": _STRING,
        "image": _IMAGE,
        "source": _STRING,
        "L2-category": _STRING,
        "comment": _STRING,
        "split": _STRING,
    }
)


def mmbench(rng: np.random.Generator, number: int) -> tuple[Row, ...]:
    """A scene, asked for a colour out of four; each question once, in one order of its options."""
    image, question = _CHOICE(rng)
    asked, listed = question.prompt.split(f" {OPTIONS}\n")
    return (
        {
            "index": number,
            "question": asked,
            # The word with which the benchmark says that there is none.
            "hint": "nan",
            "answer": question.answer,
            **dict(line.split(". ") for line in listed.splitlines()),
            "category": "attribute_recognition",
            "image": image,
            "source": "drawn",
            "L2-category": "finegrained_perception (instance-level)",
            "comment": "nan",
            "split": "dev",
        },
    )


GQA_INSTRUCTIONS = datasets.Features(
    {
        "id": _STRING,
        "imageId": _STRING,
        "question": _STRING,
        "answer": _STRING,
        "fullAnswer": _STRING,
        "isBalanced": datasets.Value("bool"),
    }
)
GQA_IMAGES = datasets.Features({"id": _STRING, "image": _IMAGE})


def gqa(rng: np.random.Generator, number: int) -> tuple[Row, ...]:
    """In turn whether one shape is left of another, and whether there is one; image apart."""
    image, question = (_RELATION, _EXISTENCE)[number % 2](rng)
    picture = f"n{number}"
    return (
        {
            "id": str(number),
            "imageId": picture,
            "question": question.prompt,
            "answer": question.answer,
            "fullAnswer": question.answer,
            "isBalanced": True,
        },
        {"id": picture, "image": image},
    )


VQAV2 = datasets.Features(
    {
        "question_type": _STRING,
        "multiple_choice_answer": _STRING,
        "answers": datasets.List(
            {"answer": _STRING, "answer_confidence": _STRING, "answer_id": _INTEGER}
        ),
        "image_id": _INTEGER,
        "answer_type": _STRING,
        "question_id": _INTEGER,
        "question": _STRING,
        "image": _IMAGE,
    }
)


def vqav2(rng: np.random.Generator, number: int) -> tuple[Row, ...]:
    """In turn how many of a shape there are, and its colour; its ten annotators agree."""
    start, kind, ask = (
        ("how many", "number", _COUNT),
        ("what color is the", "other", _COLOR),
    )[number % 2]
    image, question = ask(rng)
    annotation = {"answer": question.answer, "answer_confidence": "yes"}
    return (
        {
            "question_type": start,
            "multiple_choice_answer": question.answer,
            "answers": [{**annotation, "answer_id": person} for person in range(1, 11)],
            "image_id": number,
            "answer_type": kind,
            "question_id": number,
            "question": question.prompt,
            "image": image,
        },
    )
