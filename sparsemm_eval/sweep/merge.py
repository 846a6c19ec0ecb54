"""The answers of several folders of one grid in a new one, for jobs on unlike machines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsemm_eval.engine.answers import Answer, AnswerStore, tally
from sparsemm_eval.errors import UserError
from sparsemm_eval.paths import write_whole
from sparsemm_eval.stored import with_checksum_line
from sparsemm_eval.sweep.grid import Grid
from sparsemm_eval.sweep.grid_file import read_grid
from sparsemm_eval.sweep.plan import Plan, answers_folder, continuing, planned_jobs

_SHOWN = 20


@dataclass(frozen=True)
class Merged:
    """What a merge made.

    Parameters
    ----------
    out : Path
        The new folder.
    answers : mapping of Path to (int, int)
        How many answers each folder has, and how many of them were new.
    expected : int
        Answers of the whole grid.
    conflicts : tuple of str
        A line a sample under one cell that two folders answer differently, in the order of cells.
    broken : tuple of str
        A line a damaged file, of which only what is as it was written is taken.
    plugins : tuple of str
        What the sweep's methods or families come from.
    """

    out: Path
    answers: Mapping[Path, tuple[int, int]]
    expected: int
    conflicts: tuple[str, ...]
    broken: tuple[str, ...]
    plugins: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        """What the command says of it."""
        for folder, (count, new) in self.answers.items():
            yield f"{folder}: {count} answers, {new} of them new"
        for line in self.broken:
            yield f"damaged, what is whole of it is taken: {line}"
        for line in self.conflicts[:_SHOWN]:
            yield f"conflict: {line}"
        if len(self.conflicts) > _SHOWN:
            yield f"and {len(self.conflicts) - _SHOWN} more conflicts"
        total = sum(new for _, new in self.answers.values())
        yield (
            f"{self.out}: {total} of {self.expected} answers, {len(self.conflicts)} conflicts; "
            f"`{continuing(self.out, self.plugins)}` goes on"
        )


def merge_sweeps(folders: Sequence[Path], out: Path) -> Merged:
    """Put all finished answers of several sweeps into a new folder.

    The folders stay as they are, but for damaged files, which are set aside. Where two answer a
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
    UserError
        If a folder holds no sweep, or one of another grid, other weights, head scores, data, plugin
        or version; or if ``out`` holds something.
    """
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: it is not empty; choose a new folder to merge into")
    grid, plan = _grid_and_plan(folders)
    models = list(dict.fromkeys(cell.model for cell in plan.cells))
    broken = [
        f"{path}: {cause}"
        for model in models
        for folder in folders
        for path, cause in tally(answers_folder(folder, model))[1].items()
    ]
    out.mkdir(parents=True, exist_ok=True)
    count: Counter[Path] = Counter()
    new: Counter[Path] = Counter()
    conflicts: list[str] = []
    for model in models:
        places = {folder: answers_folder(folder, model) for folder in folders}
        stores = {folder: AnswerStore(at) for folder, at in places.items() if at.is_dir()}
        merged = AnswerStore(answers_folder(out, model))
        for cell in (cell.words for cell in plan.cells if cell.model == model):
            kept: dict[str, tuple[Answer, Path]] = {}
            for folder, store in stores.items():
                for key, answer in store.read(cell).items():
                    count[folder] += 1
                    new[folder] += key not in kept
                    first, source = kept.setdefault(key, (answer, folder))
                    if first.text != answer.text:
                        conflicts.append(
                            f"{cell}, {answer.doc_id}: {first.text!r} ({source}, kept), "
                            f"{answer.text!r} ({folder})"
                        )
            merged.write(answer for answer, _ in kept.values())
        merged.close()
    # Last: a folder without a plan is one where the merge was broken off.
    write_whole(out / "grid.yaml", with_checksum_line(grid.resolved()))
    plan.write(out)
    return Merged(
        out,
        {folder: (count[folder], new[folder]) for folder in folders},
        sum(cell.samples for cell in plan.cells),
        tuple(conflicts),
        tuple(broken),
        tuple(plan.plugins),
    )


def _grid_and_plan(folders: Sequence[Path]) -> tuple[Grid, Plan]:
    """The first folder's grid, and one plan of all folders, which must be of one make."""
    for folder in folders:  # all of them, before a plugin's grid is read
        _check_folder(folder)
    grids, plans = zip(*map(_read, folders), strict=True)
    grid, plan = grids[0], plans[0]
    for folder, other_grid, other_plan in zip(folders, grids, plans, strict=True):
        if _without_shards(other_grid) != _without_shards(grid):
            raise UserError(f"{folder}: its grid is another than that of {folders[0]}")
        if (cell := plan.unlike(other_plan)) is not None:
            raise UserError(
                f"{folder}: its answers are of other weights, head scores, data, plugin or version "
                f"of sparsemm-eval than those before it ({cell.model}, {cell.words})"
            )
        plan = plan.joined(other_plan)
    begun = {(cell.model, cell.task) for cell in plan.cells}
    counts = {cell.task: cell.samples for cell in plan.cells}
    jobs = [job for job in grid.jobs() if (job.model.name, job.task) in begun]
    order = [(job.model.name, job.task) for job in jobs]
    cells = sorted(plan.cells, key=lambda cell: order.index((cell.model, cell.task)))
    return grid, Plan(planned_jobs(jobs, counts), tuple(cells), plan.plugins, plan.allow_failed)


def _check_folder(folder: Path) -> None:
    for name in ("grid.yaml", "plan.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no sweep was begun here, it has no {name}")


def _read(folder: Path) -> tuple[Grid, Plan]:
    return read_grid(folder / "grid.yaml"), Plan.read(folder)


def _without_shards(grid: Grid) -> str:
    """A grid in words, however it is parted into jobs."""
    return grid.model_copy(update={"shards": 1}).resolved()
