"""Answers on disk: merged from all files, readable after anything, set aside when broken."""

import json
import random
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from engine.fixtures import log, sentence
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsemm_eval.engine import answer_file as module
from sparsemm_eval.engine.answers import Answer, AnswerStore, Tally, answer_key, tally

CELL = "model task method(budget=64)"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
NOT_JSON = (b"bytes", {1}, 1j, Path("a"), object(), ValueError)
CHILD = """
import sys
from sparsemm_eval.engine.answers import Answer, AnswerStore
store = AnswerStore(sys.argv[1])
store.write([Answer(f"{sys.argv[2]}-{n}", "cell", "t", str(n), sys.argv[2]) for n in range(5)])
"""


def answer(number: int, text: str | None = "text", **other: Any) -> Answer:
    """Make an answer of this test's cell."""
    values = {"key": f"key{number}", "cell": CELL, "task": "task", "doc_id": str(number)}
    return Answer(**values | {"text": text} | other)


def fill(folder: Path, count: int) -> Path:
    """Write a closed file of answers and return its path."""
    store = AnswerStore(folder)
    store.write([answer(number, "x" * 200, record={"n": number}) for number in range(count)])
    store.close()
    return store.files()[-1]


# --- kept ---------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    st.dictionaries(
        TEXT,
        st.tuples(TEXT, st.lists(st.integers(), max_size=3)),
        max_size=6,
    )
)
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, written: dict[str, tuple[str, list[int]]]
) -> None:
    """By another process's reader, while the writer is open and after it is closed."""
    folder = tmp_path_factory.mktemp("answers")
    store = AnswerStore(folder)
    expected = {
        key: Answer(key, CELL, "task", "doc", text, None, {"record": numbers})
        for key, (text, numbers) in written.items()
    }
    for value in expected.values():
        store.write([value])
    assert AnswerStore(folder).read(CELL) == expected
    store.close()
    assert AnswerStore(folder).read(CELL) == store.read(CELL) == expected
    assert AnswerStore(folder).read("another cell") == {}
    assert store.count() == len(expected)


def test_a_store_goes_on_after_it_was_closed(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path / "made" / "on the way")
    for number in range(3):
        store.write([answer(number)])
        store.close()
        store.close()
    assert len(store.files()) == 3
    assert set(store.read(CELL)) == {"key0", "key1", "key2"}


def test_processes_write_files_of_their_own_and_readers_merge_them(tmp_path: Path) -> None:
    children = [
        subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path), name]) for name in "abcd"
    ]
    assert [child.wait(60) for child in children] == [0, 0, 0, 0]
    store = AnswerStore(tmp_path)
    assert len(store.files()) == 4
    found = store.read("cell")
    assert {key: value.text for key, value in found.items()} == {
        f"{name}-{number}": name for name in "abcd" for number in range(5)
    }


@pytest.mark.parametrize("same_file", [True, False])
def test_a_failure_is_not_finished_and_a_later_success_wins(
    tmp_path: Path, same_file: bool
) -> None:
    store = AnswerStore(tmp_path)
    store.write([answer(0, None, error="OSError: broken"), answer(1)])
    assert set(store.read(CELL)) == {"key1"}
    assert store.count() == 1
    if not same_file:
        store.close()
    store.write([answer(0, "mended")])
    assert store.read(CELL)["key0"] == answer(0, "mended")
    assert store.count() == 2


def test_a_failure_in_a_later_file_takes_no_success_away(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path)
    store.write([answer(0, "good")])
    store.close()
    store.write([answer(0, None, error="OSError: broken")])
    assert store.read(CELL)["key0"].text == "good"


def test_an_empty_answer_is_an_answer(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path)
    store.write([answer(0, "")])
    assert store.read(CELL)["key0"].text == ""
    assert store.count() == 1


# --- broken -------------------------------------------------------------------------------------


@pytest.fixture
def _no_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is for network file systems, and takes time."""
    monkeypatch.setattr(module, "_SECOND_LOOK", 0.0)


def aside(path: Path) -> Path:
    """Where a broken file is kept."""
    return path.with_name(f"{path.name}.broken")


@pytest.mark.usefixtures("_no_second_look")
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(cut=st.integers(min_value=2))
def test_a_file_cut_off_anywhere_is_set_aside(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    """However much is left: SQLite alone would read a half last page as fewer answers."""
    folder = tmp_path_factory.mktemp("cut")
    broken = fill(folder, 60)
    written = AnswerStore(folder).read(CELL)
    content = broken.read_bytes()
    content = content[: 2 + cut % (len(content) - 2)]
    broken.write_bytes(content)
    good = fill(folder, 3)
    assert list(tally(folder)[1]) == [broken]
    assert broken.exists(), "to look is not to touch"
    with log() as lines:
        found = AnswerStore(folder).read(CELL)
    assert {"key0", "key1", "key2"} <= set(found)
    assert found.items() <= written.items()
    (line,) = lines
    assert "damaged" in line
    assert str(broken) in line
    # What lies on whole pages is saved into a file of its own.
    saved = set(AnswerStore(folder).files()) - {good}
    assert len(saved) == (len(found) > 3)
    assert aside(broken).read_bytes() == content


@pytest.mark.usefixtures("_no_second_look")
@pytest.mark.parametrize("content", [b"no database " * 100, b"\0" * 8192, b"{}"])
@pytest.mark.parametrize("read", [lambda store: store.read(CELL), AnswerStore.count])
def test_a_garbage_file_is_set_aside_as_it_was(tmp_path: Path, content: bytes, read: Any) -> None:
    fill(tmp_path, 3)
    garbage = tmp_path / "answers-9-host-9.sqlite"
    garbage.write_bytes(content)
    journal = garbage.with_name(f"{garbage.name}-journal")
    journal.write_bytes(b"what it was")
    read(AnswerStore(tmp_path))
    assert aside(garbage).read_bytes() == content
    assert not garbage.exists()
    assert not journal.exists()
    assert AnswerStore(tmp_path).count() == 3


@pytest.mark.usefixtures("_no_second_look")
@pytest.mark.parametrize("first", [CELL, "other"])
def test_a_file_broken_where_another_cell_lies_is_set_aside_whole(
    tmp_path: Path, first: str
) -> None:
    """Else what one cell is scored by would depend on which cell was read first."""
    store = AnswerStore(tmp_path)
    for number in range(60):
        store.write([answer(number), answer(1000 + number, "y" * 9000, cell="other")])
    store.close()
    (path,) = store.files()
    content = bytearray(path.read_bytes())
    # An inner page of a text of the other cell: what the tree points to, not what a query of
    # CELL reads.
    with sqlite3.connect(path) as file:
        pages = file.execute("PRAGMA page_count").fetchone()[0]
    file.close()
    size = len(content) // pages
    for page in range(pages // 2, pages):
        content[page * size : page * size + 16] = b"\xff" * 16
    path.write_bytes(content)
    AnswerStore(tmp_path).read(first)
    assert aside(path).exists()
    # Answers of either lie on the half that is whole.
    found = AnswerStore(tmp_path).read(CELL)
    assert 20 < len(found) < 60
    assert found.items() <= {f"key{number}": answer(number) for number in range(60)}.items()


@pytest.mark.usefixtures("_no_second_look")
@pytest.mark.parametrize(("statement", "saved"), [
    ("UPDATE answers SET record = '{' WHERE key = 'key1'", {"key0"}),
    ("ALTER TABLE answers DROP COLUMN written", set()),
])  # fmt: skip
def test_a_hand_broken_file_is_set_aside(tmp_path: Path, statement: str, saved: set[str]) -> None:
    path = fill(tmp_path, 2)
    with sqlite3.connect(path) as file:
        file.execute(statement)
    file.close()
    assert set(AnswerStore(tmp_path).read(CELL)) == saved
    assert aside(path).exists()


@pytest.mark.usefixtures("_no_second_look")
def test_a_writer_whose_file_breaks_goes_on_in_another(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path)
    store.write([answer(0)])
    (path,) = store.files()
    path.write_bytes(b"garbage" * 99)
    assert store.read(CELL) == {}
    store.write([answer(1)])
    assert set(AnswerStore(tmp_path).read(CELL)) == {"key1"}


BUSY = """
import sqlite3, sys
file = sqlite3.connect(sys.argv[1])
file.execute("PRAGMA cache_size=1")
from sparsemm_eval.engine.answer_file import digest_of
file.create_function("digest_of", 8, lambda *values: digest_of(values))
file.execute(
    "UPDATE answers SET text = 'changed', "
    "digest = digest_of(key, cell, task, doc_id, 'changed', error, record, written)"
)
file.executemany(
    "INSERT INTO answers VALUES (?, 'cell', 't', 'd', ?, NULL, '{}', 0, '')",
    [(f"new{n}", "y" * 2000) for n in range(200)],
)
file.execute(
    "UPDATE answers SET digest = digest_of(key, cell, task, doc_id, text, error, record, written)"
)
print("half written", flush=True)
sys.stdin.readline()
file.commit()
"""


def test_a_file_that_is_being_written_is_never_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a transaction is in the file, the rest in its journal: readers wait for its end."""
    path = fill(tmp_path, 20)
    command = [sys.executable, "-c", BUSY, str(path)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline() == "half written\n"
        monkeypatch.setattr(module, "_READERS_PATIENCE", 0.1)
        with pytest.raises(OSError, match="cannot be read now") as caught:
            AnswerStore(tmp_path).read(CELL)
        assert str(path) in sentence(caught)
        assert path.exists()
        child.stdin.write("\n")
    monkeypatch.setattr(module, "_READERS_PATIENCE", 60)
    found = AnswerStore(tmp_path).read(CELL)
    assert {value.text for value in found.values()} == {"changed"}
    assert len(found) == 20


def test_a_tally_says_what_became_of_each_document(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path)
    store.write([answer(0), answer(1, None, error="OSError: lost"), answer(2, "", cell="other")])
    store.close()
    store.write([answer(2, None, error="ValueError: no"), answer(3, None, error="KeyError: 3")])
    store.write([answer(33, doc_id="3")])
    found, broken = tally(tmp_path)
    assert broken == {}
    assert found == {
        CELL: Tally(frozenset({"0", "3"}), {"1": "OSError: lost", "2": "ValueError: no"}),
        "other": Tally(frozenset({"2"}), {}),
    }
    assert tally(tmp_path / "nothing") == ({}, {})


def test_a_tally_adds_up_what_answers_took(tmp_path: Path) -> None:
    store = AnswerStore(tmp_path)
    store.write([answer(number, record={"seconds": 0.25 * number}) for number in range(4)])
    store.write([answer(5), answer(6, record={"seconds": "long"}), answer(7)])
    store.write([answer(8, None, error="OSError: lost", record={"seconds": 9.0})])
    store.close()
    (path,) = store.files()
    with sqlite3.connect(path) as file:
        file.execute("UPDATE answers SET record = '{\"seconds\":' WHERE key = 'key7'")
    tallies, broken = tally(tmp_path)
    assert broken == {path: "1 of 8 answers are not as they were written"}
    assert (tallies[CELL].seconds, tallies[CELL].timed) == (1.5, 4)
    assert len(tallies[CELL].done) == 6


# --- refused ------------------------------------------------------------------------------------


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    path = fill(tmp_path, 2)
    with sqlite3.connect(path) as file:
        file.execute("PRAGMA user_version=7")
    file.close()
    with pytest.raises(ValueError, match=r"format 7") as caught:
        AnswerStore(tmp_path).read(CELL)
    assert str(path) in sentence(caught)


def test_a_file_killed_before_its_table_was_there_is_empty(tmp_path: Path) -> None:
    (tmp_path / "answers-1-host-1.sqlite").touch()
    with sqlite3.connect(tmp_path / "answers-2-host-2.sqlite") as file:
        file.execute("PRAGMA user_version=1")
    file.close()
    assert AnswerStore(tmp_path).read(CELL) == {}


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here I am")
    with pytest.raises(ValueError, match="answers=") as caught:
        AnswerStore(tmp_path / "file" / "answers")
    assert str(tmp_path) in sentence(caught)


def test_a_folder_named_by_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lmms-eval parses ``answers=2026`` as an integer."""
    monkeypatch.chdir(tmp_path)
    AnswerStore(2026).write([answer(0)])
    assert AnswerStore(tmp_path / "2026").count() == 1


# --- a full disk --------------------------------------------------------------------------------


@contextmanager
def full_after(monkeypatch: pytest.MonkeyPatch, pages: int) -> Iterator[None]:
    """Let database files grow to so many pages only."""
    connect = sqlite3.connect

    def limited(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        connection = connect(*args, **kwargs)
        connection.execute(f"PRAGMA max_page_count={pages}")
        return connection

    with monkeypatch.context() as patch:
        patch.setattr(module.sqlite3, "connect", limited)
        yield


def fill_up(store: AnswerStore) -> None:
    """Write until it fails."""
    for number in range(200):
        store.write([answer(number, "x" * 500)])


@pytest.mark.parametrize("pages", [1, 2, 3, 4, 8])
def test_a_full_disk_is_one_sentence_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pages: int
) -> None:
    """From the first page on, and the same store goes on once there is room."""
    store = AnswerStore(tmp_path)
    with full_after(monkeypatch, pages):
        with pytest.raises(OSError, match="could not be written") as caught:
            fill_up(store)
        with pytest.raises(OSError, match="could not be written"):
            store.write([answer(900, "x" * 5000), answer(901, "x" * 5000)])
    assert str(tmp_path) in sentence(caught)
    found = AnswerStore(tmp_path).read(CELL)
    assert set(found) == {f"key{number}" for number in range(len(found))}
    assert (len(found) > 0) == (pages > 3)
    store.close()
    store.write([answer(len(found))])
    assert store.count() == len(found) + 1


def test_files_that_must_not_grow(tmp_path: Path) -> None:
    """The operating system refuses a write halfway, in another process."""
    script = """
import resource, sys
from sparsemm_eval.engine.answers import Answer, AnswerStore
store = AnswerStore(sys.argv[1])
unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
def attempt(limit, number):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        store.write([Answer(f"k{number}", "cell", "t", str(number), "x" * 900)])
        return "written"
    except OSError as error:
        return str(error)
said = [attempt(5000, 0), attempt(resource.RLIM_INFINITY, 1)]
number = 2
while attempt(30_000, number) == "written":
    number += 1
said += [str(number), attempt(resource.RLIM_INFINITY, number + 1)]
print("\\n".join(said))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    first, second, number, last = done.stdout.splitlines()
    assert "could not be written" in first
    assert str(tmp_path) in first
    assert (second, last) == ("written", "written")
    expected = {f"k{n}" for n in range(1, int(number))} | {f"k{int(number) + 1}"}
    assert len(expected) > 4
    assert set(AnswerStore(tmp_path).read("cell")) == expected


# --- keys ---------------------------------------------------------------------------------------


def shuffled(value: Any, chance: random.Random) -> Any:
    """The same value with all its dicts in another order."""
    if isinstance(value, dict):
        items = [(name, shuffled(inner, chance)) for name, inner in value.items()]
        chance.shuffle(items)
        return dict(items)
    return [shuffled(inner, chance) for inner in value] if isinstance(value, list) else value


@given(st.dictionaries(st.text(), JSON, max_size=6), st.randoms(use_true_random=False))
def test_a_key_does_not_depend_on_the_order_of_dicts(
    parts: dict[str, Any], chance: random.Random
) -> None:
    key = answer_key(parts)
    assert key == answer_key(shuffled(parts, chance)) == answer_key(json.loads(json.dumps(parts)))
    assert len(key) == 64


@given(st.dictionaries(st.text(), JSON, max_size=4), st.dictionaries(st.text(), JSON, max_size=4))
def test_other_parts_have_another_key(one: dict[str, Any], other: dict[str, Any]) -> None:
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (answer_key(one) == answer_key(other)) == same


@pytest.mark.parametrize("part", NOT_JSON, ids=lambda part: type(part).__name__)
def test_a_key_holds_only_what_json_can(part: Any) -> None:
    for parts in ({"part": part}, {"deep": [{"er": part}]}):
        with pytest.raises(TypeError):
            answer_key(parts)
