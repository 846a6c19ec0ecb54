"""Train a tiny model: ``python -m sparsemm_eval.tiny.train FAMILY --out DIR``.

The output folder gets ``train_log.jsonl``, the resumable ``training.pt``, a loadable checkpoint
``step-N/`` every few minutes and, at the end, a folder of the family's name with its model card.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import PreTrainedModel, Qwen2VLForConditionalGeneration

from sparsemm_eval.tiny.documents import PAGE, Layout, Split
from sparsemm_eval.tiny.pictures import Kind
from sparsemm_eval.tiny.training.alignment import align_vision, seen_words
from sparsemm_eval.tiny.training.card import LOG, MADE, how_made, model_card
from sparsemm_eval.tiny.training.evaluate import evaluate
from sparsemm_eval.tiny.training.family import FAMILIES, Family, Qwen2VLFamily, export
from sparsemm_eval.tiny.training.learner import Learner, rates
from sparsemm_eval.tiny.training.packing import Packing, draw_batch

STAGES: dict[str, tuple[Packing, ...]] = {
    "qwen2vl": (
        Packing(Layout(2, 11, 1, 2), documents=48, tokens=72, onward=1),
        Packing(Layout(4, 11, 2, 4), documents=32, tokens=112, onward=1),
        Packing(Layout(6, 11, 3, 6), documents=24, tokens=160, onward=1),
        Packing(Layout(8, 22, 6, 12), documents=12, tokens=240, onward=1),
        Packing(PAGE, documents=8, tokens=320, onward=2, pictures=0.6),
    ),
    # 22 columns from the first step: on fewer the squashed base image is legible too, and a model
    # that has learnt to read that is lost when it no longer is.
    "llava_next": (
        Packing(Layout(3, 22, 2, 4), documents=24, tokens=112, onward=1),
        Packing(Layout(5, 22, 3, 7), documents=16, tokens=160, onward=1),
        Packing(Layout(7, 22, 4, 10), documents=12, tokens=240, onward=1, pictures=0.3),
        Packing(Layout(11, 22, 8, 14), documents=8, tokens=320, onward=1, pictures=0.3),
        Packing(PAGE, documents=8, tokens=320, onward=2, pictures=0.6),
    ),
}
WARM_UP = 100
DECAY = 0.3
PASSED = 0.9
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
        Index into the family's ``STAGES``.
    seconds : float
        Time spent, earlier sessions of a resumed run included.
    """

    step: int = 0
    stage: int = 0
    seconds: float = 0.0


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
        """Return the share of the full rate: a short warm-up, a plateau, a linear way down."""
        warm = min(1.0, (progress.step + 1) / WARM_UP)
        return warm * min(1.0, max(0.0, 1 - self.spent(progress)) / DECAY)


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
        The shares of :func:`~sparsemm_eval.tiny.training.learner.rates`, prefixed with
        ``held_out_``, over at least 400 value questions.
    """
    packing = STAGES[learner.family.name][-1]
    total, index = torch.zeros(len(Kind) + 1, 2, dtype=torch.float64), 0
    while total[Kind.VALUE, 1] < CHECK_QUESTIONS:
        total += learner.test(draw_batch(learner.family, packing, Split.HELD_OUT, seed, index))
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
    family, stages = learner.family, STAGES[learner.family.name]
    while budget.spent(progress) < 1:
        rate = family.learning_rate * budget.learning_rate(progress)
        batch = draw_batch(family, stages[progress.stage], Split.TRAIN, seed, progress.step)
        loss, counts = learner.step(batch, rate)
        recent.append(counts)
        progress.step += 1
        progress.seconds = time.monotonic() - started
        last = progress.stage == len(stages) - 1
        if progress.step % LOG_EVERY == 0:
            shares = rates(torch.stack(tuple(recent)).sum(0))
            place = {"step": progress.step, "stage": progress.stage + 1}
            log({**place, "loss": loss, "learning_rate": rate, **shares})
            read = (shares.get("value_exact", 0), shares.get("transcript_characters", 0))
            if min(read) >= PASSED and not last and len(recent) == LOG_EVERY:
                progress.stage += 1
                recent.clear()
                log({"step": progress.step, "stage_reached": progress.stage + 1})
        if last and progress.step % CHECK_EVERY == 0:
            log({"step": progress.step, **check(learner, seed)})
        if progress.seconds >= next_save:
            saves, next_save = saves + 1, progress.seconds + 60 * save_minutes
            learner.save(out / "training.pt", asdict(progress))
            if saves % 2 == 0:
                note = f"Unfinished: the model after {progress.step:,} steps.\n"
                export(family, learner.model, out / f"step-{progress.step:06d}", note)


def lend(lender: Path, model: PreTrainedModel) -> tuple[bool, torch.Tensor]:
    """Give a model the weights of a trained tiny Qwen2-VL, as far as they fit.

    Parameters
    ----------
    lender : pathlib.Path
        Folder of the trained checkpoint.
    model : PreTrainedModel
        Changed in place. A LLaVA-NeXT gets the language layers alone: a KV head that several
        query heads share is repeated for each, and biases are left out.

    Returns
    -------
    own : bool
        Whether the model is a Qwen2-VL too, and so got everything.
    words : torch.Tensor
        What the lender sees where a glyph stands, see
        :func:`~sparsemm_eval.tiny.training.alignment.seen_words`.
    """
    given = Qwen2VLForConditionalGeneration.from_pretrained(lender, dtype=torch.float32)
    words = seen_words(Qwen2VLFamily(), given)
    if isinstance(model, Qwen2VLForConditionalGeneration):
        model.load_state_dict(given.state_dict())
        return True, words
    lent = given.state_dict()
    heads = given.config.text_config.num_key_value_heads
    for name, tensor in model.state_dict().items():
        if name not in lent or not name.startswith(("model.language_model.", "lm_head.")):
            continue
        found = lent[name]
        if found.shape != tensor.shape:
            times = len(tensor) // len(found)
            found = found.unflatten(0, (heads, -1)).repeat_interleave(times, 0).flatten(0, 1)
        tensor.copy_(found)
    return False, words


def train(
    family_name: Annotated[str, typer.Argument(metavar="FAMILY", help=" or ".join(FAMILIES))],
    out: Annotated[Path, typer.Option(help="Output folder; a run found there is resumed.")],
    start: Annotated[Path | None, typer.Option(help="Trained tiny Qwen2-VL to start from.")] = None,
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
    """Train a tiny model, evaluate it on unseen pages and export it to OUT/FAMILY."""
    if family_name not in FAMILIES:
        raise typer.BadParameter(f"{family_name}: it must be one of {', '.join(FAMILIES)}")
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    saved = out / "training.pt"
    family: Family = FAMILIES[family_name]()
    learner = Learner(family, family.build_model(seed), compiled=compile_layers)
    progress = Progress()
    if saved.exists():
        progress = Progress(**learner.load(saved))
    words, own = learner.model.model.language_model.embed_tokens.weight.detach().clone(), False
    if start and not saved.exists():
        own, words = lend(start, learner.model)
        # What reads already has the lessons before the last behind it.
        progress.stage = len(STAGES[family_name]) - 1 if own else 0
    log = Log(out / LOG, time.monotonic() - progress.seconds)
    if progress.seconds == 0:
        started = time.monotonic()
        align_vision(family, learner.model, words, seed, align_steps, log, keep=own)
        progress.seconds = time.monotonic() - started
    learn(learner, progress, Budget(max_minutes, max_steps), seed, out, log, save_minutes)
    learner.save(saved, asdict(progress))
    folder = out / family_name
    export(family, learner.model, folder, "Not evaluated yet.\n")
    readings = evaluate(folder, eval_questions, seed)
    for kind, reading in readings.items():
        log({f"final_{kind}_{name}": value for name, value in reading.items()})
    command = f"python -m sparsemm_eval.tiny.train {family_name} --out {out.name}"
    if start:
        command += f" --start {start.name}"
    command += (
        f" --seed {seed} --max-minutes {max_minutes:g} --max-steps {max_steps}"
        f" --align-steps {align_steps} --eval-questions {eval_questions} --threads {threads}"
    )
    shutil.copy(out / LOG, folder / LOG)
    (folder / MADE).write_text(json.dumps(how_made(command), indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(folder), encoding="utf-8")
    typer.echo(f"exported to {folder}")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; ``arguments`` stand in for those of the process."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(train)
    app(arguments, standalone_mode=False)


if __name__ == "__main__":
    main()
