"""How well a checkpoint reads: ordinary generation on documents it has never seen."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from sparsemm_eval.tiny.documents import (
    PAGE,
    Document,
    Layout,
    Question,
    Split,
    draw_document,
    onward_question,
    stream,
    transcript_question,
    value_question,
)
from sparsemm_eval.tiny.pictures import Kind
from sparsemm_eval.tiny.training.packing import draw_pictures

# Held-out documents from this number on are only ever read by the final evaluation.
FINAL = 100_000
_QUESTIONS_A_DOCUMENT = 5
_MARGIN = 8


@dataclass(frozen=True)
class Reading:
    """Scores of one kind of question, each between 0 and 1.

    Attributes
    ----------
    exact : float
        Share of answers equal to the expected one.
    anls : float
        Mean normalised Levenshtein similarity, 0 where it is below one half.
    questions : int
        How many were asked.
    """

    exact: float
    anls: float
    questions: int


def similarity(answer: str, expected: str) -> float:
    """Return the normalised Levenshtein similarity of two strings, 0 where below one half.

    Parameters
    ----------
    answer, expected : str
        The two strings.

    Returns
    -------
    float
        1 for equal strings.
    """
    if answer == expected:
        return 1.0
    previous = list(range(len(expected) + 1))
    for row, left in enumerate(answer, start=1):
        current = [row]
        for column, right in enumerate(expected):
            swapped = previous[column] + (left != right)
            current.append(min(swapped, previous[column + 1] + 1, current[column] + 1))
        previous = current
    similar = 1 - previous[-1] / max(len(answer), len(expected))
    return similar if similar >= 0.5 else 0.0


@torch.no_grad()
def answer(
    model: PreTrainedModel, processor: ProcessorMixin, image: Image.Image, questions: list[Question]
) -> list[str]:
    """Generate greedy answers to questions about one image, as one left-padded batch.

    Parameters
    ----------
    model, processor
        As ``from_pretrained`` gives them.
    image : PIL.Image.Image
        The page.
    questions : list of Question
        What to ask.

    Returns
    -------
    list of str
        One answer a question, without special tokens.
    """
    prompts = [
        processor.apply_chat_template(
            [
                {
                    "role": "user",
                    "content": [{"type": "image"}, {"type": "text", "text": question.prompt}],
                }
            ],
            add_generation_prompt=True,
        )
        for question in questions
    ]
    inputs = processor(
        text=prompts, images=[image] * len(prompts), padding=True, return_tensors="pt"
    ).to(model.device)
    longest = max(len(question.answer) for question in questions)
    output = model.generate(**inputs, max_new_tokens=longest + _MARGIN, do_sample=False)
    return processor.batch_decode(
        output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )


def evaluate(
    folder: Path, questions: int = 500, seed: int = 0, layout: Layout = PAGE
) -> dict[str, dict[str, float]]:
    """Measure an exported checkpoint in bfloat16 on unseen documents.

    Parameters
    ----------
    folder : pathlib.Path
        Exported checkpoint.
    questions : int
        Number of value questions, five a document; a fifth as many read-on questions, a tenth as
        many transcripts, and all questions about half as many pictures are asked too.
    seed : int
        Seed of the held-out documents.
    layout : Layout
        Shape of the documents.

    Returns
    -------
    dict
        For every kind of question, in lower case, the fields of :class:`Reading`.
    """
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).eval()
    pairs: dict[Kind, list[tuple[str, str]]] = {kind: [] for kind in Kind}

    def ask(image: Image.Image, asked: list[tuple[Kind, Question]]) -> None:
        # Answers of one length together: no short one waits for a transcript to end.
        for kind in sorted({kind for kind, _ in asked}):
            chosen = [question for of_kind, question in asked if of_kind == kind]
            said = answer(model, processor, image, chosen)
            expected = (question.answer for question in chosen)
            pairs[kind].extend(zip(said, expected, strict=True))

    for number in range(-(-questions // _QUESTIONS_A_DOCUMENT)):
        document = draw_document(stream(Split.HELD_OUT, seed, FINAL + number), layout)
        ask(document.image, _ask(document, number, questions - len(pairs[Kind.VALUE])))
    for picture in draw_pictures(stream(Split.HELD_OUT, seed, FINAL - 1), questions // 2):
        ask(picture.image, list(picture.questions))
    return {kind.name.lower(): asdict(_score(found)) for kind, found in pairs.items() if found}


def _ask(document: Document, number: int, missing: int) -> list[tuple[Kind, Question]]:
    rng = stream(Split.HELD_OUT, number, FINAL)
    order = [int(index) for index in rng.permutation(len(document.entries))]
    values = order[: min(_QUESTIONS_A_DOCUMENT, missing)]
    asked = [(Kind.VALUE, value_question(document, index)) for index in values]
    asked.append((Kind.ONWARD, onward_question(document, order[0])))
    # Transcripts are long: every second document is enough.
    if number % 2 == 0:
        asked.append((Kind.TRANSCRIPT, transcript_question(document)))
    return asked


def _score(pairs: list[tuple[str, str]]) -> Reading:
    return Reading(
        exact=sum(said == expected for said, expected in pairs) / len(pairs),
        anls=sum(similarity(said, expected) for said, expected in pairs) / len(pairs),
        questions=len(pairs),
    )
