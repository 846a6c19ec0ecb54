"""A finished table, and how it is written: Markdown, LaTeX, CSV, HTML, JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from itertools import groupby

import pandas as pd

from sparsemm_eval.errors import UserError

BOLD, ITALIC, UNDERLINE = "bold", "italic", "underline"
_MARKDOWN = {BOLD: "**{}**", ITALIC: "*{}*", UNDERLINE: "<u>{}</u>"}
_HTML = {BOLD: "<b>{}</b>", ITALIC: "<i>{}</i>", UNDERLINE: "<u>{}</u>"}
_LATEX = {BOLD: r"\textbf{{{}}}", ITALIC: r"\textit{{{}}}", UNDERLINE: r"\underline{{{}}}"}
_SIGNS = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"$<$", ">": r"$>$", "≈": r"$\approx$", "±": r"$\pm$", "✓": r"$\surd$", "·": r"$\cdot$",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Table:
    """A table of text.

    Parameters
    ----------
    text : DataFrame
        What each cell shows, "" where nothing was run. Columns are named by what stands over
        them, or by (that, what is shown below it).
    names : int
        How many columns, from the left, are words that name the row.
    sparse : int
        How many of these are not repeated where they do not change.
    title : str
        What stands over it.
    caption : tuple of str
        Lines below it; **, * and <u> in them are marks as in Markdown.
    marks : DataFrame, optional
        As `text`: "bold", "italic", "underline" or "".
    plain : DataFrame, optional
        The same rows, for machines: numbers without signs around them, names in full. Default:
        `text`.
    """

    text: pd.DataFrame
    names: int = 1
    sparse: int = 0
    title: str = ""
    caption: tuple[str, ...] = ()
    marks: pd.DataFrame | None = None
    plain: pd.DataFrame | None = None


def to_format(table: Table, form: str) -> str:
    """Write a table.

    Parameters
    ----------
    table : Table
        From `sparsemm_eval.report.tables`.
    form : {"markdown", "latex", "csv", "html", "json"}
        CSV and JSON are numbers and names alone, as text: no title, caption or marks.

    Raises
    ------
    UserError
        If the format is none of these.
    """
    return checked_format(form)(table)


def checked_format(form: str) -> Callable[[Table], str]:
    """The writer of a format; see `to_format`."""
    if form not in _FORMATS:
        raise UserError(f"format={form}: it must be one of {', '.join(_FORMATS)}")
    return _FORMATS[form]


def to_markdown(table: Table) -> str:
    """The rows of a table as GitHub Markdown, without title, caption and last line end."""
    frame = _marked(table, _MARKDOWN, lambda text: text.replace("|", r"\|"), sparse=True)
    aligned = ["left"] * table.names + ["right"] * (frame.shape[1] - table.names)
    return frame.to_markdown(index=False, disable_numparse=True, colalign=aligned)


def _markdown(table: Table) -> str:
    title = f"### {table.title}" if table.title else ""
    # A line of Markdown goes on in the next one but for two blanks.
    parts = (title, to_markdown(table), "  \n".join(table.caption))
    return "\n\n".join(filter(None, parts)) + "\n"


def _html(table: Table) -> str:
    frame = _marked(table, _HTML, escape, sparse=False)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in frame.columns)
    rows = []
    for row in frame.itertuples(index=False):
        names = "".join(f'<th scope="row">{cell}</th>' for cell in row[: table.names])
        rows.append(f"<tr>{names}{''.join(f'<td>{cell}</td>' for cell in row[table.names :])}</tr>")
    caption = "<br>".join(_styled(escape(line, quote=False), _HTML) for line in table.caption)
    return (
        f"<table>\n<caption><strong>{escape(table.title)}</strong><br>{caption}</caption>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody>\n</table>\n"
    )


def _latex(table: Table) -> str:
    """As pandas' own, with rules between groups of rows, which that one cannot draw."""
    frame = _marked(table, _LATEX, _escaped, sparse=True)
    left = table.names
    heads = [[*map(_escaped, frame.columns)]]
    values = _heads(table.text)[left:]
    if any(shown for _, shown in values):
        spans = [(column, len(list(group))) for column, group in groupby(values, lambda v: v[0])]
        top = [rf"\multicolumn{{{width}}}{{c}}{{{_escaped(column)}}}" for column, width in spans]
        below = [*heads[0][:left], *(_escaped(shown or "score") for _, shown in values)]
        heads = [[""] * left + top, below]
    lines = []
    for number, row in enumerate(frame.itertuples(index=False)):
        if number and left > 1 and row[0]:
            lines.append(r"\midrule")
        lines.append(_row(row))
    caption = " ".join(_styled(_escaped_caption(line), _LATEX) for line in table.caption)
    return "\n".join([
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{_escaped(table.title)}. {caption}}}",
        rf"\begin{{tabular}}{{{'l' * left}{'r' * (frame.shape[1] - left)}}}",
        r"\toprule",
        *map(_row, heads),
        r"\midrule",
        *lines,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
        "",
    ])  # fmt: skip


def _row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _csv(table: Table) -> str:
    return _plain(table).to_csv(index=False, lineterminator="\n")


def _json(table: Table) -> str:
    rows = (json.dumps(row, ensure_ascii=False) for row in _plain(table).to_dict("records"))
    return "[\n" + ",\n".join(rows) + "\n]\n"


_FORMATS = {
    "markdown": _markdown, "latex": _latex, "csv": _csv, "html": _html, "json": _json,
}  # fmt: skip
FORMATS = tuple(_FORMATS)


def _plain(table: Table) -> pd.DataFrame:
    return _flat(table.text if table.plain is None else table.plain)


def _heads(frame: pd.DataFrame) -> list[tuple[str, str]]:
    return [name if isinstance(name, tuple) else (name, "") for name in frame.columns]


def _flat(frame: pd.DataFrame) -> pd.DataFrame:
    """With one line over its columns."""
    return frame.set_axis([" ".join(filter(None, head)) for head in _heads(frame)], axis="columns")


def _marked(
    table: Table, signs: dict[str, str], escaped: Callable[[str], str], sparse: bool
) -> pd.DataFrame:
    """Text made safe for the format, with its marks; `sparse`: a name only where it changes."""
    frame = _flat(table.text).map(escaped)
    if table.marks is not None:
        shown = table.text.ne("").to_numpy()
        for mark, sign in signs.items():
            here = table.marks.eq(mark).to_numpy() & shown
            frame = frame.mask(here, frame.map(sign.format))
    if sparse and table.sparse:
        names = frame.iloc[:, : table.sparse]
        changed = names.ne(names.shift()).cummax(axis="columns")
        frame.iloc[:, : table.sparse] = names.where(changed, "")
    return frame


def _escaped(text: str) -> str:
    return "".join(_SIGNS.get(sign, sign) for sign in text)


def _escaped_caption(line: str) -> str:
    """As `_escaped`, with the marks of `_styled` left as they are."""
    parts = re.split(r"(</?u>)", line)
    return "".join(part if part in ("<u>", "</u>") else _escaped(part) for part in parts)


def _styled(line: str, signs: dict[str, str]) -> str:
    """A caption's marks in another format."""
    line = line.replace("&lt;u&gt;", "<u>").replace("&lt;/u&gt;", "</u>")
    for mark, pattern in (
        (BOLD, r"\*\*(.+?)\*\*"), (ITALIC, r"\*(.+?)\*"), (UNDERLINE, r"<u>(.+?)</u>"),
    ):  # fmt: skip
        line = re.sub(pattern, lambda found, sign=signs[mark]: sign.format(found[1]), line)
    return line
