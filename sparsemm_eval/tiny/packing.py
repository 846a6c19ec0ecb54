"""Documents turned into training batches.

One image carries many questions: a sequence is the image followed by independent blocks, each a
question and its answer. A block sees the image and itself, and every block's positions begin
where the image's end, so that to the model each is the only question asked. That multiplies the
training signal per image.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch

from .checkpoint import (
    IM_END,
    IMAGE_PAD,
    MERGE,
    PAD,
    PATCH,
    VISION_END,
    VISION_START,
    VOCABULARY,
    encode,
)
from .documents import (
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

IGNORED = -100


class Kind(IntEnum):
    """What a block asks for."""

    TRANSCRIPT = 0
    ONWARD = 1
    VALUE = 2


_WEIGHTS = {Kind.TRANSCRIPT: 1.0, Kind.ONWARD: 1.0, Kind.VALUE: 2.0}


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
    """

    layout: Layout
    documents: int
    tokens: int
    onward: int


@dataclass(frozen=True)
class Batch:
    """Tensors of one training step; B documents, L tokens each.

    Attributes
    ----------
    input_ids : torch.Tensor
        Shape (B, L).
    position_ids : torch.Tensor
        Time, height and width position, shape (3, B, L).
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
    pixel_values : torch.Tensor
        Patches, shape (B * patches, 2 * 3 * 64).
    grid_thw : torch.Tensor
        Patch grid of every image, shape (B, 3).
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    blocks: torch.Tensor
    kinds: torch.Tensor
    pixel_values: torch.Tensor
    grid_thw: torch.Tensor


def patchify(images: np.ndarray) -> torch.Tensor:
    """Cut grey images into patches as the image processor does, without its per-image work.

    Parameters
    ----------
    images : numpy.ndarray
        Grey images, uint8, shape (B, height, width); sides are multiples of 16.

    Returns
    -------
    torch.Tensor
        float32 of shape (B * patches, 3 * 2 * 8 * 8), four patches of a cell in a row.
    """
    count, height, width = images.shape
    side = PATCH * MERGE
    cells = torch.from_numpy(images).float().div_(127.5).sub_(1)
    cells = cells.view(count, height // side, MERGE, PATCH, width // side, MERGE, PATCH)
    patches = cells.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, 1, PATCH * PATCH)
    # Three equal channels, two equal frames.
    return patches.expand(-1, 6, -1).reshape(-1, 6 * PATCH * PATCH)


def patch_grid(layout: Layout, count: int) -> torch.Tensor:
    """Return the patch grid of ``count`` images of one layout, shape (count, 3)."""
    return torch.tensor([[1, layout.rows * MERGE, layout.columns * MERGE]]).expand(count, -1)


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
    chosen, room = [], packing.tokens
    for kind, question in wanted:
        needed = len(question.prompt) + len(question.answer) + 1
        if needed <= room:
            chosen.append((kind, question))
            room -= needed
    return chosen


def image_prefix(layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens in front of every question and their positions.

    Parameters
    ----------
    layout : Layout
        Shape of the page.

    Returns
    -------
    tokens : numpy.ndarray
        Start, one image token a cell, end; shape (cells + 2,).
    positions : numpy.ndarray
        Time, height and width position, shape (3, cells + 2).
    """
    rows, columns = np.divmod(np.arange(layout.image_tokens), layout.columns)
    positions = np.zeros((3, layout.image_tokens + 2), np.int64)
    positions[:, 1:-1] = 1 + np.stack([np.zeros_like(rows), rows, columns])
    positions[:, -1] = 1 + max(layout.rows, layout.columns)
    tokens = np.full(layout.image_tokens + 2, VOCABULARY[IMAGE_PAD])
    tokens[0], tokens[-1] = VOCABULARY[VISION_START], VOCABULARY[VISION_END]
    return tokens, positions


def pack(
    documents: list[Document], questions: list[list[tuple[Kind, Question]]], tokens: int
) -> Batch:
    """Lay documents and their questions out as one batch.

    Parameters
    ----------
    documents : list of Document
        Pages of one layout.
    questions : list of list of (Kind, Question)
        What is asked about each.
    tokens : int
        Room for the questions behind each image.

    Returns
    -------
    Batch
        Its length L is image tokens + 2 + ``tokens``.
    """
    layout = documents[0].layout
    prefix_ids, prefix_positions = image_prefix(layout)
    start, count = len(prefix_ids), len(documents)
    length = start + tokens
    ids = np.full((count, length), VOCABULARY[PAD])
    positions = np.zeros((3, count, length), np.int64)
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
            weights[row, first : stop - 1] = _WEIGHTS[kind]
            blocks[row, at:stop] = len(kinds)
            kinds.append(int(kind))
            at = stop
    pixels = np.stack([np.asarray(document.image)[:, :, 0] for document in documents])
    tensors = [torch.from_numpy(array) for array in (ids, positions, labels, weights, blocks)]
    return Batch(
        input_ids=tensors[0],
        position_ids=tensors[1],
        mask=_block_mask(tensors[4], start),
        labels=tensors[2],
        weights=tensors[3],
        blocks=tensors[4],
        kinds=torch.tensor(kinds),
        pixel_values=patchify(pixels),
        grid_thw=patch_grid(layout, count),
    )


def _block_mask(blocks: torch.Tensor, start: int) -> torch.Tensor:
    length = blocks.shape[1]
    same = blocks[:, :, None] == blocks[:, None, :]
    same[:, :, :start] = True
    seen = same & torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)
    return mask[:, None]


def draw_batch(packing: Packing, split: Split, seed: int, index: int) -> Batch:
    """Draw batch number ``index`` of a stream.

    Parameters
    ----------
    packing : Packing
        Shape of the batch.
    split, seed, index
        The stream, see :func:`~sparsemm_eval.tiny.documents.stream`.

    Returns
    -------
    Batch
    """
    rng = stream(split, seed, index)
    documents = [draw_document(rng, packing.layout) for _ in range(packing.documents)]
    questions = [choose_questions(rng, document, packing) for document in documents]
    return pack(documents, questions, packing.tokens)
