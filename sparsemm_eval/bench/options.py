"""What is measured, as a command line gives it."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path

from sparsemm_eval.bench.entries import ENTRIES, Entry
from sparsemm_eval.bench.shapes import DISTRIBUTIONS, DTYPES, SHAPES, Case
from sparsemm_eval.errors import UserError, check_choice, check_int

QUICK = {"means": "64", "rows": "1", "repeats": 3}


@dataclass(frozen=True)
class Options:
    """Cases, entries and effort; lists are comma-separated.

    Parameters
    ----------
    shapes, means, distributions, rows : str
        Every combination is a case.
    entries : str
        What attends.
    dtype : str
        float16 on CUDA and float32 on a CPU when empty.
    device : {"", "cpu", "cuda"}
        CUDA where there is one when empty.
    threads : int
        Of torch on a CPU; 0: torch's own choice.
    repeats : int
        Measurements of each entry.
    seconds : float
        When an entry of a case is left alone though it has fewer.
    memory : float
        GiB that keys and values may take; 0: 70% of what is free.
    quick : bool
        Every line in seconds: `QUICK` where nothing else is given, few layers, a small copy.
    out : Path
        Folder for the JSON, the table and the figure.
    """

    shapes: str = ",".join(SHAPES)
    means: str = "64,256,1024,4096"
    distributions: str = ",".join(DISTRIBUTIONS)
    rows: str = "1,4,31"
    entries: str = ",".join(ENTRIES)
    dtype: str = ""
    device: str = ""
    threads: int = 0
    repeats: int = 30
    seconds: float = 1.0
    memory: float = 0.0
    quick: bool = False
    out: Path = Path("results/kernels")

    def checked(self) -> Options:
        """The same with what `quick` means written out.

        Raises
        ------
        ValueError
            For numbers out of range; names are checked where they are used.
        """
        check_int("threads", self.threads, 0)
        check_int("repeats", self.repeats, 1)
        for name in ("seconds", "memory"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name}={getattr(self, name)!r}: it must be at least 0")
        defaults = {field.name: field.default for field in fields(self)}
        untouched = {n: v for n, v in QUICK.items() if getattr(self, n) == defaults[n]}
        return replace(self, **untouched) if self.quick else self

    def chosen_entries(self) -> list[type[Entry]]:
        """The entries that are named."""
        return [ENTRIES[name] for name in known_words("entries", self.entries, ENTRIES)]

    def cases(self, kind: str) -> list[Case]:
        """Every combination that is named, on a "cpu" or on "cuda"."""
        default = "float16" if kind == "cuda" else "float32"
        return [
            Case(shape, mean, distribution, rows, dtype)
            for shape, dtype, distribution, rows, mean in itertools.product(
                known_words("shapes", self.shapes, SHAPES),
                known_words("dtype", self.dtype or default, DTYPES),
                known_words("distributions", self.distributions, DISTRIBUTIONS),
                integers("rows", self.rows),
                integers("means", self.means),
            )
        ]


def known_words(name: str, text: str, known: Collection[str] | None = None) -> list[str]:
    """The parts of a comma-separated list.

    Raises
    ------
    ValueError
        If there is none, or one that is not known.
    """
    words = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not words:
        raise UserError(f"{name}={text!r}: it must name at least one")
    for word in words if known is not None else ():
        check_choice(name, word, list(known))
    return words


def integers(name: str, text: str) -> list[int]:
    """The parts of a comma-separated list of integers, each at least 1, or ValueError."""
    words = known_words(name, text)
    for word in words:
        check_int(name, int(word) if word.isdecimal() else word, 1)
    return [int(word) for word in words]
