"""Documents turned into training batches.

One image carries many questions: a sequence is the image followed by independent blocks, each a
question and its answer. A block sees the image and itself, and every block's positions begin
where the image's end, so that to the model each is the only question asked. That multiplies the
training signal per image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from sparsemm_eval.tiny.documents import (
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
from sparsemm_eval.tiny.pictures import (
    Kind,
    Picture,
    draw_chart,
    draw_scene,
    draw_signs,
    draw_word,
)
from sparsemm_eval.tiny.training.family import Family
from sparsemm_eval.tiny.training.vocabulary import IM_END, PAD, VOCABULARY, encode

IGNORED = -100
PICTURE_TOKENS = 176
# Short answers beside long ones, and those that are hardest to learn.
_WEIGHTS = {Kind.VALUE: 2.0, Kind.CHOICE: 3.0, Kind.RELATION: 2.0}


@dataclass(frozen=True)
class Packing:
    """How many documents a batch holds, and how many tokens of questions a document gets.

    Attributes
    ----------
    layout : Layout
        Shape of the documents.
    documents : int
        Documents a batch.
    tokens : int
        Room for question blocks behind each image; values are asked for until it is full.
    onward : int
        Questions a document that read on from an entry.
    pictures : float
        Share of the batches that hold pictures instead of documents: twice as many, each with
        room for ``PICTURE_TOKENS`` of questions.
    """

    layout: Layout
    documents: int
    tokens: int
    onward: int
    pictures: float = 0.0


@dataclass(frozen=True)
class Batch:
    """Tensors of one training step; B documents, L tokens each.

    Attributes
    ----------
    input_ids : torch.Tensor
        Shape (B, L).
    position_ids : torch.Tensor
        Positions along each axis, shape (axes, B, L); LLaVA-NeXT has one axis, Qwen2-VL three.
    mask : torch.Tensor
        Additive attention mask, shape (B, 1, L, L).
    labels : torch.Tensor
        Token to predict at each place, -100 where none, shape (B, L).
    weights : torch.Tensor
        Weight of each place in the loss, shape (B, L).
    blocks : torch.Tensor
        Number of the block within the batch, -1 outside, shape (B, L).
    kinds : torch.Tensor
        Kind of every block of the batch, shape (blocks,).
    pixels : dict of torch.Tensor
        What the image processor makes of the images.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    blocks: torch.Tensor
    kinds: torch.Tensor
    pixels: dict[str, torch.Tensor]


def choose_questions(
    rng: np.random.Generator, document: Document, packing: Packing
) -> list[tuple[Kind, Question]]:
    """Choose what to ask about a document: all of it, some entries onward, values while they fit.

    Parameters
    ----------
    rng : numpy.random.Generator
        Chooses the entries.
    document : Document
        The page.
    packing : Packing
        Room for the questions.

    Returns
    -------
    list of (Kind, Question)
        Each needs the length of its prompt and answer, plus one end token.
    """
    count = len(document.entries)
    wanted = [(Kind.TRANSCRIPT, transcript_question(document))]
    for index in rng.permutation(count)[: packing.onward]:
        wanted.append((Kind.ONWARD, onward_question(document, int(index))))
    for index in rng.permutation(count):
        wanted.append((Kind.VALUE, value_question(document, int(index))))
    return _fit(wanted, packing.tokens)


def _fit(wanted: list[tuple[Kind, Question]], room: int) -> list[tuple[Kind, Question]]:
    chosen = []
    for kind, question in wanted:
        needed = len(question.prompt) + len(question.answer) + 1
        if needed <= room:
            chosen.append((kind, question))
            room -= needed
    return chosen


def pack(
    family: Family,
    pages: list[Document] | list[Picture],
    questions: list[list[tuple[Kind, Question]]],
    tokens: int,
) -> Batch:
    """Lay pages and their questions out as one batch.

    Parameters
    ----------
    family : Family
        Of the model that learns.
    pages : list of Document or of Picture
        Pages of one layout.
    questions : list of list of (Kind, Question)
        What is asked about each.
    tokens : int
        Room for the questions behind each image.

    Returns
    -------
    Batch
        Its length L is that of the family's prefix + ``tokens``.
    """
    prefix_ids, prefix_positions = family.prefix(pages[0].layout)
    start, count = len(prefix_ids), len(pages)
    length = start + tokens
    ids = np.full((count, length), VOCABULARY[PAD])
    positions = np.zeros((len(prefix_positions), count, length), np.int64)
    labels = np.full((count, length), IGNORED)
    weights = np.zeros((count, length), np.float32)
    blocks = np.full((count, length), -1)
    kinds: list[int] = []
    ids[:, :start], positions[:, :, :start] = prefix_ids, prefix_positions[:, None]
    for row, asked in enumerate(questions):
        at = start
        for kind, question in asked:
            block = [*encode(question.prompt + question.answer), VOCABULARY[IM_END]]
            stop, first = at + len(block), at + len(question.prompt) - 1
            ids[row, at:stop] = block
            positions[:, row, at:stop] = prefix_positions[0, -1] + 1 + np.arange(len(block))
            labels[row, first : stop - 1] = ids[row, first + 1 : stop]
            weights[row, first : stop - 1] = _WEIGHTS.get(kind, 1.0)
            blocks[row, at:stop] = len(kinds)
            kinds.append(int(kind))
            at = stop
    tensors = [torch.from_numpy(array) for array in (ids, positions, labels, weights, blocks)]
    return Batch(
        input_ids=tensors[0],
        position_ids=tensors[1],
        mask=_block_mask(tensors[4], start),
        labels=tensors[2],
        weights=tensors[3],
        blocks=tensors[4],
        kinds=torch.tensor(kinds),
        pixels=family.pixels([page.image for page in pages]),
    )


def _block_mask(blocks: torch.Tensor, start: int) -> torch.Tensor:
    length = blocks.shape[1]
    same = blocks[:, :, None] == blocks[:, None, :]
    same[:, :, :start] = True
    seen = same & torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)
    return mask[:, None]


def draw_batch(family: Family, packing: Packing, split: Split, seed: int, index: int) -> Batch:
    """Draw batch number ``index`` of a stream.

    Parameters
    ----------
    family : Family
        Of the model that learns.
    packing : Packing
        Shape of the batch.
    split, seed, index
        The stream, see :func:`~sparsemm_eval.tiny.documents.stream`.

    Returns
    -------
    Batch
        Of documents, or of pictures.
    """
    rng = stream(split, seed, index)
    if rng.random() < packing.pictures:
        pictures = draw_pictures(rng, 2 * packing.documents)
        asked = [_shuffled(rng, picture, PICTURE_TOKENS) for picture in pictures]
        return pack(family, pictures, asked, PICTURE_TOKENS)
    documents = [draw_document(rng, packing.layout) for _ in range(packing.documents)]
    questions = [choose_questions(rng, document, packing) for document in documents]
    return pack(family, documents, questions, packing.tokens)


def draw_pictures(rng: np.random.Generator, count: int) -> list[Picture]:
    """Draw pictures of all sorts to learn from.

    Scenes come most often: what is asked about them is hardest. Some hold a single thing, from
    which its colour can be learnt before the looking for it.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of all randomness.
    count : int
        How many.

    Returns
    -------
    list of Picture
    """
    pictures = []
    for chance in rng.random(count):
        if chance < 0.5:
            pictures.append(draw_scene(rng, least=1))
        elif chance < 0.65:
            pictures.append(draw_signs(rng, 1, 1))
        elif chance < 0.85:
            pictures.append(draw_signs(rng, 2, 4))
        elif chance < 0.95:
            pictures.append(draw_chart(rng))
        else:
            pictures.append(draw_word(rng))
    return pictures


def _shuffled(rng: np.random.Generator, picture: Picture, room: int) -> list[tuple[Kind, Question]]:
    questions = [picture.questions[i] for i in rng.permutation(len(picture.questions))]
    # A choice is as long as three other questions: one is asked, and before the room is gone.
    choices = [pair for pair in questions if pair[0] == Kind.CHOICE]
    return _fit(choices[:1] + [pair for pair in questions if pair not in choices], room)
