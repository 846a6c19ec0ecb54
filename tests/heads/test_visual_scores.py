"""Visual scores on disk, with warnings, and whether other images would rank the heads alike."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.heads.visual_scores import PageScore, VisualScores, rank_correlation, stability
from sparsemm_eval.methods import HeadScores
from sparsemm_eval.tiny import default_checkpoint


def some_scores(images: int, found: int = 10) -> VisualScores:
    rng = np.random.default_rng(0)
    heads = rng.random((5, 8)) * 10
    return VisualScores(tuple(
        PageScore(str(n), heads + rng.random((5, 8)), 12, 10, 1, 20, found) for n in range(images)
    ))  # fmt: skip


def test_scores_on_disk_are_read_back_with_their_provenance(tmp_path: Path) -> None:
    checkpoint = Checkpoint(default_checkpoint())
    found = some_scores(6)
    found.write(tmp_path / "s.json", checkpoint, "made-up", "tiles", "the command")
    read = HeadScores.read(tmp_path / "s.json", checkpoint.shape)
    np.testing.assert_allclose(read.values, found.scores.mean(0), atol=1e-6)
    made = json.loads((tmp_path / "s.provenance.json").read_text())
    assert (made["images"], made["character_accuracy"], made["data"]) == (6, 0.5, "made-up")
    assert (made["image_tokens"], made["command"]) == ("tiles", "the command")
    assert made["rank_correlation"]["of_halves"] > 0.9
    assert made["data_sha256"] == found.data_hash
    assert made["warnings"] == []


def test_scores_that_say_little_come_with_a_warning() -> None:
    assert some_scores(6).warnings() == []
    poor, unsettled = some_scores(1, found=9).warnings()
    assert "says only 45% of the annotated characters" in poor
    assert "cannot be told" in unsettled


def noisy(images: int, noise: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.random((6, 8)) + noise * rng.standard_normal((images, 6, 8))


def test_equal_images_agree_from_the_first() -> None:
    found = stability(noisy(8, 0.0))
    assert (found.split_half, found.worst, found.needed) == (1, 1, 2)
    assert found.settled
    assert found.settling == ((1, 1), (2, 1), (4, 1), (8, 1))
    assert found.halves == ((1, 1), (2, 1), (4, 1))


def test_what_is_needed_is_foretold_before_it_is_there() -> None:
    few, many = stability(noisy(16, 1.5)), stability(noisy(512, 1.5))
    assert not few.settled
    assert many.settled
    assert few.worst <= few.split_half
    # From 16 images to within a factor of three of what many show.
    assert many.needed / 3 < few.needed < many.needed * 3


def test_noise_alone_never_settles() -> None:
    found = stability(np.random.default_rng(1).standard_normal((64, 6, 8)))
    assert abs(found.split_half) < 0.5
    assert found.needed is None or found.needed > 200


def test_one_image_says_nothing_of_others() -> None:
    found = stability(noisy(1, 1.0))
    assert (found.split_half, found.needed, found.settled) == (None, None, False)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=40))
def test_rank_correlation_is_spearmans(pairs: list[tuple[int, int]]) -> None:
    one, other = np.array(pairs, dtype=float).T
    expected = spearmanr(one, other).statistic if np.ptp(one) and np.ptp(other) else 0
    assert rank_correlation(one, other) == pytest.approx(expected, abs=1e-12)
