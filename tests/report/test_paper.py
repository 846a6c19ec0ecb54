"""The paper's numbers come back as printed."""

import csv
from importlib.resources import files

import pandas as pd
import pytest

from sparsemm_eval.report.cells import COLUMNS, join_seeds
from sparsemm_eval.report.paper import TABLES, paper_cells, paper_efficiency

NAMES = {
    "table1": "table1_ratio_ablation",
    "table2": "table2_component_ablation",
    "table3": "table3_ocr_rich",
    "table4": "table4_general",
}
# Table 2's rows, by its columns local_window, uniform, score_preferred.
PARTS = {"100": "Local", "110": "SparseMM (ratio=1)", "111": "SparseMM (ratio=0.1)"}


def printed(name: str) -> list[dict[str, str]]:
    text = (files("sparsemm_eval.report.paper") / f"{name}.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def label(table: str, row: dict[str, str]) -> str:
    if table == "table1":
        return f"SparseMM (ratio={float(row['ratio']):g})"
    if table == "table2":
        return PARTS[row["local_window"] + row["uniform"] + row["score_preferred"]]
    return row["method"]


@pytest.mark.parametrize("table", TABLES)
def test_every_cell_comes_back_value_for_value(table: str) -> None:
    cells = paper_cells(table)
    shown = {}
    for cell in cells.itertuples():
        budget = "" if pd.isna(cell.budget) else f"{cell.budget:g}"
        score = f"{cell.score * (100 if cell.percent else 1):.{cell.digits}f}"
        shown[cell.benchmark, cell.model, cell.label, budget] = (score, cell.source)
    rows = printed(NAMES[table])
    assert len(cells) == len(shown) == len(rows) > 0
    for row in rows:
        where = (row["benchmark"], row["model"], label(table, row), row["budget"])
        assert shown[where] == (row["score"], row["source"])


def test_scores_are_on_one_scale() -> None:
    cells = paper_cells()
    assert len(cells) == sum(len(printed(name)) for name in NAMES.values())
    assert list(cells.columns) == list(COLUMNS)
    bounded = cells[cells["benchmark"] != "TextCaps"]
    assert bounded["score"].between(0, 1).all()
    captions = cells.loc[cells["benchmark"] == "TextCaps", "score"]
    assert captions.max() > 1
    assert set(cells.loc[cells["percent"], "benchmark"]) == {"MMBench", "GQA", "VQAv2"}


def test_digitised_values_are_told_from_printed_ones() -> None:
    cells = paper_cells("table3")
    assert set(cells["source"]) == {"table3", "figure4_digitised"}
    full = cells[cells["method"] == "fullkv"]
    assert (full["source"] == "figure4_digitised").all()
    assert full["budget"].isna().all()


def test_components_are_methods_and_settings() -> None:
    cells = paper_cells("table2")
    found = cells[["method", "ratio"]].drop_duplicates().fillna(-1).to_records(index=False)
    assert [tuple(pair) for pair in found] == [("local", -1), ("sparsemm", 1), ("sparsemm", 0.1)]


def test_another_table_is_refused() -> None:
    with pytest.raises(ValueError, match="like=table5: it must be one of table1, table2"):
        paper_cells("table5")


def test_joining_seeds_leaves_the_paper_as_it_is() -> None:
    cells = paper_cells()
    pd.testing.assert_frame_equal(join_seeds(cells), cells)


def test_efficiency_is_as_digitised() -> None:
    frame = paper_efficiency()
    rows = printed("efficiency_digitised")
    assert len(frame) == len(rows)
    for (_, cell), row in zip(frame.iterrows(), rows, strict=True):
        assert (cell["model"], cell["label"]) == (row["model"], row["method"])
        assert cell["method"] == row["method"].lower()
        for name in ("input_tokens", "decode_ms_per_token", "peak_memory_gb"):
            assert cell[name] == float(row[name])
        assert pd.isna(cell["budget"]) == (row["budget"] == "")
