"""What this machine can do and how fast: doctor and benchmarks."""

from __future__ import annotations

import inspect
import shlex
import sys
from itertools import chain
from typing import Annotated, Any

import typer

from sparsemm_eval.bench.options import BENCHMARKS, Options, run_benchmark
from sparsemm_eval.cli.common import one_sentence, words
from sparsemm_eval.errors import UserError
from sparsemm_eval.libraries import check_libraries

app = typer.Typer()
bench_app = typer.Typer(help="Measure how fast it is.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")


@app.command()
def doctor(
    build: Annotated[
        bool, typer.Option("--build", help="Compile the attention op now, not on first use.")
    ] = False,
    arches: Annotated[
        str, typer.Option(help="With --build: GPU architectures, such as 8.0,9.0; default: found.")
    ] = "",
    libraries: Annotated[
        bool,
        typer.Option("--libraries", help="Only whether what runs stand on works."),
    ] = False,
) -> None:
    """What this machine has, which backends work on it, and what would mend the rest."""
    with one_sentence():
        if libraries:
            check_libraries()
            return
        if arches and not build:
            raise UserError(f"arches={arches!r}: it needs --build, which it is for")
        from sparsemm_eval import doctor as doctors

        built = doctors.build_libraries(words(arches)) if build else ()
        broken = False
        for finding in chain(built, doctors.examine()):
            typer.echo(f"{finding.subject:24} {finding.found}")
            if finding.remedy:
                typer.echo(f"{'':24} {finding.remedy}")
            broken |= finding.broken
    raise typer.Exit(int(broken))


def _add_benchmark(name: str, kind: type[Options]) -> None:
    """Add a command that has an option for each field of a benchmark's options."""

    def command(**given: Any) -> None:
        with one_sentence():
            again = shlex.join(["sparsemm-eval", *sys.argv[1:]])
            code = run_benchmark(name, kind(**given), again).show()
        raise typer.Exit(code)

    parameters = [
        inspect.Parameter(
            one.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=one.default,
            annotation=Annotated[
                one.kind, typer.Option(*[one.flag] * (one.default is False), help=one.help)
            ],
        )
        for one in kind.declared()
    ]
    command.__signature__ = inspect.Signature(parameters)
    bench_app.command(name, help=kind.__doc__)(command)


for _name, _kind in BENCHMARKS.items():
    _add_benchmark(_name, _kind)
