"""What is asked about a picture is what its pixels show."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemm_eval.tiny.documents import KEYS, Split, stream
from sparsemm_eval.tiny.pictures import (
    BAR,
    BLOCK,
    CHOICES,
    COLORS,
    PICTURE,
    SHAPES,
    Kind,
    Mark,
    captions,
    draw_chart,
    draw_scene,
    draw_signs,
    draw_word,
    paint,
)

SEEDS = st.integers(0, 2**32)
few = settings(max_examples=25, deadline=None)


def rng(seed):
    return stream(Split.TRAIN, seed)


def asked(picture, kind):
    return {question.prompt: question.answer for of, question in picture.questions if of == kind}


def cells(picture):
    """Pixels of every cell, [rows, columns, 16, 16, 3]."""
    pixels = np.asarray(picture.image, float)
    return pixels.reshape(PICTURE.rows, 16, PICTURE.columns, 16, 3).swapaxes(1, 2)


def near(pixels, color):
    return np.abs(pixels - COLORS[color]).max(-1) < 50


@few
@given(SEEDS, st.integers(1, 3))
def test_a_scene_is_counted_and_coloured_as_asked(seed, least):
    picture = draw_scene(rng(seed), least)
    shown = cells(picture)
    things = (shown.min(-1) < 140).any((-1, -2))
    colors = asked(picture, Kind.COLOR)
    counts = list(asked(picture, Kind.COUNT).values())
    assert things.sum() == len(colors) + int(counts[0])
    assert counts[1] == "1"
    for color in colors.values():
        assert near(shown[things], color).sum((-1, -2)).max() > 20
    for prompt, letter in asked(picture, Kind.CHOICE).items():
        assert CHOICES[letter] == colors[prompt.split(" There")[0]]
        assert f"\n{letter}. {CHOICES[letter]}\n" in prompt


@few
@given(SEEDS)
def test_relations_are_asked_both_ways_and_existence_is_true(seed):
    picture = draw_scene(rng(seed))
    relations = asked(picture, Kind.RELATION)
    assert sorted(relations.values()) in ([], ["no", "yes"])
    there = {prompt.split()[-1].strip("?") for prompt in asked(picture, Kind.COLOR)}
    repeated, count = next(iter(asked(picture, Kind.COUNT).items()))
    for prompt, answer in asked(picture, Kind.EXISTENCE).items():
        shape = prompt.split()[-1].strip("?")
        many = repeated.startswith(f"How many {shape}") and int(count) > 0
        assert (answer == "yes") == (shape in there or many)


def test_left_is_left():
    marks = [Mark("red", "star", 2, 3), Mark("blue", "cross", 5, 20)]
    drawn = paint(rng(0), [], marks).astype(float)
    red, blue = (near(drawn, color).nonzero()[1].mean() / 16 for color in ("red", "blue"))
    assert int(red) == 3
    assert int(blue) == 20


@few
@given(SEEDS)
def test_bars_are_as_long_as_their_numbers(seed):
    picture = draw_chart(rng(seed))
    values = asked(picture, Kind.BAR)
    lengths = (cells(picture)[:, 7:].mean(-1) < 215).sum((1, 3)).max(1)
    numbers = sorted(int(value) for value in values.values())
    assert np.allclose(np.sort(lengths[lengths > 0]), np.array(numbers) * 2.4, atol=1.5)
    labels = {prompt[1:4]: int(value) for prompt, value in values.items()}
    assert set(labels) <= set(KEYS)
    longest, shortest = asked(picture, Kind.EXTREME).values()
    assert longest == max(labels, key=labels.get)
    assert shortest == min(labels, key=labels.get)


@few
@given(SEEDS)
def test_each_sign_has_a_color_of_its_own(seed):
    picture = draw_signs(rng(seed), 2, 4)
    colors = {prompt.split()[4] for prompt in asked(picture, Kind.SIGN)}
    pixels = np.asarray(picture.image, float)
    for color in COLORS:
        # A frame of at least twelve cells; ink alone is a few dark pixels a cell.
        assert (near(pixels, color).sum() > 1500) == (color in colors)
    assert not asked(picture, Kind.CAPTION)


def test_a_lone_sign_has_a_caption_and_a_word():
    picture = draw_signs(rng(3), 1, 1)
    (prompt, text), *_ = asked(picture, Kind.SIGN).items()
    color = prompt.split()[4]
    assert asked(picture, Kind.CAPTION) == {"Caption:": f"a {color} sign says {text}"}
    assert list(asked(picture, Kind.WORD).values()) == [text]
    assert len(set(captions(color, text))) == 5
    assert all(color in said and text in said for said in captions(color, text))


@pytest.mark.parametrize("draw", [draw_signs, draw_word, draw_chart, draw_scene])
def test_the_same_seed_draws_the_same_picture(draw):
    one, again, other = draw(rng(1)), draw(rng(1)), draw(rng(2))
    assert one == again
    assert one != other
    assert one.image.size == PICTURE.size


def test_every_shape_looks_different():
    drawn = [
        paint(np.random.default_rng(0), [], [Mark("black", shape, 0, 0)])[:16, :16].astype(int)
        for shape in (*SHAPES, BLOCK, BAR)
    ]
    for first in range(len(drawn)):
        for second in range(first):
            assert np.abs(drawn[first] - drawn[second]).mean() > 3
