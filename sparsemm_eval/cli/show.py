"""Tables, figures and the page of results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsemm_eval.cli.common import (
    PluginNames,
    integers,
    load_plugins,
    numbers,
    one_sentence,
    quiet,
    words,
)
from sparsemm_eval.errors import UserError, check_choice
from sparsemm_eval.report.inputs import FIGURES, RANKING, check_formats, check_inputs

if TYPE_CHECKING:
    from sparsemm_eval.report.cells import Filters

app = typer.Typer()


def _filters(models: str, benchmarks: str, methods: str, budgets: str) -> Filters:
    from sparsemm_eval.report.cells import Filters

    given = (words(names) for names in (models, benchmarks, methods))
    return Filters(*given, numbers("budgets", budgets, "256,64"))


@app.command()
def table(
    results: Annotated[
        list[str], typer.Argument(help="Results files, folders of them, or the word paper.")
    ],
    like: Annotated[
        str | None,
        typer.Option(
            help="table1, table2, table3 or table4 of the paper; or ranking: which method is best "
            "at equal bytes; own shape."
        ),
    ] = None,
    show: Annotated[
        str,
        typer.Option(
            help="Under each column: score, interval, kept, bytes, paper, from_paper, difference, "
            "baseline, p, n, spread."
        ),
    ] = "score",
    metric: Annotated[
        str | None,
        typer.Option(help="As lmms-eval names it, such as exact_match; the one that counts."),
    ] = None,
    long: Annotated[bool, typer.Option("--long", help="One row a cell, with all of them.")] = False,
    form: Annotated[str, typer.Option("--format", help="markdown, latex, csv, html or json.")] = (
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
    within: Annotated[
        float, typer.Option(help="Ranking: bytes count as equal that differ by this share at most.")
    ] = 0.05,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file; default: the screen.")
    ] = None,
) -> None:
    """Scores in the paper's shape, with intervals and tests where there are samples files."""
    with one_sentence():
        from sparsemm_eval.report.paper_tables import written_table

        filters = _filters(models, benchmarks, methods, budgets)
        made = written_table(
            results,
            filters,
            form,
            like,
            words(show),
            long,
            against,
            digits,
            percent,
            metric,
            within,
        )
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
    kind: Annotated[
        str, typer.Option(help="budget, kept, ranking, efficiency or heads.")
    ] = "budget",
    formats: Annotated[str, typer.Option("--format", help="Of svg, png and pdf.")] = "svg,png",
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
    plugin: PluginNames = None,
) -> None:
    """Draw score over budget or kept tokens, a ranking, efficiency, or each KV head's budget."""
    with one_sentence():
        check_choice("kind", kind, FIGURES)
        check_formats(words(formats))
        check_inputs(results or ())
        load_plugins(plugin)
        from sparsemm_eval.report import figures as files

        if kind == "heads":
            from sparsemm_eval.heads.budgets import draw_budgets
            from sparsemm_eval.report.results import parse_model_args

            if results:
                raise UserError(f"kind=heads takes no results ({results[0]}): give model=…")
            done = draw_budgets(
                out, words(formats), model, head_scores, kv_heads,
                words(methods) or ["sparsemm"], integers("budgets", budgets), tokens,
                parse_model_args(settings),
            )  # fmt: skip
        elif not results:
            raise UserError(f"kind={kind}: give results files, folders, or the word paper")
        else:
            filters = _filters(models, benchmarks, methods, budgets)
            if kind == "efficiency":
                done = files.draw_efficiency(results, out, words(formats), filters, paper)
            elif kind == RANKING:
                if paper:
                    raise UserError("paper with kind=ranking: it has no kept bytes; leave it out")
                done = files.draw_ranking(results, out, words(formats), filters, zoom)
            else:
                done = files.draw_scores(results, kind, out, words(formats), filters, paper, zoom)
        for note in done.notes:
            typer.echo(f"sparsemm-eval: {note}", err=True)
        for path in done.files:
            typer.echo(f"wrote {path}")


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
        check_inputs(results)
        quiet()
        from sparsemm_eval.report.page import write_page
        from sparsemm_eval.report.results import gather, not_read

        read = gather(results)
        for note in not_read(read.unreadable):
            typer.echo(note, err=True)
        visuals = None
        if not no_images:
            from sparsemm_eval.engine.tasks import visuals
        typer.echo(f"wrote {write_page(read, out, title, samples, visuals, against)}")
