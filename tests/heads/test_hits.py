"""Which tokens of a page score, for whom, and how much of its text was read."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sparsemm_eval.heads.hits import characters_found, score_page
from sparsemm_eval.heads.pages import Chunk, Page
from sparsemm_eval.heads.regions import Qwen2VLRegions


class Letters:
    """A tokenizer of one token a character."""

    def __call__(self, text: str, **_: bool) -> dict:
        return {"offset_mapping": [(place, place + 1) for place in range(len(text))]}

    def decode(self, tokens: list[int], **_: bool) -> str:
        return "".join(map(chr, tokens))


@pytest.mark.parametrize("aligned", [True, False])
def test_a_look_at_the_place_counts_by_its_tokens(aligned: bool) -> None:
    """A over one of four image tokens, B over two; the image begins at position 5."""
    chunks = (Chunk("A", (0, 0, 10, 10)), Chunk("B", (0, 10, 20, 20)), Chunk("\n", None))
    page = Page(Image.new("RGB", (20, 20)), "", chunks, aligned)
    looked = np.array([[[5, 5, 5], [6, 7, 5]], [[0, 8, 5], [5, 7, 5]]])  # [L, Hq, tokens]
    regions = Qwen2VLRegions(20, 20, "all", 2, 2)
    answer = [ord(chunk.text) for chunk in chunks]
    places = np.arange(5, 9)
    found = score_page(page, answer, Letters(), looked, [True] * 3, regions, places)
    assert found.scores.tolist() == [[1, 0.5], [0.5, 1.5]]
    assert (found.answer_tokens, found.scored) == (3, 2)
    half = score_page(page, answer, Letters(), looked, [True, False, True], regions, places)
    assert half.scores.tolist() == [[1, 0], [0, 1]]
    assert half.scored == 1


LETTERS = st.text("abcdefgh ", min_size=1, max_size=20)


@given(LETTERS, LETTERS, LETTERS)
def test_a_chunk_within_a_text_is_found_whole(before: str, chunk: str, after: str) -> None:
    assert characters_found(chunk, before + chunk + after) == len(chunk)


@given(LETTERS, LETTERS)
def test_no_more_is_found_than_there_is(chunk: str, text: str) -> None:
    assert 0 <= characters_found(chunk, text) <= min(len(chunk), len(text))
    assert characters_found(chunk, "0123456789") == 0


def test_a_misread_letter_costs_itself_only() -> None:
    text = "first line\nthe qu1ck brown fax\nlast line"
    assert characters_found("the quick brown fox", text) == 17
