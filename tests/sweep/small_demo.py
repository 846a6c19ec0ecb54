"""The demo's grid, small enough for tests: both models, two tasks, every method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from sparsemm_eval.sweep.grid_file import grids_folder

TASKS = ("docvqa_mini", "vqav2_mini")
TABLES = ("table.md", "kept.md")
# Of each task: full KV, and 16 methods at two budgets.
CELLS = 33


def write_small_demo(path: Path, **changes: Any) -> Path:
    """Write the grid, with other values, to a file."""
    values = yaml.safe_load((grids_folder() / "demo.yaml").read_text())
    small = {"samples": 3, "tasks": list(TASKS), "budgets": [64, 12], "batch_size": 3}
    path.write_text(yaml.safe_dump(values | small | changes))
    return path


def tables(out: Path) -> list[bytes]:
    """What must be the same however the answers came about."""
    return [(out / name).read_bytes() for name in TABLES]
