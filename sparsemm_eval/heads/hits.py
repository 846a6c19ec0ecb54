"""Hits of one page: the place that each token of its text was read from, and who looked there."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

import numpy as np

from sparsemm_eval.heads.pages import Page, union
from sparsemm_eval.heads.records import PageScore
from sparsemm_eval.heads.regions import Box, Regions


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
        Tokens of the page's known text, or of what the model said.
    tokenizer : object
        What made them.
    looked : ndarray
        [L, Hq, tokens]: position in the prompt that each head looked at most.
    right : sequence of bool
        Whether the model itself says each token; others do not score.
    regions : Regions
        Of the page's image.
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
