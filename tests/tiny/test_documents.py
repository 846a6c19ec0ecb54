import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemm_eval.tiny.documents import (
    KEYS,
    PAGE,
    Layout,
    Split,
    draw_document,
    onward_question,
    stream,
    transcript_question,
    value_question,
)

# Paper is white with noise of 8 grey levels, the faintest ink reaches 76.
PAPER, INK = 200, 150

LAYOUTS = st.sampled_from(
    [Layout(2, 11, 1, 2), Layout(6, 11, 3, 6), PAGE, Layout(4, 33, 1, 12, cell=20)]
)
DOCUMENTS = st.builds(
    lambda seed, layout: draw_document(stream(Split.TRAIN, seed), layout),
    st.integers(0, 2**32),
    LAYOUTS,
)


@settings(max_examples=25, deadline=None)
@given(DOCUMENTS)
def test_every_box_holds_ink_and_all_ink_lies_in_a_box(document):
    grey = np.asarray(document.image)[:, :, 0]
    outside = np.ones(grey.shape, bool)
    for glyph in document.glyphs:
        x0, y0, x1, y1 = glyph.box
        assert grey[y0:y1, x0:x1].min() < INK
        assert outside[y0:y1, x0:x1].all(), "boxes overlap"
        outside[y0:y1, x0:x1] = False
    assert grey[outside].min() > PAPER


@settings(max_examples=25, deadline=None)
@given(DOCUMENTS)
def test_each_glyph_stays_in_the_cell_of_its_character(document):
    cell = document.layout.cell
    expected = [
        (char, entry.row, entry.column + offset)
        for entry in document.entries
        for offset, char in enumerate(entry.text)
    ]
    found = [(g.char, g.box[1] // cell, g.box[0] // cell) for g in document.glyphs]
    ends = [(g.char, (g.box[3] - 1) // cell, (g.box[2] - 1) // cell) for g in document.glyphs]
    assert found == ends == expected
    assert document.image.size == document.layout.size


@settings(max_examples=25, deadline=None)
@given(DOCUMENTS)
def test_entries_are_in_reading_order_with_unique_keys_and_a_blank_between(document):
    places = [(entry.row, entry.column) for entry in document.entries]
    assert places == sorted(places)
    keys = [entry.key for entry in document.entries]
    assert len(set(keys)) == len(keys)
    assert set(keys) <= set(KEYS)
    layout = document.layout
    assert layout.min_entries <= len(keys) <= layout.max_entries
    taken = {
        (entry.row, entry.column + offset)
        for entry in document.entries
        for offset in range(len(entry.text))
    }
    for entry in document.entries:
        end = entry.column + len(entry.text)
        assert end <= layout.columns
        assert (entry.row, end) not in taken


@settings(max_examples=25, deadline=None)
@given(DOCUMENTS)
def test_text_and_answers_are_aligned_with_boxes(document):
    char_at = {glyph.box: glyph.char for glyph in document.glyphs}
    questions = [transcript_question(document)]
    for index in range(len(document.entries)):
        questions += [value_question(document, index), onward_question(document, index)]
    for question in questions:
        boxes = document.boxes_of(question)
        read = "".join("\n" if box is None else char_at[box] for box in boxes)
        assert read == question.answer
    assert questions[0].answer == document.text
    assert len(document.text_boxes) == len(document.text)


def test_questions_and_answers_as_the_page_has_them():
    document = draw_document(stream(Split.HELD_OUT, 3))
    first, second, third = document.entries[:3]
    assert value_question(document, 1).prompt == f"?{second.key}:"
    assert value_question(document, 1).answer == second.value
    onward = onward_question(document, 0)
    assert onward.prompt == f">{first.key}:"
    assert onward.answer == f"{first.value}\n{second.text}\n{third.text}"
    last = len(document.entries) - 1
    assert onward_question(document, last).answer == document.entries[last].value
    assert transcript_question(document).prompt == "*\n"


def test_a_question_about_another_document_is_refused():
    one, other = (draw_document(stream(Split.HELD_OUT, seed)) for seed in (0, 1))
    with pytest.raises(ValueError, match="not a question about this document"):
        one.boxes_of(value_question(other, 5))


def test_the_same_seed_draws_the_same_page_and_splits_differ():
    one, again = (draw_document(stream(Split.TRAIN, 7, 2)) for _ in range(2))
    assert one == again
    others = [stream(Split.BENCHMARK, 7, 2), stream(Split.TRAIN, 8, 2), stream(Split.TRAIN, 7, 3)]
    assert all(draw_document(rng).text != one.text for rng in others)


@pytest.mark.parametrize(
    "arguments",
    [(0, 11, 1, 1), (2, 12, 1, 1), (2, 11, 0, 1), (2, 11, 2, 1), (2, 11, 1, 3), (2, 11, 1, 1, 15)],
)
def test_impossible_layouts_are_refused(arguments):
    with pytest.raises(ValueError, match=r"must|wide"):
        Layout(*arguments)
