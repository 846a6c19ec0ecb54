"""Train the tiny model from nothing: ``python -m sparsemm_eval.tiny.train --out DIR``.

The output folder gets ``train_log.jsonl``, the resumable ``training.pt``, a loadable checkpoint
``step-N/`` every few minutes and, at the end, ``qwen2vl/`` with its model card.
"""

from __future__ import annotations

import json
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from .alignment import align_vision
from .card import model_card
from .checkpoint import build_model, export
from .documents import PAGE, Layout, Split
from .evaluate import evaluate
from .learner import LEARNING_RATE, Learner, rates
from .packing import Packing, draw_batch

STAGES: tuple[Packing, ...] = (
    Packing(Layout(2, 11, 1, 2), documents=48, tokens=72, onward=1),
    Packing(Layout(4, 11, 2, 4), documents=32, tokens=112, onward=1),
    Packing(Layout(6, 11, 3, 6), documents=24, tokens=160, onward=1),
    Packing(Layout(8, 22, 6, 12), documents=12, tokens=240, onward=1),
    Packing(PAGE, documents=8, tokens=320, onward=2),
)
WARM_UP = 100
DECAY = 0.3
PASSED = 0.9
TARGET = 0.99
LOG_EVERY = 20
CHECK_EVERY = 250
CHECK_QUESTIONS = 400


@dataclass
class Progress:
    """Where a run stands; all of it is in the training checkpoint.

    Attributes
    ----------
    step : int
        Optimizer steps taken after the vision alignment.
    stage : int
        Index into ``STAGES``.
    seconds : float
        Time spent, earlier sessions of a resumed run included.
    end : float
        Share of the budget at which training ends; below 1 once the target was met early.
    held_out : float
        Newest exact match on held-out values.
    """

    step: int = 0
    stage: int = 0
    seconds: float = 0.0
    end: float = 1.0
    held_out: float = 0.0


class Log:
    """Appends records to a JSONL file, and shows them."""

    def __init__(self, file: Path, started: float) -> None:
        self._file, self._started = file, started

    def __call__(self, record: dict[str, float]) -> None:
        """Append one record, with the seconds since the start."""
        timed = {**record, "seconds": time.monotonic() - self._started}
        line = json.dumps({key: round(value, 5) for key, value in timed.items()})
        with self._file.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
        typer.echo(line)


@dataclass(frozen=True)
class Budget:
    """When training ends: after so many minutes or steps, whichever comes first."""

    minutes: float
    steps: int

    def spent(self, progress: Progress) -> float:
        """Return the share of the budget that is spent."""
        return max(progress.seconds / (60 * self.minutes), progress.step / self.steps)

    def learning_rate(self, progress: Progress) -> float:
        """Return the rate: a short warm-up, a long plateau, a linear way down to the end."""
        left = 1 - self.spent(progress) / progress.end
        warm = min(1.0, (progress.step + 1) / WARM_UP)
        return LEARNING_RATE * warm * min(1.0, max(0.0, left) / DECAY)


def check(learner: Learner, seed: int) -> dict[str, float]:
    """Measure a learner on held-out documents of the last stage, without generating.

    Parameters
    ----------
    learner : Learner
        The learner.
    seed : int
        Seed of the held-out documents.

    Returns
    -------
    dict
        The shares of :func:`~sparsemm_eval.tiny.learner.rates`, prefixed with ``held_out_``, over
        at least 400 value questions.
    """
    total, index = torch.zeros(6, dtype=torch.float64), 0
    while total[1] < CHECK_QUESTIONS:
        total += learner.test(draw_batch(STAGES[-1], Split.HELD_OUT, seed, index))
        index += 1
    return {f"held_out_{name}": share for name, share in rates(total).items()}


def learn(
    learner: Learner,
    progress: Progress,
    budget: Budget,
    seed: int,
    out: Path,
    log: Log,
    save_minutes: float,
) -> None:
    """Go through the stages until the budget is spent.

    Parameters
    ----------
    learner, progress
        What learns and where it stands; both change in place.
    budget : Budget
        When to stop.
    seed : int
        Seed of the documents.
    out : pathlib.Path
        Folder of the log and of the checkpoints.
    log : Log
        Receives a record every 20 steps, at every new stage and at every check.
    save_minutes : float
        Minutes between training checkpoints; every second one is exported too.
    """
    recent: deque[torch.Tensor] = deque(maxlen=LOG_EVERY)
    started = time.monotonic() - progress.seconds
    saves, next_save = 0, progress.seconds + 60 * save_minutes
    while budget.spent(progress) < progress.end:
        rate = budget.learning_rate(progress)
        batch = draw_batch(STAGES[progress.stage], Split.TRAIN, seed, progress.step)
        loss, counts = learner.step(batch, rate)
        recent.append(counts)
        progress.step += 1
        progress.seconds = time.monotonic() - started
        last = progress.stage == len(STAGES) - 1
        if progress.step % LOG_EVERY == 0:
            shares = rates(torch.stack(tuple(recent)).sum(0))
            place = {"step": progress.step, "stage": progress.stage + 1}
            log({**place, "loss": loss, "learning_rate": rate, **shares})
            passed = min(shares["value_exact"], shares["transcript_characters"]) >= PASSED
            if passed and not last and len(recent) == LOG_EVERY:
                progress.stage += 1
                recent.clear()
                log({"step": progress.step, "stage_reached": progress.stage + 1})
        if last and progress.step % CHECK_EVERY == 0:
            found = check(learner, seed)
            log({"step": progress.step, **found})
            progress.held_out = found["held_out_value_exact"]
            if progress.held_out >= TARGET and budget.spent(progress) < 1 - DECAY:
                # Good enough already: come down now, over the same share of the whole.
                progress.end = min(progress.end, budget.spent(progress) / (1 - DECAY))
        if progress.seconds >= next_save:
            saves, next_save = saves + 1, progress.seconds + 60 * save_minutes
            learner.save(out / "training.pt", asdict(progress))
            if saves % 2 == 0:
                note = f"Unfinished: the model after {progress.step:,} steps.\n"
                export(learner.model, out / f"step-{progress.step:06d}", note)


def train(
    out: Annotated[Path, typer.Option(help="Output folder; a run found there is resumed.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and documents.")] = 0,
    max_minutes: Annotated[float, typer.Option(min=0, help="Minutes of training.")] = 60.0,
    max_steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 1_000_000,
    align_steps: Annotated[int, typer.Option(min=0, help="Steps for vision alone.")] = 500,
    eval_questions: Annotated[int, typer.Option(min=1, help="Final value questions.")] = 500,
    save_minutes: Annotated[float, typer.Option(help="Minutes between checkpoints.")] = 5.0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    compile_layers: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Compile the layers (needs g++).")
    ] = True,
) -> None:
    """Train the tiny model, evaluate it on unseen documents and export it to OUT/qwen2vl."""
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    saved = out / "training.pt"
    learner = Learner(build_model(seed), compiled=compile_layers)
    progress = Progress()
    if saved.exists():
        progress = Progress(**learner.load(saved))
    log = Log(out / "train_log.jsonl", time.monotonic() - progress.seconds)
    if progress.seconds == 0:
        started = time.monotonic()
        align_vision(learner.model, seed, align_steps, log)
        progress.seconds = time.monotonic() - started
    learn(learner, progress, Budget(max_minutes, max_steps), seed, out, log, save_minutes)
    learner.save(saved, asdict(progress))
    folder = out / "qwen2vl"
    export(learner.model, folder, "Not evaluated yet.\n")
    readings = evaluate(folder, eval_questions, seed, STAGES[-1].layout)
    for kind, reading in readings.items():
        log({f"final_{kind}_{name}": value for name, value in reading.items()})
    command = (
        f"python -m sparsemm_eval.tiny.train --out {out.name} --seed {seed}"
        f" --max-minutes {max_minutes:g} --max-steps {max_steps} --align-steps {align_steps}"
        f" --eval-questions {eval_questions} --threads {threads}"
    )
    card = model_card(learner.model, out / "train_log.jsonl", readings, command)
    (folder / "README.md").write_text(card, encoding="utf-8")
    typer.echo(f"exported to {folder}")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; ``arguments`` stand in for those of the process."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(train)
    app(arguments, standalone_mode=False)


if __name__ == "__main__":
    main()
