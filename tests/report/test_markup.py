"""Finished tables as Markdown, LaTeX, CSV, HTML and JSON."""

import csv
import json
import re
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pandas as pd
import pytest
from report.scored import cell

from sparsemm_eval.errors import printable
from sparsemm_eval.report.cells import cells_frame
from sparsemm_eval.report.markup import FORMATS, Table, to_format
from sparsemm_eval.report.paper import paper_cells
from sparsemm_eval.report.paper_tables import paper_table
from sparsemm_eval.report.ranking import rank_methods
from sparsemm_eval.report.ranking_table import ranking_table


@pytest.fixture
def table() -> Table:
    """Names that are hostile to every format; two columns, one of them twofold."""
    cells = cells_frame(
        [
            cell("sparsemm", 64, 0.8, model="a_b & 50%|<i>", label="SparseMM (ratio=0.1)"),
            cell("snapkv", 64, 0.5, model="a_b & 50%|<i>"),
            cell("snapkv", 32, 0.5, model="a_b & 50%|<i>", kept_tokens_per_head=None),
        ]
    )
    return paper_table(cells, show=("score", "kept"))


def test_markdown(table: Table) -> None:
    lines = to_format(table, "markdown").splitlines()
    assert lines[0] == "### Scores by budget"
    head = [part.strip() for part in lines[2].split("|")[1:-1]]
    assert head == [
        "benchmark", "model", "method", "64", "64 kept tokens/head", "32", "32 kept tokens/head"
    ]  # fmt: skip
    first = [part.strip() for part in re.split(r"(?<!\\)\|", lines[4])[1:-1]]
    assert first == [
        "DocVQA (ANLS)", r"a_b & 50%\|\<i>", "SparseMM (ratio=0.1)", "**0.800**", "64.0", "", ""
    ]  # fmt: skip
    second = [part.strip() for part in re.split(r"(?<!\\)\|", lines[5])[1:-1]]
    assert second == ["", "", "SnapKV", "<u>0.500</u>", "64.0", "0.500", ""]
    assert lines[7].startswith("**Bold**: best")


def test_latex(table: Table) -> None:
    text = to_format(table, "latex")
    for name in ("table*", "tabular"):
        assert text.count(rf"\begin{{{name}}}") == text.count(rf"\end{{{name}}}") == 1
    body = text.split(r"\toprule")[1].split(r"\bottomrule")[0]
    assert r"\shortstack{kept \\ tokens/head}" in body
    body = re.sub(r"\\shortstack{.*?}", "head", body)
    rows = [row for row in body.replace(r"\midrule", "").split(r"\\") if row.strip()]
    assert r"\multicolumn{2}{c}{64} & \multicolumn{2}{c}{32}" in rows[0]
    for row in rows[1:]:
        # Every line has the columns that the preamble declares.
        assert len(re.findall(r"(?<!\\)&", row)) == (0 if "DocVQA" in row else 4)
    assert r"\begin{tabular}{lrrrr}" in text
    assert r"a\_b \& 50\%\textbar{}$<$i$>$" in text.split(r"\caption")[1]
    assert r"\textbf{0.800}" in body
    assert r"\underline{0.500}" in body
    assert r"\textbf{Bold}: best" in text.split(r"\caption")[1]
    assert r"\label{tab:scores-by-budget}" in text
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")


@pytest.mark.parametrize("like", ["table2", "table3"])
def test_latex_is_ascii_where_signs_have_names(like: str) -> None:
    text = to_format(paper_table(paper_cells(), like=like), "latex")
    assert text.isascii()
    assert (r"$\surd$" if like == "table2" else r"$\approx$") in text


def test_groups_of_rows_are_ruled_off() -> None:
    text = to_format(paper_table(paper_cells(), like="table4"), "latex")
    assert text.count(r"\midrule") == 3
    assert text.count(r" \\") == 1 + 3 * (1 + 5)


def test_each_model_has_a_float_of_its_own() -> None:
    text = to_format(paper_table(paper_cells(), like="table3"), "latex")
    captions = re.findall(r"\\caption\{(.*)\}", text)
    models = [*dict.fromkeys(paper_cells("table3")["model"])]
    assert [model for model in models for caption in captions if model in caption] == [
        model for model in models for _ in range(len(captions) // len(models))
    ]
    assert all(
        not set(models) & set(cells) for cells in re.findall(r"toprule(.*?)bottomrule", text)
    )
    labels = re.findall(r"\\label\{(.*)\}", text)
    assert len(set(labels)) == len(captions)
    # What marks mean stands once, and the others point to it.
    assert sum("significant" in caption for caption in captions) == 1
    assert text.count(rf"\ref{{{labels[0]}}}") == len(captions) - 1


def test_a_column_has_one_number_of_decimals() -> None:
    def decimals(even: bool) -> set[int]:
        text = to_format(paper_table(paper_cells(), like="table3", even=even), "csv")
        return {len(found) for found in re.findall(r",\d\.(\d+)", text)}

    assert decimals(even=True) == {3}
    assert decimals(even=False) == {3, 4}


WIDE = ("score", "interval", "kept", "bytes", "paper", "difference", "baseline", "p", "n")


BOOKTABS = (
    shutil.which("kpsewhich") and subprocess.run(["kpsewhich", "booktabs.sty"]).returncode == 0
)


@pytest.mark.skipif(not BOOKTABS, reason="there is no LaTeX with booktabs")
@pytest.mark.parametrize("columns", ["onecolumn", "twocolumn"])
@pytest.mark.parametrize(
    ("like", "show", "long"),
    [
        *((f"table{number}", ("score",), False) for number in (1, 2, 3, 4)),
        (None, WIDE, False),
        (None, ("score",), True),
    ],
)
def test_latex_fits_its_page(
    like: str | None, show: tuple[str, ...], long: bool, columns: str, tmp_path: Path
) -> None:
    cells = paper_cells(like)
    if like is None:
        own = [
            cell(method, budget, 0.5 + budget / 1e5, model=f"a_{model}", benchmark=benchmark,
                 low=0.4, high=0.6, kept_tokens_per_head=budget / 3, kept_kv_bytes=1e4 * budget)
            for method in ("sparsemm", "snapkv", "my_own_method_of_a_long_name")
            for model in ("one", "two")
            for benchmark in ("DocVQA", "a benchmark & more")
            for budget in (2048, 1024, 512, 256, 128, 64)
        ]  # fmt: skip
        cells = cells_frame(own)
    _fits(paper_table(cells, like=like, show=show, long=long, even=True), columns, tmp_path)


@pytest.mark.skipif(not BOOKTABS, reason="there is no LaTeX with booktabs")
@pytest.mark.parametrize("columns", ["onecolumn", "twocolumn"])
def test_a_ranking_fits_its_page_with_its_words(columns: str, tmp_path: Path) -> None:
    budgets = (2048, 1024, 512, 256, 128, 64, 32)
    names = ("sparsemm", "snapkv", "adakv", "local", "streaming", "my_own_method_of_a_long_name")
    cells, parts = [cell("fullkv", None, 1.0, model=model) for model in ("a_one", "b&two")], []
    for model in ("a_one", "b&two"):
        cells += [cell(name, budget, 0.5, model=model) for budget in budgets for name in names]
    for place, row in enumerate(cells):
        scores = [1.0] * 20 if row["method"] == "fullkv" else [1.0, 0.0] * 10
        parts.append(pd.DataFrame({"cell": place, "doc_id": range(20), "score": scores}))
    table = ranking_table(rank_methods(cells_frame(cells), pd.concat(parts)))
    assert len(table.words) == 2 * (2 + len(budgets) + 2 + len(budgets))
    _fits(table, columns, tmp_path)


def _fits(table: Table, columns: str, tmp_path: Path) -> None:
    text = to_format(table, "latex")
    document = tmp_path / "document.tex"
    document.write_text(
        rf"\documentclass[10pt,{columns}]{{article}}\usepackage{{booktabs}}\begin{{document}}"
        f"\n{text}\n" + r"\end{document}" + "\n"
    )
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", document.name],
        cwd=tmp_path, capture_output=True, text=True, errors="replace",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout
    assert "too large" not in done.stdout


def test_words_stand_before_a_table_as_text() -> None:
    table = Table(pd.DataFrame({"a": ["1"], "b": ["2"]}), words=("A <b> & *c* 5%.", "Then."))
    markdown = to_format(table, "markdown")
    assert markdown.startswith("A \\<b> & \\*c\\* 5%.\n\nThen.\n\n| a")
    latex = to_format(table, "latex")
    assert (
        "\n{\\sloppy A $<$b$>$ \\& *c* 5\\%.\\par}\n\n{\\sloppy Then.\\par}\n\n\\begin{ta" in latex
    )
    assert to_format(table, "html").startswith("<p>A &lt;b&gt; &amp; *c* 5%.</p>\n<p>Then.</p>")
    assert to_format(table, "csv") == "a,b\n1,2\n"


def test_csv_is_read_back(table: Table) -> None:
    rows = list(csv.DictReader(to_format(table, "csv").splitlines()))
    assert [row["model"] for row in rows] == ["a_b & 50%|<i>"] * 2
    assert [row["benchmark"] for row in rows] == ["DocVQA"] * 2
    assert [row["64"] for row in rows] == ["0.800", "0.500"]
    assert [row["32 kept tokens/head"] for row in rows] == ["", ""]


def test_json_is_read_back(table: Table) -> None:
    first, second = json.loads(to_format(table, "json"))
    assert (first["model"], first["64"], first["32"]) == ("a_b & 50%|<i>", "0.800", "")
    assert second["32"] == "0.500"


def test_html_is_well_formed_and_escaped(table: Table) -> None:
    text = to_format(table, "html")
    tree = ElementTree.fromstring(text.replace("<br>", "<br/>"))
    rows = tree.findall("tbody/tr")
    assert rows[0].findall("th")[1].text == "a_b & 50%|<i>"
    assert rows[0].find("td/b").text == "0.800"
    assert rows[1].find("td/u").text == "0.500"
    assert len(tree.findall("thead/tr/th")) == 7
    assert tree.find("caption/b").text == "Bold"


@pytest.mark.parametrize("form", FORMATS)
def test_the_long_form_has_a_row_a_cell(form: str) -> None:
    cells = cells_frame([cell("sparsemm", 64, 0.8), cell("fullkv", None, 0.9)])
    text = to_format(paper_table(cells, long=True), form)
    lines = [line for line in text.splitlines() if "FullKV" in line or "SparseMM" in line]
    # On paper, its many columns are several tables below each other.
    assert len(lines) == 2 * max(text.count(r"\begin{table*}"), 1)
    assert "FullKV" in lines[0]
    assert "0.9" in lines[0]


def test_another_format_is_refused(table: Table) -> None:
    with pytest.raises(ValueError, match="format=pdf: it must be one of markdown, latex, csv"):
        to_format(table, "pdf")


HOSTILE = {
    "a|b\nc": (r"a\|b\\nc", r"a\textbar{}b\textbackslash{}nc", r"a|b\nc"),
    "`rm` <b> [x](javascript:y)": (
        r"\`rm\` \<b> [x]\(javascript:y)",
        r"\textasciigrave{}rm\textasciigrave{} $<$b$>$ [x](javascript:y)",
        "`rm` <b> [x](javascript:y)",
    ),
    r"\input{x} #$%&_^~": (
        r"\\input{x} #$%&_^~",
        r"\textbackslash{}input\{x\} \#\$\%\&\_\textasciicircum{}\textasciitilde{}",
        r"\input{x} #$%&_^~",
    ),
    "=HYPERLINK(1)": ("=HYPERLINK(1)", "=HYPERLINK(1)", "'=HYPERLINK(1)"),
    "+1-cmd": ("+1-cmd", "+1-cmd", "'+1-cmd"),
    "@SUM": ("@SUM", "@SUM", "'@SUM"),
    "-0.25": ("-0.25", "-0.25", "-0.25"),
    "+1.5e-08": ("+1.5e-08", "+1.5e-08", "+1.5e-08"),
    "é 縮 \u2212": ("é 縮 \u2212", "é U+7E2E $-$", "é 縮 \u2212"),
    "\x1b[31mred\u202e": (
        r"\\x1b[31mred\\u202e",
        r"\textbackslash{}x1b[31mred\textbackslash{}u202e",
        r"\x1b[31mred\u202e",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_is_text_in_every_format(name: str) -> None:
    markdown, latex, plain = HOSTILE[name]
    text = Table(pd.DataFrame({name: [name], "n": ["1"]}), title=name)
    lines = to_format(text, "markdown").splitlines()
    assert lines[0] == f"### {markdown}"
    for line in (lines[2], lines[4]):
        assert re.split(r"(?<!\\)\|", line)[1].strip() == markdown
    made = to_format(text, "latex")
    assert rf"\caption{{{latex}.}}" in made
    assert f"\n{latex} & 1 \\\\\n" in made
    assert next(csv.reader([to_format(text, "csv").splitlines()[1]])) == [plain, "1"]
    (row,) = ElementTree.fromstring(to_format(text, "html").replace("<br>", "<br/>")).iter("tbody")
    assert row.find("tr/th").text == printable(name)
    assert json.loads(to_format(text, "json")) == [{name: name, "n": "1"}]
