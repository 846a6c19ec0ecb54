"""Locks of a sweep's folder, one file each; the system drops a dead process's."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loguru import logger

# `status` holds a lock for an instant when it looks whether it is free.
_PATIENCE = 0.5
_PAUSE = 0.05
_UNKNOWN = "a process that has not said its name yet"


class Locked(OSError):
    """Another process holds a lock."""


@contextmanager
def lock(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold a lock file while the block runs.

    Parameters
    ----------
    path : Path
        Its folder is made; the file stays.
    wait : bool
        Wait for another holder instead of raising.

    Raises
    ------
    Locked
        Naming the process that holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # "a": the holder's name must stay readable to those who do not get the lock.
    with path.open("a", encoding="utf-8") as file:
        _acquire(file.fileno(), path, wait)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def holder(path: Path) -> str | None:
    """Who holds a lock file, in words; None if nobody does."""
    if not path.is_file():
        return None
    with path.open(encoding="utf-8") as file:
        if _try(file.fileno(), fcntl.LOCK_SH):
            return None
        return file.read() or _UNKNOWN


def busy(out: Path, name: str, who: str) -> Locked:
    """The error that a sweep's folder, or its job or part ``name``, is another process's."""
    return Locked(
        f"{out}: another sweep, {who}, is on it ({name}); wait for it with --wait, or choose "
        "another folder"
    )


def _acquire(file: int, path: Path, wait: bool) -> None:
    end = time.monotonic() + _PATIENCE
    said = False
    while not _try(file, fcntl.LOCK_EX):
        if time.monotonic() < end:
            time.sleep(_PAUSE)
            continue
        name = path.read_text(encoding="utf-8") or _UNKNOWN
        if not wait:
            raise busy(path.parent.parent, path.stem, name)
        if not said:
            logger.warning(f"waiting for {name}, which is on {path.stem} of {path.parent.parent}")
            said = True
        # Not LOCK_EX without LOCK_NB: on some network file systems that never returns.
        time.sleep(1)


def _try(file: int, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
