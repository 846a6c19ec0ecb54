"""The command line: ``sparsemm-eval``."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="sparsemm-eval",
    help="Evaluate head-budgeted KV-cache compression of multimodal LLMs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

bench_app = typer.Typer(help="Measure how fast it is.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")


@app.callback()
def main() -> None:
    """Evaluate head-budgeted KV-cache compression of multimodal LLMs."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for answers, tables and curves.")] = Path(
        "results/demo"
    ),
    samples: Annotated[int, typer.Option(help="Samples of each benchmark, 1 to 200.")] = 50,
    full: Annotated[bool, typer.Option("--full", help="All 200 samples of each.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples read together.")] = 25,
    budgets: Annotated[
        str, typer.Option(help="Mean tokens per KV head, comma-separated.")
    ] = "256,128,64,32,16,12",
    tasks: Annotated[str, typer.Option(help="Miniature tasks, comma-separated; all.")] = "",
    models: Annotated[str, typer.Option(help="Embedded models, comma-separated; all.")] = "",
    masked: Annotated[int, typer.Option(help="Documents of the masking study; 0: none.")] = 40,
    allocation: Annotated[str, typer.Option(help="paper or exact.")] = "paper",
) -> None:
    """Full KV and five methods over budgets on the embedded models; offline, in minutes."""
    with one_sentence():
        _quiet()
        from sparsemm_eval.sweep.demo import SAMPLES, TASKS, run_demo

        done = run_demo(
            out,
            SAMPLES if full else samples,
            batch_size,
            _integers("budgets", budgets),
            _words(tasks) or TASKS,
            _words(models),
            masked,
            allocation,
            command=_demo_command(),
        )
        typer.echo(done.markdown)
        for path in done.files:
            typer.echo(f"wrote {path}")


@app.command()
def sweep(
    grid: Annotated[str, typer.Argument(help="A grid of tasks/grids/, or a YAML file's path.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Its folder; default: results/sweeps/GRID.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show cells, jobs and an estimate, and end.")
    ] = False,
    job: Annotated[
        str | None, typer.Option(help="Only this job's answers, by its name; no scores.")
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for another sweep on the folder.")
    ] = False,
    skip_missing: Annotated[
        bool,
        typer.Option("--skip-missing", help="Leave out tasks whose metrics cannot run here."),
    ] = False,
) -> None:
    """Run a grid: models x tasks x methods x budgets, each prompt read once for all cells.

    A sweep that was stopped goes on where it was; `sparsemm-eval status FOLDER` shows how far.
    """
    with one_sentence():
        _quiet()
        from sparsemm_eval.sweep.grid import read_grid

        chosen = read_grid(grid)
        if dry_run:
            from sparsemm_eval.sweep.estimate import describe

            typer.echo(describe(chosen, out))
            return
        from sparsemm_eval.sweep.run import run_sweep

        folder = out or Path("results/sweeps") / chosen.name
        command = shlex.join(["sparsemm-eval", *sys.argv[1:]])
        done = run_sweep(chosen, folder, command, job, wait, skip_missing)
        typer.echo(done.markdown)
        typer.echo(done.status)
        for path in done.files:
            typer.echo(f"wrote {path}")
        for lost in done.left_out:
            typer.echo(f"left out: {lost.cause}")
        failures = done.status.failures + done.failures
        for line in failures:
            typer.echo(f"sparsemm-eval: {line}", err=True)
    raise typer.Exit(1 if failures else 0)


@app.command()
def status(folder: Annotated[Path, typer.Argument(help="A sweep's folder.")]) -> None:
    """How far a sweep is, by job and by cell, from its files alone."""
    with one_sentence():
        from sparsemm_eval.sweep.status import status as read_status

        typer.echo(read_status(folder))


@app.command()
def chase(
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint: a folder or a hub repository; default: embedded."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Score file; default: where its runs will find it."),
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            help="What is read: drawn, synthdog, coco, synthdog:FOLDER, coco:FOLDER, or a JSONL "
            'file of {"image": path, "chunks": [{"text": …, "box": [x0, y0, x1, y1]}]} lines.'
        ),
    ] = "drawn",
    count: Annotated[int, typer.Option("-n", min=1, help="Images.")] = 200,
    image_tokens: Annotated[
        str, typer.Option(help="Where a box is looked for: all, or tiles only as published code.")
    ] = "all",
    batch_size: Annotated[int, typer.Option(help="Images read together.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Where a generated answer ends.")] = 1024,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="Where the model lies.")] = "cpu",
) -> None:
    """Find the heads that look at what is being read, and write their visual scores.

    A run that was cut off goes on from OUTPUT.pages.jsonl; so does one with more images.
    """
    with one_sentence():
        from sparsemm_eval.heads.chase import chase as run_chase
        from sparsemm_eval.heads.findings import write_scores
        from sparsemm_eval.heads.pages import pages_for
        from sparsemm_eval.models.checkpoint import Checkpoint
        from sparsemm_eval.tiny import default_checkpoint

        checkpoint = Checkpoint(model or default_checkpoint(), dtype=dtype, device_map=device)
        path = output or checkpoint.scores_cache()
        found = run_chase(
            checkpoint,
            pages_for(checkpoint, data, count),
            count,
            image_tokens=image_tokens,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            records=path.with_name(f"{path.stem}.pages.jsonl"),
        )
        command = shlex.join(["sparsemm-eval", *sys.argv[1:]])
        write_scores(found, path, checkpoint, data, image_tokens, command)
        typer.echo(found.summary())
        typer.echo(f"wrote {path}")
        for warning in found.warnings():
            typer.echo(f"warning: {warning}", err=True)


@app.command()
def draw(
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint: a folder or hub repository; default: embedded."),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="What is looked at; default: a drawn document.")
    ] = None,
    question: Annotated[str | None, typer.Option(help="What is asked about the image.")] = None,
    box: Annotated[
        str | None, typer.Option(help="Where the answer stands: x0,y0,x1,y1 in its pixels.")
    ] = None,
    heads: Annotated[
        str | None, typer.Option(help="Heads to draw, such as 3-1,4-0, not the best and worst.")
    ] = None,
    best: Annotated[int, typer.Option(help="Heads of the highest visual scores.")] = 3,
    worst: Annotated[int, typer.Option(help="Heads of the lowest visual scores.")] = 3,
    head_scores: Annotated[
        Path | None, typer.Option(help="Score file; default: the checkpoint's own.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the pictures.")] = Path(
        "results/heads"
    ),
    max_new_tokens: Annotated[int, typer.Option(help="Where the answer ends.")] = 64,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="Where the model lies.")] = "cpu",
) -> None:
    """Draw what the heads look at while a question is answered: over the image, and all at once."""
    with one_sentence():
        from sparsemm_eval.heads.draw import draw as draw_heads
        from sparsemm_eval.heads.draw import read_scene
        from sparsemm_eval.models.checkpoint import Checkpoint
        from sparsemm_eval.tiny import default_checkpoint

        scene = read_scene(image, question, box)
        checkpoint = Checkpoint(model or default_checkpoint(), dtype=dtype, device_map=device)
        drawn = draw_heads(checkpoint, scene, out, heads, best, worst, head_scores, max_new_tokens)
        typer.echo(f"answer: {drawn.answer}")
        for line in (*drawn.lines, *(f"wrote {path}" for path in drawn.files)):
            typer.echo(line)


@app.command()
def mask(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for answers, table and curve.")],
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint: a folder or hub repository; default: embedded."),
    ] = None,
    tasks: Annotated[str, typer.Option(help="Benchmarks, comma-separated.")] = "docvqa_mini",
    shares: Annotated[
        str, typer.Option(help="Shares of the query heads to silence, comma-separated.")
    ] = "0.01,0.02,0.05,0.1",
    seeds: Annotated[int, typer.Option(help="Draws of random heads a share.")] = 3,
    mode: Annotated[str, typer.Option(help="How heads are silenced: query, output or both.")] = (
        "query"
    ),
    samples: Annotated[int, typer.Option(help="The first so many of each benchmark.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples read together.")] = 8,
    head_scores: Annotated[
        Path | None, typer.Option(help="Score file; default: the checkpoint's own.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="Where the model lies.")] = "cpu",
) -> None:
    """What benchmarks lose without the visual heads, and without as many random others."""
    with one_sentence():
        _quiet()
        from sparsemm_eval.heads.mask import run_masking
        from sparsemm_eval.methods import MASK_MODES
        from sparsemm_eval.models.checkpoint import Checkpoint
        from sparsemm_eval.tiny import default_checkpoint

        checkpoint = Checkpoint(model or default_checkpoint(), dtype=dtype, device_map=device)
        done = run_masking(
            checkpoint,
            out,
            tasks=[task.strip() for task in tasks.split(",") if task.strip()],
            shares=_numbers("shares", shares),
            seeds=seeds,
            modes=MASK_MODES if mode == "both" else (mode,),
            samples=samples,
            batch_size=batch_size,
            head_scores=head_scores,
            command=shlex.join(["sparsemm-eval", *sys.argv[1:]]),
        )
        typer.echo(done.markdown)
        for path in done.files:
            typer.echo(f"wrote {path}")


@app.command()
def doctor(
    build: Annotated[
        bool, typer.Option("--build", help="Compile the attention op now, not on first use.")
    ] = False,
    arches: Annotated[
        str, typer.Option(help="With --build: GPU architectures, such as 8.0,9.0; default: found.")
    ] = "",
) -> None:
    """What this machine has, which backends work on it, and what would mend the rest."""
    with one_sentence():
        from sparsemm_eval import doctor as doctors

        if arches and not build:
            raise ValueError(f"arches={arches!r}: it needs --build, which it is for")
        built = doctors.build_libraries(_words(arches)) if build else ()
        broken = False
        for finding in chain(built, doctors.examine()):
            typer.echo(f"{finding.subject:24} {finding.found}")
            if finding.remedy:
                typer.echo(f"{'':24} {finding.remedy}")
            broken |= finding.broken
    raise typer.Exit(int(broken))


@bench_app.command()
def kernels(
    shapes: Annotated[str, typer.Option(help="Layers, comma-separated.")] = (
        "vicuna,mistral,qwen2vl"
    ),
    means: Annotated[str, typer.Option(help="Mean tokens per KV head, comma-separated.")] = (
        "64,256,1024,4096"
    ),
    distributions: Annotated[str, typer.Option(help="How heads differ in length.")] = (
        "heavy,uniform"
    ),
    rows: Annotated[str, typer.Option(help="Samples decoded together, comma-separated.")] = (
        "1,4,31"
    ),
    entries: Annotated[str, typer.Option(help="What is timed, comma-separated.")] = (
        "cuda_ext,concatenate,padded_sdpa,torch,varlen,flashinfer"
    ),
    dtype: Annotated[
        str, typer.Option(help="Comma-separated; default: float16 on CUDA, float32 on the CPU.")
    ] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda; default: CUDA where it is.")] = "",
    threads: Annotated[int, typer.Option(help="On the CPU; 0: torch's choice.")] = 0,
    repeats: Annotated[int, typer.Option(help="Measurements of each entry.")] = 30,
    seconds: Annotated[float, typer.Option(help="At most about so long an entry and case.")] = 1.0,
    memory: Annotated[float, typer.Option(help="GiB for caches; 0: 70% of what is free.")] = 0.0,
    quick: Annotated[bool, typer.Option("--quick", help="Every line, in seconds.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for JSON, table and figure.")] = Path(
        "results/kernels"
    ),
) -> None:
    """Append and attend in one layer: this project's op beside other ways, and the bound."""
    given = dict(locals())
    with one_sentence():
        from sparsemm_eval.bench.kernels import run_kernels
        from sparsemm_eval.bench.options import Options

        done = run_kernels(Options(**given), shlex.join(["sparsemm-eval", *sys.argv[1:]]))
        typer.echo(done.markdown)
        for path in done.files:
            typer.echo(f"wrote {path}")
        for line in done.failures:
            typer.echo(f"sparsemm-eval: {line}", err=True)
    raise typer.Exit(1 if done.failures else 0)


@bench_app.command("shared-prefill")
def shared_prefill(
    model: Annotated[
        str,
        typer.Option(
            help="qwen2vl or llava_next (embedded); vicuna, mistral or qwen2vl-7b (random weights)."
        ),
    ] = "qwen2vl",
    device: Annotated[str, typer.Option(help="cpu or cuda; default: CUDA where it is.")] = "",
    samples: Annotated[int, typer.Option(help="Prompts in all.")] = 40,
    batch_size: Annotated[int, typer.Option(help="Prompts read together.")] = 8,
    repeats: Annotated[int, typer.Option(help="Of each way, in turn.")] = 3,
    threads: Annotated[int, typer.Option(help="On the CPU; 0: torch's choice.")] = 0,
    out: Annotated[Path, typer.Option(help="The file.")] = Path(
        "results/sweep/shared_prefill.json"
    ),
) -> None:
    """A grid of 31 cells in one pass, the same cells one by one, and full KV alone."""
    with one_sentence():
        from sparsemm_eval.bench.shared_prefill import run_shared_prefill

        command = shlex.join(["sparsemm-eval", *sys.argv[1:]])
        found = run_shared_prefill(
            out, model, device, samples, batch_size, repeats, threads, command
        )
        for name in ("seconds", "grid_over_one_full", "one_by_one_over_grid", "answers_unlike"):
            typer.echo(f"{name}: {found[name]}")
        if "byte_bound" in found:
            typer.echo(f"byte bound: {found['byte_bound']}")
        typer.echo(f"wrote {out}")


@contextmanager
def one_sentence() -> Iterator[None]:
    """Bad input ends with its one sentence and exit code 1, not with a traceback."""
    from sparsemm_eval.methods.checks import one_line
    from sparsemm_eval.models.answers import SampleFailures

    try:
        yield
    except (ValueError, OSError, NotImplementedError, SampleFailures) as error:
        typer.echo(f"sparsemm-eval: {one_line(error)}", err=True)
        raise typer.Exit(1) from error


def _quiet() -> None:
    """Leave the screen to progress and results: other libraries' news only from warnings on."""
    from loguru import logger

    logger.remove()
    logger.add(sys.stderr, level="WARNING")


def _integers(name: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise ValueError(f"{name}={text!r}: it must be integers, such as 256,128,64")
    return [int(part) for part in parts]


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ValueError(f"{name}={text!r}: it must be numbers, such as 0.01,0.05") from error


def _demo_command() -> str:
    """As it was given, through the front door."""
    return shlex.join(["./run_eval.sh", *sys.argv[1:]]) if sys.argv[2:] else "./run_eval.sh"


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
