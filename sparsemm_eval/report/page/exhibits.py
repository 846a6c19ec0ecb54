"""Tables and figures as parts of a page."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass

import pandas as pd

from sparsemm_eval.report.curves import score_curves
from sparsemm_eval.report.markup import to_format
from sparsemm_eval.report.names import MODEL_NAMES
from sparsemm_eval.report.paper_tables import LAYOUTS, applicable, paper_table
from sparsemm_eval.report.styles import to_svg

_CURVES = {
    "budget": "Score over budget",
    "kept_tokens_per_head": "Score over the tokens that were really kept",
}


@dataclass(frozen=True)
class TableOnPage:
    """A table; `html` is the finished element, or `lack` says why there is none."""

    title: str
    html: str = ""
    lack: str = ""


@dataclass(frozen=True)
class FigureOnPage:
    """A figure; `uri` holds all of it, as an image of its own so that no names of two clash."""

    title: str
    uri: str


def tables(cells: pd.DataFrame, scores: pd.DataFrame) -> list[TableOnPage]:
    """The paper's tables that these cells fill at least in part; else all cells in one.

    Parameters
    ----------
    cells : DataFrame
        Of `sparsemm_eval.report.results.load`, seeds joined.
    scores : DataFrame
        Of their samples.
    """
    measured = cells["source"].eq("measured")
    beside_paper = cells.loc[measured, "model"].isin(MODEL_NAMES).any()
    show = ("score", "paper") if beside_paper else ("score",)
    made = []
    for like in applicable(cells) or (None,):
        title = "All cells" if like is None else LAYOUTS[like].title
        try:
            table = paper_table(cells, scores, like, show)
        except ValueError as error:
            made.append(TableOnPage(title, lack=f"It was left out: {error}."))
        else:
            made.append(TableOnPage(title, to_format(table, "html")))
    return made


def figures(cells: pd.DataFrame) -> list[FigureOnPage]:
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
            svg = to_svg(score_curves(some, over))
            uri = b64encode(svg.encode("utf-8")).decode("ascii")
            drawn.append(FigureOnPage(title, f"data:image/svg+xml;base64,{uri}"))
    return drawn
