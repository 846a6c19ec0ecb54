"""Every answer on disk as soon as it exists; found again by what made it.

A folder of SQLite files, one a writing process, so that no two processes ever write to one file;
readers merge them. Rollback journals, not write-ahead logs: those are unsafe on network file
systems.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sqlite3
import time
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
)
"""
_VERSION = 1


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
        What was measured on the way: tokens, kept tokens and bytes, backend, batch size, device.
    """

    key: str
    cell: str
    task: str
    doc_id: str
    text: str | None = None
    error: str | None = None
    record: Mapping[str, Any] = field(default_factory=dict)


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
        If the folder cannot be made, or holds a file that is no answers file.
    """

    def __init__(self, folder: str | Path) -> None:
        # lmms-eval makes a number of a name such as 2026.
        self.folder = Path(str(folder))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"answers={folder}: no folder can be made there ({error})") from error
        self._writer: sqlite3.Connection | None = None

    def read(self, cell: str) -> dict[str, Answer]:
        """Finished answers of a cell by key, from all files; failures are not finished."""
        found: dict[str, Answer] = {}
        for path in self.files():
            rows = _query(
                path,
                "SELECT key, cell, task, doc_id, text, record FROM answers "
                "WHERE cell = ? AND error IS NULL",
                (cell,),
            )
            for key, cell_, task, doc_id, text, record in rows:
                found[key] = Answer(key, cell_, task, doc_id, text, None, _record(path, record))
        return found

    def count(self) -> int:
        """Finished answers in all files, each once."""
        keys: set[str] = set()
        for path in self.files():
            keys.update(
                key for (key,) in _query(path, "SELECT key FROM answers WHERE text NOTNULL")
            )
        return len(keys)

    def files(self) -> list[Path]:
        """The files that hold answers, in the order they were begun."""
        return sorted(self.folder.glob("answers-*.sqlite"))

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
            writer = sqlite3.connect(self.folder / name)
            writer.execute("PRAGMA journal_mode=DELETE")
            writer.execute("PRAGMA synchronous=FULL")
            writer.execute(f"PRAGMA user_version={_VERSION}")
            writer.execute(_SCHEMA)
            writer.commit()
            # Only now: one that failed on the way, on a full disk, must not be written to later.
            self._writer = writer
        return self._writer


def _query(path: Path, statement: str, values: tuple = ()) -> list[tuple]:
    # Opened for writing: only so can SQLite take back what a killed process left half-written.
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True)) as file:
            return _query_open(file, path, statement, values)
    except sqlite3.DatabaseError as error:
        raise _unreadable(path, error) from error


def _record(path: Path, text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except (TypeError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path}: not a readable answers file ({error}); move it away and run again, what it "
        "held is computed anew"
    )


def _query_open(file: sqlite3.Connection, path: Path, statement: str, values: tuple) -> list[tuple]:
    (version,) = file.execute("PRAGMA user_version").fetchone()
    (pages,) = file.execute("PRAGMA page_count").fetchone()
    (page,) = file.execute("PRAGMA page_size").fetchone()
    # SQLite itself reads the missing part of a last page as zeros, and answers vanish unseen.
    if (size := path.stat().st_size) < pages * page:
        raise sqlite3.DatabaseError(f"cut off after {size} of {pages * page} bytes")
    tables = file.execute("SELECT 1 FROM sqlite_master WHERE name = 'answers'").fetchall()
    if not tables:
        # Its process was killed before the table was there.
        return []
    if version != _VERSION:
        raise ValueError(
            f"{path}: written by another version of sparsemm-eval (format {version}, this is "
            f"{_VERSION}); choose another answers folder"
        )
    return file.execute(statement, values).fetchall()
