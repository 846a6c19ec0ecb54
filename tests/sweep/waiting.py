"""Tests that watch other processes: wait for what they do, and see that they are gone."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil


def wait_until(true: Callable[[], object], seconds: float = 120.0) -> None:
    """Wait until a function says so."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_gone(pid: int) -> bool:
    """Whether a process has ended, also where nobody has asked for its exit code yet."""
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
