"""What a sweep's folder is to hold: its jobs and cells, known before the first answer."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsemm_eval.errors import UserError, short_repr
from sparsemm_eval.paths import write_whole
from sparsemm_eval.stored import NoFile, NotUnderstood, read_json_as, with_checksum

if TYPE_CHECKING:  # a grid knows methods and models, and a plan is read without them
    from sparsemm_eval.sweep.grid import Job

SCHEMA = 1
_LONGEST = 240  # characters of a file's name, its ending left out


@dataclass(frozen=True)
class PlannedJob:
    """Samples shard, shard + shards, … of one task, for all cells of one model."""

    name: str
    model: str
    task: str
    shard: int
    shards: int
    samples: int

    def __post_init__(self) -> None:
        _check_file_names(self.name, self.model, self.task)
        if not 0 <= self.shard < self.shards or self.samples < 0:
            raise UserError(
                f"{self.name}: shard {self.shard} of {self.shards} with {self.samples} samples: "
                "there is no such job"
            )


@dataclass(frozen=True)
class PlannedCell:
    """One model under one method on one task.

    Parameters
    ----------
    model, task : str
        Names in the grid.
    words : str
        The cell as its answers name it.
    key : str
        Of all that decides its answers on the model's side: weights, head scores, settings.
    settings : mapping
        Of the method, as the grid gives them.
    samples : int
        Documents it is to answer.
    results : str
        Its results file, from the sweep's folder.
    """

    model: str
    task: str
    words: str
    key: str
    settings: Mapping[str, Any]
    samples: int
    results: str

    def __post_init__(self) -> None:
        _check_file_names(self.model, self.task, *self.results.split("/"))
        if self.samples < 0:
            raise UserError(f"{self.words}: it cannot have {self.samples} samples")

    def asks(self, document: str) -> bool:
        """Whether a document, named "split number", is one of the first so many of its task."""
        return number_of(document) < self.samples


def number_of(document: str) -> int:
    """A document's number in its data set, out of "split number"."""
    return int(document.split()[-1])


def _check_file_names(*names: str) -> None:
    """A plan names files of its own folder, whoever wrote it."""
    for name in names:
        if name in ("", ".", "..") or "/" in name or "\0" in name or len(name) > _LONGEST:
            raise UserError(f"{short_repr(name)}: it names a file and must be its name alone")


@dataclass(frozen=True)
class Plan:
    """All jobs and cells of a sweep, and the plugins that its methods come from, by digest.

    Of each cell ``allow_failed`` samples may fail; it is scored without them.
    """

    jobs: tuple[PlannedJob, ...]
    cells: tuple[PlannedCell, ...]
    plugins: Mapping[str, str] = field(default_factory=dict)
    allow_failed: int = 0

    @classmethod
    def read(cls, out: Path) -> Plan | None:
        """Of a sweep's folder; None if no sweep has got so far there.

        Raises
        ------
        ValueError
            If the file is broken.
        """
        path = out / "plan.json"
        try:
            return read_json_as(path, cls)
        except NoFile:
            return None
        except NotUnderstood as error:
            raise UserError(
                f"{path}: not a readable plan of a sweep ({error}); move it away and run the "
                "sweep again, its answers stay"
            ) from error

    def unlike(self, other: Plan) -> PlannedCell | None:
        """The first cell of another plan that this one has too, but of other answers."""
        known = {(c.model, c.words): (c.key, c.samples) for c in self.cells}
        for cell in other.cells:
            answers = cell.key, cell.samples
            if known.get((cell.model, cell.words), answers) != answers:
                return cell
        return None

    def joined(self, other: Plan) -> Plan:
        """This plan with the jobs, cells and plugins of another; as many may fail as there."""
        jobs = {job.name: job for job in (*self.jobs, *other.jobs)}
        cells = {(cell.model, cell.words): cell for cell in (*self.cells, *other.cells)}
        plugins = {**self.plugins, **other.plugins}
        return Plan(tuple(jobs.values()), tuple(cells.values()), plugins, other.allow_failed)

    def write(self, out: Path) -> None:
        """Put it into a sweep's folder, whole or not at all."""
        content = with_checksum({"schema": SCHEMA, **asdict(self)})
        write_whole(out / "plan.json", json.dumps(content, indent=1))


def planned_jobs(jobs: Iterable[Job], counts: Mapping[str, int]) -> tuple[PlannedJob, ...]:
    """A grid's jobs on tasks of so many documents; what would have none is left out.

    Parameters
    ----------
    jobs : iterable of Job
        Jobs of the grid.
    counts : mapping of str to int
        Documents by task.
    """
    return tuple(
        PlannedJob(
            job.name,
            job.model.name,
            job.task,
            job.shard,
            job.shards,
            len(range(job.shard, counts[job.task], job.shards)),
        )
        for job in jobs
        if job.shard < counts[job.task]
    )


def answers_folder(out: Path, model: str) -> Path:
    """Where a model's answers lie. One a model: two of a family have cells of equal names."""
    return out / "answers" / model


def continuing(out: Path, plugins: Iterable[str]) -> str:
    """The command that goes on with a sweep's folder."""
    words = ["sparsemm-eval", "sweep", str(out / "grid.yaml"), "--out", str(out)]
    for plugin in plugins:
        words += ["--plugin", plugin]
    return shlex.join(words)


def lock_file(out: Path, name: str) -> Path:
    """Of a job, or of ``scoring``."""
    return out / "locks" / f"{name}.lock"
