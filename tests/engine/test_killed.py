"""Killed without warning, a process loses nothing it was told is on disk."""

import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparsemm_eval.engine.answers import Answer, AnswerStore

CELL = "cell"
# Says which answers are on disk as soon as `write` has returned, and goes on for ever.
WRITER = """
import sys
from itertools import count
from sparsemm_eval.engine.answers import Answer, AnswerStore
store = AnswerStore(sys.argv[1])
for batch in count():
    keys = [f"{sys.argv[2]}-{batch}-{n}" for n in range(4)]
    store.write([Answer(key, "cell", "t", key, "x" * 3000) for key in keys])
    print(batch, flush=True)
"""
# Dies inside a transaction that has outgrown SQLite's memory: half of it is in the file already.
HALFWAY = """
import os, signal, sqlite3, sys
from sparsemm_eval.engine.answers import Answer, AnswerStore
store = AnswerStore(sys.argv[1])
store.write([Answer(f"k{n}", "cell", "t", str(n), "kept" * 100) for n in range(50)])
store.close()
file = sqlite3.connect(store.files()[0])
file.execute("PRAGMA cache_size=1")
file.execute("UPDATE answers SET text = 'lost', cell = 'lost'")
file.executemany(
    "INSERT INTO answers VALUES (?, 'cell', 't', 'd', ?, NULL, '{}', 0, '')",
    [(f"new{n}", "y" * 2000) for n in range(200)],
)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("seed", range(4))
def test_no_committed_answer_is_lost(tmp_path: Path, seed: int) -> None:
    """Three processes one after the other, each killed at a moment of chance."""
    chance = random.Random(seed)
    promised = set()
    for name in "abc":
        command = [sys.executable, "-c", WRITER, str(tmp_path), name]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            said = [child.stdout.readline() for _ in range(chance.randint(1, 4))]
            time.sleep(chance.uniform(0, 0.05))
            child.kill()
            said += child.stdout.readlines()
        assert child.returncode == -signal.SIGKILL
        promised |= {f"{name}-{int(batch)}-{n}" for batch in said for n in range(4)}
    found = AnswerStore(tmp_path).read(CELL)
    assert promised <= set(found)
    # At most the batch that was being written when each was killed, and that one whole.
    assert len(set(found) - promised) in (0, 4, 8, 12)
    assert {answer.text for answer in found.values()} == {"x" * 3000}


def test_a_transaction_torn_halfway_is_taken_back(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", HALFWAY, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    (path,) = AnswerStore(tmp_path).files()
    journal = path.with_name(f"{path.name}-journal")
    assert journal.stat().st_size > 0
    assert torn(path), "the file itself is as it was: this proves nothing"
    expected = {f"k{n}": Answer(f"k{n}", CELL, "t", str(n), "kept" * 100) for n in range(50)}
    store = AnswerStore(tmp_path)
    assert store.read(CELL) == expected
    assert not journal.exists()
    store.write([Answer("after", CELL, "t", "d", "text")])
    assert set(AnswerStore(tmp_path).read(CELL)) == {*expected, "after"}


def torn(path: Path) -> bool:
    """Whether the file without its journal shows what was never committed."""
    copy = path.parent / "without-journal"
    copy.write_bytes(path.read_bytes())
    file = sqlite3.connect(copy)
    try:
        return file.execute("SELECT count(*) FROM answers WHERE cell = 'lost'").fetchone() != (0,)
    except sqlite3.DatabaseError:
        return True
    finally:
        file.close()
        copy.unlink()
