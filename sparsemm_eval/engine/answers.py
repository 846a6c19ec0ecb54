"""Every answer on disk as soon as it exists; found again by what made it.

A folder of SQLite files, one a writing process, so that no two processes ever write to one file;
readers merge them. Rollback journals, not write-ahead logs: those are unsafe on network file
systems. A damaged file is set aside as ``NAME.broken``; what is still as it was written is saved
into a new file, and the rest is computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sqlite3
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from loguru import logger

from sparsemm_eval.engine import answer_file
from sparsemm_eval.errors import UserError

# Files that a writer begins at most for one batch of answers: others may set its own aside.
_FILES_A_BATCH = 5
# Seconds after which a file's time tells whether it was written to since.
_SETTLED = 2


@dataclass(frozen=True)
class Answer:
    """One sample under one cell: its text, or why there is none.

    Parameters
    ----------
    key : str
        Of all that decides the text, by `answer_key`.
    cell : str
        The cell in words, such as "qwen2vl_sparsemm docvqa_val snapkv(budget=64,…)".
    task, doc_id : str
        The sample.
    text : str or None
        The answer; None if it failed.
    error : str or None
        The cause if it failed.
    record : mapping
        What was measured on the way: tokens (of the answer, as ids, and how many), kept tokens and
        bytes, ``kl_full`` (see `sparsemm_eval.engine.decode.Decoded`), backend, batch size,
        device; where candidates were scored, each `sparsemm_eval.engine.decode.Candidate`, the
        likeliest of which is the answer. Older answers lack some of it.
    """

    key: str
    cell: str
    task: str
    doc_id: str
    text: str | None = None
    error: str | None = None
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tally:
    """What became of a cell's documents.

    Parameters
    ----------
    done : frozenset of str
        Documents with an answer.
    failed : mapping of str to str
        Causes by document, of those that have none.
    seconds : float
        What the answers took that say how long they took.
    timed : int
        How many these are.
    """

    done: frozenset[str] = frozenset()
    failed: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    timed: int = 0


class SampleFailures(RuntimeError):
    """Some samples have no answer; their causes are in the answers store."""


def answer_key(parts: Mapping[str, Any]) -> str:
    """SHA-256 of the parts that decide an answer, written in one canonical way.

    Raises
    ------
    TypeError
        For a part that JSON cannot hold: it would not be the same in another process.
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


class AnswerStore:
    """The answers of a folder.

    Parameters
    ----------
    folder : str or Path
        Made if it is not there.

    Raises
    ------
    ValueError
        If the folder cannot be made.
    """

    def __init__(self, folder: str | Path) -> None:
        # lmms-eval makes a number of a name such as 2026.
        self.folder = Path(str(folder))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"answers={folder}: no folder can be made there ({error})") from error
        self._writer: sqlite3.Connection | None = None
        self._path, self._inode = self.folder, None  # of the file it writes to
        self._checked: set[Path] = set()

    def read(self, cell: str) -> dict[str, Answer]:
        """Finished answers of a cell by key, from all files; failures are not finished.

        Damaged files are set aside first.

        Raises
        ------
        ValueError
            Naming a file of another format.
        """
        return {
            key: Answer(key, cell, task, doc_id, text, None, json.loads(record))
            for rows in self._from_all(lambda path: answer_file.rows_of(path, cell))
            for key, _, task, doc_id, text, _, record, *_ in rows
            if text is not None
        }

    def count(self) -> int:
        """Finished answers in all files, each once."""
        return len({key for keys in self._from_all(answer_file.keys_of) for key in keys})

    def files(self) -> list[Path]:
        """The files that hold answers, in the order they were begun."""
        return _files(self.folder)

    def _from_all(self, read: Callable[[Path], list]) -> list[list]:
        """What is read from each file; again from all of them once a damaged one is set aside."""
        while True:
            found = []
            for path in self.files():
                try:
                    if path not in self._checked:
                        answer_file.check(path)
                        self._checked.add(path)
                    found.append(read(path))
                except FileNotFoundError:
                    continue  # another process has set it aside
                except answer_file.Broken as error:
                    self._set_aside(path, error)
                    break
            else:
                return found

    def _set_aside(self, path: Path, error: Exception) -> None:
        """Save what can be saved of a damaged file into a new one, and rename it.

        Others may do the same at the same time: then some answers are there twice. Whoever writes
        to the file meanwhile finds it renamed, and writes what it wrote last once more.

        Raises
        ------
        OSError
            If the folder cannot be written to.
        """
        self.close()  # it may be this very process's
        aside = path.with_name(f"{path.name}.broken")
        journal = path.with_name(f"{path.name}-journal")
        try:
            before = path.stat()
            saved = self._save(answer_file.sound_rows(path))
            if journal.exists():
                os.replace(journal, aside.with_name(f"{aside.name}-journal"))
            os.replace(path, aside)
            after = aside.stat()
            if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
                saved = self._save(answer_file.sound_rows(aside))
        except FileNotFoundError:
            return  # another process was faster
        except (OSError, sqlite3.OperationalError) as problem:
            raise OSError(
                f"{path}: damaged ({error}), and it cannot be set aside ({problem}); see to it "
                "that its folder can be written to, and run again"
            ) from error
        logger.warning(
            f"{path}: damaged ({error}); it is set aside as {aside.name}, {saved} answers of it "
            "are saved, and what is missing is computed again"
        )

    def _save(self, rows: Sequence[answer_file.Row]) -> int:
        """Put rows into a new file of their own; how many."""
        if rows:
            with closing(answer_file.begin(self._new_path())) as file:
                answer_file.insert(file, rows)
        return len(rows)

    def write(self, answers: Iterable[Answer]) -> None:
        """Put answers on disk, all or none; returns when they are there.

        Raises
        ------
        OSError
            If the disk is full or the folder cannot be written to. Nothing finished is lost.
        """
        now = time.time()
        rows = [
            answer_file.sealed(
                (a.key, a.cell, a.task, a.doc_id, a.text, _utf8(a.error), _record(a), now)
            )
            for a in answers
        ]
        for _ in range(_FILES_A_BATCH):
            if self._is_written(rows):
                return
        raise OSError(
            f"answers={self.folder}: an answer could not be written, as its file is damaged or "
            "set aside again and again; what was finished is safe, look at the disk and run again"
        )

    def close(self) -> None:
        """Close the file this process writes to."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _is_written(self, rows: Sequence[answer_file.Row]) -> bool:
        """Put rows into this process's file; False if it is damaged or gone, and a new one due."""
        try:
            answer_file.insert(self._connection(), rows)
        except sqlite3.DatabaseError as error:
            if self._writer is None or (answer_file.is_passing(error) and not self._is_moved()):
                remedy = "make room" if "full" in str(error) else "see that it can be written to"
                raise OSError(
                    f"answers={self.folder}: an answer could not be written ({error}); what was "
                    f"finished is safe, {remedy} and run again to go on"
                ) from error
            if not self._is_moved():
                self._set_aside(self._path, error)
        else:
            if not self._is_moved():
                return True
        self.close()
        return False

    def _connection(self) -> sqlite3.Connection:
        if self._writer is None:
            path = self._new_path()
            writer = answer_file.begin(path)
            # Only now: one that failed on the way, on a full disk, must not be written to later.
            self._writer, self._path, self._inode = writer, path, _inode(path)
        return self._writer

    def _is_moved(self) -> bool:
        """Whether another process has set this one's file aside, or someone has removed it."""
        return _inode(self._path) != self._inode

    def _new_path(self) -> Path:
        name = f"answers-{time.time_ns()}-{socket.gethostname()}-{os.getpid()}.sqlite"
        return self.folder / name


def tally(folder: Path) -> tuple[dict[str, Tally], dict[Path, str]]:
    """What a folder holds, without setting anything aside.

    Returns
    -------
    dict of str to Tally
        By cell; of damaged files what is still as it was written.
    dict of Path to str
        Causes by file, of those that are damaged.
    """
    done: dict[str, set[str]] = defaultdict(set)
    failed: dict[str, dict[str, str]] = defaultdict(dict)
    times: dict[str, list[float]] = defaultdict(list)
    broken: dict[Path, str] = {}
    for path in _files(folder):
        try:
            found = path.stat()
            stamp = found.st_size, found.st_mtime_ns, found.st_ino
            # What was written a moment ago may be written again within one tick of the clock.
            settled = time.time() - found.st_mtime > _SETTLED
            rows, cause = (_known_outcomes if settled else _outcomes)(path, stamp)
        except FileNotFoundError:
            continue  # another process has set it aside
        if cause:
            broken[path] = cause
        for cell, doc_id, error, seconds in rows:
            if error is not None:
                failed[cell][doc_id] = error
                continue
            done[cell].add(doc_id)
            if seconds is not None:
                times[cell].append(seconds)
    tallies = {}
    for cell in (*done, *failed):
        causes = {doc: cause for doc, cause in failed[cell].items() if doc not in done[cell]}
        tallies[cell] = Tally(frozenset(done[cell]), causes, sum(times[cell]), len(times[cell]))
    return tallies, broken


def _outcomes(
    path: Path, stamp: tuple[int, ...]
) -> tuple[tuple[tuple[str, str, str | None, float | None], ...], str]:
    """Cell, document, cause of a failure and seconds of each answer of a file; its damage.

    Parameters
    ----------
    path : Path
        The file.
    stamp : tuple of int
        Size, time and inode of its content, by which `_known_outcomes` knows it.
    """
    try:
        rows, cause = answer_file.check(path, keep=True), ""
    except answer_file.Broken as error:
        rows, cause = answer_file.sound_rows(path), str(error)
    except UserError as error:  # of another format: a run stops there, to look does not
        rows, cause = [], str(error).removeprefix(f"{path}: ")
    outcomes = []
    for _, cell, _, doc_id, text, error, record, *_ in rows:
        seconds = None if text is None else json.loads(record).get("seconds")
        timed = seconds if isinstance(seconds, int | float) else None
        outcomes.append((cell, doc_id, (error or "") if text is None else None, timed))
    return tuple(outcomes), cause


# A sweep looks before each of its jobs, and `status --watch` for hours: most files are as before.
_known_outcomes = lru_cache(maxsize=10_000)(_outcomes)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("answers-*.sqlite"))


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _record(answer: Answer) -> str:
    return json.dumps(dict(answer.record))


def _utf8(text: str | None) -> str | None:
    """What SQLite takes: a cause may name a file whose name is no UTF-8."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()
