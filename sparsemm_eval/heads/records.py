"""The score of every page on disk as soon as it exists, so that a killed chase goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsemm_eval.errors import UserError


@dataclass(frozen=True, eq=False)
class PageScore:
    """What one page said about the heads.

    Parameters
    ----------
    digest : str
        Of the page.
    scores : ndarray or None
        [L, Hq], summed over scored tokens; None for a page without annotation, which is left out.
    answer_tokens : int
        Tokens of what was said, or fed.
    scored : int
        Of these, those that stand in exactly one place and that the model itself says.
    ambiguous : int
        Those that stand in more than one chunk, and so belong to none.
    characters, found : int
        Annotated characters, and how many of them the model says.
    """

    digest: str
    scores: np.ndarray | None
    answer_tokens: int = 0
    scored: int = 0
    ambiguous: int = 0
    characters: int = 0
    found: int = 0


class PageRecords:
    """A JSONL file: what decides the scores, then a line a page, in order.

    Parameters
    ----------
    path : Path
        Read if it is there; made on the first write.
    settings : mapping
        All that decides a page's scores beside the page.

    Raises
    ------
    ValueError
        If the file is of other settings, or broken before its last line; that one may be cut off,
        as a killed run leaves it, and is dropped.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, dict(settings)
        self.done: list[PageScore] = []
        if path.is_file():
            self._read()

    def write(self, pages: Sequence[PageScore]) -> None:
        """Append pages; returns when the system has them."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.is_file() or not self.path.stat().st_size
        with self.path.open("a", encoding="utf-8") as file:
            if new:
                file.write(json.dumps(self.settings) + "\n")
            for page in pages:
                values = None if page.scores is None else page.scores.tolist()
                file.write(json.dumps(asdict(page) | {"scores": values}) + "\n")
        self.done.extend(pages)

    def _read(self) -> None:
        text = self.path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        lines = whole.decode("utf-8", errors="replace").splitlines()
        try:
            rows = [json.loads(line) for line in lines]
            settings, pages = (rows[0], rows[1:]) if rows else (self.settings, [])
            done = [PageScore(**page | {"scores": _array(page["scores"])}) for page in pages]
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"{self.path}: not the pages of a chase ({error}); move it away to begin anew"
            ) from error
        if settings != self.settings:
            other = [name for name in self.settings if settings.get(name) != self.settings[name]]
            raise UserError(
                f"{self.path} holds pages of a chase with another {', '.join(other) or 'setting'}: "
                "give another --output, or move it away to begin anew"
            )
        if whole != text:
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        self.done = done


def _array(values: list[list[float]] | None) -> np.ndarray | None:
    return None if values is None else np.array(values, dtype=float)
