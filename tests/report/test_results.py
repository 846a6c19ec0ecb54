"""Results files, ours and others', to one frame."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sparsemm_eval.errors import UserError
from sparsemm_eval.report.cells import COLUMNS, join_seeds
from sparsemm_eval.report.names import BENCHMARKS, find_benchmark
from sparsemm_eval.report.paper import paper_cells
from sparsemm_eval.report.provenance import content_hash
from sparsemm_eval.report.results import FILE_COLUMNS, Results, gather, load
from sparsemm_eval.stored import with_checksum

QWEN = "pretrained=Qwen/Qwen2-VL-7B-Instruct"


def content(
    args: str = f"{QWEN},method=sparsemm,budget=64",
    score: float = 0.5,
    task: str = "docvqa_val",
    metric: str = "anls",
    samples: int = 10,
    **entries: Any,
) -> dict[str, Any]:
    """What lmms-eval writes, cut to what is read."""
    return {
        "results": {task: {"alias": task, f"{metric},none": score, f"{metric}_stderr,none": 0.1}},
        "group_subtasks": {task: []},
        "n-samples": {task: {"original": 20, "effective": samples}},
        "config": {"model": "qwen2vl_sparsemm", "model_args": args},
        "git_hash": "abc1234",
        "lmms_eval_version": "0.7.3",
        "date": "20260102_030405",
        "throughput": {
            "avg_kept_tokens_per_head": 60.5,
            "avg_kept_kv_bytes": 1024.0,
            "avg_prompt_tokens": 99.0,
        },
        **entries,
    }


def write(path: Path, made: dict[str, Any] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content() if made is None else made))
    return path


def found(folder: Path, *made: dict[str, Any]) -> Results:
    """Results of files a, b, … in a folder."""
    for name, one in zip("abcdefgh", made, strict=False):
        write(folder / f"{name}_results.json", one)
    return load([folder])


# --- one file -----------------------------------------------------------------------------------


def test_a_cell_states_model_task_method_score_and_what_was_kept(tmp_path: Path) -> None:
    args = f"{QWEN},method=sparsemm,budget=64,ratio=0.2,window=8,allocation=exact"
    results = found(tmp_path, content(args))
    assert list(results.cells.columns) == list(COLUMNS)
    cell = results.cells.iloc[0]
    assert (cell.model, cell.task, cell.benchmark) == (
        "Qwen2-VL-7B-Instruct", "docvqa_val", "DocVQA",
    )  # fmt: skip
    assert (cell.method, cell.label, cell.budget) == ("sparsemm", "SparseMM", 64)
    assert (cell.ratio, cell.window, cell.allocation) == (0.2, 8, "exact")
    assert pd.isna(cell.seed)
    assert (cell.score, cell.stderr, cell.samples, cell.expected) == (0.5, 0.1, 10, 20)
    assert (cell.kept_tokens_per_head, cell.kept_kv_bytes, cell.prompt_tokens) == (60.5, 1024, 99)
    assert (cell.source, cell.file, cell.files_of, cell.samples_files) == ("measured", 0, (0,), ())
    assert cell.settings["pretrained"] == "Qwen/Qwen2-VL-7B-Instruct"


def test_a_plain_file_says_what_lmms_eval_knows_of_its_making(tmp_path: Path) -> None:
    results = found(tmp_path, content())
    assert list(results.files.columns) == list(FILE_COLUMNS)
    file = results.files.iloc[0]
    assert (file.kind, file.commit, file.date) == ("lmms-eval", "abc1234", "2026-01-01 19:04:05")
    assert file.versions == {"lmms-eval": "0.7.3"}
    assert (file.command, file.python, file.hardware) == (None, None, {})
    assert file.path == str(tmp_path / "a_results.json")


def test_ours_says_more_and_is_left_out_when_it_was_changed(tmp_path: Path) -> None:
    made = content()
    entry = {
        "schema": 1, "command": "sparsemm-eval sweep x", "commit": "def+", "date": "2026-01-02",
        "python": "3.11", "versions": {"torch": "2"}, "hardware": {"name": "one"}, "model": "mine",
        "results": content_hash(made),
    }  # fmt: skip
    results = found(tmp_path, made | {"sparsemm_eval": entry})
    file = results.files.iloc[0]
    assert (file.kind, file.schema, file.command) == ("sparsemm-eval", 1, entry["command"])
    assert (file.commit, file.versions) == ("def+", {"torch": "2"})
    for changed in (
        content(score=0.9) | {"sparsemm_eval": entry},
        made | {"sparsemm_eval": with_checksum(entry) | {"model": "another"}},
    ):
        with pytest.raises(UserError, match="it was changed since it was written"):
            found(tmp_path, changed)
    found(tmp_path, made | {"sparsemm_eval": with_checksum(entry)})


def test_full_kv_has_no_budget_and_percent_become_shares(tmp_path: Path) -> None:
    made = content(f"{QWEN},method=fullkv", 81.5, "mmbench_en_dev_static", "gpt_eval_score")
    cell = found(tmp_path, made).cells.iloc[0]
    assert (cell.label, cell.score, cell.stderr, cell.percent) == ("FullKV", 0.815, 0.001, True)
    assert pd.isna(cell.budget)


def test_part_of_ocrbench_is_a_share_of_that_part(tmp_path: Path) -> None:
    """lmms-eval divides by 1,000 also where 10 samples were asked."""
    made = content(score=0.005, task="ocrbench", metric="ocrbench_accuracy", samples=10)
    assert found(tmp_path, made).cells["score"].tolist() == [pytest.approx(0.5)]


def test_several_tasks_of_a_file_are_cells_and_their_group_is_none(tmp_path: Path) -> None:
    made = content()
    made["results"] |= {
        "both": {"alias": "both", "anls,none": 0.3},
        "gqa": {"exact_match,none": 0.25},
        "docvqa_test": {"submission,none": []},
    }
    made["group_subtasks"] = {"both": ["docvqa_val", "gqa"], "gqa": []}
    write(tmp_path / "a_samples_gqa.jsonl", {})
    results = found(tmp_path, made)
    assert results.cells[["task", "score"]].to_numpy().tolist() == [
        ["docvqa_val", 0.5], ["gqa", 0.25],
    ]  # fmt: skip
    assert results.cells["samples_files"].tolist() == [(), (str(tmp_path / "a_samples_gqa.jsonl"),)]
    # lmms-eval adds up what was kept of all tasks: it is no task's own.
    assert results.cells["kept_tokens_per_head"].isna().all()
    (lost,) = results.unreadable
    assert lost.reason == "its task docvqa_test has no score that counts"


def test_another_benchmark_keeps_its_name_metric_and_scale(tmp_path: Path) -> None:
    made = content(score=1500.0, task="mme", metric="mme_perception_score")
    made["results"]["mme"] |= {"mme_cognition_score,none": 300.0}
    cell = found(tmp_path, made).cells.iloc[0]
    assert (cell.benchmark, cell.metric, cell.metric_label) == (
        "mme", "mme_perception_score", "mme_perception_score",
    )  # fmt: skip
    assert (cell.score, cell.percent) == (1500, False)


def test_metric_and_direction_are_what_the_file_says(tmp_path: Path) -> None:
    """The first metric of the task's own list that has a number; lower may be better."""
    made = content(score=0.3, task="speech", metric="wer")
    made["results"]["speech"] |= {"submission,none": [], "cer,none": 0.1}
    made["configs"] = {"speech": {"metric_list": [{"metric": "submission"}, {"metric": "cer"}]}}
    made["higher_is_better"] = {"speech": {"wer": False, "cer": False}}
    cell = found(tmp_path, made).cells.iloc[0]
    assert (cell.benchmark, cell.metric, cell.score) == ("speech", "cer", 0.1)
    assert not cell.higher_is_better
    every = load([tmp_path], all_metrics=True).cells
    assert every["metric"].tolist() == ["cer", "wer"]


def test_a_known_benchmark_with_another_metric_is_shown_as_it_is(tmp_path: Path) -> None:
    cell = found(tmp_path, content(score=80.0, task="mmbench_en_dev", metric="own")).cells.iloc[0]
    assert (cell.benchmark, cell.metric_label, cell.score) == ("MMBench", "own", 80)
    assert not cell.percent
    assert not cell.bounded


def test_variants_that_are_other_benchmarks_are_not_taken_for_the_papers() -> None:
    assert find_benchmark("ocrbench_v2") is None
    assert find_benchmark("mmbench_cn_dev") is None
    assert find_benchmark("textvqa_val_lite") is BENCHMARKS["textvqa"]


def test_another_programs_model_is_a_method_of_its_own(tmp_path: Path) -> None:
    """Whether it compresses is not said, so it is not taken for full KV."""
    made = content(f"{QWEN},max_pixels=602112")
    made["config"]["model"] = "qwen2_vl"
    cell = found(tmp_path, made).cells.iloc[0]
    assert (cell.method, cell.label, cell.model) == (
        "qwen2_vl", "qwen2_vl", "Qwen2-VL-7B-Instruct",
    )  # fmt: skip
    assert pd.isna(cell.budget)


# --- models -------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["cells/tiny", "tiny/cells", "tiny/mask/cells"])
def test_an_old_file_has_its_models_name_from_its_folder(where: str, tmp_path: Path) -> None:
    write(tmp_path / where / "x_results.json", content("method=fullkv"))
    assert load([tmp_path / where]).cells["model"].tolist() == ["tiny"]


def test_a_name_of_ones_own_gives_way_to_the_papers_unless_it_tells_cells_apart(
    tmp_path: Path,
) -> None:
    def own(name: str, score: float) -> dict[str, Any]:
        return content(score=score) | {"sparsemm_eval": {"schema": 1, "model": name}}

    assert found(tmp_path / "one", own("mine", 0.1)).cells["model"].tolist() == [
        "Qwen2-VL-7B-Instruct"
    ]
    two = found(tmp_path / "two", own("half", 0.1), own("whole", 0.2))
    assert two.cells["model"].tolist() == ["half", "whole"]
    mixed = found(tmp_path / "mixed", own("half", 0.1), content(score=0.2))
    assert mixed.cells["model"].tolist() == ["half", "Qwen2-VL-7B-Instruct"]


# --- what cannot be read ------------------------------------------------------------------------


BROKEN = {
    "cut off": (json.dumps(content())[:200], "it is no JSON, or was cut off"),
    "empty": ("", "it is no JSON"),
    "a list": ("[]", "no lmms-eval results file"),
    "other": ('{"cells": []}', "it has no entry results"),
    "no scores": ('{"results": {}}', "it holds no scores"),
    "no number": (json.dumps(content(score="N/A")), "it holds no scores"),
    "NaN": (json.dumps(content(score=float("nan"))), "it holds no scores"),
    "results": ('{"results": [1]}', "its entry results is no mapping"),
    "task": ('{"results": {"gqa": 1}}', "its entry gqa is no mapping"),
    "args": (json.dumps(content(args=3)), "its config.model_args is 3: it must be text"),
    "newer": (
        json.dumps(content(sparsemm_eval={"schema": 2, "date": 5})),
        "it has schema 2 and this version",
    ),
    "entry": (json.dumps(content(sparsemm_eval=[1])), "its entry sparsemm_eval is no mapping"),
    "kind": (json.dumps(content(sparsemm_eval={"schema": "1"})), "has schema='1': it must be int"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_cannot_be_read_is_listed_with_its_reason(case: str, tmp_path: Path) -> None:
    text, reason = BROKEN[case]
    write(tmp_path / "good_results.json")
    (tmp_path / "bad_results.json").write_text(text)
    results = load([tmp_path])
    assert len(results.cells) == len(results.files) == 1
    (bad,) = results.unreadable
    assert bad.path == str(tmp_path / "bad_results.json")
    assert reason in bad.reason


def test_a_binary_file_and_what_a_killed_run_left_are_listed(tmp_path: Path) -> None:
    write(tmp_path / "good_results.json")
    (tmp_path / "a_results.json").write_bytes(b"\xff\xfe{}")
    write(tmp_path / "b_results.json.unfinished")
    write(tmp_path / "c_results.json.broken")
    reasons = [lost.reason for lost in load([tmp_path]).unreadable]
    starts = ("it is no UTF-8", "it was never finished", "it was set aside")
    for reason, start in zip(reasons, starts, strict=True):
        assert reason.startswith(start)


def test_nothing_found_is_an_error_that_says_what_is_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there are no results here; give folders"):
        load([tmp_path])
    with pytest.raises(ValueError, match=r"no such file or folder; give results files"):
        load([tmp_path / "nowhere"])
    (tmp_path / "bad_results.json").write_text("{")
    with pytest.raises(ValueError, match=r"first .*bad_results\.json: it is no JSON"):
        load([tmp_path])


def test_the_search_leaves_out_what_holds_no_results(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "er" / "x_results.json")
    for name in ("answers", "submissions", "mask"):
        write(tmp_path / name / "y_results.json")
    write(tmp_path / "summary.json")
    results = load([tmp_path])
    assert results.files["path"].tolist() == [str(tmp_path / "deep" / "er" / "x_results.json")]
    assert results.unreadable == ()
    assert len(load([tmp_path / "mask"]).files) == 1


def test_a_file_named_twice_is_read_once_and_order_is_that_of_paths(tmp_path: Path) -> None:
    first = write(tmp_path / "z_results.json", content(f"{QWEN},method=snapkv,budget=8"))
    write(tmp_path / "b_results.json")
    results = load([first, tmp_path])
    assert [Path(path).name for path in results.files["path"]] == [
        "z_results.json", "b_results.json",
    ]  # fmt: skip


# --- several files ------------------------------------------------------------------------------


def test_the_same_cell_twice_is_one_of_the_newest_file(tmp_path: Path) -> None:
    """How it was computed does not tell it apart, nor does a default that is stated."""
    results = found(
        tmp_path,
        content(date="20260101_000000"),
        content(f"{QWEN},method=sparsemm,budget=64,batch_size=4,ratio=0.1", date="20260301_000000"),
        content(date="20260201_000000"),
    )
    (cell,) = results.cells.itertuples()
    assert (cell.file, cell.files_of) == (1, (1, 0, 2))
    assert len(results.files) == 3


@pytest.mark.parametrize(("score", "samples"), [(0.6, 10), (0.5, 9)])
def test_the_same_cell_with_another_score_is_an_error_that_names_the_files(
    score: float, samples: int, tmp_path: Path
) -> None:
    other = content(f"{QWEN},method=sparsemm,budget=64,backend=torch", score, samples=samples)
    with pytest.raises(ValueError, match=r"docvqa_val, sparsemm at budget 64 is there twice") as e:
        found(tmp_path, content(), other)
    words = str(e.value)
    assert "a_results.json" in words
    assert "b_results.json" in words
    assert "backend (None, torch)" in words or "backend (torch, None)" in words
    assert ("samples" in words) == (samples == 9)
    assert "\n" not in words


def test_settings_that_vary_are_in_the_label_of_all_cells_of_that_method(tmp_path: Path) -> None:
    sparse = f"{QWEN},method=sparsemm,budget=64"
    results = found(
        tmp_path,
        content(sparse),
        content(f"{sparse},ratio=0.5"),
        content(f"{QWEN},method=sparsemm,budget=32"),
        content(f"{QWEN},method=snapkv,budget=64,window=8"),
        content(f"{QWEN},method=fullkv"),
    )
    # ratio tells the cells at 64 apart; window tells none apart.
    assert results.cells["label"].tolist() == [
        "SparseMM (ratio=0.1)", "SparseMM (ratio=0.5)", "SparseMM (ratio=0.1)", "SnapKV", "FullKV",
    ]  # fmt: skip


def test_seeds_become_mean_and_spread(tmp_path: Path) -> None:
    drawn = f"{QWEN},method=random,budget=64"
    results = found(
        tmp_path,
        content(drawn, 0.2),
        content(f"{drawn},seed=1", 0.4),
        content(f"{drawn},seed=2", 0.6),
        content(f"{drawn},seed=1,window=8", 0.9),
        content(),
    )
    assert results.cells["label"].tolist()[:2] == [
        "Random (seed=0, window=32)", "Random (seed=1, window=32)",
    ]  # fmt: skip
    joined = join_seeds(results.cells)
    assert joined["label"].tolist() == [
        "Random (seed=0+1+2, window=32)", "Random (seed=1, window=8)", "SparseMM",
    ]  # fmt: skip
    cell = joined.iloc[0]
    assert (cell.score, cell.seeds, cell.files_of) == (pytest.approx(0.4), 3, (0, 1, 2))
    assert cell.spread == pytest.approx(0.2)
    assert pd.isna(cell.stderr)
    assert joined["seeds"].tolist() == [3, 1, 1]
    assert joined["spread"].isna().tolist() == [False, True, True]
    assert list(joined.columns) == list(COLUMNS)


def test_seeds_of_unlike_many_samples_are_not_joined(tmp_path: Path) -> None:
    drawn = f"{QWEN},method=random,budget=64"
    results = found(tmp_path, content(drawn, 0.2), content(f"{drawn},seed=1", 0.4, samples=5))
    joined = join_seeds(results.cells)
    assert joined["seeds"].tolist() == [1, 1]
    assert joined["label"].tolist() == ["Random (seed=0)", "Random (seed=1)"]


def test_seeds_are_not_named_where_nothing_else_varies(tmp_path: Path) -> None:
    drawn = f"{QWEN},method=random"
    made = [content(f"{drawn},budget=64,seed={seed}", 0.1 * seed) for seed in (1, 2)]
    joined = join_seeds(found(tmp_path, *made, content(f"{drawn},budget=32")).cells)
    assert joined["label"].tolist() == ["Random", "Random"]
    pd.testing.assert_frame_equal(join_seeds(joined), joined)


def test_the_paper_stands_beside_ones_own(tmp_path: Path) -> None:
    write(tmp_path / "a_results.json")
    both = gather([str(tmp_path), "paper"])
    assert len(both.cells) == 1 + len(paper_cells())
    assert both.cells.index.is_unique
    assert len(both.files) == 1
    alone = gather(["paper"])
    pd.testing.assert_frame_equal(alone.cells, paper_cells())
    assert list(alone.files.columns) == list(FILE_COLUMNS)
    with pytest.raises(ValueError, match="nothing given: there are no results here"):
        gather([])


def test_reading_needs_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from sparsemm_eval.report import results, samples\n"
        "heavy = 'torch transformers lmms_eval datasets matplotlib pycocoevalcap'.split()\n"
        "print(*(name for name in heavy if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
