"""lmms-eval's own command line, with this package's tasks and an honest exit code."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import typer

from sparsemm_eval.cli.common import one_sentence

app = typer.Typer()


@app.command(
    name="eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)
def evaluate(context: typer.Context) -> None:
    """Run `python -m lmms_eval ARGS` with our tasks; the exit code is 1 if the run failed."""
    with one_sentence():
        from sparsemm_eval.libraries import check_libraries

        check_libraries()
    if failure := _run(context.args):
        typer.echo(f"sparsemm-eval: {failure}", err=True)
        raise typer.Exit(1)


def _run(arguments: list[str]) -> str | None:
    """Run lmms-eval on arguments; what it said of a failure, which its exit code hides."""
    from lmms_eval.__main__ import cli_evaluate
    from loguru import logger

    from sparsemm_eval.errors import one_line
    from sparsemm_eval.paths import tasks_folder

    failures: list[str] = []
    errors: list[str] = []

    def watch(record: Any) -> None:
        # lmms-eval logs what failed, inside its handler, and goes on to a normal end. Its other
        # errors are a task's own and no failure, unless it then leaves without a word.
        if record["message"].startswith("Error during evaluation"):
            error = sys.exc_info()[1]
            failures.append(one_line(error) if error else record["message"])
        elif record["level"].name == "ERROR":
            errors.append(record["message"])

    theirs = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    theirs.add_argument("--include_path", action="append", default=[])
    given, rest = theirs.parse_known_args(arguments)
    folders = [str(tasks_folder()), *given.include_path]
    before = sys.argv
    sys.argv = ["lmms_eval", *rest]
    logger.configure(patcher=watch)
    try:
        cli_evaluate(argparse.Namespace(include_path=folders))
    except SystemExit as end:
        if end.code or not errors:
            raise
        failures += errors[-1:]
    finally:
        sys.argv = before
        logger.configure(patcher=lambda record: None)
    return failures[0] if failures else None
