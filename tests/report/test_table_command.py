"""`sparsemm-eval table`: from results files to text."""

import csv
import json
from pathlib import Path

import pytest
from click.testing import Result
from report.result_files import QUESTIONS, TARGETS, write_cell, write_grid
from typer.testing import CliRunner

from sparsemm_eval.cli import app


def table(*words: str) -> Result:
    return CliRunner().invoke(app, ["table", *map(str, words)])


def rows(done: Result) -> list[dict[str, str]]:
    assert done.exit_code == 0, done.output
    return list(csv.DictReader(done.stdout.splitlines()))


def test_results_files_become_a_table(tmp_path: Path) -> None:
    write_grid(tmp_path)
    found = rows(table(tmp_path, "--format", "csv"))
    assert [(row["benchmark"], row["model"], row["method"]) for row in found] == [
        (benchmark, model, method)
        for benchmark in ("DocVQA", "TextVQA")
        for model in ("large", "small")
        for method in ("FullKV", "SparseMM", "SnapKV")
    ]
    assert [(row["256"], row["64"]) for row in found[:3]] == [
        ("1.000", "1.000"), ("1.000", "0.500"), ("0.750", "0.250")
    ]  # fmt: skip


def test_the_same_command_gives_the_same_text(tmp_path: Path) -> None:
    write_grid(tmp_path)
    words = (tmp_path, "--show", "score,interval,difference,p", "--against", "fullkv")
    first = table(*words)
    assert "95% interval" in first.stdout
    assert "n = 4; McNemar" in first.stdout
    assert table(*words).stdout == first.stdout


def test_samples_make_intervals_and_tests(tmp_path: Path) -> None:
    """Without samples files there are ranks alone; one answer more of four is no win."""
    write_grid(tmp_path / "with")
    for method, right in (("sparsemm", 4), ("snapkv", 3)):
        answers = [*TARGETS[:right], *["no"] * (len(QUESTIONS) - right)]
        write_cell(tmp_path / "without", method, 64, answers, samples_file=False)
    assert "*1.000*" in table(tmp_path / "with", "--budgets", "256").stdout
    bare = table(tmp_path / "without").stdout
    assert "**1.000**" in bare
    assert "is not known" in bare


def test_cells_are_chosen_by_name(tmp_path: Path) -> None:
    write_grid(tmp_path)
    found = rows(
        table(
            tmp_path, "--format", "csv", "--models", "small", "--benchmarks", "textvqa",
            "--methods", "snapkv", "--budgets", "64", "--percent",
        )
    )  # fmt: skip
    assert found == [{"benchmark": "TextVQA", "model": "small", "method": "SnapKV", "64": "25.0"}]


def test_a_second_metric_is_shown_by_its_name(tmp_path: Path) -> None:
    for method, budget, score in (("fullkv", None, 0.9), ("snapkv", 64, 0.7)):
        path = write_cell(tmp_path, method, budget, TARGETS)
        content = json.loads(path.read_text())
        content["results"]["docvqa_val"]["own_metric,none"] = score
        path.write_text(json.dumps(content))
    found = rows(table(tmp_path, "--metric", "own_metric", "--format", "csv", "--long"))
    assert [(row["metric_label"], row["score"]) for row in found] == [
        ("own_metric", "0.9"), ("own_metric", "0.7")
    ]  # fmt: skip
    done = table(tmp_path, "--metric", "bleu")
    assert done.exit_code == 1
    assert "metric='bleu': it must be of anls, own_metric" in done.stderr


def test_unreadable_files_are_said_and_do_not_stop_it(tmp_path: Path) -> None:
    write_grid(tmp_path)
    (tmp_path / "cut_results.json").write_text('{"results": ')
    done = table(tmp_path)
    assert done.exit_code == 0
    assert "not read" in done.stderr
    assert "cut_results.json" in done.stderr
    assert done.stdout == table(tmp_path).stdout
    assert "cut_results" not in done.stdout


def test_empty_answers_are_said_and_change_no_table(tmp_path: Path) -> None:
    path = write_cell(tmp_path, "snapkv", 64, TARGETS)
    plain = table(tmp_path)
    assert "empty" not in plain.output
    content = json.loads(path.read_text())
    content["throughput"]["avg_empty_answers/docvqa_val"] = 2
    path.write_text(json.dumps(content))
    done = table(tmp_path)
    assert done.stdout == plain.stdout
    assert "empty answers: 2 of 4 of SnapKV 64 on docvqa_val (small)" in done.stderr


def test_a_file_is_written(tmp_path: Path) -> None:
    out = tmp_path / "new" / "table.tex"
    done = table("paper", "--like", "table1", "--format", "latex", "-o", out)
    assert done.exit_code == 0, done.output
    assert out.read_text().startswith("% needs")
    assert out.read_text() == table("paper", "--like", "table1", "--format", "latex").stdout


def test_one_row_a_cell(tmp_path: Path) -> None:
    write_grid(tmp_path)
    found = rows(table(tmp_path, "--long", "--format", "csv"))
    assert len(found) == 20
    assert {row["source"] for row in found} == {"measured"}
    best = next(row for row in found if row["method"] == "sparsemm" and row["budget"] == "256")
    assert (best["score"], best["low"], best["high"], best["samples"]) == ("1", "1", "1", "4")
    assert (best["baseline"], best["difference"], best["test"]) == ("SnapKV", "0.25", "McNemar")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("/nowhere",), "/nowhere: there is no such file or folder"),
        (("/nowhere", "--like", "table7"), "like=table7: it must be one of table1"),
        (("/nowhere", "--show", "speed"), "show=speed: it must be of score"),
        (("/nowhere", "--format", "pdf"), "format=pdf: it must be one of markdown"),
        (("paper", "--budgets", "many"), "budgets='many': it must be numbers"),
        (("paper", "--models", "opt"), "models=opt: it must be of LLaVA-NeXT-Mistral-7B"),
        (("paper", "--against", "h2o"), "against=h2o: it must be best or one of"),
        (("paper", "--like", "table4", "--benchmarks", "docvqa"), "it needs results on MMBench"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_1(words: tuple, said: str) -> None:
    """Options are looked at before results are."""
    done = table(*words)
    assert done.exit_code == 1
    assert done.stdout == ""
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
