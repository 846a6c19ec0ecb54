"""Results files, ours and plain lmms-eval's, to one tidy frame."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from sparsemm_eval.errors import UserError
from sparsemm_eval.report.cells import cells_frame, counted_once, labelled, named
from sparsemm_eval.report.paper import paper_cells
from sparsemm_eval.report.results_file import SUFFIX, NotResults, read_file

PAPER = "paper"
FILE_COLUMNS = (
    "path", "kind", "schema", "command", "commit", "date", "python", "versions", "hardware",
    "model_args", "changed",
)  # fmt: skip
# Of no results: stored answers, what metrics write beside, and the study of silenced heads, which
# has full KV of fewer samples.
_NOT_SEARCHED = frozenset({"answers", "submissions", "mask"})
_LEFT_BEHIND = {
    ".unfinished": "it was never finished: its process was ended while writing it",
    ".broken": "it was set aside because it was cut off or changed",
}


@dataclass(frozen=True)
class Unreadable:
    """A file that should hold results.

    Parameters
    ----------
    path : str
        The file.
    reason : str
        Why it was not read, in one sentence.
    """

    path: str
    reason: str


@dataclass(frozen=True)
class Results:
    """What was found.

    Parameters
    ----------
    cells : DataFrame
        One row a (results file, task), its metric that counts: the columns of
        `sparsemm_eval.report.cells.COLUMNS`. Scores end at 1 where they are ``bounded``: of the
        paper's benchmarks but for CIDEr; all others are as lmms-eval has them.
    files : DataFrame
        One row a results file, by the number in `cells`' ``file``: `FILE_COLUMNS`.
    unreadable : tuple of Unreadable
        Files that should hold results and were not read.
    """

    cells: pd.DataFrame
    files: pd.DataFrame
    unreadable: tuple[Unreadable, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence each file that was not read."""
        return tuple(f"not read: {file.path}: {file.reason}" for file in self.unreadable)


def gather(results: Iterable[str]) -> Results:
    """As `load`, where ``paper`` stands for the paper's numbers.

    Parameters
    ----------
    results : iterable of str
        Files, folders, ``paper``.
    """
    words = list(results)
    paths = [Path(word) for word in words if word != PAPER]
    own = load(paths) if paths or not words else Results(cells_frame([]), _files([]))
    if PAPER not in words:
        return own
    tables = [frame for frame in (own.cells, paper_cells()) if len(frame)]
    return Results(pd.concat(tables, ignore_index=True), own.files, own.unreadable)


def load(paths: Iterable[Path], all_metrics: bool = False) -> Results:
    """Read results files, and all in folders.

    Parameters
    ----------
    paths : iterable of Path
        Results files; folders are searched for ``*_results.json``, but for those below them named
        answers, submissions (what metrics write) and mask (the study of silenced heads).
    all_metrics : bool
        Whether each metric of a task is a row, or only the one that counts.

    Returns
    -------
    Results
        Files in the order of their paths. A cell that is there twice with the same score is one.

    Raises
    ------
    ValueError
        If a path does not exist, nothing could be read, or one cell has two scores.
    """
    given = [Path(path) for path in paths]
    found, unreadable = _found(given)
    rows: list[dict[str, Any]] = []
    files: list[dict[str, Any]] = []
    for path in found:
        left = _LEFT_BEHIND.get(path.suffix)
        try:
            if left is not None:
                raise NotResults(left)
            file = read_file(path, all_metrics)
        except NotResults as error:
            unreadable.append(Unreadable(str(path), str(error)))
            continue
        rows += [_measured(row, len(files)) for row in file.rows]
        files.append(file.about)
        unreadable += [
            Unreadable(str(path), f"its task {task} has no score that counts")
            for task in file.without_score
        ]
    if not rows:
        raise UserError(_nothing(given, unreadable))
    cells = cells_frame(labelled(counted_once(named(rows), files)))
    return Results(cells, _files(files), tuple(unreadable))


def _measured(row: dict[str, Any], file: int) -> dict[str, Any]:
    return row | {"seeds": 1, "source": "measured", "file": file, "files_of": (file,)}


def _files(rows: list[dict[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=list(FILE_COLUMNS), dtype=object)
    frame = frame.where(frame.notna(), None)
    return frame.assign(schema=frame["schema"].astype("Int64"), changed=frame["changed"].eq(True))


def _found(given: Iterable[Path]) -> tuple[list[Path], list[Unreadable]]:
    """All files, each once, whichever way it was named; and folders that could not be searched."""
    found: dict[Path, Path] = {}
    closed: list[Unreadable] = []

    def note(error: OSError) -> None:
        reason = f"the folder cannot be searched ({error.strerror})"
        closed.append(Unreadable(str(error.filename), reason))

    for path in given:
        if not path.exists():
            raise UserError(
                f"{path}: there is no such file or folder; give results files, folders that hold "
                f"some, or the word {PAPER}"
            )
        for file in sorted(_search(path, note)) if path.is_dir() else [path]:
            found.setdefault(file.resolve(), file)
    return list(found.values()), closed


def _search(folder: Path, note: Callable[[OSError], None]) -> Iterator[Path]:
    names = (SUFFIX, *(f"{SUFFIX}{suffix}" for suffix in _LEFT_BEHIND))
    for place, folders, files in os.walk(folder, onerror=note):
        folders[:] = [name for name in folders if name not in _NOT_SEARCHED]
        yield from (Path(place) / name for name in files if name.endswith(names))


def _nothing(given: list[Path], unreadable: list[Unreadable]) -> str:
    where = ", ".join(map(str, given)) or "nothing given"
    if not unreadable:
        return (
            f"{where}: there are no results here; give folders that hold *{SUFFIX} files as "
            f"sparsemm-eval or lmms-eval write them, or the word {PAPER}"
        )
    first = unreadable[0]
    return (
        f"{where}: nothing here could be read, {len(unreadable)} tried, first {first.path}: "
        f"{first.reason}"
    )
