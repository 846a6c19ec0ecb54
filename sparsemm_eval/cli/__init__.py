"""The command line: ``sparsemm-eval``, a file a group of commands."""

from __future__ import annotations

import typer

from sparsemm_eval.cli import heads, jobs, measure, run, show

app = typer.Typer(
    name="sparsemm-eval",
    help="Evaluate head-budgeted KV-cache compression of multimodal LLMs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback()
def main() -> None:
    """Evaluate head-budgeted KV-cache compression of multimodal LLMs."""


for group in (run, jobs, show, heads, measure):
    app.add_typer(group.app)
