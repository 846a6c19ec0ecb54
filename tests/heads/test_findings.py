"""What a chase found: on disk, and with its warnings."""

import json
from pathlib import Path

import numpy as np

from sparsemm_eval.heads.findings import Chase, write_scores
from sparsemm_eval.heads.records import PageScore
from sparsemm_eval.methods import HeadScores
from sparsemm_eval.models.checkpoint import Checkpoint
from sparsemm_eval.tiny import default_checkpoint


def some_scores(images: int, found: int = 10) -> Chase:
    rng = np.random.default_rng(0)
    heads = rng.random((5, 8)) * 10
    return Chase(tuple(
        PageScore(str(n), heads + rng.random((5, 8)), 12, 10, 1, 20, found) for n in range(images)
    ))  # fmt: skip


def test_scores_on_disk_are_read_back_with_their_provenance(tmp_path: Path) -> None:
    checkpoint = Checkpoint(default_checkpoint())
    found = some_scores(6)
    write_scores(found, tmp_path / "s.json", checkpoint, "made-up", "tiles", "the command")
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
