"""The command line: ``sparsemm-eval``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
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


@app.callback()
def main() -> None:
    """Evaluate head-budgeted KV-cache compression of multimodal LLMs."""


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for answers, tables and curve.")] = Path(
        "results/demo"
    ),
    samples: Annotated[int, typer.Option(help="Documents, 1 to 200.")] = 200,
    batch_size: Annotated[int, typer.Option(min=1, help="Documents read together.")] = 50,
    budgets: Annotated[
        str, typer.Option(help="Mean tokens per KV head, comma-separated.")
    ] = "256,128,64,32,16,12",
) -> None:
    """Full KV and five methods over budgets on the embedded model; offline, minutes on a laptop."""
    with one_sentence():
        _quiet()
        from sparsemm_eval.sweep.demo import run_demo

        done = run_demo(out, samples, batch_size, _integers("budgets", budgets))
        typer.echo(done.markdown)
        for path in done.files:
            typer.echo(f"wrote {path}")


@app.command()
def chase(
    model: Annotated[str, typer.Option(help="Checkpoint: a folder or a hub repository.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Score file; default: where its runs will find it."),
    ] = None,
    data: Annotated[str, typer.Option(help="What is read: drawn.")] = "drawn",
    count: Annotated[int, typer.Option("-n", min=1, help="Images.")] = 200,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="Where the model lies.")] = "cpu",
) -> None:
    """Find the heads that look at what is being read, and write their visual scores."""
    with one_sentence():
        from sparsemm_eval.heads.chase import chase as run_chase
        from sparsemm_eval.heads.chase import drawn_pages, write_scores
        from sparsemm_eval.models.checkpoint import Checkpoint

        if data != "drawn":
            raise ValueError(f"data={data!r}: it must be drawn")
        checkpoint = Checkpoint(model, "qwen2_vl", dtype=dtype, device_map=device)
        found = run_chase(checkpoint, drawn_pages(count), count)
        path = output or checkpoint.scores_cache()
        write_scores(found, path, checkpoint, f"{data}-{count}")
        typer.echo(
            f"{found.tokens} characters on {count} images, {found.accuracy:.1%} read right; "
            f"wrote {path}"
        )


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
