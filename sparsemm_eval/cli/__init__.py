"""The command line: ``sparsemm-eval``, a file a group of commands."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsemm_eval import __version__
from sparsemm_eval.cli import common, evaluate, heads, jobs, measure, run, show

app = typer.Typer(
    name="sparsemm-eval",
    help="Evaluate head-budgeted KV-cache compression of multimodal LLMs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"sparsemm-eval {__version__}")
        raise typer.Exit


@app.callback()
def main(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of what you can mend, too.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version, and end."
        ),
    ] = False,
) -> None:
    """Evaluate head-budgeted KV-cache compression of multimodal LLMs."""
    common.debug = debug


for group in (run, evaluate, jobs, show, heads, measure):
    app.add_typer(group.app)
