"""How a result was made: command, commit, versions, hardware."""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sparsemm_eval.stored import read_bytes

SCHEMA = 1
_MOST_BYTES = 4 << 30  # of a samples file
# The one entry of our results files that is not lmms-eval's.
OURS = "sparsemm_eval"
# In a results file's throughput, followed by a task: how many of its samples have no answer, and
# were left out of its score.
FAILED_SAMPLES = "failed_samples"
# Likewise: how many of its samples have an answer without a word in it, which is scored as it is.
EMPTY_ANSWERS = "empty_answers"
# Likewise, followed by a kind of prompts: how many documents of it the method was calibrated on.
CALIBRATED = "calibration_documents"
# Likewise, followed by a task: how many of its scored documents are among those.
CALIBRATION_SCORED = "calibration_documents_scored"
_PACKAGES = ("sparsemm-eval", "torch", "transformers", "lmms-eval", "accelerate", "flash-attn")


def provenance(command: str) -> dict[str, Any]:
    """What a results file says of its making.

    Parameters
    ----------
    command : str
        The command that makes it again.
    """
    return {
        "schema": SCHEMA,
        "command": command,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
        "hardware": {"machine": platform.machine(), "cpu_cores": os.cpu_count()},
    }


def content_hash(content: Mapping[str, Any]) -> str:
    """SHA-256 of a results file without our own entry, which a sweep checks it by."""
    rest = {name: value for name, value in content.items() if name != OURS}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a samples file.

    Raises
    ------
    NotUnderstood
        If it cannot be read.
    """
    return hashlib.sha256(read_bytes(path, _MOST_BYTES)).hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The checkout's that this package runs from, "+" where files differ; None elsewhere."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
