"""What a chase found: the heads' scores, how far they can be trusted, and their file."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from sparsemm_eval.heads.records import PageScore
from sparsemm_eval.heads.stability import ENOUGH, Stability, stability
from sparsemm_eval.methods import HeadScores
from sparsemm_eval.models.checkpoint import Checkpoint
from sparsemm_eval.report.provenance import provenance

# Below this share of the annotated characters, what was scored is not reading.
_READS = 0.5


@dataclass(frozen=True, eq=False)
class Chase:
    """What a chase found.

    Parameters
    ----------
    pages : tuple of PageScore
        In the order they were given; those without annotation too.
    """

    pages: tuple[PageScore, ...]

    @cached_property
    def scores(self) -> np.ndarray:
        """[images, L, Hq]: sum over the scored tokens of each annotated image."""
        return np.stack([page.scores for page in self.pages if page.scores is not None])

    @property
    def left_out(self) -> int:
        """Images without annotated text."""
        return sum(page.scores is None for page in self.pages)

    @property
    def tokens(self) -> int:
        """Scored tokens: those that stand in one place and that the model itself says."""
        return sum(page.scored for page in self.pages)

    @property
    def answer_tokens(self) -> int:
        """All tokens of what was said, or fed."""
        return sum(page.answer_tokens for page in self.pages)

    @property
    def ambiguous(self) -> int:
        """Tokens that stand in more than one chunk, and so belong to none."""
        return sum(page.ambiguous for page in self.pages)

    @property
    def accuracy(self) -> float:
        """Share of the annotated characters that the model says."""
        characters = sum(page.characters for page in self.pages)
        return sum(page.found for page in self.pages) / characters if characters else 0.0

    @property
    def head_scores(self) -> HeadScores:
        """Mean over the images."""
        return HeadScores(self.scores.mean(0))

    @cached_property
    def stability(self) -> Stability:
        """Whether other images would rank the heads alike."""
        return stability(self.scores)

    @property
    def data_hash(self) -> str:
        """SHA-256 over all pages, images and annotation."""
        return hashlib.sha256(" ".join(page.digest for page in self.pages).encode()).hexdigest()

    def summary(self) -> str:
        """What was scored, and how far it can be trusted."""
        words = [
            f"{self.tokens} of {self.answer_tokens} tokens scored on {len(self.scores)} images",
            f"{self.accuracy:.1%} of the annotated characters read",
        ]
        if self.ambiguous:
            words.append(f"{self.ambiguous} tokens stand in several chunks and count for none")
        if self.left_out:
            words.append(f"{self.left_out} images without annotated text left out")
        if self.stability.split_half is not None:
            words.append(f"rank correlation of two halves {self.stability.split_half:.2f}")
        return "; ".join(words)

    def warnings(self) -> list[str]:
        """What should keep one from using these scores, a sentence each."""
        found = []
        if self.accuracy < _READS:
            found.append(
                f"the model says only {self.accuracy:.0%} of the annotated characters: what was "
                "scored is hardly reading"
            )
        if not self.stability.settled:
            agreement, needed = self.stability.split_half, self.stability.needed
            said = "cannot be told" if agreement is None else f"is {agreement:.2f}"
            more = f"; about {needed} images are needed" if needed else "; give more images"
            found.append(
                f"the scores have not settled: the rank correlation of two halves {said}, below "
                f"{ENOUGH}{more}"
            )
        return found


def write_scores(
    found: Chase,
    path: Path,
    checkpoint: Checkpoint,
    data: str,
    image_tokens: str = "all",
    command: str = "",
) -> None:
    """Write scores in the published format, and beside them how they were made.

    Parameters
    ----------
    found : Chase
        What was found.
    path : Path
        JSON {"layer-head": [value per image]}; provenance goes to ``<stem>.provenance.json``.
    checkpoint : Checkpoint
        The model.
    data : str
        Name of the data.
    image_tokens : {"all", "tiles"}
        As the chase was run.
    command : str
        The command that makes the file again.
    """
    layers, heads = found.scores.shape[1:]
    table = {
        f"{layer}-{head}": [round(float(value), 6) for value in found.scores[:, layer, head]]
        for layer in range(layers)
        for head in range(heads)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table) + "\n", encoding="utf-8")
    settled = found.stability
    made = {
        "scores": path.name,
        "scores_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "checkpoint_hash": checkpoint.hash,
        "model_type": checkpoint.config.model_type,
        "dtype": checkpoint.dtype,
        "image_tokens": image_tokens,
        "data": data,
        "data_sha256": found.data_hash,
        "images": len(found.scores),
        "images_without_text": found.left_out,
        "answer_tokens": found.answer_tokens,
        "scored_tokens": found.tokens,
        "ambiguous_tokens": found.ambiguous,
        "character_accuracy": round(found.accuracy, 4),
        "rank_correlation": {
            "of_halves": settled.split_half,
            "of_halves_lowest": settled.worst,
            "of_two_sets_of_k_images": settled.halves,
            "of_first_k_images_and_all": settled.settling,
            "images_needed": settled.needed,
        },
        "warnings": found.warnings(),
        **provenance(command),
    }
    beside = path.with_name(f"{path.stem}.provenance.json")
    beside.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
