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
    only_scores: Annotated[
        bool, typer.Option("--only-scores", help="Score what is answered, answer nothing.")
    ] = False,
    world_size: Annotated[
        int | None, typer.Option(help="Refuse unless so many processes run together (torchrun).")
    ] = None,
) -> None:
    """Run a grid: models x tasks x methods x budgets, each prompt read once for all cells.

    A sweep that was stopped goes on where it was; `sparsemm-eval status FOLDER` shows how far.
    """
    with one_sentence(), _stoppable("run it again to go on"):
        _quiet()
        from sparsemm_eval.sweep.grid import read_grid

        chosen = read_grid(grid)
        if dry_run:
            from sparsemm_eval.sweep.estimate import describe

            typer.echo(describe(chosen, out))
            return
        from sparsemm_eval.sweep.run import leave_ranks, run_sweep
        from sparsemm_eval.sweep.signals import leaving

        folder = out or Path("results/sweeps") / chosen.name
        words = [word for word in sys.argv[1:] if word not in ("--wait", "--only-scores")]
        command = shlex.join(["sparsemm-eval", *words])
        with leaving():
            done = run_sweep(
                chosen, folder, command, job, wait, skip_missing, only_scores, world_size
            )
        leave_ranks()
        typer.echo(done.markdown)
        typer.echo(done.status)
        for path in done.files:
            typer.echo(f"wrote {path}")
        for lost in done.left_out:
            typer.echo(f"left out: {lost.cause}")
        failures = done.status.failures + done.failures
        if job is not None:
            failures = done.status.incomplete(job)
        for line in failures:
            typer.echo(f"sparsemm-eval: {line}", err=True)
    raise typer.Exit(1 if failures else 0)


@app.command()
def submit(
    grid: Annotated[str, typer.Argument(help="A grid of tasks/grids/, or a YAML file's path.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Its folder; default: results/sweeps/GRID.")
    ] = None,
    executor: Annotated[str, typer.Option(help="local (this machine's GPUs, or CPU) or slurm.")] = (
        "local"
    ),
    shards: Annotated[
        int | None, typer.Option(help="Jobs a model and task; default: as the grid says.")
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(help="Of each job; default: 1, on a machine without GPUs 0.")
    ] = None,
    max_parallel: Annotated[
        int | None,
        typer.Option(help="Jobs that run at once; default: what the GPUs allow, on a CPU 1."),
    ] = None,
    retries: Annotated[int, typer.Option(help="Of a job that dies.")] = 2,
    skip_missing: Annotated[
        bool,
        typer.Option("--skip-missing", help="Leave out tasks whose metrics cannot run here."),
    ] = False,
    time: Annotated[
        str | None,
        typer.Option(help="Slurm: limit of a job, minutes or HH:MM:SS; it is then requeued."),
    ] = None,
    partition: Annotated[str | None, typer.Option(help="Slurm's.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm's.")] = None,
    qos: Annotated[str | None, typer.Option(help="Slurm's.")] = None,
    setup: Annotated[
        list[str] | None, typer.Option(help="Slurm: a shell line before each job; repeatable.")
    ] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(help="Slurm: any other parameter, such as mem=64G; repeatable."),
    ] = None,
) -> None:
    """Run a grid as batch jobs, then score; what is done is skipped, so submit again at will.

    `sparsemm-eval status FOLDER` shows the jobs, `sparsemm-eval cancel FOLDER` ends them.
    """
    with one_sentence(), _stoppable("submit it again to go on"):
        _quiet()
        from sparsemm_eval.sweep import submit as submits
        from sparsemm_eval.sweep.grid import read_grid
        from sparsemm_eval.sweep.room import Room
        from sparsemm_eval.sweep.status import status as read_status

        chosen = read_grid(grid)
        folder = (out or Path("results/sweeps") / chosen.name).resolve()
        chosen = submits.with_shards(chosen, folder, shards)
        room = Room(
            executor, gpus, max_parallel, time, partition, account, qos,
            tuple(setup or ()), tuple(sbatch or ()),
        )  # fmt: skip
        done = submits.submit(chosen, folder, room, retries, skip_missing, tell=typer.echo)
        for line in done.lines(folder):
            typer.echo(line)
        failed = done.failed or (executor == "local" and not read_status(folder).finished)
    raise typer.Exit(1 if failed else 0)


@app.command()
def cancel(folder: Annotated[Path, typer.Argument(help="A sweep's folder.")]) -> None:
    """End the jobs that were submitted for a folder; every finished answer stays."""
    with one_sentence():
        from sparsemm_eval.sweep.cancel import cancel as cancel_jobs

        names = cancel_jobs(folder)
        typer.echo(f"cancelled: {', '.join(names) or 'nothing, no job waits or runs'}")


@app.command()
def merge(
    folders: Annotated[
        list[Path], typer.Argument(help="Sweeps of one grid, from several machines.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder.")],
) -> None:
    """Put the answers of several folders into one; where they differ, the first folder's are kept.

    `sparsemm-eval sweep OUT/grid.yaml -o OUT` then answers the rest and scores.
    """
    with one_sentence():
        _quiet()
        from sparsemm_eval.sweep.merge import merge_sweeps

        merged = merge_sweeps(folders, out)
        for line in merged.lines():
            typer.echo(line)


@app.command()
def status(
    folder: Annotated[Path, typer.Argument(help="A sweep's folder.")],
    watch: Annotated[
        bool, typer.Option("--watch", help="Again and again, until no job waits or runs.")
    ] = False,
    seconds: Annotated[float, typer.Option(min=0.1, help="With --watch: between looks.")] = 10.0,
) -> None:
    """How far a sweep is, by job and by cell, from its files; Slurm is asked where it is."""
    with one_sentence():
        from sparsemm_eval.sweep.status import follow
        from sparsemm_eval.sweep.status import status as read_status

        if watch:
            follow(folder, seconds)
        else:
            typer.echo(read_status(folder))


@app.command()
def report(
    results: Annotated[
        list[str],
        typer.Argument(help="Results files, folders of them, or `paper` for the paper's numbers."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for index.html.")],
    title: Annotated[str, typer.Option(help="Of the page.")] = (
        "KV-cache compression of vision-language models"
    ),
    samples: Annotated[
        int, typer.Option(min=0, help="At most so many of the samples of a cell, for reading.")
    ] = 20,
    no_images: Annotated[
        bool, typer.Option("--no-images", help="Without the samples' images.")
    ] = False,
    against: Annotated[
        str, typer.Option(help="What scores are compared with: best, fullkv or a method.")
    ] = "best",
) -> None:
    """One HTML page of results that needs nothing else: scores, tables, figures, samples, runs.

    Images come from the tasks' data, which lmms-eval loads as for a run.
    """
    with one_sentence():
        _quiet()
        from sparsemm_eval.report.page import write_page
        from sparsemm_eval.report.results import gather

        read = gather(results)
        for file in read.unreadable:
            typer.echo(f"not read: {file.path}: {file.reason}", err=True)
        visuals = None
        if not no_images:
            from sparsemm_eval.models.visuals import visuals
        typer.echo(f"wrote {write_page(read, out, title, samples, visuals, against)}")


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
            shares=_numbers("shares", shares, "0.01,0.05"),
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
def table(
    results: Annotated[
        list[str], typer.Argument(help="Results files, folders of them, or the word paper.")
    ],
    like: Annotated[
        str | None, typer.Option(help="table1, table2, table3 or table4 of the paper; own shape.")
    ] = None,
    show: Annotated[
        str,
        typer.Option(
            help="Under each column: score, interval, kept, bytes, paper, from_paper, difference, "
            "baseline, p, n, spread."
        ),
    ] = "score",
    long: Annotated[bool, typer.Option("--long", help="One row a cell, with all of them.")] = False,
    form: Annotated[str, typer.Option("--format", help="markdown, latex, csv or html.")] = (
        "markdown"
    ),
    against: Annotated[
        str, typer.Option(help="What differences are from: best, fullkv or a method.")
    ] = "best",
    models: Annotated[str, typer.Option(help="Only these, comma-separated.")] = "",
    benchmarks: Annotated[str, typer.Option(help="Only these.")] = "",
    methods: Annotated[str, typer.Option(help="Only these.")] = "",
    budgets: Annotated[str, typer.Option(help="Only these.")] = "",
    digits: Annotated[
        int | None, typer.Option(min=0, max=8, help="Decimals of scores; the paper's, or 3.")
    ] = None,
    percent: Annotated[
        bool | None,
        typer.Option("--percent/--no-percent", help="Scores that end at 1, in percent."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file; default: the screen.")
    ] = None,
) -> None:
    """Scores in the paper's shape, with intervals and tests where there are samples files."""
    with one_sentence():
        from sparsemm_eval.report import table_files

        made = table_files.make_table(
            results, like, _words(show), long, form, against, _words(models), _words(benchmarks),
            _words(methods), _numbers("budgets", budgets, "256,64"), digits, percent,
        )  # fmt: skip
        for note in made.notes:
            typer.echo(f"sparsemm-eval: {note}", err=True)
        if out is None:
            typer.echo(made.text, nl=False)
        else:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(made.text, encoding="utf-8")
            typer.echo(f"wrote {out}")


@app.command()
def figure(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the figure.")],
    results: Annotated[
        list[str] | None,
        typer.Argument(help="Results files, folders, or the word paper; of heads none."),
    ] = None,
    kind: Annotated[str, typer.Option(help="budget, kept, efficiency or heads.")] = "budget",
    formats: Annotated[str, typer.Option("--format", help="Of svg and png.")] = "svg,png",
    paper: Annotated[
        bool, typer.Option("--paper", help="The paper's curves behind, dashed.")
    ] = False,
    zoom: Annotated[
        bool, typer.Option("--zoom", help="Fit scores' axes to the data; else from 0 to 1.")
    ] = False,
    models: Annotated[str, typer.Option(help="Only these, comma-separated.")] = "",
    benchmarks: Annotated[str, typer.Option(help="Only these, comma-separated.")] = "",
    methods: Annotated[str, typer.Option(help="Only these; of heads: sparsemm.")] = "",
    budgets: Annotated[str, typer.Option(help="Only these; of heads: a panel each.")] = "",
    model: Annotated[
        str | None,
        typer.Option(help="Heads: a folder, a hub repository or embedded:qwen2vl (default)."),
    ] = None,
    head_scores: Annotated[
        Path | None, typer.Option(help="Heads: score file; default: the checkpoint's own.")
    ] = None,
    kv_heads: Annotated[
        int | None, typer.Option(help="Heads: a layer, of a score file without a model.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Heads: of the prompt.")] = 2048,
    settings: Annotated[
        str, typer.Option(help="Heads: of the methods, such as ratio=0.2,allocation=exact.")
    ] = "",
) -> None:
    """Draw score over budget or really kept tokens, efficiency, or the budget of each KV head."""
    with one_sentence():
        from sparsemm_eval.methods.checks import check_choice
        from sparsemm_eval.report import figure_files as files

        check_choice("kind", kind, files.KINDS)
        if kind == "heads":
            from sparsemm_eval.heads.budgets import draw_budgets
            from sparsemm_eval.report.results_file import parse_model_args

            if results:
                raise ValueError(f"kind=heads takes no results ({results[0]}): give model=…")
            done = draw_budgets(
                out, _words(formats), model, head_scores, kv_heads,
                _words(methods) or ["sparsemm"], _integers("budgets", budgets), tokens,
                parse_model_args(settings),
            )  # fmt: skip
        elif not results:
            raise ValueError(f"kind={kind}: give results files, folders, or the word paper")
        else:
            filters = files.Filters(
                _words(models),
                _words(benchmarks),
                _words(methods),
                _numbers("budgets", budgets, "256,64"),
            )
            if kind == "efficiency":
                done = files.draw_efficiency(results, out, _words(formats), filters, paper)
            else:
                done = files.draw_scores(results, kind, out, _words(formats), filters, paper, zoom)
        for note in done.notes:
            typer.echo(f"sparsemm-eval: {note}", err=True)
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


@bench_app.command()
def efficiency(
    models: Annotated[
        str,
        typer.Option(
            help="vicuna, mistral, qwen2vl-7b (7B shapes, random weights), qwen2vl, llava_next "
            "(embedded), or checkpoints; default: the first three on CUDA, else the embedded."
        ),
    ] = "",
    lengths: Annotated[
        str, typer.Option(help="Tokens of a prompt; default: 2K to 32K, on a CPU 64 to 2K.")
    ] = "",
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = "fullkv,sparsemm",
    budgets: Annotated[str, typer.Option(help="Default: 256, on a CPU 64.")] = "",
    engines: Annotated[
        str, typer.Option(help="Also ours_plain and ours_compiled; see the README.")
    ] = "ours,hf_generate,hf_static,concatenate",
    rows: Annotated[str, typer.Option(help="Decoded at once, beside one.")] = "31",
    window: Annotated[int, typer.Option(help="Of the methods.")] = 32,
    steps: Annotated[int, typer.Option(help="New tokens that are timed.")] = 100,
    repeats: Annotated[int, typer.Option(help="0: one on CUDA, three on the CPU.")] = 0,
    dtype: Annotated[str, typer.Option(help="Default: float16 on CUDA, float32 on the CPU.")] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda; default: CUDA where it is.")] = "",
    threads: Annotated[int, typer.Option(help="On the CPU; 0: torch's choice.")] = 0,
    bandwidth: Annotated[
        str, typer.Option(help="With --dry-run: GB/s, or a GPU such as h100 or a100-80gb.")
    ] = "h200",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print bytes and bounds, and end.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is there.")] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also the host's share of a step.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Every line, in seconds.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for JSON, table and figure.")] = Path(
        "results/efficiency"
    ),
) -> None:
    """Prefill, decode time, memory and cache over prompt lengths, beside the byte bound."""
    given = dict(locals())
    with one_sentence():
        from sparsemm_eval.bench.efficiency import describe_bounds, run_efficiency
        from sparsemm_eval.bench.efficiency_options import EfficiencyOptions

        options = EfficiencyOptions(**given)
        if dry_run:
            typer.echo(describe_bounds(options, options.memory_bandwidth()))
            return
        done = run_efficiency(options, shlex.join(["sparsemm-eval", *sys.argv[1:]]))
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


@contextmanager
def _stoppable(onward: str) -> Iterator[None]:
    """A process that was asked to end says so, in one sentence, by the shell's exit codes."""
    from sparsemm_eval.sweep.signals import Stopped

    try:
        yield
    except Stopped as stopped:
        typer.echo(f"sparsemm-eval: {stopped}; every finished answer is safe, {onward}", err=True)
        raise typer.Exit(128 + stopped.signum) from stopped


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


def _numbers(name: str, text: str, such_as: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise ValueError(f"{name}={text!r}: it must be numbers, such as {such_as}") from error


def _demo_command() -> str:
    """As it was given, through the front door."""
    return shlex.join(["./run_eval.sh", *sys.argv[1:]]) if sys.argv[2:] else "./run_eval.sh"


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
