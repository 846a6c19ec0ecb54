"""A finished table, and how it is written: Markdown, LaTeX, CSV, HTML."""

from __future__ import annotations

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
# Names of rows that are not said again, and those that are words.
_SPARSE = ("benchmark", "budget", "model")
_WORDS = ("benchmark", "model", "method")
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
    title : str
        Of the table.
    caption : tuple of str
        Lines below it; **, * and <u> in them are marks as in Markdown.
    text : DataFrame
        What each cell shows, "" where nothing was run. Rows and columns are named by
        MultiIndexes, columns by (column, what is shown); an index of one unnamed level is not
        shown.
    marks : DataFrame
        The same shape: "bold", "italic", "underline" or "".
    plain : DataFrame
        The same rows, for machines: numbers without signs around them, names in full.
    cells : DataFrame
        What it shows, one row a cell, with statistics.
    """

    title: str
    caption: tuple[str, ...]
    text: pd.DataFrame
    marks: pd.DataFrame
    plain: pd.DataFrame
    cells: pd.DataFrame


def to_format(table: Table, form: str) -> str:
    """Write a table.

    Parameters
    ----------
    table : Table
        Of `paper_tables`.
    form : {"markdown", "latex", "csv", "html"}
        CSV is numbers and names alone: no title, caption or marks.

    Raises
    ------
    ValueError
        If the format is none of these.
    """
    return checked_format(form)(table)


def checked_format(form: str) -> Callable[[Table], str]:
    """The writer of a format; see `to_format`."""
    if form not in _FORMATS:
        raise UserError(f"format={form}: it must be one of {', '.join(_FORMATS)}")
    return _FORMATS[form]


def _markdown(table: Table) -> str:
    frame = _flat(_marked(table, _MARKDOWN, lambda text: text.replace("|", r"\|")), sparse=True)
    left = _left(table)
    aligned = ["left"] * left + ["right"] * (frame.shape[1] - left)
    body = frame.to_markdown(index=False, disable_numparse=True, colalign=aligned)
    # A line of Markdown goes on in the next one but for two blanks.
    return f"### {table.title}\n\n{body}\n\n" + "  \n".join(table.caption) + "\n"


def _html(table: Table) -> str:
    frame = _flat(_marked(table, _HTML, escape), sparse=False)
    left = _left(table)
    head = "".join(f'<th scope="col">{escape(str(name))}</th>' for name in frame.columns)
    rows = []
    for row in frame.itertuples(index=False):
        names = "".join(f'<th scope="row">{cell}</th>' for cell in row[:left])
        rows.append(f"<tr>{names}{''.join(f'<td>{cell}</td>' for cell in row[left:])}</tr>")
    caption = "<br>".join(_styled(escape(line, quote=False), _HTML) for line in table.caption)
    return (
        f"<table>\n<caption><strong>{escape(table.title)}</strong><br>{caption}</caption>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody>\n</table>\n"
    )


def _latex(table: Table) -> str:
    frame = _flat(_marked(table, _LATEX, _escaped), sparse=True)
    left = _left(table)
    names, values = list(frame.columns[:left]), table.text.columns
    head = [*map(_escaped, names), *(_escaped(str(name)) for name in frame.columns[left:])]
    heads = [head]
    if values.nlevels == 2 and not _one_shown(values):
        spans = [(column, len(list(group))) for column, group in groupby(values, lambda v: v[0])]
        top = [rf"\multicolumn{{{width}}}{{c}}{{{_escaped(column)}}}" for column, width in spans]
        heads = [
            [""] * left + top,
            [*map(_escaped, names), *(_escaped(shown or "score") for _, shown in values)],
        ]
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
    return _flat(table.plain, sparse=False).to_csv(index=False, lineterminator="\n")


_FORMATS = {"markdown": _markdown, "latex": _latex, "csv": _csv, "html": _html}
FORMATS = tuple(_FORMATS)


def _left(table: Table) -> int:
    """How many columns hold words, not numbers: they stand to the left."""
    if table.text.index.names != [None]:
        return table.text.index.nlevels
    return sum(name in _WORDS for name in table.text.columns)


def _one_shown(columns: pd.Index) -> bool:
    return columns.nlevels == 2 and set(columns.get_level_values(1)) == {""}


def _marked(table: Table, signs: dict[str, str], escaped: Callable[[str], str]) -> pd.DataFrame:
    """Text made safe for the format, with its marks; names of rows made safe, too."""
    frame = pd.DataFrame(
        [
            [
                signs[mark].format(escaped(cell)) if mark and cell else escaped(cell)
                for cell, mark in zip(cells, marks, strict=True)
            ]
            for cells, marks in zip(table.text.to_numpy(), table.marks.to_numpy(), strict=True)
        ],
        index=table.text.index,
        columns=table.text.columns,
    )
    if table.text.index.names != [None]:
        names = [tuple(map(escaped, name)) for name in _names(table.text)]
        frame.index = pd.MultiIndex.from_tuples(names, names=table.text.index.names)
    return frame


def _names(frame: pd.DataFrame) -> list[tuple[str, ...]]:
    return [name if isinstance(name, tuple) else (name,) for name in frame.index]


def _flat(frame: pd.DataFrame, sparse: bool) -> pd.DataFrame:
    """One header line, names of rows as columns; `sparse`: a name only where it changes."""
    columns = [
        " ".join(filter(None, name if isinstance(name, tuple) else (name,)))
        for name in frame.columns
    ]
    flat = frame.set_axis(columns, axis="columns")
    if frame.index.names == [None]:
        return flat
    names = _names(frame)
    shown = names
    if sparse:
        before = [(), *names]
        shown = [
            tuple(
                "" if frame.index.names[level] in _SPARSE and last[: level + 1] == name[: level + 1]
                else name[level]
                for level in range(len(name))
            )
            for last, name in zip(before, names, strict=False)
        ]  # fmt: skip
    left = pd.DataFrame(shown, columns=list(frame.index.names))
    return pd.concat([left, flat.reset_index(drop=True)], axis="columns")


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
