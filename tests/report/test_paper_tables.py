"""Tables in the paper's shape: the paper's own cells come back, and marks say what is known."""

import csv
import re
from collections.abc import Iterator
from importlib.resources import files

import numpy as np
import pandas as pd
import pytest
from report.scored import by_name, cell, coins, frames

from sparsemm_eval.report.cells import cells_frame
from sparsemm_eval.report.markup import to_format
from sparsemm_eval.report.paper import paper_cells
from sparsemm_eval.report.paper_tables import applicable, paper_table
from sparsemm_eval.report.statistics import add_statistics

FILES = {
    "table1": "table1_ratio_ablation.csv",
    "table2": "table2_component_ablation.csv",
    "table3": "table3_ocr_rich.csv",
    "table4": "table4_general.csv",
}
LEFT = {"table1": 1, "table2": 3, "table3": 3, "table4": 3}
TICKS = {"1": "✓", "0": ""}


def printed(like: str) -> list[dict[str, str]]:
    """The paper's cells as they are in the project's data, text as it is."""
    text = (files("sparsemm_eval.report.paper") / FILES[like]).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def expected(like: str) -> Iterator[tuple[tuple[str, ...], str | None, str, bool]]:
    """Name of the row, column (None: all), value as printed, whether it was digitised."""
    for row in printed(like):
        digitised = row["source"].endswith("_digitised")
        if like == "table1":
            yield (row["model"],), f"{float(row['ratio']):g}", row["score"], digitised
        elif like == "table2":
            parts = (row["local_window"], row["uniform"], row["score_preferred"])
            yield parts, row["budget"], row["score"], digitised
        else:
            name = (row["benchmark"], row["model"], row["method"])
            yield name, row["budget"] or None, row["score"], digitised


def from_markdown(text: str, left: int) -> dict[tuple[tuple[str, ...], str], str]:
    """Cells of a rendered table without their marks, by names of the row and head of the column."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[part.strip() for part in line[1:-1].split("|")] for line in lines]
    head, body = rows[0], rows[2:]
    found, names = {}, [""] * left
    for row in body:
        # Names that do not change are not said again, but for ticks, which are values.
        ticks = head[:left] == ["local window", "uniform", "score-preferred"]
        names = [said if said or ticks else last for said, last in zip(row, names, strict=False)]
        key = tuple(re.sub(r" \([^)]*\)$", "", name) for name in names)
        for column, value in zip(head[left:], row[left:], strict=True):
            found[key, column] = re.sub(r"\*|</?u>", "", value)
    return found


def from_csv(text: str, left: int) -> dict[tuple[tuple[str, ...], str], str]:
    head, *body = csv.reader(text.splitlines())
    return {
        (tuple(row[:left]), column): value
        for row in body
        for column, value in zip(head[left:], row[left:], strict=True)
    }


@pytest.mark.parametrize("like", FILES)
def test_the_papers_cells_come_back_value_for_value(like: str) -> None:
    """In Markdown with its sign where digitised; a cell the paper lacks is empty."""
    found = from_markdown(to_format(paper_table(paper_cells(), like=like), "markdown"), LEFT[like])
    columns = {column for _, column in found}
    wanted = {}
    for names, column, value, digitised in expected(like):
        shown = tuple(map(TICKS.get, names)) if like == "table2" else names
        for one in [column] if column else columns:
            wanted[shown, one] = ("≈" if digitised else "") + value
    assert {key: value for key, value in found.items() if value} == wanted
    assert {key for key, value in found.items() if not value} == set(found) - set(wanted)


@pytest.mark.parametrize("like", FILES)
def test_csv_has_the_papers_numbers_alone(like: str) -> None:
    left = {"table1": 3, "table2": 5}.get(like, 3)
    found = from_csv(to_format(paper_table(paper_cells(), like=like), "csv"), left)
    columns = {column for _, column in found}
    where = {"table1": ("OCRBench", "256"), "table2": ("MMBench", "Qwen2-VL-7B-Instruct")}
    wanted = {
        ((*where.get(like, ()), *names), one): value
        for names, column, value, _ in expected(like)
        for one in ([column] if column else columns)
    }
    assert {key: value for key, value in found.items() if value} == wanted


def test_missing_cells_stay_empty() -> None:
    cells = paper_cells("table4")
    left_out = cells["method"].eq("snapkv") & cells["budget"].eq(96)
    text = to_format(paper_table(cells[~left_out], like="table4"), "csv")
    found = from_csv(text, 3)
    assert found[("GQA", "Qwen2-VL-7B-Instruct", "SnapKV"), "96"] == ""
    assert found[("GQA", "Qwen2-VL-7B-Instruct", "SnapKV"), "64"] == "60.82"


def test_digitised_cells_are_explained_and_their_source_is_in_the_long_form() -> None:
    table = paper_table(paper_cells(), like="table3")
    assert "≈: read off a figure" in table.caption[0]
    assert "≈" not in paper_table(paper_cells(), like="table4").caption[0]
    long = to_format(paper_table(paper_cells(), like="table3", long=True), "csv")
    sources = {
        (row["benchmark"], row["model"], row["label"], row["budget"]): (row["source"], row["score"])
        for row in csv.DictReader(long.splitlines())
    }
    assert len(sources) == len(printed("table3"))
    for row in printed("table3"):
        source, score = sources[row["benchmark"], row["model"], row["method"], row["budget"]]
        assert source == row["source"]
        assert float(score) == float(row["score"])


def test_rows_are_in_the_papers_order_and_ones_own_follow() -> None:
    own = cells_frame(
        [
            cell("early", 64, 0.5), cell("snapkv", 64, 0.5), cell("fullkv", None, 0.9),
            cell("sparsemm", 32, 0.8),
            cell("snapkv", 64, 0.4, model="LLaVA-NeXT-Vicuna-7B"),
            cell("snapkv", 64, 0.4, task="mme", benchmark="mme", metric_label="score"),
            cell("snapkv", 64, 0.4, task="ocrbench", benchmark="OCRBench", metric_label="accuracy"),
        ]
    )  # fmt: skip
    table = paper_table(own)
    assert list(by_name(table).index) == [
        ("DocVQA (ANLS)", "LLaVA-NeXT-Vicuna-7B", "SnapKV"),
        ("DocVQA (ANLS)", "small", "FullKV"),
        ("DocVQA (ANLS)", "small", "SparseMM"),
        ("DocVQA (ANLS)", "small", "SnapKV"),
        ("DocVQA (ANLS)", "small", "early"),
        ("OCRBench (accuracy)", "small", "SnapKV"),
        ("mme (score)", "small", "SnapKV"),
    ]
    assert list(by_name(table).columns.get_level_values(0)) == ["64", "32"]
    full = by_name(table).loc[("DocVQA (ANLS)", "small", "FullKV")]
    assert full.tolist() == ["0.900", "0.900"]
    assert by_name(table).loc[("DocVQA (ANLS)", "small", "SparseMM")].tolist() == ["", "0.800"]


def marks(table) -> list[str]:
    return by_name(table, table.marks).iloc[:, 0].tolist()


def test_a_win_is_bold_and_what_may_be_chance_is_not() -> None:
    full, best, near, far = coins(1, 300, 0.95, 0.9, 0.7, 0.5)
    scores = {
        ("fullkv", None): full, ("sparsemm", 64): best, ("snapkv", 64): near, ("adakv", 64): far
    }  # fmt: skip
    sure = paper_table(*frames(scores))
    assert marks(sure) == ["", "bold", "underline", ""]
    assert "significantly better" in sure.caption[0]
    assert "McNemar" in sure.caption[1]
    assert "2 comparisons" in sure.caption[1]
    close = near.copy()
    close[np.flatnonzero(close == 0)[:2]] = 1
    unsure = paper_table(*frames(scores | {("sparsemm", 64): close}))
    assert marks(unsure) == ["", "italic", "underline", ""]


def test_without_samples_marks_are_ranks_and_the_caption_says_so() -> None:
    cells = cells_frame(
        [cell("sparsemm", 64, 0.8), cell("snapkv", 64, 0.7), cell("adakv", 64, 0.8)]
    )
    table = paper_table(cells)
    assert marks(table) == ["bold", "underline", "bold"]
    assert "not known" in table.caption[0]
    assert "Holm" not in " ".join(table.caption)


def test_marks_stay_against_the_next_best_whatever_is_compared_with() -> None:
    full, best, near = coins(2, 300, 0.95, 0.9, 0.6)
    cells, scores = frames({("fullkv", None): full, ("sparsemm", 64): best, ("snapkv", 64): near})
    table = paper_table(cells, scores, show=("score", "difference"), against="fullkv")
    assert marks(table) == ["", "bold", "underline"]
    shown = by_name(table)[("64", "difference")]
    drop = best.mean() - full.mean()
    assert shown.iloc[1].startswith(f"{drop:+.3f} [")
    assert "differences are from FullKV" in table.caption[1]


def test_what_is_shown_beside_a_score() -> None:
    cells, scores = frames({("sparsemm", 64): [1, 0, 1, 1], ("snapkv", 64): [0, 0, 1, 0]})
    cells = cells.assign(
        expected=[10.0, 4.0], model="LLaVA-NeXT-Vicuna-7B", spread=[0.01, np.nan], seeds=3
    )
    shown = ("score", "n", "kept", "bytes", "paper", "from_paper", "baseline", "p", "spread")
    table = paper_table(cells, scores, like="table3", show=shown)
    row = by_name(table).loc[("DocVQA (ANLS)", "LLaVA-NeXT-Vicuna-7B", "SparseMM")].tolist()
    assert row == [
        "0.7500 (n=4)", "4", "64.0", "3", "0.6377", "+0.1123", "SnapKV", "0.500",
        "±0.0100 (3 seeds)",
    ]  # fmt: skip
    other = by_name(table).loc[("DocVQA (ANLS)", "LLaVA-NeXT-Vicuna-7B", "SnapKV")].tolist()
    assert other[4:6] == ["≈0.498", "-0.2480"]
    plain = by_name(table, table.plain).loc[("DocVQA", "LLaVA-NeXT-Vicuna-7B", "SparseMM")].tolist()
    assert plain[0] == "0.7500"
    low, high = add_statistics(cells, scores).loc[0, ["low", "high"]]
    interval = by_name(paper_table(cells, scores, show=("interval",))).iloc[0, 0]
    assert interval == f"[{low:.3f}, {high:.3f}]"


def test_where_all_are_of_the_same_samples_the_caption_says_so_once() -> None:
    cells, scores = frames({("sparsemm", 64): [1, 0, 1, 1], ("snapkv", 64): [0, 0, 1, 0]})
    table = paper_table(cells.assign(expected=10.0), scores)
    assert "(n=4)" not in "".join(by_name(table).to_numpy().ravel())
    assert any("n = 4 of 10;" in line for line in table.caption)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "0.815"),
        ({"percent": True}, "81.5"),
        ({"digits": 1}, "0.8"),
        ({"like": "table4"}, "81.54"),
        ({"like": "table4", "percent": False}, "0.8154"),
        ({"like": "table4", "digits": 1}, "81.5"),
    ],
)
def test_decimals_and_percent(options: dict, text: str) -> None:
    of = {"benchmark": "MMBench", "task": "mmbench_en_dev_static", "percent": True}
    cells = cells_frame([cell("sparsemm", 64, 0.81541, **of)])
    assert by_name(paper_table(cells, **options)).iloc[0, 0] == text


@pytest.mark.parametrize("benchmark", ["TextCaps", "mme"])
def test_scores_of_no_known_end_are_never_percent(benchmark: str) -> None:
    cells = cells_frame(
        [cell("sparsemm", 64, 1.25, benchmark=benchmark, metric_label="CIDEr", bounded=False)]
    )
    assert by_name(paper_table(cells, percent=True)).iloc[0, 0] == "1.250"


def test_own_ratios_stand_side_by_side_a_row_a_budget() -> None:
    cells = cells_frame(
        [
            cell("sparsemm", budget, 0.5 + ratio / 10, ratio=ratio)
            for budget in (64, 32)
            for ratio in (0.0, 0.1, 1.0)
        ]
        + [cell("snapkv", 64, 0.9)]
    )
    table = paper_table(cells, like="table1")
    assert list(by_name(table).index) == [("64", "small"), ("32", "small")]
    assert by_name(table).loc[("64", "small")].tolist() == ["0.500", "0.510", "0.600"]
    assert list(by_name(table).columns.get_level_values(0)) == ["0", "0.1", "1"]
    assert table.title.endswith("DocVQA (ANLS)")
    assert by_name(table, table.marks).iloc[0].tolist() == ["", "underline", "bold"]


def test_own_parts_of_the_cache() -> None:
    """The default ratio is that of a run that states none."""
    cells = cells_frame(
        [
            cell("local", 64, 0.2), cell("sparsemm", 64, 0.5, ratio=1.0),
            cell("sparsemm", 64, 0.8), cell("snapkv", 64, 0.9),
        ]
    )  # fmt: skip
    table = paper_table(cells, like="table2")
    assert list(by_name(table).index) == [("✓", "", ""), ("✓", "✓", ""), ("✓", "✓", "✓")]
    assert by_name(table).iloc[:, 0].tolist() == ["0.200", "0.500", "0.800"]
    assert list(by_name(table, table.plain, 5).index)[1] == ("DocVQA", "small", "1", "1", "0")


def test_parts_of_the_cache_are_at_the_papers_ratio_where_there_are_several() -> None:
    """The others are Table 1's."""
    cells = [cell("local", 64, 0.2)] + [
        cell("sparsemm", 64, ratio, ratio=ratio) for ratio in (0.1, 0.3, 1.0)
    ]
    table = paper_table(cells_frame(cells), like="table2")
    assert by_name(table).iloc[:, 0].tolist() == ["0.200", "1.000", "0.100"]
    others = paper_table(cells_frame([cells[0], *cells[2:]]), like="table2")
    assert by_name(others).iloc[:, 0].tolist() == ["0.200", "1.000", "0.300"]


def test_the_paper_beside_ones_own_is_told_apart() -> None:
    own = cells_frame([cell("sparsemm", 64, 0.63, model="LLaVA-NeXT-Vicuna-7B")])
    both = pd.concat([own, paper_cells()], ignore_index=True)
    table = paper_table(both, like="table3")
    name = ("DocVQA (ANLS)", "LLaVA-NeXT-Vicuna-7B")
    assert by_name(table).loc[(*name, "SparseMM"), ("64", "")] == "0.6300"
    assert by_name(table).loc[(*name, "SparseMM (paper)"), ("64", "")] == "0.6377"
    rows = list(by_name(table).index)
    assert rows.index((*name, "SparseMM (paper)")) == rows.index((*name, "SparseMM")) + 1


def test_two_tasks_of_a_benchmark_have_their_own_rows() -> None:
    cells = cells_frame([cell("sparsemm", 64, 0.5), cell("sparsemm", 64, 0.6, task="docvqa_mini")])
    names = list(by_name(paper_table(cells)).index.get_level_values(0))
    assert names == ["DocVQA (ANLS), docvqa_mini", "DocVQA (ANLS), docvqa_val"]


def test_tables_that_apply() -> None:
    assert applicable(paper_cells()) == ["table1", "table2", "table3", "table4"]
    assert applicable(cells_frame([cell("sparsemm", 64, 0.5)])) == ["table3"]
    ratios = [cell("sparsemm", 64, 0.5, ratio=ratio) for ratio in (0.1, 0.2)]
    assert applicable(cells_frame(ratios)) == ["table1", "table3"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"like": "table5"}, "like=table5: it must be one of table1"),
        ({"like": "table4"}, "it needs results on MMBench, GQA, VQAv2; there is DocVQA, SparseMM"),
        ({"like": "table1"}, "it needs sparsemm with several ratios"),
        ({"like": "table2"}, "it needs at least two of local"),
        ({"show": ("score", "speed")}, "show=speed: it must be of score, interval"),
        ({"show": ()}, "show: give at least one"),
        ({"against": "h2o"}, "against=h2o: it must be best or one of"),
    ],
)
def test_wrong_options_are_one_sentence(options: dict, said: str) -> None:
    cells = cells_frame([cell("sparsemm", 64, 0.5)])
    with pytest.raises(ValueError, match=re.escape(said)):
        paper_table(cells, **options)


def test_two_cells_of_one_place_are_refused() -> None:
    cells = cells_frame([cell("sparsemm", 64, 0.5), cell("sparsemm", 64, 0.6)])
    with pytest.raises(ValueError, match="SparseMM at budget=64: there are two such cells"):
        paper_table(cells)
