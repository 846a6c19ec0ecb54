"""CIDEr equals the reference implementation's."""

import shutil
from argparse import Namespace
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pycocoevalcap.cider.cider import Cider

from sparsemm_eval.report.cider import cider, plain_words, treebank_words

CAPTION = st.lists(st.sampled_from(["a", "red", "sign", "says", "stop"]), max_size=9).map(" ".join)
IMAGE = st.tuples(st.lists(CAPTION, min_size=1, max_size=4), CAPTION)


@settings(deadline=None, max_examples=60)
@given(st.lists(IMAGE, min_size=1, max_size=6), st.lists(CAPTION, max_size=6))
def test_scores_are_the_reference_implementations(
    images: list[tuple[list[str], str]], others: list[str]
) -> None:
    """Image by image, whatever other answers are scored with them."""
    references = {number: captions for number, (captions, _) in enumerate(images)}
    answers = {number: [answer] for number, (_, answer) in enumerate(images)}
    both = {number: [answer, *others] for number, (_, answer) in enumerate(images)}
    # That one cannot do without a single word.
    assume(any(captions != [""] * len(captions) for captions in references.values()))
    mean, each = Cider().compute_score(references, answers)
    found = cider(references, both)
    scores = [found[number, answer] for number, (answer,) in answers.items()]
    assert scores == pytest.approx(list(each), abs=1e-12)
    assert sum(scores) / len(scores) == pytest.approx(mean, abs=1e-12)


def test_words_of_the_miniature() -> None:
    assert plain_words("A blue sign: “B9OZV”.") == "a blue sign b9ozv"


@pytest.mark.skipif(shutil.which("java") is None, reason="needs java")
def test_the_corpus_score_is_that_of_lmms_evals_own_textcaps(tmp_path: Path) -> None:
    from lmms_eval.tasks.textcaps.utils import textcaps_cider

    images = {
        3: (["A sign, that says 'STOP'.", "a red sign says stop"], "a sign that\nsays stop"),
        14: (["It isn't 50% (closed) on Main-St.", "the shop isn't closed"], ""),
        15: (["a cafe; it's Joe's", "Joe's cafe, U.S.A."], "It's a cafe on Main-St."),
    }
    results = [
        {"image_id": image, "answer": captions, "pred": pred}
        for image, (captions, pred) in images.items()
    ]
    theirs = textcaps_cider(results, Namespace(output_path=str(tmp_path)))
    texts = {text for result in results for text in (*result["answer"], result["pred"])}
    words = treebank_words(sorted(texts))
    found = cider(
        {result["image_id"]: [words[text] for text in result["answer"]] for result in results},
        {result["image_id"]: [words[result["pred"]]] for result in results},
    )
    assert theirs > 0.1
    assert sum(found.values()) / len(found) == pytest.approx(theirs, rel=1e-9)
