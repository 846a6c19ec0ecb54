"""Visual scores: how often each query head looks at the very place that is being read.

SparseMM, section 3.1: for a generated token that stands in one place of the image, a
head hits when its largest attention weight falls on an image token of that place; a hit counts
1 / (image tokens of the place). Here no attention matrix is kept: the answer is generated, or
known, then fed once behind its prompt, and each layer keeps the argmax of the rows that write it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.generation import DEFAULT_NEW_TOKENS
from sparsemm_eval.engine.requests import to_model
from sparsemm_eval.errors import UserError, check_choice, check_int
from sparsemm_eval.families import IMAGE_TOKENS, Box, Regions
from sparsemm_eval.heads.capture import ArgmaxCapture, feed, greedy_answers, read_prompts
from sparsemm_eval.heads.pages import Page, union
from sparsemm_eval.heads.regions import find_regions, image_positions, regions_of
from sparsemm_eval.heads.visual_scores import PageRecords, PageScore, VisualScores


def chase(
    checkpoint: Checkpoint,
    pages: Iterable[Page],
    count: int | None = None,
    *,
    image_tokens: str = "all",
    batch_size: int = 1,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    records: Path | None = None,
) -> VisualScores:
    """Score every query head of a model on annotated pages.

    Parameters
    ----------
    checkpoint : Checkpoint
        A model of a family whose regions are known.
    pages : iterable of Page
        What is read.
    count : int, optional
        How many pages there are, for the progress bar.
    image_tokens : {"all", "tiles"}
        Which tokens of an image a box is looked for in; see `regions`.
    batch_size : int
        Pages read together.
    max_new_tokens : int
        Where a generated answer ends at the latest.
    records : Path, optional
        Where each page's score is kept as soon as it exists; pages found there are not computed
        again.

    Raises
    ------
    UserError
        In one sentence, if the family's regions are unknown (before weights are loaded), there is
        no page, no page is annotated, or nothing that the model reads could be scored.
    """
    regions_of(checkpoint.config.model_type)
    check_choice("image_tokens", image_tokens, IMAGE_TOKENS)
    check_int("batch_size", batch_size, least=1)
    check_int("max_new_tokens", max_new_tokens, least=1)
    settings = {
        "checkpoint": checkpoint.hash,
        "dtype": checkpoint.dtype,
        "image_tokens": image_tokens,
        "max_new_tokens": max_new_tokens,
    }
    kept = PageRecords(records, settings)
    progress = iter(tqdm(pages, total=count, desc="chasing heads", leave=False))
    scores = _known(kept, progress)
    while batch := list(islice(progress, batch_size)):
        new = _score(checkpoint, batch, image_tokens, max_new_tokens)
        kept.write(new)
        scores += new
    return _checked(VisualScores(tuple(scores)), checkpoint)


def _known(records: PageRecords, pages: Iterable[Page]) -> list[PageScore]:
    """Scores that are there of the first pages, which are taken from `pages`."""
    scores = []
    for place, (known, page) in enumerate(zip(records.done, pages, strict=False)):
        if known.digest != page.digest:
            raise UserError(
                f"{records.path}: page {place} is not that of this data; give another "
                "--output, or move it away to begin anew"
            )
        scores.append(known)
    return scores


def _checked(scores: VisualScores, checkpoint: Checkpoint) -> VisualScores:
    if not scores.pages:
        raise UserError("no pages to chase heads on: give at least 1 image")
    if scores.left_out == len(scores.pages):
        raise UserError(
            f"none of the {len(scores.pages)} images has annotated text: give pages whose chunks "
            "have text and a box"
        )
    if not scores.scores.any():
        raise UserError(
            f"{checkpoint.pretrained} says {scores.accuracy:.0%} of the annotated characters, and "
            f"of {scores.answer_tokens} tokens {scores.tokens} could be scored, none of them a hit "
            "of any head: its heads cannot be scored by what it reads"
        )
    return scores


def _score(
    checkpoint: Checkpoint, pages: Sequence[Page], image_tokens: str, max_new_tokens: int
) -> list[PageScore]:
    """Score a batch of pages; those without annotation cost nothing."""
    annotated = [page for page in pages if page.chunks]
    scores = iter(
        _score_annotated(checkpoint, annotated, image_tokens, max_new_tokens) if annotated else ()
    )
    return [next(scores) if page.chunks else PageScore(page.digest, None) for page in pages]


@torch.inference_mode()
def _score_annotated(
    checkpoint: Checkpoint, pages: Sequence[Page], image_tokens: str, max_new_tokens: int
) -> list[PageScore]:
    model, processor, shape = checkpoint.model, checkpoint.processor, checkpoint.shape
    images = [page.image for page in pages]
    inputs = read_prompts(processor, images, [page.prompt for page in pages], checkpoint.family)
    sizes = [image.size for image in images]
    regions = find_regions(checkpoint.config, processor, inputs, sizes, image_tokens)
    inputs = to_model(inputs, model)
    if all(page.aligned for page in pages):
        tokenizer = processor.tokenizer
        answers = [tokenizer(page.text, add_special_tokens=False)["input_ids"] for page in pages]
    else:
        answers = greedy_answers(checkpoint, inputs, max_new_tokens)
    rows = max(map(len, answers))
    ids = inputs["input_ids"]
    looked = np.zeros((len(pages), shape.layers, shape.query_heads, 0), dtype=int)
    if rows:
        capture = ArgmaxCapture(shape, rows)
        # Logits tell what the model would write in place of a known text; a generated one is its.
        keep = rows + 1 if any(page.aligned for page in pages) else 1
        ids, logits = feed(checkpoint, inputs, answers, capture, keep)
        own = logits[:, :-1].argmax(-1).cpu()
        looked = capture.looked().numpy()
    scores = []
    for row, (page, answer, region) in enumerate(zip(pages, answers, regions, strict=True)):
        positions = image_positions(checkpoint.config, ids[row], [region])[0]
        there = looked[row, ..., looked.shape[-1] - len(answer) :]
        right = [True] * len(answer)
        if page.aligned:
            right = (own[row, rows - len(answer) :] == torch.tensor(answer)).tolist()
        scores.append(
            score_page(page, answer, processor.tokenizer, there, right, region, positions)
        )
    return scores


def score_page(
    page: Page,
    answer: Sequence[int],
    tokenizer: object,
    looked: np.ndarray,
    right: Sequence[bool],
    regions: Regions,
    positions: np.ndarray,
) -> PageScore:
    """Score a page by where heads looked, token by token.

    Parameters
    ----------
    page : Page
        With annotation.
    answer : sequence of int
        Tokens of the page's known text, or of what the model wrote.
    tokenizer : object
        What made them.
    looked : ndarray
        [L, Hq, tokens]: position in the prompt that each head looked at most.
    right : sequence of bool
        Whether the model itself writes each token; others do not score.
    regions : Regions
        Regions of the page's image.
    positions : ndarray
        [image tokens]: where these stand, as `looked` counts.
    """
    if page.aligned:
        places, ambiguous = _aligned_places(page, tokenizer), 0
        asked = [place is not None for place in places]
        characters, found = sum(asked), sum(map(min, asked, right))
    else:
        places, ambiguous = _chunk_places(page, answer, tokenizer)
        text = tokenizer.decode(answer, skip_special_tokens=True)
        characters = sum(len(chunk.text) for chunk in page.chunks)
        found = sum(characters_found(chunk.text, text) for chunk in page.chunks)
    at: dict[Box, np.ndarray] = {}
    scores, scored = np.zeros(looked.shape[:2]), 0
    for token, box in enumerate(places):
        if box is None or not right[token]:
            continue
        if box not in at:
            at[box] = positions[regions.tokens(box)]
        if len(at[box]):
            scores += np.isin(looked[:, :, token], at[box]) / len(at[box])
            scored += 1
    return PageScore(page.digest, scores, len(answer), scored, ambiguous, characters, found)


def _aligned_places(page: Page, tokenizer: object) -> list[Box | None]:
    """The box around each token's characters of a known text."""
    spans = tokenizer(page.text, add_special_tokens=False, return_offsets_mapping=True)
    chunks = page.chunks
    return [union(c.box for c in chunks[start:stop]) for start, stop in spans["offset_mapping"]]


def _chunk_places(
    page: Page, answer: Sequence[int], tokenizer: object
) -> tuple[list[Box | None], int]:
    """The box of the one chunk that each token occurs in, and how many occur in several."""
    places: list[Box | None] = []
    ambiguous = 0
    for token in answer:
        text = tokenizer.decode([token]).strip()
        known = len(text) >= page.shortest
        boxes = [chunk.box for chunk in page.chunks if known and text in chunk.text]
        places.append(boxes[0] if len(boxes) == 1 else None)
        ambiguous += len(boxes) > 1
    return places, ambiguous


def characters_found(chunk: str, text: str) -> int:
    """How many characters of a chunk a text has, in order, around where it has most of it."""
    best = SequenceMatcher(None, chunk, text, autojunk=False).find_longest_match()
    start = max(best.b - best.a, 0)
    near = SequenceMatcher(None, chunk, text[start : start + len(chunk)], autojunk=False)
    return sum(block.size for block in near.get_matching_blocks())
