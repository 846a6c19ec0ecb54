"""Whose a sweep's folder is: what is refused before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sparsemm_eval.errors import UserError, check_choice
from sparsemm_eval.stored import NoFile, NotUnderstood, checked_text, read_text
from sparsemm_eval.sweep.grid import Grid, Job
from sparsemm_eval.sweep.lock import busy, holder
from sparsemm_eval.sweep.plan import Plan, continuing, lock_file
from sparsemm_eval.sweep.status import SCORING


def chosen_jobs(grid: Grid, name: str | None) -> list[Job]:
    """All jobs of a grid, or the one of a name; UserError if there is none."""
    jobs = grid.jobs()
    if name is None:
        return jobs
    check_choice("job", name, [job.name for job in jobs])
    return [job for job in jobs if job.name == name]


def refuse_other_grid(grid: Grid, out: Path, replace: bool = False) -> None:
    """Raise UserError if a folder holds another grid's sweep; one of its name may be replaced."""
    if (replace and name_there(out) in (None, grid.name)) or not is_other_grid(grid, out):
        return
    plan = Plan.read(out)
    raise UserError(
        f"{out}: it holds the sweep of another grid, {out / 'grid.yaml'}; choose another folder, "
        f"or run that one on with `{continuing(out, plan.plugins if plan else ())}`"
    )


def name_there(out: Path) -> str | None:
    """The name of the grid whose sweep a folder holds; None if it holds none."""
    lines = _grid_there(out)
    return lines[0].removeprefix("name: ").strip("'") if lines else None


def is_other_grid(grid: Grid, out: Path) -> bool:
    """Whether a folder holds the sweep of a grid that differs in more than its name."""
    lines = _grid_there(out)
    return bool(lines) and lines[1:] != grid.resolved().splitlines()[1:]


def refuse_other_sweep(jobs: Sequence[Job], out: Path) -> None:
    """Raise `sparsemm_eval.sweep.lock.Locked` if another process is on one of the jobs."""
    for name in (*(job.name for job in jobs), SCORING):
        if (other := holder(lock_file(out, name))) is not None:
            raise busy(out, name, other)


def _grid_there(out: Path) -> list[str]:
    """Lines of the grid whose sweep a folder holds, its name first; none if it holds none."""
    path = out / "grid.yaml"
    try:
        return checked_text(read_text(path)).splitlines()
    except NoFile:
        return []
    except NotUnderstood as error:
        raise UserError(f"{path}: {error}; choose another folder, or move it away") from error
