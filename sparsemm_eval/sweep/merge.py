"""The answers of several folders of one grid in a new one, for jobs on unlike machines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsemm_eval.engine.answers import Answer, AnswerStore, tally
from sparsemm_eval.errors import UserError
from sparsemm_eval.paths import write_whole
from sparsemm_eval.sweep.grid import Grid, parse_grid
from sparsemm_eval.sweep.plan import Plan, PlannedCell, PlannedJob, answers_folder

_SHOWN = 20


@dataclass(frozen=True)
class Conflict:
    """One sample under one cell that two folders answer differently.

    Parameters
    ----------
    cell, document : str
        Which.
    kept, other : str
        The texts.
    kept_from, other_from : Path
        The folders.
    """

    cell: str
    document: str
    kept: str
    other: str
    kept_from: Path
    other_from: Path

    def __str__(self) -> str:
        return (
            f"{self.cell}, {self.document}: {self.kept!r} ({self.kept_from}, kept), "
            f"{self.other!r} ({self.other_from})"
        )


@dataclass(frozen=True)
class Merged:
    """What a merge made.

    Parameters
    ----------
    out : Path
        The new folder.
    found : mapping of Path to (int, int)
        Of each folder, answers it has, and those of them that were new.
    expected : int
        Answers of the whole grid.
    conflicts : tuple of Conflict
        In the order of cells.
    broken : tuple of str
        A line a file that could not be read.
    """

    out: Path
    found: Mapping[Path, tuple[int, int]]
    expected: int
    conflicts: tuple[Conflict, ...]
    broken: tuple[str, ...]

    def lines(self) -> Iterator[str]:
        """What to say of it."""
        for folder, (count, new) in self.found.items():
            yield f"{folder}: {count} answers, {new} of them new"
        for line in self.broken:
            yield f"broken, left out: {line}"
        for conflict in self.conflicts[:_SHOWN]:
            yield f"conflict: {conflict}"
        if len(self.conflicts) > _SHOWN:
            yield f"and {len(self.conflicts) - _SHOWN} more conflicts"
        total = sum(new for _, new in self.found.values())
        yield (
            f"{self.out}: {total} of {self.expected} answers, {len(self.conflicts)} conflicts; "
            f"`sparsemm-eval sweep {self.out / 'grid.yaml'} --out {self.out}` goes on"
        )


def merge_sweeps(folders: Sequence[Path], out: Path) -> Merged:
    """Put all finished answers of several sweeps into a new folder.

    The folders stay as they are, but for broken files, which are set aside. Where two answer a
    sample differently, as unlike machines may in half precision, the first folder's answer is
    kept and the conflict is shown.

    Parameters
    ----------
    folders : sequence of Path
        Sweeps of one grid; they may differ in how it is parted into jobs.
    out : Path
        A folder that is not there yet, or is empty.

    Raises
    ------
    ValueError
        If a folder holds no sweep, or one of another grid, other weights, head scores, data or
        version; or if ``out`` holds something.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: it is not empty; choose a new folder to merge into")
    grids = [_grid(folder) for folder in folders]
    plans = [_plan(folder) for folder in folders]
    cells = _same_cells(folders, grids, plans)
    models = tuple(dict.fromkeys(cell.model for cell in cells))
    broken = tuple(
        f"{path}: {cause}"
        for model in models
        for folder in folders
        for path, cause in tally(answers_folder(folder, model))[1].items()
    )
    counts = dict.fromkeys(folders, (0, 0))
    conflicts: list[Conflict] = []
    out.mkdir(parents=True, exist_ok=True)
    for model in models:
        stores = {
            folder: AnswerStore(place)
            for folder in folders
            if (place := answers_folder(folder, model)).is_dir()
        }
        store = AnswerStore(answers_folder(out, model))
        for cell in (cell.words for cell in cells if cell.model == model):
            kept = _merge_cell(cell, stores, counts, conflicts)
            store.write(kept)
        store.close()
    # Last: a folder without a plan is one where the merge was broken off.
    write_whole(out / "grid.yaml", grids[0].resolved())
    plugins = {name: digest for plan in plans for name, digest in plan.plugins.items()}
    Plan(_jobs(grids[0], cells), cells, plugins).write(out)
    expected = sum(cell.samples for cell in cells)
    return Merged(out, counts, expected, tuple(conflicts), broken)


def _grid(folder: Path) -> Grid:
    path = folder / "grid.yaml"
    if not path.is_file():
        raise UserError(f"{folder}: no sweep was begun here, it has no grid.yaml")
    return parse_grid(path.read_text(encoding="utf-8"), path)


def _plan(folder: Path) -> Plan:
    plan = Plan.read(folder)
    if plan is None:
        raise UserError(f"{folder}: no sweep was begun here, it has no plan.json")
    return plan


def _same_cells(
    folders: Sequence[Path], grids: Sequence[Grid], plans: Sequence[Plan]
) -> tuple[PlannedCell, ...]:
    """The cells of all folders, which must be of one make."""
    first = grids[0].model_copy(update={"shards": 1}).resolved()
    known: dict[tuple[str, str], PlannedCell] = {}
    for folder, grid, plan in zip(folders, grids, plans, strict=True):
        if grid.model_copy(update={"shards": 1}).resolved() != first:
            raise UserError(f"{folder}: its grid is another than that of {folders[0]}")
        for cell in plan.cells:
            if known.setdefault((cell.model, cell.words), cell) != cell:
                raise UserError(
                    f"{folder}: its answers are of other weights, head scores, data or version of "
                    f"sparsemm-eval than those before it ({cell.model}, {cell.words})"
                )
    order = {name: place for place, name in enumerate(spec.name for spec in grids[0].models)}
    tasks = {task: place for place, task in enumerate(grids[0].tasks)}
    return tuple(sorted(known.values(), key=lambda cell: (order[cell.model], tasks[cell.task])))


def _jobs(grid: Grid, cells: Sequence[PlannedCell]) -> tuple[PlannedJob, ...]:
    """The grid's jobs on what is planned."""
    counts = {(cell.model, cell.task): cell.samples for cell in cells}
    jobs = [job for job in grid.jobs() if (job.model.name, job.task) in counts]
    return tuple(
        PlannedJob(
            job.name,
            job.model.name,
            job.task,
            job.shard,
            job.shards,
            len(range(job.shard, counts[job.model.name, job.task], job.shards)),
        )
        for job in jobs
    )


def _merge_cell(
    cell: str,
    stores: Mapping[Path, AnswerStore],
    counts: dict[Path, tuple[int, int]],
    conflicts: list[Conflict],
) -> list[Answer]:
    kept: dict[str, tuple[Answer, Path]] = {}
    for folder, store in stores.items():
        answers = store.read(cell)
        before = len(kept)
        for key, answer in answers.items():
            first, source = kept.setdefault(key, (answer, folder))
            if first.text != answer.text:
                conflicts.append(
                    Conflict(cell, answer.doc_id, first.text, answer.text, source, folder)
                )
        count, new = counts[folder]
        counts[folder] = count + len(answers), new + len(kept) - before
    return [answer for answer, _ in kept.values()]
