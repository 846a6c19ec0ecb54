"""Answers on a disk that changes them: nothing wrong is read, nothing sound is lost."""

import json
import random
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from engine.fixtures import log, sentence

from sparsemm_eval.engine import answer_file, salvage
from sparsemm_eval.engine.answers import Answer, AnswerStore, tally

CELLS = ("model task one(budget=64)", "model task two(budget=64)")
# Answers that a page of an index or a table's leaf holds at most.
PAGE = 20
OLD_SCHEMA = """
CREATE TABLE answers (
    key TEXT PRIMARY KEY, cell TEXT NOT NULL, task TEXT NOT NULL, doc_id TEXT NOT NULL,
    text TEXT, error TEXT, record TEXT NOT NULL, written REAL NOT NULL
);
CREATE INDEX answers_of_cell ON answers (cell);
PRAGMA user_version=1;
"""


@pytest.fixture(autouse=True)
def _no_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is for network file systems, and takes time."""
    monkeypatch.setattr(answer_file, "_SECOND_LOOK", 0.0)


def answers(count: int, tokens: int = 12) -> list[Answer]:
    """Answers of two cells, every tenth a long one that no page holds, every eleventh failed."""
    return [
        Answer(
            f"{number:064x}", CELLS[number % 2], "task", f"test {number}",
            None if number % 11 == 10 else f"answer {number} " * (400 if number % 10 == 9 else 3),
            "OSError: lost" if number % 11 == 10 else None,
            {"seconds": 0.1, "tokens": [number] * tokens},
        )
        for number in range(count)
    ]  # fmt: skip


def written(folder: Path, count: int) -> Path:
    """Write a closed file of answers in several batches; its path."""
    store = AnswerStore(folder)
    of_all = answers(count)
    for start in range(0, count, 40):
        store.write(of_all[start : start + 40])
    store.close()
    return store.files()[-1]


def old(folder: Path, count: int) -> Path:
    """Write a file as versions before digests did; its path."""
    folder.mkdir(exist_ok=True)
    path = folder / "answers-1-host-1.sqlite"
    with closing(sqlite3.connect(path)) as file, file:
        file.executescript(OLD_SCHEMA)
        file.executemany(
            "INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (a.key, a.cell, a.task, a.doc_id, a.text, a.error, json.dumps(a.record), 1.5)
                for a in answers(count)
            ],
        )
    return path


def read(folder: Path) -> dict[str, Answer]:
    """All finished answers of a folder."""
    store = AnswerStore(folder)
    return {key: one for cell in CELLS for key, one in store.read(cell).items()}


def finished(count: int) -> dict[str, Answer]:
    return {one.key: one for one in answers(count) if one.text is not None}


def by_hand(path: Path, statement: str, values: tuple = ()) -> None:
    with closing(sqlite3.connect(path)) as file, file:
        file.execute(statement, values)


def aside(path: Path) -> Path:
    return path.with_name(f"{path.name}.broken")


# --- any bit, any length --------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_a_flipped_bit_is_never_an_answer(tmp_path: Path, seed: int) -> None:
    """Wherever it is: nothing is read that was not written, and a page of answers lost at most."""
    path = written(tmp_path / "first", 300)
    content, expected, chance = path.read_bytes(), finished(300), random.Random(seed)
    places = [chance.randrange(8 * len(content)) for _ in range(20)]
    if not seed:  # the header, of which every byte means something
        places = range(0, 8 * 100, 7)
    for place in places:
        folder = tmp_path / str(place)
        folder.mkdir()
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        (folder / path.name).write_bytes(changed)
        tallies, broken = tally(folder)
        found = read(folder)
        assert found.items() <= expected.items(), f"bit {place}"
        assert len(found) >= len(expected) - PAGE, f"bit {place}"
        if found != expected:
            assert broken, f"bit {place}: answers are lost, and nobody is told"
            assert (folder / aside(path).name).read_bytes() == changed
        assert sum(len(of_cell.done) for of_cell in tallies.values()) == len(found)
        assert read(folder) == found
        assert tally(folder)[1] == {}


@pytest.mark.parametrize("seed", range(3))
def test_a_file_cut_off_or_overwritten_keeps_the_rest(tmp_path: Path, seed: int) -> None:
    path = written(tmp_path / "first", 300)
    content, expected, chance = path.read_bytes(), finished(300), random.Random(seed)
    for number in range(8):
        folder = tmp_path / str(number)
        folder.mkdir()
        at = chance.randrange(len(content))
        changed = content[:at]
        if number % 2:
            changed += chance.randbytes(4096) + content[at + 4096 :]
        (folder / path.name).write_bytes(changed)
        found = read(folder)
        assert found.items() <= expected.items()
        if number % 2:
            assert len(found) >= len(expected) - 3 * PAGE


def test_pages_alone_hold_every_row(tmp_path: Path) -> None:
    """The oracle of what is saved without SQLite: SQLite."""
    path = written(tmp_path, 300)
    with closing(sqlite3.connect(path)) as file:
        rows = file.execute("SELECT * FROM answers").fetchall()
    found = list(salvage.rows_in_pages(path.read_bytes()))
    assert sorted(rows) == sorted(row for row in found if len(row) == 9)


# --- one row --------------------------------------------------------------------------------------

CHANGES = {
    "another text": ("text = '1999'", ()),
    "another document": ("doc_id = 'test 77'", ()),
    "no document": ("doc_id = 'te'", ()),
    "another key": ("key = 'abc'", ()),
    "an integer": ("task = 7", ()),
    "bytes": ("text = ?", (b"\xff\xfe",)),
    "no UTF-8": ("text = CAST(? AS TEXT)", (b"answer \xb1\xff",)),
    "no record": ("record = '{'", ()),
    "a list": ("record = '[]'", ()),
    "nothing": ("text = NULL, error = NULL", ()),
}
IN_OLD = ("no document", "bytes", "no UTF-8", "no record", "a list")


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_row_alone_is_lost(tmp_path: Path, change: tuple[str, tuple]) -> None:
    path = written(tmp_path, 40)
    statement, values = change
    by_hand(path, f"UPDATE answers SET {statement} WHERE doc_id = 'test 3'", values)
    (cause,) = tally(tmp_path)[1].values()
    assert cause == "1 of 40 answers are not as they were written"
    expected = finished(40)
    expected.pop(answers(4)[3].key)
    with log() as lines:
        assert read(tmp_path) == expected
    (line,) = lines
    assert str(path) in line
    assert "39 answers of it are saved" in line
    assert aside(path).exists()
    # Failures are saved too: what failed is known without trying again.
    assert sum(len(of_cell.failed) for of_cell in tally(tmp_path)[0].values()) == 3


@pytest.mark.parametrize("change", [CHANGES[name] for name in IN_OLD], ids=IN_OLD)
def test_an_old_file_stays_readable_but_for_what_is_none(
    tmp_path: Path, change: tuple[str, tuple]
) -> None:
    path = old(tmp_path, 40)
    assert read(tmp_path) == finished(40)
    store = AnswerStore(tmp_path)
    store.write([Answer("new", CELLS[0], "task", "test 99", "text")])
    store.close()
    assert path.exists()
    assert len(store.files()) == 2, "nothing is written to an old file"
    statement, values = change
    by_hand(path, f"UPDATE answers SET {statement} WHERE doc_id = 'test 3'", values)
    tallies, broken = tally(tmp_path)
    assert list(broken) == [path]
    assert sum(len(of_cell.done) for of_cell in tallies.values()) == len(finished(40))
    found = read(tmp_path)
    assert len(found) == len(finished(40))
    assert answers(4)[3].key not in found
    assert aside(path).exists()


def test_a_format_that_is_off_by_a_bit_is_ours_and_another_is_not(tmp_path: Path) -> None:
    path = written(tmp_path, 20)
    by_hand(path, "PRAGMA user_version=3")
    assert read(tmp_path) == finished(20)
    assert aside(path).exists()
    (path,) = AnswerStore(tmp_path).files()
    by_hand(path, "ALTER TABLE answers ADD COLUMN more TEXT")
    by_hand(path, "PRAGMA user_version=3")
    with pytest.raises(ValueError, match="format 3") as caught:
        read(tmp_path)
    assert str(path) in sentence(caught)
    assert "format 3" in tally(tmp_path)[1][path], "status names it and goes on"


def test_a_view_that_computes_for_ever_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / "answers-1-host-1.sqlite"
    columns = ", ".join(f"1 AS {name}" for name in answer_file.COLUMNS)
    by_hand(
        path,
        f"CREATE VIEW answers AS WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) "
        f"SELECT {columns} FROM n",
    )
    by_hand(path, "CREATE TABLE other (x)")
    assert "its table is missing" in tally(tmp_path)[1][path]
    assert read(tmp_path) == {}
    assert aside(path).exists()


# --- while it is written to -----------------------------------------------------------------------


def flip_text(path: Path) -> None:
    content = path.read_bytes()
    at = content.index(b"answer 5")
    path.write_bytes(content[:at] + b"Z" + content[at + 1 :])


def no_database(path: Path) -> None:
    path.write_bytes(b"garbage " * 999)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:9000])


def ruined_root(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096 : 4096 + 64] = b"\xff" * 64
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [flip_text, no_database, cut, ruined_root, Path.unlink])
def test_a_writer_whose_file_is_damaged_under_it_goes_on(
    tmp_path: Path, damage: Callable[[Path], Any]
) -> None:
    """And what it writes from then on is there, whoever looks."""
    store = AnswerStore(tmp_path)
    store.write(answers(40))
    damage(store.files()[0])
    later = [Answer(f"later {n}", CELLS[0], "task", f"test {n}", "text") for n in range(3)]
    for one in later:
        store.write([one])
    store.close()
    found = read(tmp_path)
    assert found.items() <= {**finished(40), **{one.key: one for one in later}}.items()
    assert {one.key for one in later} <= set(found)


def test_a_writer_whose_file_another_has_set_aside_goes_on_in_a_new_one(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path)
    store.write(answers(40))
    flip_text(store.files()[0])
    assert len(read(tmp_path)) == len(finished(40)) - 1  # another process
    store.write(answers(41)[40:])
    assert len(read(tmp_path)) == len(finished(41)) - 1
    store.write(answers(6)[5:])
    store.close()
    assert read(tmp_path) == finished(41)


READER = """
import sys
from sparsemm_eval.engine.answers import AnswerStore
for cell in sys.argv[2:]:
    AnswerStore(sys.argv[1]).read(cell)
"""


def test_two_processes_set_one_file_aside(tmp_path: Path) -> None:
    for _ in range(3):
        flip_text(written(tmp_path, 40))
    children = [
        subprocess.Popen([sys.executable, "-c", READER, str(tmp_path), *CELLS]) for _ in range(2)
    ]
    assert [child.wait(60) for child in children] == [0, 0]
    expected = finished(40)
    expected.pop(answers(6)[5].key)
    assert read(tmp_path) == expected
    assert len(list(tmp_path.glob("*.broken"))) == 3


@pytest.mark.parametrize("error", [
    sqlite3.OperationalError("database is locked"),
    sqlite3.OperationalError("disk I/O error"),
    sqlite3.OperationalError("unable to open database file"),
])  # fmt: skip
def test_what_passes_sets_nothing_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: sqlite3.Error
) -> None:
    path = written(tmp_path, 20)

    def fails(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", fails)
        with pytest.raises(OSError, match="cannot be read now") as caught:
            read(tmp_path)
        sentence(caught)
        store = AnswerStore(tmp_path)
        with pytest.raises(OSError, match="could not be written") as caught:
            store.write(answers(1))
        sentence(caught)
    assert path.exists()
    assert read(tmp_path) == finished(20)


def test_a_cause_that_is_no_utf8_is_written(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path)
    store.write([Answer("k", CELLS[0], "task", "test 0", None, "OSError: '\udcff.png'")])
    (of_cell,) = tally(tmp_path)[0].values()
    assert of_cell.failed == {"test 0": "OSError: '\\udcff.png'"}
