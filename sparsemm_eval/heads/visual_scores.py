"""The visual scores of a chase: page by page on disk, together, and how far to trust them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.errors import UserError, check_int, one_line
from sparsemm_eval.methods import HeadScores
from sparsemm_eval.methods.head_scores import provenance_file
from sparsemm_eval.paths import write_whole
from sparsemm_eval.report.provenance import provenance
from sparsemm_eval.stored import NotUnderstood, checked, parse_json, read_bytes, with_checksum

# Below this share of the annotated characters, what was scored is not reading.
_READS = 0.5
# Two halves of the images whose scores rank the heads so much alike have settled.
ENOUGH = 0.9
_SPLITS = 20
_MOST_BYTES = 1 << 30  # of records: some 50,000 pages of a 7B model


@dataclass(frozen=True, eq=False)
class PageScore:
    """The hits of all heads on one page.

    Parameters
    ----------
    digest : str
        Hash of the page.
    scores : ndarray or None
        [L, Hq], summed over scored tokens; None for a page without annotation, which is left out.
    answer_tokens : int
        Tokens of the answer, generated or known.
    scored : int
        How many of these stand in exactly one place and are the model's own.
    ambiguous : int
        How many stand in more than one chunk, and so belong to none.
    characters, found : int
        Annotated characters, and how many of them the model reads.
    """

    digest: str
    scores: np.ndarray | None
    answer_tokens: int = 0
    scored: int = 0
    ambiguous: int = 0
    characters: int = 0
    found: int = 0


class PageRecords:
    """A JSONL file: what decides the scores, then a line a page, in order; a killed chase goes on.

    Parameters
    ----------
    path : Path or None
        Read if it is there; made on the first write. None keeps the pages in memory alone.
    settings : mapping
        All that decides a page's scores beside the page.

    Raises
    ------
    UserError
        If the file is of other settings, or broken before its last line; that one may be cut off,
        as a killed run leaves it, and is dropped.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, dict(settings)
        self.done: list[PageScore] = []
        if path is not None and path.is_file():
            self._read(path)

    def write(self, pages: Sequence[PageScore]) -> None:
        """Append pages; returns when the system has them."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = not self.path.is_file() or not self.path.stat().st_size
            with self.path.open("a", encoding="utf-8") as file:
                if new:
                    file.write(json.dumps(with_checksum(self.settings)) + "\n")
                for page in pages:
                    values = None if page.scores is None else page.scores.tolist()
                    row = with_checksum(asdict(page) | {"scores": values})
                    file.write(json.dumps(row) + "\n")
        self.done.extend(pages)

    def _read(self, path: Path) -> None:
        try:
            text = read_bytes(path, _MOST_BYTES)
            whole = text[: text.rfind(b"\n") + 1]
            lines = enumerate(whole.decode("utf-8", errors="replace").split("\n")[:-1], 1)
            rows = [_row(number, line) for number, line in lines]
            settings, pages = (rows[0], rows[1:]) if rows else (self.settings, [])
            done = [_page(page) for page in pages]
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"{path}: not the pages of a chase ({one_line(error)}); move it away to begin anew"
            ) from error
        if len({page.scores.shape for page in done if page.scores is not None}) > 1:
            raise UserError(
                f"{path}: its pages have scores of unlike models; move it away to begin anew"
            )
        if settings != self.settings:
            other = [name for name in self.settings if settings.get(name) != self.settings[name]]
            raise UserError(
                f"{path} holds pages of a chase with another {', '.join(other) or 'setting'}: "
                "give another --output, or move it away to begin anew"
            )
        if whole != text:
            with path.open("r+b") as file:
                file.truncate(len(whole))
        self.done = done


def _row(number: int, line: str) -> dict[str, Any]:
    try:
        row = checked(parse_json(line))
    except NotUnderstood as error:
        raise NotUnderstood(f"line {number}: {error}") from error
    if not isinstance(row, dict):
        raise NotUnderstood(f"line {number} is no object")
    return row


def _page(row: dict[str, Any]) -> PageScore:
    page = PageScore(**row | {"scores": _array(row["scores"])})
    for name in ("answer_tokens", "scored", "ambiguous", "characters", "found"):
        check_int(name, getattr(page, name), least=0)
    return page


def _array(values: list[list[float]] | None) -> np.ndarray | None:
    array = None if values is None else np.array(values, dtype=float)
    if array is not None and (array.ndim != 2 or not np.isfinite(array).all() or array.min() < 0):
        raise NotUnderstood("a page's scores are not a finite number of hits a head")
    return array


@dataclass(frozen=True, eq=False)
class VisualScores:
    """The visual scores of all heads, from every page of a chase.

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
        """Scored tokens: those that stand in one place and are the model's own."""
        return sum(page.scored for page in self.pages)

    @property
    def answer_tokens(self) -> int:
        """All tokens of the answers, generated or known."""
        return sum(page.answer_tokens for page in self.pages)

    @property
    def ambiguous(self) -> int:
        """Tokens that stand in more than one chunk, and so belong to none."""
        return sum(page.ambiguous for page in self.pages)

    @property
    def accuracy(self) -> float:
        """Share of the annotated characters that the model reads."""
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
        sentences = []
        if self.accuracy < _READS:
            sentences.append(
                f"the model says only {self.accuracy:.0%} of the annotated characters: what was "
                "scored is hardly reading"
            )
        if not self.stability.settled:
            agreement, needed = self.stability.split_half, self.stability.needed
            known = "cannot be told" if agreement is None else f"is {agreement:.2f}"
            more = f"; about {needed} images are needed" if needed else "; give more images"
            sentences.append(
                f"the scores have not settled: the rank correlation of two halves {known}, below "
                f"{ENOUGH}{more}"
            )
        return sentences

    def write(
        self,
        path: Path,
        checkpoint: Checkpoint,
        data: str,
        image_tokens: str = "all",
        command: str = "",
    ) -> None:
        """Write the scores in the published format, and beside them how they were made.

        Parameters
        ----------
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
        layers, heads = self.scores.shape[1:]
        table = {
            f"{layer}-{head}": [round(float(value), 6) for value in self.scores[:, layer, head]]
            for layer in range(layers)
            for head in range(heads)
        }
        write_whole(path, json.dumps(table) + "\n")
        beside = {
            "scores": path.name,
            "scores_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "checkpoint_hash": checkpoint.hash,
            "model_type": checkpoint.config.model_type,
            "dtype": checkpoint.dtype,
            "image_tokens": image_tokens,
            "data": data,
            "data_sha256": self.data_hash,
            "images": len(self.scores),
            "images_without_text": self.left_out,
            "answer_tokens": self.answer_tokens,
            "scored_tokens": self.tokens,
            "ambiguous_tokens": self.ambiguous,
            "character_accuracy": round(self.accuracy, 4),
            "rank_correlation": {
                "of_halves": self.stability.split_half,
                "of_halves_lowest": self.stability.worst,
                "of_two_sets_of_k_images": self.stability.halves,
                "of_first_k_images_and_all": self.stability.settling,
                "images_needed": self.stability.needed,
            },
            "warnings": self.warnings(),
            **provenance(command),
        }
        write_whole(provenance_file(path), json.dumps(beside, indent=2) + "\n")


@dataclass(frozen=True)
class Stability:
    """Rank correlations (Spearman, over all heads) between scores from different images.

    Parameters
    ----------
    split_half : float or None
        Between two disjoint halves, mean over random splits; None for fewer than two images.
    worst : float or None
        The lowest of them.
    halves : tuple of (int, float)
        The same with two disjoint sets of k images only, k doubling.
    settling : tuple of (int, float)
        First k images against all, k doubling.
    needed : int or None
        Images from which two halves agree by 0.9: seen where they do, else by the Spearman-Brown
        formula; None if nothing can be said.
    """

    split_half: float | None
    worst: float | None
    halves: tuple[tuple[int, float], ...]
    settling: tuple[tuple[int, float], ...]
    needed: int | None

    @property
    def settled(self) -> bool:
        """Whether two halves agree by 0.9."""
        return self.split_half is not None and self.split_half >= ENOUGH


def stability(scores: np.ndarray, seed: int = 0) -> Stability:
    """Compare scores from disjoint sets of images.

    Parameters
    ----------
    scores : ndarray
        [images, L, Hq].
    seed : int
        Seed of the random splits.
    """
    images = len(scores)
    flat = scores.reshape(images, -1)
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(images) for _ in range(_SPLITS)]

    def between(k: int) -> list[float]:
        return [
            rank_correlation(flat[order[:k]].mean(0), flat[order[k : 2 * k]].mean(0))
            for order in orders
        ]

    agreements = {k: between(k) for k in _doubling(images // 2)}
    halves = tuple((k, float(np.mean(values))) for k, values in agreements.items())
    everything = flat.mean(0)
    settling = tuple((k, rank_correlation(flat[:k].mean(0), everything)) for k in _doubling(images))
    if not halves:
        return Stability(None, None, (), settling, None)
    worst = min(agreements[halves[-1][0]])
    return Stability(halves[-1][1], worst, halves, settling, _needed(halves))


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's; 0 where one of the two tells no heads apart because all are equal."""
    one, other = (pd.Series(x.ravel()).rank() for x in (one, other))
    if one.nunique() == 1 or other.nunique() == 1:
        return 0.0
    return float(one.corr(other))


def _doubling(most: int) -> list[int]:
    """1, 2, 4, … and at last `most` itself."""
    sizes = [2**power for power in range(most.bit_length()) if 2**power < most]
    return [*sizes, most] if most else []


def _needed(halves: tuple[tuple[int, float], ...]) -> int | None:
    for k, agreement in halves:
        if agreement >= ENOUGH:
            return 2 * k
    k, agreement = halves[-1]
    if agreement <= 0:
        return None
    longer = ENOUGH * (1 - agreement) / (agreement * (1 - ENOUGH))
    return 2 * math.ceil(k * longer)
