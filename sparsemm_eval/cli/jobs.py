"""A grid as batch jobs: submit, follow, cancel, merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsemm_eval.cli.common import (
    AllowFailed,
    IncludePath,
    PluginNames,
    folders,
    load_plugins,
    one_sentence,
    quiet,
    warnings_only,
)

app = typer.Typer()


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
    allow_failed: AllowFailed = 0,
    plugin: PluginNames = None,
    include_path: IncludePath = None,
) -> None:
    """Run a grid as batch jobs, then score; what is done is skipped, so submit again at will.

    `sparsemm-eval status FOLDER` shows the jobs, `sparsemm-eval cancel FOLDER` ends them.
    """
    with one_sentence("every finished answer is safe, submit it again to go on"):
        from sparsemm_eval.sweep import jobs
        from sparsemm_eval.sweep.grid_file import read_grid
        from sparsemm_eval.sweep.resources import Resources
        from sparsemm_eval.sweep.status import status as read_status

        plugins = load_plugins(plugin)
        chosen = read_grid(grid)
        folder = (out or Path("results/sweeps") / chosen.name).resolve()
        chosen = jobs.with_shards(chosen, folder, shards)
        resources = Resources(
            executor, gpus, max_parallel, time, partition, account, qos,
            tuple(setup or ()), tuple(sbatch or ()),
        )  # fmt: skip
        jobs.check_submission(chosen, folder, resources, retries)
        quiet()
        done = jobs.submit(
            chosen,
            folder,
            resources,
            retries,
            skip_missing,
            typer.echo,
            folders(include_path),
            plugins,
            allow_failed,
        )
        for line in done.lines(folder):
            typer.echo(line)
        failed = done.failed or (executor == "local" and not read_status(folder).finished)
    raise typer.Exit(1 if failed else 0)


@app.command()
def cancel(folder: Annotated[Path, typer.Argument(help="A sweep's folder.")]) -> None:
    """End the jobs that were submitted for a folder; every finished answer stays."""
    with one_sentence():
        from sparsemm_eval.sweep.jobs import cancel as cancel_jobs

        names = cancel_jobs(folder)
        typer.echo(f"cancelled: {', '.join(names) or 'nothing, no job waits or runs'}")


@app.command()
def merge(
    sweeps: Annotated[
        list[Path],
        typer.Argument(metavar="FOLDERS...", help="Sweeps of one grid, from several machines."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder.")],
    plugin: PluginNames = None,
) -> None:
    """Put the answers of several folders into one; where they differ, the first folder's are kept.

    `sparsemm-eval sweep OUT/grid.yaml -o OUT` then answers the rest and scores.
    """
    with one_sentence("nothing is finished, run it again into a new folder"):
        warnings_only()
        from sparsemm_eval.sweep.merge import merge_sweeps

        load_plugins(plugin)
        merged = merge_sweeps(sweeps, out)
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
