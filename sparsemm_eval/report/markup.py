"""A finished table, and how it is written: Markdown, LaTeX, CSV, HTML, JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import groupby

import pandas as pd

from sparsemm_eval.errors import UserError, printable

BOLD, ITALIC, UNDERLINE = "bold", "italic", "underline"
_MARKDOWN = {BOLD: "**{}**", ITALIC: "*{}*", UNDERLINE: "<u>{}</u>"}
_HTML = {BOLD: "<b>{}</b>", ITALIC: "<i>{}</i>", UNDERLINE: "<u>{}</u>"}
_LATEX = {BOLD: r"\textbf{{{}}}", ITALIC: r"\textit{{{}}}", UNDERLINE: r"\underline{{{}}}"}
_LATEX_SIGNS = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"$<$", ">": r"$>$", "≈": r"$\approx$", "±": r"$\pm$", "✓": r"$\surd$", "·": r"$\cdot$",
    "|": r"\textbar{}", "`": r"\textasciigrave{}", "\u2212": "$-$", "\u00d7": r"$\times$",
    "\u2013": "--", "\u2014": "---", "\u2018": "`", "\u2019": "'", "\u201c": "``", "\u201d": "''",
    "\u2026": r"\ldots{}",
}  # fmt: skip
# Letters that LaTeX sets as they stand, without a package.
_LATEX_LETTERS = re.compile("[ -~\u00a1-\u017f]")
# What Markdown would take for a mark, a column, code, an element or a link.
_MARKDOWN_SIGNS = re.compile(r"[\\|`*<]|(?<=\])\(")
# What a spreadsheet would take for a formula, unless it is a number.
_FORMULA = re.compile(r"[=+\-@](?![\d.]+(e[+-]?\d+)?$)")
# Points: the narrowest page there is, LaTeX's own article; footnotesize; between two columns.
_ROOM, _SIZE, _BETWEEN = 345, 8, 7
_BELOW = r" \\ "
# Of a page, below a caption of many lines.
_ROWS = 40


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
    words : tuple of str
        Paragraphs that stand before it, without marks.
    """

    text: pd.DataFrame
    names: int = 1
    sparse: int = 0
    title: str = ""
    caption: tuple[str, ...] = ()
    marks: pd.DataFrame | None = None
    plain: pd.DataFrame | None = None
    words: tuple[str, ...] = ()


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
    frame = _marked(table, _MARKDOWN, _escaped_markdown, sparse=True)
    frame = frame.set_axis([_escaped_markdown(name) for name in frame.columns], axis="columns")
    aligned = ["left"] * table.names + ["right"] * (frame.shape[1] - table.names)
    return frame.to_markdown(index=False, disable_numparse=True, colalign=aligned)


def _markdown(table: Table) -> str:
    title = f"### {_escaped_markdown(table.title)}" if table.title else ""
    # A line of Markdown goes on in the next one but for two blanks.
    words = map(_escaped_markdown, table.words)
    parts = (title, *words, to_markdown(table), "  \n".join(table.caption))
    return "\n\n".join(filter(None, parts)) + "\n"


def _html(table: Table) -> str:
    frame = _marked(table, _HTML, _escaped_html, sparse=False)
    head = "".join(f'<th scope="col">{_escaped_html(name)}</th>' for name in frame.columns)
    rows = []
    for row in frame.itertuples(index=False):
        names = "".join(f'<th scope="row">{cell}</th>' for cell in row[: table.names])
        rows.append(f"<tr>{names}{''.join(f'<td>{cell}</td>' for cell in row[table.names :])}</tr>")
    caption = "<br>".join(_styled(escape(line, quote=False), _HTML) for line in table.caption)
    words = "".join(f"<p>{_escaped_html(line)}</p>\n" for line in table.words)
    return (
        f"{words}<table>\n<caption><strong>{_escaped_html(table.title)}</strong><br>{caption}</caption>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody>\n</table>\n"
    )


def _latex(table: Table) -> str:
    """Floats that fit a page, one model each; rules of booktabs between groups of rows."""
    parts = [part for model in _models(table) for part in _pages(model)]
    stem = re.sub(r"[^a-z0-9]+", "-", table.title.lower()).strip("-") or "table"
    labels = [f"tab:{stem}"] + [f"tab:{stem}-{place}" for place in range(2, len(parts) + 1)]
    explained = " ".join(_styled(_escaped_caption(line), _LATEX) for line in table.caption)
    floats = []
    for place, (part, label) in enumerate(zip(parts, labels, strict=True)):
        caption = _escaped(part.title) + "."
        if explained:
            caption += (
                f" {explained}" if place == 0 else rf" Marks as in Table~\ref{{{labels[0]}}}."
            )
        floats.append(_float(part, caption, label))
    # Long names may stretch a line, but not stick out of it.
    words = "".join(f"{{\\sloppy {_escaped(line)}\\par}}\n\n" for line in table.words)
    return "% needs \\usepackage{booktabs}\n" + words + "\n".join(floats)


def _models(table: Table) -> list[Table]:
    """A table for each model, whose name goes from the rows into the title."""
    heads = [head for head, _ in _heads(table.text)]
    if "model" not in heads[: table.names] or table.names == 1:
        return [table]
    names = table.text.iloc[:, heads.index("model")]
    return [
        replace(
            _taken(table, names.eq(name).to_numpy(), [head != "model" for head in heads]),
            names=table.names - 1,
            sparse=max(table.sparse - 1, 0),
            title=f"{table.title}, {name}",
        )
        for name in names.unique()
    ]


def _pages(table: Table) -> list[Table]:
    """The columns of a table that fit beside each other, and the rows that fit below them."""
    frame = _shown(table)
    left = range(_grouped(table), table.names)
    groups = [
        [place for place, _ in columns]
        for _, columns in groupby(enumerate(_heads(table.text)[table.names :]), lambda h: h[1][0])
    ]
    groups = [[place + table.names for place in group] for group in groups]
    widths = {place: _width(frame, table, place) for place in range(frame.shape[1])}
    room = _ROOM - sum(widths[place] for place in left)
    if any(sum(widths[place] for place in group) > room for group in groups):
        groups = [[place] for group in groups for place in group]
    blocks: list[list[int]] = []
    for group in groups:
        taken = sum(widths[place] for place in (blocks[-1] if blocks else ()))
        if blocks and taken + sum(widths[place] for place in group) <= room:
            blocks[-1] += group
        else:
            blocks.append(list(group))
    rows = _row_blocks(frame, table)
    several = len(rows) * len(blocks) > 1
    parts = []
    for lines in rows:
        for block in blocks:
            columns = [place < table.names or place in block for place in widths]
            kept = [place in lines for place in range(len(frame))]
            part = _taken(table, kept, columns)
            number = f" ({len(parts) + 1} of {len(rows) * len(blocks)})" if several else ""
            parts.append(replace(part, title=table.title + number))
    return parts


def _row_blocks(frame: pd.DataFrame, table: Table) -> list[range]:
    """Rows of each page, whole groups where one fits."""
    begins = [0, *_group_begins(frame, table)]
    ends = [*begins[1:], len(frame)]
    blocks: list[range] = []
    groups = 1  # of the last page, each with a line for its name and rule
    for begin, end in zip(begins, ends, strict=True):
        for first in range(begin, end, _ROWS):
            last = min(first + _ROWS, end)
            if blocks and last - blocks[-1].start + groups < _ROWS:
                blocks[-1] = range(blocks[-1].start, last)
                groups += 1
            else:
                blocks.append(range(first, last))
                groups = 1
    return blocks


def _grouped(table: Table) -> bool:
    """Whether the first of several names stands above the rows that share it."""
    return table.names > 1 and table.sparse > 0


def _group_begins(frame: pd.DataFrame, table: Table) -> list[int]:
    """The rows above which a rule stands: their first name is another than the row's before."""
    if table.names == 1:
        return []
    first = frame.iloc[:, 0]
    return [
        place
        for place in range(1, len(frame))
        if first.iloc[place] not in ("", first.iloc[place - 1])
    ]


def _taken(table: Table, rows: Sequence[bool], columns: Sequence[bool]) -> Table:
    """A part of a table."""
    text = table.text.loc[list(rows), list(columns)]
    marks = None if table.marks is None else table.marks.loc[list(rows), list(columns)]
    return replace(table, text=text, marks=marks)


def _shown(table: Table) -> pd.DataFrame:
    return _marked(table, _LATEX, _escaped, sparse=True)


def _width(frame: pd.DataFrame, table: Table, place: int) -> float:
    """Points that a column takes, as far as characters tell."""
    head, shown = _heads(table.text)[place]
    under = table.text.iloc[:, place]
    longest = max((_points(text) for text in (*under, *(shown or head).split())), default=0.0)
    over = [one for one, _ in _heads(table.text)].count(head)
    if place >= table.names:  # what is best is bold, and bold is wider
        longest *= 1.15
    return max(longest, _points(head) / over) + _BETWEEN


def _points(text: str) -> float:
    """Of a text in Computer Modern, rather too many than too few."""
    wide = sum(sign.isupper() or sign in "%&@—mwMW≈±✓" for sign in text)
    narrow = sum(sign in "ijlt.,:;()[]|! " for sign in text)
    return _SIZE * (0.52 * (len(text) - wide - narrow) + 0.8 * wide + 0.33 * narrow)


def _float(table: Table, caption: str, label: str) -> str:
    frame = _shown(table)
    begins = _group_begins(frame, table)
    heads, left = _heads(table.text), table.names
    above = {place: [r"\midrule"] for place in begins}
    if _grouped(table):
        names, frame = frame.iloc[:, 0], frame.iloc[:, 1:]
        heads, left = heads[1:], left - 1
        for place in (0, *begins):
            name = rf"\multicolumn{{{len(heads)}}}{{l}}{{\textit{{{names.iloc[place]}}}}} \\"
            above[place] = [*above.get(place, ()), name]
    over = [[_stacked(head or shown) for head, shown in heads]]
    if any(shown for _, shown in heads[left:]):
        spans = [(head, len([*group])) for head, group in groupby(heads[left:], lambda h: h[0])]
        top = [rf"\multicolumn{{{width}}}{{c}}{{{_escaped(head)}}}" for head, width in spans]
        below = [*over[0][:left], *(_stacked(shown or "score") for _, shown in heads[left:])]
        over = [[""] * left + top, below]
    lines = []
    for place, row in enumerate(frame.itertuples(index=False)):
        lines += [*above.get(place, ()), _row(row)]
    return "\n".join([
        r"\begin{table*}[tp]",
        r"\centering",
        rf"\caption{{{caption}}}",
        rf"\label{{{label}}}",
        r"\smallskip",
        r"\footnotesize",
        rf"\setlength{{\tabcolsep}}{{{_BETWEEN / 2:g}pt}}",
        rf"\begin{{tabular}}{{{'l' * left}{'r' * (frame.shape[1] - left)}}}",
        r"\toprule",
        *map(_row, over),
        r"\midrule",
        *lines,
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table*}",
        "",
    ])  # fmt: skip


def _stacked(head: str) -> str:
    """A head of several words, one below the other."""
    words = [_escaped(word) for word in head.split()]
    return "".join(words) if len(words) < 2 else rf"\shortstack{{{_BELOW.join(words)}}}"


def _row(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _csv(table: Table) -> str:
    plain = _plain(table)
    plain = plain.map(_escaped_csv).set_axis(map(_escaped_csv, plain.columns), axis="columns")
    return plain.to_csv(index=False, lineterminator="\n")


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
    """For LaTeX; a sign that it has no letter for is named by its number."""
    return "".join(
        _LATEX_SIGNS.get(sign) or (sign if _LATEX_LETTERS.match(sign) else f"U+{ord(sign):04X}")
        for sign in printable(text)
    )


def _escaped_html(text: str) -> str:
    return escape(printable(text))


def _escaped_markdown(text: str) -> str:
    return _MARKDOWN_SIGNS.sub(lambda found: f"\\{found[0]}", printable(text))


def _escaped_csv(text: str) -> str:
    text = printable(text)
    return f"'{text}" if _FORMULA.match(text) else text


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
