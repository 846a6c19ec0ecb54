"""Results files to tables and curves."""

import json
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from sparsemm_eval.report.figures import score_over_budget
from sparsemm_eval.report.provenance import provenance
from sparsemm_eval.report.results import parse_model_args, read_results
from sparsemm_eval.report.tables import kept_table, score_table, to_markdown


def results_file(folder: Path, model_args: str, score: float, kept: float) -> Path:
    """A results file as lmms-eval writes it, cut to what is read."""
    results = {
        "results": {
            "docvqa_mini": {
                "alias": "docvqa_mini",
                "anls,none": score,
                "anls_stderr,none": 0.01,
                "anls_stderr_clt,none": 0.02,
            }
        },
        "n-samples": {"docvqa_mini": {"original": 200, "effective": 50}},
        "config": {"model": "qwen2vl_sparsemm", "model_args": model_args},
        "throughput": {
            "avg_kept_tokens_per_head": kept,
            "avg_kept_kv_bytes": kept * 1024,
            "avg_prompt_tokens": 359.0,
        },
    }
    path = folder / f"{model_args.replace('=', '-').replace(',', '-')}.json"
    path.write_text(json.dumps(results))
    return path


@pytest.fixture
def frame(tmp_path: Path) -> pd.DataFrame:
    cells = [
        ("method=snapkv,budget=32", 0.5, 32.0),
        ("method=snapkv,budget=64", 0.7, 64.0),
        ("method=sparsemm,budget=64,ratio=0.1", 0.9, 63.5),
        ("method=fullkv", 0.99, 359.0),
    ]
    return read_results([results_file(tmp_path, *cell) for cell in cells])


def test_one_row_a_metric_with_its_settings(frame: pd.DataFrame) -> None:
    assert len(frame) == 4
    row = frame[frame["method"] == "sparsemm"].iloc[0]
    assert (row.task, row.metric, row.score, row.stderr) == ("docvqa_mini", "anls", 0.9, 0.01)
    assert (row.budget, row.ratio, row.samples, row.kept_tokens_per_head) == (64, 0.1, 50, 63.5)


def test_the_table_has_the_papers_order_and_leaves_out_what_was_not_run(
    frame: pd.DataFrame,
) -> None:
    table = score_table(frame)
    assert list(table.index) == ["FullKV", "SparseMM", "SnapKV"]
    assert list(table.columns) == ["64", "32"]
    assert table.loc["FullKV"].tolist() == [0.99, 0.99]
    assert pd.isna(table.loc["SparseMM", "32"])
    assert "| SnapKV" in to_markdown(table)


def test_the_kept_table_states_nominal_and_real(frame: pd.DataFrame) -> None:
    table = kept_table(frame)
    assert table["budget"].tolist() == ["", "64", "64", "32"]
    assert table["kept tokens/head"].tolist() == ["359.0", "63.5", "64.0", "32.0"]
    assert table["KV KiB/sample"].tolist() == ["359.0", "63.5", "64.0", "32.0"]


def test_the_curve_is_a_picture(frame: pd.DataFrame, tmp_path: Path) -> None:
    path = tmp_path / "curve.png"
    score_over_budget(frame, "title", "ANLS", path)
    assert min(Image.open(path).size) > 500


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"results": {}}', "no json"])
def test_a_file_of_another_kind_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json: not an lmms-eval results file"):
        read_results([path])


def test_model_args_are_read_as_lmms_eval_reads_them() -> None:
    text = "pretrained=a/b,budget=64,ratio=0.1,method=sparsemm"
    assert parse_model_args(text) == {
        "pretrained": "a/b", "budget": 64, "ratio": 0.1, "method": "sparsemm"
    }  # fmt: skip
    assert parse_model_args("") == {}


def test_provenance_says_how_to_make_it_again() -> None:
    made = provenance("./run_eval.sh")
    assert made["command"] == "./run_eval.sh"
    assert {"torch", "transformers", "lmms-eval"} <= set(made["versions"])
    assert made["hardware"]["cpu_cores"] >= 1
