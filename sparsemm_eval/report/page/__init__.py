"""One self-contained HTML page of results: it loads nothing, and works from a file."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import replace
from datetime import datetime, timezone
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from matplotlib.figure import Figure

import sparsemm_eval
from sparsemm_eval.errors import UserError
from sparsemm_eval.report.cells import join_seeds
from sparsemm_eval.report.figures.ranking import ranking_curves
from sparsemm_eval.report.figures.scores import score_curves
from sparsemm_eval.report.figures.style import to_svg
from sparsemm_eval.report.layouts import LAYOUTS
from sparsemm_eval.report.markup import to_format
from sparsemm_eval.report.names import MODEL_NAMES
from sparsemm_eval.report.page.leaderboard import leaderboard, runs
from sparsemm_eval.report.page.samples import Visuals, browse, compare, unlike_counts
from sparsemm_eval.report.paper_tables import applicable, paper_table
from sparsemm_eval.report.ranking import rank_methods
from sparsemm_eval.report.ranking_table import ranking_table, ranking_words
from sparsemm_eval.report.results import Results
from sparsemm_eval.report.samples import score_samples
from sparsemm_eval.report.statistics import add_statistics
from sparsemm_eval.report.tables import calibration_lines, empty_line, missing_notes

TITLE = "KV-cache compression of vision-language models"
_CURVES = {
    "budget": "Score over budget",
    "kept_tokens_per_head": "Score over the tokens that were really kept",
}


def write_page(
    results: Results,
    folder: Path,
    title: str = TITLE,
    samples: int = 20,
    visuals: Visuals | None = None,
    against: str = "best",
) -> Path:
    """Write ``index.html``: ranking, leaderboard, tables, figures, samples unlike full KV's, runs.

    Parameters
    ----------
    results : Results
        What `sparsemm_eval.report.results.load` gives.
    folder : Path
        Where it goes; made if it is not there.
    title : str
        The page's.
    samples : int
        Samples a cell that can be looked at, at most.
    visuals : callable, optional
        Images of documents by task and document number; None leaves images out.
    against : str
        What scores are compared with, as for `add_statistics`.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    ValueError
        If there are no cells, or `samples` or `against` cannot be.
    """
    if results.cells.empty:
        raise UserError(
            "there is no score in what was read: give results files, or folders that hold them"
        )
    if samples < 0:
        raise UserError(f"samples={samples}: it must be 0 or more")
    scored = score_samples(results.cells)
    joined = join_seeds(results.cells)
    origin = _origin(results.cells, joined)
    scores = scored.frame.assign(cell=scored.frame["cell"].map(origin))
    cells = add_statistics(joined, scores, against)
    by_sample = scored.frame.set_index(["cell", "doc_id"])["score"].to_dict()
    comparisons, notes = compare(results.cells, by_sample)
    browser = browse(results.cells, comparisons, by_sample, samples, visuals)
    css, script = _text("page.css"), _text("page.js")
    page = _environment().get_template("page.html.j2").render(
        title=title,
        read=_read(results),
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=sparsemm_eval.__version__,
        unreadable=results.unreadable,
        ranking=_ranking(joined, scores),
        leaderboard=leaderboard(cells, unlike_counts(comparisons, origin), against),
        tables=_tables(joined, scores),
        figures=_figures(cells),
        notes=(
            *scored.notes, *missing_notes(joined), *calibration_lines(joined),
            *filter(None, [empty_line(joined)]),
        ),
        browser={**browser, "notes": [*notes, *browser["notes"]]},
        runs=runs(results.files),
        css=css,
        script=script,
        policy={"css": _policy(css), "script": _policy(script)},
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "index.html"
    # Half a surrogate pair, which a model may say, has no place in a file.
    path.write_text(page, encoding="utf-8", errors="replace")
    return path


def _environment() -> jinja2.Environment:
    """Everything that enters a template is escaped, JSON too."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sparsemm_eval.report", "page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {
        "ensure_ascii": False,
        "allow_nan": False,
        "separators": (",", ":"),
    }
    return environment


def _origin(cells: pd.DataFrame, joined: pd.DataFrame) -> dict[int, int]:
    """By index of a cell the index of the one in which its seeds are joined."""
    places = {
        (file, cell["task"]): index
        for index, cell in joined.iterrows()
        for file in cell["files_of"]
    }
    own = cells[cells["source"] == "measured"]
    return {index: places[cell["file"], cell["task"]] for index, cell in own.iterrows()}


def _read(results: Results) -> str:
    """What was read, in a sentence."""
    measured = results.cells["source"].eq("measured")
    counts = {
        "cells": measured.sum(),
        "results files": len(results.files),
        "cells of the paper": (~measured).sum(),
        "files not read": len(results.unreadable),
    }
    return ", ".join(f"{name}: {count:,}" for name, count in counts.items() if count) + "."


def _policy(text: str) -> str:
    """What the content policy names a script or a style sheet of the page by: no other runs."""
    return f"sha256-{b64encode(sha256(text.encode('utf-8')).digest()).decode('ascii')}"


def _text(name: str) -> str:
    return (files("sparsemm_eval.report.page") / name).read_text(encoding="utf-8")


def _tables(cells: pd.DataFrame, scores: pd.DataFrame) -> list[dict[str, str]]:
    """The paper's tables that these cells fill at least in part; else all cells in one.

    Each has a title and html, the finished element, or lack, which says why there is none.

    Parameters
    ----------
    cells : DataFrame
        As `sparsemm_eval.report.results.load` gives them, seeds joined.
    scores : DataFrame
        Those of their samples.
    """
    measured = cells["source"].eq("measured")
    beside_paper = cells.loc[measured, "model"].isin(MODEL_NAMES).any()
    show = ("score", "paper") if beside_paper else ("score",)
    shown = []
    for like in applicable(cells) or (None,):
        title = "All cells" if like is None else LAYOUTS[like].title
        try:
            table = paper_table(cells, scores, like, show)
        except UserError as error:
            shown.append({"title": title, "html": "", "lack": f"It was left out: {error}."})
        else:
            shown.append({"title": title, "html": to_format(table, "html")})
    return shown


def _figures(cells: pd.DataFrame) -> list[dict[str, str]]:
    """Score over budget and over what was kept, where there are curves to draw.

    Parameters
    ----------
    cells : DataFrame
        Cells with their statistics, seeds joined.
    """
    drawn = []
    for over, title in _CURVES.items():
        some = cells[cells["budget"].isna() | cells[over].notna()]
        if some["budget"].notna().any():
            drawn.append(_drawn(title, score_curves(some, over)))
    return drawn


def _drawn(title: str, figure: Figure) -> dict[str, str]:
    """A title and a uri that holds all of a figure, as an image of its own: no two names clash."""
    uri = b64encode(to_svg(figure).encode("utf-8")).decode("ascii")
    return {"title": title, "uri": f"data:image/svg+xml;base64,{uri}"}


def _ranking(cells: pd.DataFrame, scores: pd.DataFrame) -> dict[str, Any]:
    """Which method is best at equal bytes, or why that cannot be said; {} of the paper alone.

    It has said (a title and sentences each model and stratum), table, figures and lack.

    Parameters
    ----------
    cells, scores
        As of `_tables`.
    """
    if cells["source"].ne("measured").all():
        return {}
    try:
        ranking = rank_methods(cells, scores)
    except UserError as error:
        return {"said": [], "table": "", "figures": [], "lack": f"There is no ranking: {error}."}
    figures = []
    if ranking.rows["kept_kv_bytes"].notna().any():
        figures = [_drawn("Share of full KV's score over the bytes kept", ranking_curves(ranking))]
    table = replace(ranking_table(ranking), words=())
    said = ranking_words(ranking)
    return {"said": said, "table": to_format(table, "html"), "figures": figures, "lack": ""}
