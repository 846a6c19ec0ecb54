"""Runs on this machine: the demo and sweeps."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from sparsemm_eval.cli.common import (
    ANSWERS_SAFE,
    AllowFailed,
    IncludePath,
    PluginNames,
    demo_command,
    folders,
    integers,
    load_plugins,
    one_sentence,
    quiet,
    words,
)
from sparsemm_eval.libraries import check_libraries

app = typer.Typer()


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for answers, tables and curves.")] = Path(
        "results/demo_run"
    ),
    samples: Annotated[int, typer.Option(help="Samples of each benchmark, 1 to 200.")] = 40,
    full: Annotated[bool, typer.Option("--full", help="All 200 samples of each.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples read together.")] = 25,
    budgets: Annotated[
        str, typer.Option(help="Mean tokens per KV head, comma-separated.")
    ] = "64,32,16",
    tasks: Annotated[str, typer.Option(help="Miniature tasks, comma-separated; all.")] = "",
    models: Annotated[str, typer.Option(help="Embedded models, comma-separated; all.")] = "",
    masked: Annotated[int, typer.Option(help="Documents of the masking study; 0: none.")] = 40,
    allocation: Annotated[str, typer.Option(help="paper or exact.")] = "paper",
    allow_failed: AllowFailed = 0,
    plugin: PluginNames = None,
) -> None:
    """Every method over budgets on the embedded models, in minutes."""
    with one_sentence(ANSWERS_SAFE):
        from sparsemm_eval.methods import method_names
        from sparsemm_eval.sweep.folder import refuse_other_grid
        from sparsemm_eval.sweep.studies import SAMPLES, check_demo_samples, demo_grid

        before = method_names()
        plugins = load_plugins(plugin)
        grid = demo_grid(
            SAMPLES if full else samples,
            batch_size,
            integers("budgets", budgets),
            words(tasks),
            words(models),
            allocation,
            more_methods=[name for name in method_names() if name not in before],
        )
        check_demo_samples("masked", masked, least=0)
        refuse_other_grid(grid, out, replace=True)
        check_libraries()
        quiet()
        from sparsemm_eval.sweep.demo import run_demo
        from sparsemm_eval.sweep.tables import warnings_of

        done = run_demo(out, grid, masked, demo_command(), plugins, allow_failed)
        typer.echo(done.markdown)
        for path in done.files:
            typer.echo(f"wrote {path}")
        for line in warnings_of(done.frame):
            typer.echo(f"sparsemm-eval: {line}", err=True)


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
    allow_failed: AllowFailed = 0,
    plugin: PluginNames = None,
    include_path: IncludePath = None,
) -> None:
    """Run a grid: models x tasks x methods x budgets, each prompt read once for all cells.

    A sweep that was stopped goes on where it was; `sparsemm-eval status FOLDER` shows how far.
    """
    with one_sentence(ANSWERS_SAFE):
        from sparsemm_eval.sweep.folder import chosen_jobs, refuse_other_grid
        from sparsemm_eval.sweep.grid_file import read_grid

        plugins, own_tasks = load_plugins(plugin), folders(include_path)
        chosen = read_grid(grid)
        chosen_jobs(chosen, job)  # refuses one that there is not
        if dry_run:
            quiet()
            from sparsemm_eval.engine.tasks import find_tasks, runnable
            from sparsemm_eval.sweep.estimate import describe

            manager = find_tasks(chosen.tasks, own_tasks)
            typer.echo(describe(chosen, out, manager))
            runnable(manager, chosen.tasks, skip_missing)
            return
        folder = out or Path("results/sweeps") / chosen.name
        refuse_other_grid(chosen, folder)
        check_libraries()
        quiet()
        from sparsemm_eval.sweep.sweep import leave_ranks, run_sweep
        from sparsemm_eval.sweep.tables import warnings_of

        words = [word for word in sys.argv[1:] if word not in ("--wait", "--only-scores")]
        command = shlex.join(["sparsemm-eval", *words])
        done = run_sweep(
            chosen, folder, command, job, wait, skip_missing, only_scores, world_size,
            own_tasks, plugins, allow_failed=allow_failed,
        )  # fmt: skip
        leave_ranks()
        typer.echo(done.markdown)
        typer.echo(done.status)
        for path in done.files:
            typer.echo(f"wrote {path}")
        for line in warnings_of(done.frame):
            typer.echo(f"sparsemm-eval: {line}", err=True)
        for lost in done.left_out:
            typer.echo(f"left out: {lost.cause}")
        failures = done.status.failures + done.failures
        if job is not None:
            failures = done.status.incomplete(job)
        for line in failures:
            typer.echo(f"sparsemm-eval: {line}", err=True)
    raise typer.Exit(1 if failures else 0)
