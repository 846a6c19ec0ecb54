"""Every answer on disk as soon as it exists; found again by what made it.

A folder of SQLite files, one a writing process, so that no two processes ever write to one file;
readers merge them. Rollback journals, not write-ahead logs: those are unsafe on network file
systems. A file that is broken is set aside as ``NAME.broken``, and what it held is computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sqlite3
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loguru import logger

from sparsemm_eval.errors import UserError

# Cells are read one by one, from files that may hold hundreds of them.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY,
    cell TEXT NOT NULL,
    task TEXT NOT NULL,
    doc_id TEXT NOT NULL,
    text TEXT,
    error TEXT,
    record TEXT NOT NULL,
    written REAL NOT NULL
);
CREATE INDEX IF NOT EXISTS answers_of_cell ON answers (cell);
"""
# A record that is no JSON is found where it is read, and says nothing here.
_SECONDS = "CASE WHEN json_valid(record) THEN json_extract(record, '$.seconds') END"
_COLUMNS = ["key", "cell", "task", "doc_id", "text", "error", "record", "written"]
_VERSION = 1
# Seconds that a process waits for others: a reader may look through a whole large file.
_READERS_PATIENCE, _WRITERS_PATIENCE = 60, 600
# A network file system may show a file's old size for a moment: broken is what still is then.
_SECOND_LOOK = 0.5


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
        device. Older answers lack some of it.
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
        self._checked: set[Path] = set()

    def read(self, cell: str) -> dict[str, Answer]:
        """Finished answers of a cell by key, from all files; failures are not finished.

        Broken files are set aside first.

        Raises
        ------
        ValueError
            Naming a file of another format.
        """
        found: dict[str, Answer] = {}
        for path, rows in self._select(
            "SELECT key, cell, task, doc_id, text, record FROM answers "
            "WHERE cell = ? AND text NOTNULL",
            (cell,),
        ):
            try:
                found.update(
                    (key, Answer(key, cell_, task, doc_id, text, None, json.loads(record)))
                    for key, cell_, task, doc_id, text, record in rows
                )
            except (TypeError, ValueError) as error:
                self._set_aside(path, error)
                return self.read(cell)
        return found

    def count(self) -> int:
        """Finished answers in all files, each once."""
        keys: set[str] = set()
        for _, rows in self._select("SELECT key FROM answers WHERE text NOTNULL"):
            keys.update(key for (key,) in rows)
        return len(keys)

    def files(self) -> list[Path]:
        """The files that hold answers, in the order they were begun."""
        return sorted(self.folder.glob("answers-*.sqlite"))

    def _select(self, statement: str, values: tuple = ()) -> Iterator[tuple[Path, list[tuple]]]:
        """Rows of each file that is sound; the others are set aside, whole, not in part."""
        for path in self.files():
            try:
                if path not in self._checked:
                    _check(path)
                    self._checked.add(path)
                rows = _query(path, statement, values)
            except _Broken as error:
                self._set_aside(path, error)
            else:
                yield path, rows

    def _set_aside(self, path: Path, error: Exception) -> None:
        """Rename a broken file, and its journal with it."""
        self.close()  # it may be this very process's
        aside = path.with_name(f"{path.name}.broken")
        journal = path.with_name(f"{path.name}-journal")
        try:
            if journal.exists():
                os.replace(journal, aside.with_name(f"{aside.name}-journal"))
            os.replace(path, aside)
        except FileNotFoundError:
            return  # another process was faster
        logger.warning(
            f"{path}: not a readable answers file ({error}); it is set aside as {aside.name}, and "
            "what it held is computed again"
        )

    def write(self, answers: Iterable[Answer]) -> None:
        """Put answers on disk, all or none; returns when they are there.

        Raises
        ------
        OSError
            If the disk is full or the folder cannot be written to. Nothing finished is lost.
        """
        rows = [
            (a.key, a.cell, a.task, a.doc_id, a.text, a.error, json.dumps(dict(a.record)), now)
            for now in (time.time(),)
            for a in answers
        ]
        try:
            with self._connection() as connection:
                connection.executemany(
                    "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows
                )
        except sqlite3.OperationalError as error:
            raise OSError(
                f"answers={self.folder}: an answer could not be written ({error}); what was "
                "finished is safe, make room and run again to go on"
            ) from error

    def close(self) -> None:
        """Close the file this process writes to."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _connection(self) -> sqlite3.Connection:
        if self._writer is None:
            name = f"answers-{time.time_ns()}-{socket.gethostname()}-{os.getpid()}.sqlite"
            writer = sqlite3.connect(self.folder / name, _WRITERS_PATIENCE)
            writer.execute("PRAGMA journal_mode=DELETE")
            writer.execute("PRAGMA synchronous=FULL")
            writer.execute(f"PRAGMA user_version={_VERSION}")
            writer.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
            # Only now: one that failed on the way, on a full disk, must not be written to later.
            self._writer = writer
        return self._writer


def tally(folder: Path) -> tuple[dict[str, Tally], dict[Path, str]]:
    """What a folder holds, without setting anything aside.

    Returns
    -------
    dict of str to Tally
        By cell.
    dict of Path to str
        Causes by file, of those that are broken.
    """
    done: dict[str, set[str]] = defaultdict(set)
    failed: dict[str, dict[str, str]] = defaultdict(dict)
    times: dict[str, list[float]] = defaultdict(list)
    broken: dict[Path, str] = {}
    for path in sorted(folder.glob("answers-*.sqlite")):
        try:
            _check(path)
            rows = _query(
                path, f"SELECT cell, doc_id, text NOTNULL, error, {_SECONDS} FROM answers"
            )
        except _Broken as error:
            broken[path] = str(error)
            continue
        for cell, doc_id, answered, error, seconds in rows:
            if answered:
                done[cell].add(doc_id)
                if isinstance(seconds, int | float):
                    times[cell].append(seconds)
            else:
                failed[cell][doc_id] = error
    tallies = {}
    for cell in (*done, *failed):
        causes = {doc: cause for doc, cause in failed[cell].items() if doc not in done[cell]}
        tallies[cell] = Tally(frozenset(done[cell]), causes, sum(times[cell]), len(times[cell]))
    return tallies, broken


class _Broken(Exception):
    """A file that SQLite, or its length, shows to be no whole answers file."""


def _check(path: Path) -> None:
    """Raise `_Broken` if a file is broken anywhere, not only where one query reads."""
    try:
        _look(path)
    except _Broken:
        time.sleep(_SECOND_LOOK)
        _look(path)


def _look(path: Path) -> None:
    for (verdict,) in _query(path, "PRAGMA quick_check(1)"):
        if verdict != "ok":
            raise _Broken(" ".join(verdict.split()))


def _query(path: Path, statement: str, values: tuple = ()) -> list[tuple]:
    # Opened for writing: only so can SQLite take back what a killed process left half-written.
    try:
        address = f"{path.resolve().as_uri()}?mode=rw"
        with closing(sqlite3.connect(address, _READERS_PATIENCE, uri=True)) as file:
            return _query_open(file, path, statement, values)
    except sqlite3.OperationalError as error:
        # It says nothing about the file's content: locked for long, not permitted, an I/O error.
        if not path.exists():
            return []  # set aside by another process
        raise OSError(f"{path}: this answers file cannot be read now ({error})") from error
    except sqlite3.DatabaseError as error:
        raise _Broken(str(error)) from error


def _query_open(file: sqlite3.Connection, path: Path, statement: str, values: tuple) -> list[tuple]:
    # Within one transaction, or another process may write between the questions.
    file.execute("BEGIN")
    (version,) = file.execute("PRAGMA user_version").fetchone()
    (pages,) = file.execute("PRAGMA page_count").fetchone()
    (page,) = file.execute("PRAGMA page_size").fetchone()
    # SQLite itself reads the missing part of a last page as zeros, and answers vanish unseen.
    if (size := path.stat().st_size) < pages * page:
        raise _Broken(f"cut off after {size} of {pages * page} bytes")
    tables = file.execute("SELECT 1 FROM sqlite_master WHERE name = 'answers'").fetchall()
    if not tables:
        # Its process was killed before the table was there.
        return []
    if version != _VERSION:
        raise UserError(
            f"{path}: written by another version of sparsemm-eval (format {version}, this is "
            f"{_VERSION}); choose another answers folder"
        )
    if [name for _, name, *_ in file.execute("PRAGMA table_info(answers)")] != _COLUMNS:
        raise _Broken("its table has other columns")
    return file.execute(statement, values).fetchall()
