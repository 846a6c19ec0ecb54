"""Results files, ours and plain lmms-eval's, to one tidy frame."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from sparsemm_eval.errors import UserError
from sparsemm_eval.report.cells import cells_frame, counted_once, labelled, named
from sparsemm_eval.report.paper import paper_cells
from sparsemm_eval.report.results_file import (
    MEASURED,
    SUFFIX,
    NotResults,
    parse_model_args,
    read_file,
    scores_of,
)

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
        `sparsemm_eval.report.cells.COLUMNS`. Scores end at 1 but for CIDEr and for benchmarks
        that are none of the paper's, which are as lmms-eval has them.
    files : DataFrame
        One row a results file, by the number in `cells`' ``file``: `FILE_COLUMNS`.
    unreadable : tuple of Unreadable
        Files that should hold results and were not read.
    """

    cells: pd.DataFrame
    files: pd.DataFrame
    unreadable: tuple[Unreadable, ...] = ()


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


def load(paths: Iterable[Path]) -> Results:
    """Read results files, and all in folders.

    Parameters
    ----------
    paths : iterable of Path
        Results files; folders are searched for ``*_results.json``, but for those below them named
        answers, submissions (what metrics write) and mask (the study of silenced heads).

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
            file = read_file(path)
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


def read_results(paths: Iterable[Path]) -> pd.DataFrame:
    """One row a (file, task, metric).

    Parameters
    ----------
    paths : iterable of Path
        Results files as lmms-eval writes them.

    Returns
    -------
    DataFrame
        Columns task, metric, score, stderr, samples, the settings of model_args (method, budget,
        …), what was kept, and file.

    Raises
    ------
    ValueError
        Naming a file that is no lmms-eval results file.
    """
    rows: list[dict[str, Any]] = []
    for path in paths:
        try:
            results = json.loads(Path(path).read_text(encoding="utf-8"))
            rows.extend(_rows(results, Path(path)))
        except (
            json.JSONDecodeError,
            UnicodeDecodeError,
            KeyError,
            AttributeError,
            TypeError,
        ) as error:
            raise UserError(f"{path}: not an lmms-eval results file ({error!r})") from error
    return pd.DataFrame(rows)


def _rows(results: Mapping[str, Any], path: Path) -> Iterator[dict[str, Any]]:
    settings = parse_model_args(results["config"]["model_args"])
    measured = {name: results.get("throughput", {}).get(key) for key, name in MEASURED.items()}
    for task, values in results["results"].items():
        for metric, (score, stderr) in scores_of(values):
            yield {
                "task": task,
                "metric": metric,
                "score": score,
                "stderr": stderr,
                "samples": results.get("n-samples", {}).get(task, {}).get("effective"),
                **settings,
                **measured,
                "file": str(path),
            }
