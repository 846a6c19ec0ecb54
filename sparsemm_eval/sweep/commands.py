"""What a sweep's jobs run: this program again, on the folder's own copy of the grid."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from sparsemm_eval.sweep.queue import Command
from sparsemm_eval.sweep.status import SCORING


def job_command(out: Path, name: str, gpus: int, doors: Sequence[str] = ()) -> Command:
    """What answers one job of a planned sweep: a rank a GPU, and their number asserted.

    Parameters
    ----------
    out : Path
        The sweep's folder.
    name : str
        The job's.
    gpus : int
        Its ranks; 0 is one, on the CPU.
    doors : sequence of str
        Words that name plugins and folders of tasks, such as ``--plugin FILE``.
    """
    begin: tuple[str, ...] = (sys.executable, "-m")
    if gpus > 1:
        begin += ("torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus), "-m")
    ranks = ("--world-size", str(max(1, gpus)))
    return Command(name, (*begin, *_sweep(out), *doors, "--job", name, *ranks))


def scoring_command(out: Path, skip_missing: bool, doors: Sequence[str] = ()) -> Command:
    """What scores all that is answered, and writes the tables of a plain sweep."""
    skip = ("--skip-missing",) if skip_missing else ()
    return Command(SCORING, (sys.executable, "-m", *_sweep(out), *doors, "--only-scores", *skip))


def _sweep(out: Path) -> tuple[str, ...]:
    return "sparsemm_eval", "sweep", str(out / "grid.yaml"), "--out", str(out), "--wait"
