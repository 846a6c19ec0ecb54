"""How far a sweep is, from the files in its folder alone."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text
from tabulate import tabulate

from sparsemm_eval.engine.answers import Tally, tally
from sparsemm_eval.errors import UserError, printable, short_repr
from sparsemm_eval.sweep.checksum import Broken, scored_answers
from sparsemm_eval.sweep.plan import (
    Plan,
    PlannedCell,
    PlannedJob,
    answers_folder,
    number_of,
)
from sparsemm_eval.sweep.state import OPEN, QUEUED, RUNNING, States

SCORING = "scoring"
TABLE = "table.md"


@dataclass(frozen=True)
class JobStatus:
    """A job: answers done, failed and expected, over all its cells; its state of `States`.

    It is complete where each of its cells has an answer to every sample but those that may fail.
    """

    job: PlannedJob
    done: int
    failed: int
    expected: int
    complete: bool
    state: str = OPEN
    reason: str = ""


@dataclass(frozen=True)
class CellStatus:
    """A cell on one task: answers done, failed and expected; whether it is scored, and can be."""

    cell: PlannedCell
    done: int
    failed: int
    scored: bool
    complete: bool


@dataclass(frozen=True)
class Status:
    """How far a sweep is.

    Parameters
    ----------
    jobs : tuple of JobStatus
    cells : tuple of CellStatus
    failures : tuple of str
        A line a task and model of which more samples failed than may, with the first cause.
    left_out : tuple of str
        A line a task and model of which samples failed that may: scores are without them.
    broken : tuple of str
        A line a file that is broken; the next run sets it aside.
    scoring_state : (str, str)
        State and reason, as a job's.
    time_left : str
        How long the missing answers will take, in words; "" if no answer was timed here, or none
        is missing.
    """

    jobs: tuple[JobStatus, ...]
    cells: tuple[CellStatus, ...]
    failures: tuple[str, ...]
    broken: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    scoring_state: tuple[str, str] = (OPEN, "")
    time_left: str = ""

    @property
    def states(self) -> dict[str, tuple[str, str]]:
        """State and reason of each job by name, and of ``scoring``."""
        return {job.job.name: (job.state, job.reason) for job in self.jobs} | {
            SCORING: self.scoring_state
        }

    @property
    def under_way(self) -> bool:
        """Whether a job waits or runs."""
        return any(state in (QUEUED, RUNNING) for state, _ in self.states.values())

    def incomplete(self, name: str) -> tuple[str, ...]:
        """A line if a job's answers are not all there."""
        return tuple(
            f"{name}: {job.expected - job.done} of {job.expected} answers are missing, "
            f"{job.failed} failed" + "".join(f"; {line}" for line in self.failures)
            for job in self.jobs
            if job.job.name == name and not job.complete
        )

    @property
    def finished(self) -> bool:
        """Whether every answer is there and every cell scored."""
        return all(cell.complete and cell.scored for cell in self.cells)

    @property
    def line(self) -> str:
        """How far it is, and what runs."""
        done = sum(cell.done for cell in self.cells)
        expected = sum(cell.cell.samples for cell in self.cells)
        scored = sum(cell.scored for cell in self.cells)
        running = sorted(
            f"{name}: {reason}" for name, (state, reason) in self.states.items() if state == RUNNING
        )
        return f"answers {done} of {expected}, cells scored {scored} of {len(self.cells)}; " + (
            f"running, {printable('; '.join(running))}" if running else "not running"
        )

    def __str__(self) -> str:
        lines = [
            self.line,
            *filter(None, [self.time_left]),
            "",
            _jobs_table(self.jobs, self.scoring_state),
            "",
            _cells_table(self.cells),
        ]
        titles = ("failed", "left out, failed", "broken")
        for title, said in zip(titles, (self.failures, self.left_out, self.broken), strict=True):
            if said:
                lines += ["", *(f"{title}: {printable(line)}" for line in said)]
        return "\n".join(lines)


def status(out: Path) -> Status:
    """Read how far a sweep is; nothing is changed, no model and no benchmark is loaded.

    Parameters
    ----------
    out : Path
        The sweep's folder.

    Raises
    ------
    ValueError
        If no sweep was begun there.
    """
    plan = Plan.read(out)
    if plan is None:
        raise UserError(
            f"{out}: no sweep was begun here, or it was stopped before it knew its cells; "
            "`sparsemm-eval sweep GRID --out FOLDER` begins one"
        )
    tallies: dict[str, Mapping[str, Tally]] = {}
    broken: list[str] = []
    for model in dict.fromkeys(planned.model for planned in (*plan.jobs, *plan.cells)):
        tallies[model], files = tally(answers_folder(out, model))
        broken += [f"{path}: {cause}" for path, cause in files.items()]
    states = States(out)
    broken += states.broken
    jobs = tuple(_job(job, plan, tallies[job.model], out, states) for job in plan.jobs)
    cells = tuple(_cell(cell, plan, tallies[cell.model], out, broken) for cell in plan.cells)
    failures = _failures(plan, tallies)
    tables = (out / TABLE).is_file()
    scored = tables and all(cell.complete and cell.scored for cell in cells)
    return Status(
        jobs,
        cells,
        tuple(line for line, may in failures if not may),
        tuple(broken),
        tuple(line for line, may in failures if may),
        states.of(SCORING, scored),
        _time_left(cells, tallies, sum(job.state == RUNNING for job in jobs)),
    )


def follow(out: Path, seconds: float) -> None:
    """Show the status of a folder again and again, until no job waits or runs.

    Where there is no terminal, in a pipe or a log, that is a line whenever something has changed.

    Parameters
    ----------
    out : Path
        The sweep's folder.
    seconds : float
        Between two looks.
    """
    now, console = status(out), Console()
    if not console.is_terminal:
        said = ""
        while now.under_way:
            if now.line != said:
                said = now.line
                print(said, flush=True)
            time.sleep(seconds)
            now = status(out)
        print(now, flush=True)
        return
    with Live(
        Text(str(now)), console=console, auto_refresh=False, vertical_overflow="crop"
    ) as screen:
        while now.under_way:
            time.sleep(seconds)
            now = status(out)
            screen.update(Text(str(now)), refresh=True)
        screen.update(Text(""), refresh=True)
    print(now)


def samples_file(results: Path, task: str) -> Path:
    """The samples file beside a results file."""
    name = results.name.removesuffix("_results.json")
    return results.with_name(f"{name}_samples_{task}.jsonl")


def _asked(cell: PlannedCell, tally: Tally, job: PlannedJob | None = None) -> Tally:
    """What became of the documents that a plan asks of a cell, or of those that a job answers.

    A folder may hold more: the answers of a larger sweep that was there before.
    """

    def counts(document: str) -> bool:
        in_shard = job is None or number_of(document) % job.shards == job.shard
        return cell.asks(document) and in_shard

    done = frozenset(document for document in tally.done if counts(document))
    return Tally(done, {one: cause for one, cause in tally.failed.items() if counts(one)})


def _job(
    job: PlannedJob, plan: Plan, tallies: Mapping[str, Tally], out: Path, states: States
) -> JobStatus:
    cells = [c for c in plan.cells if (c.model, c.task) == (job.model, job.task)]
    of_cells = [_asked(cell, tallies.get(cell.words, Tally()), job) for cell in cells]
    done = sum(len(of_cell.done) for of_cell in of_cells)
    expected = job.samples * len(cells)
    complete = all(_complete(of_cell, job.samples, plan.allow_failed) for of_cell in of_cells)
    state, reason = states.of(job.name, complete)
    return JobStatus(
        job,
        done=done,
        failed=sum(len(of_cell.failed) for of_cell in of_cells),
        expected=expected,
        complete=complete,
        state=state,
        reason=reason,
    )


def _complete(tally: Tally, samples: int, allow_failed: int) -> bool:
    """Whether every answer is there but those that failed and may."""
    failed = len(tally.failed)
    return len(tally.done) + failed == samples and failed <= allow_failed


def _cell(
    cell: PlannedCell, plan: Plan, tallies: Mapping[str, Tally], out: Path, broken: list[str]
) -> CellStatus:
    of_cell = _asked(cell, tallies.get(cell.words, Tally()))
    results = out / cell.results
    try:
        scored = scored_answers(results, samples_file(results, cell.task)) is not None
    except Broken as error:
        broken.append(str(error))
        scored = False
    complete = _complete(of_cell, cell.samples, plan.allow_failed) and bool(of_cell.done)
    return CellStatus(cell, len(of_cell.done), len(of_cell.failed), scored, complete)


def _time_left(
    cells: Iterable[CellStatus], tallies: Mapping[str, Mapping[str, Tally]], running: int
) -> str:
    """How long the missing answers will take at what those of the same model and task took.

    An answer's time is its share of the batch it was decoded in. Jobs are taken to go on as many
    at once as run now, or one by one where none does; the ranks of one job count as one.
    """
    missing: Counter[tuple[str, str]] = Counter()
    timed: Counter[tuple[str, str]] = Counter()
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    for cell in cells:
        at = cell.cell.model, cell.cell.task
        of_cell = tallies[cell.cell.model].get(cell.cell.words, Tally())
        missing[at] += cell.cell.samples - cell.done
        timed[at] += of_cell.timed
        seconds[at] += of_cell.seconds
    known = [at for at in missing if missing[at] and timed[at]]
    if not known:
        return ""
    jobs = max(running, 1)
    left = sum(missing[at] * seconds[at] / timed[at] for at in known) / jobs
    count = sum(missing[at] for at in known)
    unknown = sum(missing.values()) - count
    line = (
        f"time left: about {duration(max(left, 1))} for {count:,} answers, measured on "
        f"{sum(timed[at] for at in known):,}, with {jobs} job{'' if jobs == 1 else 's'} at once"
    )
    return f"{line}; {unknown:,} more are of tasks not begun" if unknown else line


def duration(seconds: float) -> str:
    """A time in hours, minutes or seconds."""
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"


def _failures(plan: Plan, tallies: Mapping[str, Mapping[str, Tally]]) -> list[tuple[str, bool]]:
    """A line a model and task of which samples failed, and whether so many may in each cell."""
    causes: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    most: Counter[tuple[str, str]] = Counter()
    for cell in plan.cells:
        at = cell.model, cell.task
        failed = _asked(cell, tallies[cell.model].get(cell.words, Tally())).failed
        causes[at].update(failed)
        most[at] = max(most[at], len(failed))
    return [
        (
            f"{model} {task}: {len(failed)} samples, first {min(failed)}: {failed[min(failed)]}",
            most[model, task] <= plan.allow_failed,
        )
        for (model, task), failed in causes.items()
        if failed
    ]


def _jobs_table(jobs: Iterable[JobStatus], scoring: tuple[str, str]) -> str:
    rows = [
        {
            "job": printable(job.job.name),
            "state": printable(job.state),
            "done": job.done,
            "expected": job.expected,
            "failed": job.failed,
            "": printable(job.reason),
        }
        for job in jobs
    ]
    if scoring[0] != OPEN:
        none = dict.fromkeys(("done", "expected", "failed"), "")
        rows.append({"job": SCORING, "state": scoring[0], **none, "": printable(scoring[1])})
    return _table(rows)


def _cells_table(cells: Iterable[CellStatus]) -> str:
    return _table(
        {
            "model": printable(cell.cell.model),
            "task": printable(cell.cell.task),
            "cell": printable(" ".join(map(_setting, cell.cell.settings.items()))),
            "done": cell.done,
            "expected": cell.cell.samples,
            "failed": cell.failed,
            "scored": "yes" if cell.scored else "",
        }
        for cell in cells
    )


def _table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows of equal keys; numbers stand on the right."""
    rows = list(rows)
    sides = ["right" if isinstance(value, int) else "left" for value in rows[0].values()]
    return tabulate(rows, headers="keys", tablefmt="plain", disable_numparse=True, colalign=sides)


def _setting(item: tuple[str, Any]) -> str:
    name, value = item
    text = value if isinstance(value, str) else short_repr(value)
    return text if name == "method" else f"{name}={text}"
