"""What all commands share: errors as one sentence, and options that are lists."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsemm_eval.errors import UserError

if TYPE_CHECKING:
    from sparsemm_eval.methods import Plugin

PluginNames = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        help="A Python file or a module that registers methods of one's own; repeatable.",
    ),
]
IncludePath = Annotated[
    list[Path] | None,
    typer.Option(
        "--include_path", "--include-path", help="A folder of one's own task files; repeatable."
    ),
]
AllowFailed = Annotated[
    int,
    typer.Option(
        "--allow-failed",
        help="Score cells without up to so many samples that failed; tables mark them.",
    ),
]


def load_plugins(names: list[str] | None) -> tuple[Plugin, ...]:
    """Import what ``--plugin`` names, before anything asks which methods there are."""
    from sparsemm_eval.methods import load_plugin

    return tuple(load_plugin(name) for name in names or ())


def folders(paths: list[Path] | None) -> tuple[Path, ...]:
    """What ``--include_path`` names, so that jobs in other places find it."""
    return tuple(path.resolve() for path in paths or ())


# What `one_sentence` says of a command whose answers are on disk as soon as they exist.
ANSWERS_SAFE = "every finished answer is safe, run it again to go on"

# Set by `sparsemm-eval --debug`.
debug = False


@contextmanager
def one_sentence(safe: str = "") -> Iterator[None]:
    """Bad input ends with its one sentence and exit code 1; its traceback only with --debug.

    A process that is asked to end, by Ctrl-C or a signal, says so in one sentence as well, and ends
    with the exit code that shells have for it: 130 for Ctrl-C, 143 for SIGTERM.

    Parameters
    ----------
    safe : str
        What is kept of a command that is asked to end, and how it goes on.
    """
    from sparsemm_eval.engine.answers import SampleFailures
    from sparsemm_eval.errors import one_line
    from sparsemm_eval.sweep.process import Stopped, leaving

    try:
        with leaving():
            yield
    except Stopped as stopped:
        typer.echo(f"sparsemm-eval: {stopped}{safe and f'; {safe}'}", err=True)
        raise typer.Exit(128 + stopped.signum) from stopped
    except (UserError, OSError, NotImplementedError, SampleFailures) as error:
        if debug:
            raise
        typer.echo(f"sparsemm-eval: {one_line(error)}", err=True)
        raise typer.Exit(1) from error


def quiet() -> None:
    """Leave the screen to progress and results: other libraries' news only from warnings on."""
    # Both set the logger up anew as they are imported, and would undo what follows.
    import lmms_eval.llm_judge.launcher
    import lmms_eval.models  # noqa: F401

    warnings_only()


def warnings_only() -> None:
    """As `quiet`, for commands that do not come to lmms-eval."""
    from loguru import logger

    logger.remove()
    logger.add(
        sys.stderr, level="WARNING", filter=lambda record: not record["extra"].get("of_cell")
    )


def integers(name: str, text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise UserError(f"{name}={text!r}: it must be integers, such as 256,128,64")
    return [int(part) for part in parts]


def numbers(name: str, text: str, such_as: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise UserError(f"{name}={text!r}: it must be numbers, such as {such_as}") from error


def words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def demo_command() -> str:
    """As it was given, through the front door."""
    return shlex.join(["./run_eval.sh", *sys.argv[1:]]) if sys.argv[2:] else "./run_eval.sh"
