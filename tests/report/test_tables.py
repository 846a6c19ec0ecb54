"""Results files to tables and curves."""

import json
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from report.scored import by_name
from report.scored import cell as made_up

from sparsemm_eval.report.cells import Filters, cells_frame, join_seeds
from sparsemm_eval.report.figures.silenced import score_over_silenced
from sparsemm_eval.report.page import write_page
from sparsemm_eval.report.paper_tables import written_table
from sparsemm_eval.report.provenance import provenance
from sparsemm_eval.report.results import load, parse_model_args
from sparsemm_eval.report.tables import (
    calibration_lines,
    empty_line,
    kept_table,
    missing_line,
    missing_notes,
    notes_below,
    overview_table,
    score_tables,
    silenced_table,
    to_markdown,
)


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
    return load([results_file(tmp_path, *cell) for cell in cells]).cells


def test_one_row_a_metric_with_its_settings(frame: pd.DataFrame) -> None:
    assert len(frame) == 4
    row = frame[frame["method"] == "sparsemm"].iloc[0]
    assert (row.task, row.metric, row.score, row.stderr) == ("docvqa_mini", "anls", 0.9, 0.01)
    assert (row.budget, row.ratio, row.samples, row.kept_tokens_per_head) == (64, 0.1, 50, 63.5)


def test_scores_without_samples_that_failed_are_marked(tmp_path: Path) -> None:
    paths = []
    for cell, failed in (
        (("method=fullkv", 0.99, 359.0), 1),
        (("method=snapkv,budget=64", 0.7, 64.0), 3),
        (("method=snapkv,budget=32", 0.5, 32.0), 0),
    ):
        path = results_file(tmp_path, *cell)
        content = json.loads(path.read_text())
        content["throughput"] |= {"avg_failed_samples/docvqa_mini": failed} if failed else {}
        path.write_text(json.dumps(content))
        paths.append(path)
    frame = load(paths).cells
    assert frame["samples"].tolist() == [49, 47, 50]
    ((_, table),) = score_tables(frame, {})
    shown = by_name(table)
    assert shown.loc["FullKV"].tolist() == ["0.990†", "0.990†"]
    assert shown.loc["SnapKV"].tolist() == ["0.700†", "0.500"]
    assert missing_line(frame) == (
        "† Without samples (1 of FullKV, 3 of SnapKV 64) that failed and have no answer."
    )
    assert missing_line(frame.iloc[:1]) == "† Without 1 samples that failed and have no answer."
    assert missing_line(frame.iloc[2:]) == ""
    (note,) = missing_notes(frame)
    assert note.endswith(", docvqa_mini: " + missing_line(frame))


def calibrated(path: Path, scored: int = 0, **kinds: int) -> Path:
    """State in a results file what its method was calibrated on."""
    content = json.loads(path.read_text())
    content["throughput"] |= {
        f"avg_calibration_documents/{kind}": float(count) for kind, count in kinds.items()
    }
    if scored:
        content["throughput"]["avg_calibration_documents_scored/docvqa_mini"] = float(scored)
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(("given", "words"), [
    ({"gqa_mini": 9}, []),
    ({"docvqa_mini": 12, "gqa_mini": 9},
     ["SnapKV was calibrated on docvqa_mini (12 documents, none of them among the 50 scored)."]),
    ({"docvqa_mini": 12, "scored": 3},
     ["SnapKV was calibrated on docvqa_mini (12 documents, 3 of them among the 50 scored)."]),
    ({"mine": 12, "scored": 3},
     ["SnapKV was calibrated on 3 of the 50 documents of docvqa_mini that are scored."]),
])  # fmt: skip
def test_what_was_calibrated_on_what_it_is_scored_on_is_said(
    given: dict, words: list[str], tmp_path: Path
) -> None:
    """Once a method, below every table of its cells."""
    paths = [results_file(tmp_path, "method=fullkv", 0.99, 359.0)]
    for budget in (64, 32):
        path = results_file(tmp_path, f"method=snapkv,budget={budget}", 0.7, 64.0)
        paths.append(calibrated(path, **given))
    results = load(paths)
    cells = join_seeds(results.cells)
    assert calibration_lines(cells) == notes_below(cells) == words
    assert calibration_lines(results.cells.iloc[:1]) == []
    for form in ("markdown", "latex", "html"):
        text = written_table([str(path) for path in paths], Filters(), form).text
        assert text.count("calibrated on") == len(words), form
    page = write_page(results, tmp_path / "page").read_text()
    # Below the leaderboard's title and below the table.
    assert page.count("calibrated on") == 2 * len(words)
    assert all(word in page for word in words)


def test_tasks_of_equal_numbers_are_named_together() -> None:
    kinds = {f"{name}_mini": 12.0 for name in ("docvqa", "gqa", "vqav2")} | {"mmbench_mini": 3.0}
    scored = {"vqav2_mini": 5.0, "ocrbench_mini": 2.0, "textvqa_mini": 2.0}
    tasks = [*kinds, "ocrbench_mini", "textvqa_mini", "chartqa_mini"]
    cells = cells_frame(
        made_up("sparsemm", 64, 0.5, task=task, calibrated=kinds,
             calibration_scored=scored.get(task, 0.0))
        for task in tasks
    )  # fmt: skip
    assert calibration_lines(cells) == [
        "SparseMM was calibrated on docvqa_mini, gqa_mini (12 documents each, none of them among "
        "the 200 scored), vqav2_mini (12 documents, 5 of them among the 200 scored), mmbench_mini "
        "(3 documents, none of them among the 200 scored), 2 of the 200 documents each of "
        "ocrbench_mini, textvqa_mini that are scored."
    ]


def test_the_cells_of_two_models_are_told_apart(tmp_path: Path) -> None:
    paths = [
        calibrated(results_file(tmp_path, f"method=snapkv,budget=64,pretrained={name}", 0.7, 64.0),
                   docvqa_mini=count)
        for name, count in (("one", 1), ("two", 2))
    ]  # fmt: skip
    assert calibration_lines(load(paths).cells) == [
        f"{name}: SnapKV was calibrated on docvqa_mini ({count} documents, none of them among the "
        "50 scored)."
        for name, count in (("one", 1), ("two", 2))
    ]


def with_empty(path: Path, count: int) -> Path:
    """State in a results file how many of its answers are empty."""
    content = json.loads(path.read_text())
    content["throughput"]["avg_empty_answers/docvqa_mini"] = count
    path.write_text(json.dumps(content))
    return path


def test_empty_answers_are_said_in_a_line(tmp_path: Path) -> None:
    cells = [(f"method=random,budget=64,seed={seed}", 0.5, 64.0) for seed in (0, 1)]
    cells += [(f"method=snapkv,budget={budget}", 0.5, budget) for budget in range(40, 48)]
    frame = load([results_file(tmp_path, *cell) for cell in cells]).cells
    assert empty_line(frame) is None
    assert empty_line(frame.iloc[:0]) is None
    tables = [to_markdown(table) for _, table in score_tables(frame, {})]
    paths = [with_empty(results_file(tmp_path, *cell), 3) for cell in cells]
    frame = load(paths).cells
    assert [to_markdown(table) for _, table in score_tables(frame, {})] == tables
    line = empty_line(join_seeds(frame))
    assert line.startswith("empty answers: 6 of 100 of Random 64 on docvqa_mini (")
    assert line.count("3 of 50 of SnapKV") == 4
    assert line.endswith("; and of 4 more cells")


def test_the_table_has_the_papers_order_and_leaves_out_what_was_not_run(
    frame: pd.DataFrame,
) -> None:
    ((_, table),) = score_tables(frame, {})
    shown = by_name(table)
    assert list(shown.index) == ["FullKV", "SparseMM", "SnapKV"]
    assert list(shown.columns.get_level_values(0)) == ["64", "32"]
    assert shown.loc["FullKV"].tolist() == ["0.990", "0.990"]
    assert shown.loc["SparseMM"].tolist() == ["0.900", ""]
    assert "| SnapKV" in to_markdown(table)


def test_the_kept_table_states_nominal_and_real(frame: pd.DataFrame) -> None:
    table = kept_table(frame).text
    assert table["budget"].tolist() == ["", "64", "64", "32"]
    assert table["kept tokens/head"].tolist() == ["359.0", "63.5", "64.0", "32.0"]
    assert table["KV KiB/sample"].tolist() == ["359.0", "63.5", "64.0", "32.0"]


@pytest.mark.parametrize(
    ("task", "metric", "score", "stderr", "shown"),
    [
        ("docvqa_mini", "anls", 0.5, 0.02, (0.5, 0.02)),
        ("mmbench_mini", "gpt_eval_score", 80.0, 3.0, (0.8, 0.03)),
        ("textcaps_mini", "textcaps_CIDEr", 2.5, 1.0, (2.5, 1.0)),
        # lmms-eval divides by 1,000 here, whatever the number of samples.
        ("ocrbench", "ocrbench_accuracy", 0.08, 0.01, (0.8, 0.1)),
    ],
)
def test_the_main_metric_counts_on_a_scale_that_ends_at_one(
    task: str, metric: str, score: float, stderr: float, shown: tuple, tmp_path: Path
) -> None:
    scores = {"other,none": 0.1, f"{metric},none": score, f"{metric}_stderr,none": stderr}
    content = {"results": {task: scores}, "n-samples": {task: {"effective": 100}}}
    path = tmp_path / "x_results.json"
    path.write_text(json.dumps(content))
    (cell,) = load([path]).cells.itertuples()
    assert cell.metric == metric
    assert (cell.score, cell.stderr) == pytest.approx(shown)


def test_the_overview_has_a_row_a_benchmark(frame: pd.DataFrame) -> None:
    chance = {"docvqa_mini": ("A", 0.1), "mmbench_mini": ("A", 25.0)}
    own = frame.assign(
        task="mmbench_mini", benchmark="MMBench", metric="gpt_eval_score", metric_label="accuracy"
    )
    both = pd.concat([frame, own])
    table = overview_table(both, 64, chance)
    shown = by_name(table)
    assert list(shown.index) == ["DocVQA (ANLS)", "MMBench (accuracy)"]
    assert list(shown.columns.get_level_values(0)) == ["FullKV", "SparseMM", "SnapKV", "chance"]
    assert shown["chance", ""].tolist() == ["0.100", "0.250"]
    assert "| budget 64" in to_markdown(table)


def test_tables_name_benchmark_metric_and_chance(frame: pd.DataFrame) -> None:
    chance = {"mmbench_mini": ("A", 25.0)}
    own = frame.assign(
        task="mmbench_mini", benchmark="MMBench", metric="gpt_eval_score", metric_label="accuracy"
    )
    ((title, table),) = score_tables(own, chance)
    assert title == "MMBench: accuracy (chance 0.250, answering “A”)"
    assert list(by_name(table).index) == ["FullKV", "SparseMM", "SnapKV"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"results": {}}', "no json"])
def test_a_file_of_another_kind_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.json: it "):
        load([path])


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


@pytest.fixture
def masking() -> pd.DataFrame:
    """Of one task: the whole model, and two shares in one mode with two seeds."""
    rows = [("none", 0.0, None, 0, 0.9)]
    for share, heads, visual, random in ((0.05, 2, 0.4, (0.8, 0.9)), (0.1, 4, 0.0, (0.5, 0.8))):
        rows.append(("visual", share, "query", heads, visual))
        rows.extend(("random", share, "query", heads, score) for score in random)
    frame = pd.DataFrame(rows, columns=["silenced", "share", "mode", "heads", "score"])
    return frame.assign(task="docvqa_mini", metric="anls")


def test_silenced_heads_stand_beside_as_many_random_ones(masking: pd.DataFrame) -> None:
    lines = to_markdown(silenced_table(masking, 40)).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells == [
        ["", "none", "0 of 40", "0.900", "", "", ""],
        ["query", "0.05", "2 of 40", "0.400", "0.850", "0.800", "0.900"],
        ["query", "0.1", "4 of 40", "0.000", "0.650", "0.500", "0.800"],
    ]


@pytest.mark.parametrize("tasks", [1, 4])
def test_score_over_silenced_heads_is_drawn(
    masking: pd.DataFrame, tasks: int, tmp_path: Path
) -> None:
    """A panel a task, in both modes."""
    both = pd.concat([masking, masking[masking["mode"].notna()].assign(mode="output")])
    frame = pd.concat([both.assign(task=f"task{number}") for number in range(tasks)])
    score_over_silenced(frame, 40, tmp_path / "m.png")
    width, height = Image.open(tmp_path / "m.png").size
    # Matplotlib of other versions may round a pixel away.
    assert (width, height) == pytest.approx((920, 680) if tasks == 1 else (2760, 1360), abs=1)
