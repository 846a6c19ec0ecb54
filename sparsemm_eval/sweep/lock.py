"""Locks of a sweep's folder, one file each; the system drops a dead process's."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from loguru import logger

from sparsemm_eval.errors import printable
from sparsemm_eval.stored import NotUnderstood, read_text

# `status` holds a lock for an instant when it looks whether it is free.
PATIENCE = 0.5
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
        Its folder is made; the file stays, and is empty unless its holder was killed.
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
        _acquire(file, path, wait)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n{begun_at(os.getpid())}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def holder(path: Path) -> str | None:
    """Who holds a lock file, in words; None if nobody does."""
    if not held(path):
        return None
    return _written(path)[0]


def held(path: Path) -> bool:
    """Whether a process holds a lock file."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return not _try(file, fcntl.LOCK_SH)


def killed(path: Path) -> bool:
    """Whether the last holder of a lock file ended without a word."""
    return path.is_file() and path.stat().st_size > 0 and not held(path)


def process_here(path: Path) -> int | None:
    """The number of the process that holds a lock file; None if it is none of this machine."""
    words, begun = _written(path)
    name = re.fullmatch(rf"process ([1-9]\d*) on {re.escape(socket.gethostname())}", words)
    if name is None:
        return None
    # Files of older versions do not say when it began.
    return int(name[1]) if begun in ("", begun_at(int(name[1]))) else None


def begun_at(pid: int) -> str:
    """When a process began, as the kernel counts; "" if this machine has none of this number.

    The machine's boot, and the clock ticks from there: no step of the clock changes them, and a
    later process of the same number has others.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    # The process' name stands in parentheses, and may hold some itself.
    return f"{boot()} {stat.rpartition(')')[2].split()[19]}"


def boot() -> str:
    """What this machine's kernel calls the time since it was started; "" if it does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def seize(file: IO, seconds: float = PATIENCE) -> bool:
    """Lock an open file, for all processes that it is handed on to; False if another holds it."""
    end = time.monotonic() + seconds
    while not _try(file, fcntl.LOCK_EX):
        if time.monotonic() >= end:
            return False
        time.sleep(_PAUSE)
    return True


def release(file: IO) -> None:
    """Unlock an open file for all that it was handed on to."""
    fcntl.flock(file, fcntl.LOCK_UN)


def busy(out: Path, name: str, who: str) -> Locked:
    """The error that a sweep's folder, or its job or part ``name``, is another process's."""
    return Locked(
        f"{out}: another sweep, {who}, is on it ({name}); wait for it with --wait, or choose "
        "another folder"
    )


def _acquire(file: IO, path: Path, wait: bool) -> None:
    # Not LOCK_EX without LOCK_NB: on some network file systems that never returns.
    told = False
    while not seize(file):
        name = _written(path)[0]
        if not wait:
            raise busy(path.parent.parent, path.stem, name)
        if not told:
            logger.warning(f"waiting for {name}, which is on {path.stem} of {path.parent.parent}")
            told = True
        time.sleep(1)


def _written(path: Path) -> tuple[str, str]:
    """Who wrote its name into a lock file last, and when that process began."""
    with suppress(NotUnderstood):
        words, _, begun = read_text(path, most=1000).partition("\n")
        return printable(words) or _UNKNOWN, begun
    return _UNKNOWN, ""


def _try(file: IO, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
