"""One file of answers: its rows, each with a digest, and what can be saved of a damaged one.

A SQLite file. Format 2 has a digest over all other columns of a row, so that nothing that changed
on disk is taken for an answer; files of format 1, without it, are read and never written to.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from sparsemm_eval.engine.salvage import PAGE, rows_in_pages
from sparsemm_eval.errors import UserError

# Cells are read one by one, from files that may hold hundreds of them.
_SCHEMA = """
CREATE TABLE answers (
    key TEXT PRIMARY KEY,
    cell TEXT NOT NULL,
    task TEXT NOT NULL,
    doc_id TEXT NOT NULL,
    text TEXT,
    error TEXT,
    record TEXT NOT NULL,
    written REAL NOT NULL,
    digest TEXT NOT NULL
);
CREATE INDEX answers_of_cell ON answers (cell);
"""
_OLD_COLUMNS = ("key", "cell", "task", "doc_id", "text", "error", "record", "written")
COLUMNS = (*_OLD_COLUMNS, "digest")
_FORMATS = {_OLD_COLUMNS: 1, COLUMNS: 2}
# Seconds that a process waits for others: a reader may look through a whole large file.
_READERS_PATIENCE, _WRITERS_PATIENCE = 60, 600
# A network file system may show a file's old size for a moment: broken is what still is then.
_SECOND_LOOK = 0.5
# SQLite's errors that say nothing of a file's content, by code, and by words for Python 3.10.
_PASSING = {
    3: "access permission denied",
    5: "database is locked",
    6: "database table is locked",
    7: "out of memory",
    8: "attempt to write a readonly database",
    9: "interrupted",
    10: "disk I/O error",
    13: "database or disk is full",
    14: "unable to open database file",
    15: "locking protocol",
}
Row = tuple
"""A row of a file: `COLUMNS`, or without the digest where the file has none."""


class Broken(Exception):
    """A file that is not as it was written; its words are the cause."""


def sealed(values: Sequence) -> Row:
    """A row of `COLUMNS` from the values of all but the last."""
    return (*values, digest_of(values))


def digest_of(values: Sequence) -> str:
    """SHA-256 of a row's values: of all columns but the digest.

    Raises
    ------
    TypeError, ValueError
        If one of them is nothing that was ever written, such as bytes.
    """
    *texts, written = values
    return hashlib.sha256(json.dumps([*texts, float(written)]).encode()).hexdigest()


def is_passing(error: sqlite3.Error) -> bool:
    """Whether an error says nothing about a file's content: locked, full, not permitted."""
    code = getattr(error, "sqlite_errorcode", None)  # since Python 3.11; none of Python's own
    if code is not None:
        return code & 0xFF in _PASSING
    return str(error).startswith(tuple(_PASSING.values()))


def begin(path: Path) -> sqlite3.Connection:
    """Begin a new file."""
    file = sqlite3.connect(path, _WRITERS_PATIENCE)
    try:
        file.execute(f"PRAGMA page_size={PAGE}")  # what is saved of damaged files is found by it
        file.execute("PRAGMA journal_mode=DELETE")
        file.execute("PRAGMA synchronous=FULL")
        file.execute(f"PRAGMA user_version={_FORMATS[COLUMNS]}")
        file.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
    except sqlite3.Error:
        file.close()
        raise
    return file


def insert(file: sqlite3.Connection, rows: Sequence[Row]) -> None:
    """Put rows of `COLUMNS` into a file that was begun, all or none."""
    places = ", ".join("?" * len(COLUMNS))
    with file:
        file.executemany(f"INSERT OR REPLACE INTO answers VALUES ({places})", rows)


def check(path: Path, keep: bool = False) -> list[Row]:
    """Look at all of a file, not only where one query reads.

    Parameters
    ----------
    path : Path
        The file.
    keep : bool
        Whether its rows are wanted.

    Returns
    -------
    list of Row
        All of them; none unless they are wanted.

    Raises
    ------
    Broken
        If it, or one row of it, is not as it was written.
    FileNotFoundError
        If it is gone: another process has set it aside.
    OSError
        If it cannot be read now, whatever it holds.
    UserError
        If it is of another format.
    """
    try:
        return _look(path, keep)
    except Broken:
        time.sleep(_SECOND_LOOK)
        return _look(path, keep)


def rows_of(path: Path, cell: str) -> list[Row]:
    """Rows of a cell; raises as `check` does for what it comes across."""
    with _reading(path) as file:
        found = file.execute("SELECT * FROM answers WHERE cell = ?", (cell,)) if file else None
        rows = found.fetchall() if found else []
    wrong = sum(row[1] != cell or not _fits(row) for row in rows)
    if wrong:
        raise Broken(f"{wrong} of {len(rows)} answers are not as they were written")
    return rows


def keys_of(path: Path) -> list[str]:
    """Keys of finished answers; raises as `check` does for what it comes across."""
    with _reading(path) as file:
        found = file.execute("SELECT key FROM answers WHERE text NOTNULL") if file else ()
        return [key for (key,) in found]


def sound_rows(path: Path) -> list[Row]:
    """Rows of a damaged file that are as they were written, of `COLUMNS`, a later one last.

    Read page by page where SQLite cannot read it: then only what has a digest is saved.
    """
    try:
        with _reading(path) as file:
            _check_tree(file)
            rows = file.execute("SELECT * FROM answers").fetchall() if file else []
    except Broken:
        rows = [row for row in rows_in_pages(path.read_bytes()) if len(row) == len(COLUMNS)]
    sound = [sealed(row[: len(_OLD_COLUMNS)]) for row in rows if _fits(row)]
    # A page that is no longer in use may hold the failure that an answer has replaced.
    return sorted(sound, key=lambda row: (row[4] is not None, float(row[7])))


def _look(path: Path, keep: bool) -> list[Row]:
    count = wrong = 0
    kept = []
    with _reading(path) as file:
        _check_tree(file)
        for row in file.execute("SELECT * FROM answers") if file else ():
            count += 1
            wrong += not _fits(row)
            if keep:
                kept.append(row)
    if wrong:
        raise Broken(f"{wrong} of {count} answers are not as they were written")
    return kept


def _check_tree(file: sqlite3.Connection | None) -> None:
    for (verdict,) in file.execute("PRAGMA integrity_check(1)") if file else ():
        if verdict != "ok":
            raise Broken(" ".join(verdict.split()))


@contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection | None]:
    """A file within one transaction; None if its process was killed before the table was there."""
    # Opened for writing: only so can SQLite take back what a killed process left half-written.
    address = f"{path.resolve().as_uri()}?mode=rw"
    try:
        with closing(sqlite3.connect(address, _READERS_PATIENCE, uri=True)) as file:
            # What is no UTF-8 becomes what no digest fits, and no error.
            file.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
            file.execute("BEGIN")
            yield file if _has_answers(file, path) else None
    except sqlite3.DatabaseError as error:
        if not path.exists():
            raise FileNotFoundError(f"{path}: another process has set it aside") from error
        if is_passing(error):
            raise OSError(f"{path}: this answers file cannot be read now ({error})") from error
        raise Broken(str(error)) from error
    except UnicodeDecodeError as error:
        raise Broken("its schema is damaged") from error  # SQLite's own words quote it


def _has_answers(file: sqlite3.Connection, path: Path) -> bool:
    (version,) = file.execute("PRAGMA user_version").fetchone()
    (pages,) = file.execute("PRAGMA page_count").fetchone()
    (page,) = file.execute("PRAGMA page_size").fetchone()
    # SQLite itself reads the missing part of a last page as zeros, and answers vanish unseen.
    if (size := path.stat().st_size) < pages * page:
        raise Broken(f"cut off after {size} of {pages * page} bytes")
    # A view of that name could compute for ever.
    tables = file.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    if ("answers",) not in tables:
        if pages > 1:
            raise Broken("its table is missing")
        return False
    columns = tuple(name for _, name, *_ in file.execute("PRAGMA table_info(answers)"))
    known = _FORMATS.get(columns)
    if known == version:
        return True
    # The number is one of few bytes that no digest guards. Another format has other columns.
    if known is not None and (known ^ version).bit_count() == 1:
        raise Broken(f"its format is said to be {version} and is {known}")
    if version in _FORMATS.values():
        raise Broken("its table has other columns")
    raise UserError(
        f"{path}: written by another version of sparsemm-eval (format {version}, this reads up to "
        f"{_FORMATS[COLUMNS]}); choose another answers folder"
    )


def _fits(row: Row) -> bool:
    """Whether a row is as it was written; without a digest, whether it may be."""
    if len(row) == len(_OLD_COLUMNS):
        return _may_be_sound(row)
    *values, digest = row
    try:
        return digest == digest_of(values)
    except (TypeError, ValueError):
        return False


def _may_be_sound(row: Row) -> bool:
    key, cell, task, doc_id, text, error, record, written = row
    texts = [key, cell, task, doc_id, record, *(x for x in (text, error) if x is not None)]
    if not all(isinstance(x, str) for x in texts) or not isinstance(written, int | float):
        return False
    try:
        "".join(texts).encode()  # lone surrogates stand for what is no UTF-8
        whole = isinstance(json.loads(record), dict)
    except (ValueError, RecursionError):
        return False
    return whole and re.fullmatch(r".+ \d+", doc_id) is not None
