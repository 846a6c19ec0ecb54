"""Locks: one holder, named; gone with its process."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer

import pytest
from engine.fixtures import log, sentence

from sparsemm_eval.sweep.lock import Locked, holder, lock

HOLD = """
import sys
from pathlib import Path
from sparsemm_eval.sweep.lock import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def another_process(path: Path) -> Iterator[subprocess.Popen]:
    """Hold a lock in another process."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout.readline() == "held\n"
        yield child
        child.kill()


def test_a_lock_is_held_and_given_back(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "job.lock"
    assert holder(path) is None
    for _ in range(2):
        with lock(path):
            assert holder(path) == f"process {os.getpid()} on {socket.gethostname()}"
        assert holder(path) is None


def test_another_holder_is_named(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "job.lock"
    with another_process(path) as child:
        words = f"process {child.pid} on {socket.gethostname()}"
        assert holder(path) == words
        with pytest.raises(Locked, match="another sweep") as caught, lock(path):
            pass
        assert words in sentence(caught)
        assert str(tmp_path) in sentence(caught)
        assert holder(path) == words, "the holder's name outlives those who did not get it"


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    path = tmp_path / "job.lock"
    with another_process(path) as child:
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert holder(path) is None
        with lock(path):
            assert str(os.getpid()) in holder(path)


def test_waiting_ends_when_the_holder_does(tmp_path: Path) -> None:
    path = tmp_path / "job.lock"
    with another_process(path) as child, log() as lines:
        timer = Timer(1.0, child.kill)
        timer.start()
        with lock(path, wait=True):
            assert child.wait() == -signal.SIGKILL
            assert str(os.getpid()) in holder(path)
    assert f"waiting for process {child.pid}" in "".join(lines)
