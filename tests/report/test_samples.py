"""Scores of single samples make up the scores of their cells."""

import json
import shutil
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemm_eval.report.cells import cells_frame, join_seeds
from sparsemm_eval.report.names import BENCHMARKS
from sparsemm_eval.report.results import Results, load
from sparsemm_eval.report.samples import read_samples, score_samples
from sparsemm_eval.sweep.grid_file import parse_grid
from sparsemm_eval.sweep.sweep import run_sweep

SAMPLES = 5
TASKS = tuple(f"{name}_mini" for name in BENCHMARKS)
GRID = f"""
models: [{{name: reader, pretrained: "embedded:qwen2vl", settings: {{dtype: float32}}}}]
tasks: [{", ".join(TASKS)}]
methods: [fullkv, random]
budgets: [12]
seeds: [0, 1]
window: 8
samples: {SAMPLES}
batch_size: {SAMPLES}
"""


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A sweep of all eight miniature benchmarks: full KV, and two draws of random."""
    out = tmp_path_factory.mktemp("swept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
        run_sweep(parse_grid(GRID, Path("small.yaml")), out, "sparsemm-eval sweep small.yaml")
        yield out


@pytest.fixture(scope="module")
def results(swept: Path) -> Results:
    return load([swept])


def test_samples_of_all_benchmarks_make_up_their_scores(results: Results) -> None:
    cells = results.cells
    assert len(cells) == 3 * len(TASKS)
    made = score_samples(cells)
    assert made.notes == ()
    assert list(made.frame.columns) == ["cell", "doc_id", "score"]
    assert made.frame["cell"].value_counts().to_dict() == dict.fromkeys(cells.index, SAMPLES)
    means = made.frame.groupby("cell")["score"].mean()
    assert means.to_numpy() == pytest.approx(cells["score"].to_numpy(), rel=1e-6)
    # A test of nothing, were all right or all wrong.
    assert 0 < cells.loc[cells["benchmark"] != "TextCaps", "score"].mean() < 1
    binary = {"OCRBench", "ChartQA", "MMBench", "GQA"}
    right = made.frame[made.frame["cell"].map(cells["benchmark"]).isin(binary)]
    assert set(right["score"]) <= {0.0, 1.0}


def test_a_sweep_says_how_its_files_were_made(results: Results) -> None:
    files = results.files
    assert set(files["kind"]) == {"sparsemm-eval"}
    assert set(files["command"]) == {"sparsemm-eval sweep small.yaml"}
    assert set(results.cells["model"]) == {"reader"}
    assert set(results.cells["label"]) == {"FullKV", "Random (seed=0)", "Random (seed=1)"}
    assert results.cells["kept_tokens_per_head"].notna().all()
    assert results.unreadable == ()


def test_samples_of_joined_seeds_are_means_over_seeds(results: Results) -> None:
    joined = join_seeds(results.cells)
    assert len(joined) == 2 * len(TASKS)
    made = score_samples(joined)
    assert made.notes == ()
    single = score_samples(results.cells).frame
    for cell in joined[joined["seeds"] == 2].itertuples():
        seeds = results.cells.index[results.cells["file"].isin(cell.files_of)]
        expected = single[single["cell"].isin(seeds)].groupby("doc_id")["score"].mean()
        found = made.frame[made.frame["cell"] == cell.Index].set_index("doc_id")["score"]
        pd.testing.assert_series_equal(found.sort_index(), expected, check_index_type=False)


def test_a_plain_file_of_several_tasks_has_samples_too(swept: Path, tmp_path: Path) -> None:
    """As `lmms-eval --log_samples` writes it: one results file, a samples file a task."""
    plain: dict[str, Any] = {"results": {}, "n-samples": {}}
    for task in ("gqa_mini", "mmbench_mini"):
        path = swept / "cells" / "reader" / f"{task}-fullkv_results.json"
        one = json.loads(path.read_text())
        plain["results"] |= one["results"]
        plain["n-samples"] |= one["n-samples"]
        plain["config"] = one["config"]
        samples = path.with_name(f"{task}-fullkv_samples_{task}.jsonl")
        shutil.copy(samples, tmp_path / f"20260102_030405_samples_{task}.jsonl")
    (tmp_path / "20260102_030405_results.json").write_text(json.dumps(plain))
    cells = load([tmp_path]).cells
    assert score_samples(cells).frame["cell"].value_counts().to_dict() == {0: SAMPLES, 1: SAMPLES}


def test_lines_hold_question_answer_and_target(results: Results) -> None:
    cell = results.cells[results.cells["label"] == "FullKV"].iloc[0]
    lines = read_samples(cell["samples_files"][0])
    assert [line["doc_id"] for line in lines] == list(range(SAMPLES))
    assert all({"input", "target", "filtered_resps", cell["metric"]} <= {*line} for line in lines)


# --- made up ------------------------------------------------------------------------------------


def cell(path: Path, score: float, task: str = "docvqa_val", metric: str = "anls") -> pd.DataFrame:
    row = {"task": task, "metric": metric, "score": score, "seeds": 1, "settings": {}}
    return cells_frame([row | {"samples_files": (str(path),)}])


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def test_samples_that_do_not_make_up_the_score_are_not_used(tmp_path: Path) -> None:
    path = write(tmp_path / "s.jsonl", {"doc_id": 0, "anls": 1.0}, {"doc_id": 1, "anls": 0.0})
    assert len(score_samples(cell(path, 0.5)).frame) == 2
    made = score_samples(cell(path, 0.75))
    assert made.frame.empty
    assert made.notes == (
        f"docvqa_val: no scores of single samples from {path}: their mean is 0.5 and the results "
        "file says 0.75",
    )


LINES = {
    '{"doc_id": 0, "anls": 1.0}\n{"doc_id"': "line 2: it is no JSON, or was cut off",
    '{"anls": 1.0}': "line 1: it is no answer with a doc_id",
    "[]": "line 1: it is no answer with a doc_id",
    '{"doc_id": 4}': "document 4 has no number for anls",
    '{"doc_id": 4, "anls": "N/A"}': "document 4 has no number for anls",
    "": "their mean is nan",
    "\udcff": "it is no UTF-8 text",
}


@pytest.mark.parametrize("text", LINES)
def test_a_broken_samples_file_is_noted(text: str, tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_bytes(text.encode(errors="surrogateescape"))
    made = score_samples(cell(path, 1.0))
    assert made.frame.empty
    (note,) = made.notes
    assert LINES[text] in note


@pytest.mark.parametrize(
    ("task", "metric"),
    [("mmbench_en_dev_static", "gpt_eval_score"), ("textcaps_mini", "textcaps_CIDEr")],
)
def test_a_line_without_what_its_metric_needs_is_noted(
    task: str, metric: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "s.jsonl", {"doc_id": 3, metric: {"pred": "x"}})
    (note,) = score_samples(cell(path, 1.0, task, metric)).notes
    assert "document 3 has no" in note


def test_an_unknown_benchmarks_numbers_are_as_they_are(tmp_path: Path) -> None:
    path = write(tmp_path / "s.jsonl", {"doc_id": 0, "x": 3}, {"doc_id": 1, "x": {"score": 5}})
    made = score_samples(cell(path, 4.0, "other", "x"))
    assert made.frame["score"].tolist() == [3, 5]


def test_answers_to_a_repeated_document_are_averaged(tmp_path: Path) -> None:
    lines = [{"doc_id": doc, "anls": score} for doc, score in ((0, 1), (0, 0), (1, 1), (1, 1))]
    made = score_samples(cell(write(tmp_path / "s.jsonl", *lines), 0.75)).frame
    assert made["score"].tolist() == [0.5, 1]


def test_without_java_textcaps_has_no_sample_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "s.jsonl", {"doc_id": 0})
    monkeypatch.setenv("PATH", "")
    (note,) = score_samples(cell(path, 1.0, "textcaps_val", "textcaps_CIDEr")).notes
    assert "there is no java" in note


def test_captions_of_fewer_images_have_weights_of_their_own(tmp_path: Path) -> None:
    """A cell of two images beside one of three: words are not as rare in both."""
    from pycocoevalcap.cider.cider import Cider

    references = {0: ["a red sign"], 1: ["a blue sign"], 2: ["some green tree"]}
    frames = []
    for count in (2, 3):
        some = {image: references[image] for image in range(count)}
        mean, _ = Cider().compute_score(some, {image: ["a red sign"] for image in some})
        lines = []
        for image, captions in some.items():
            said = {"image_id": image, "answer": captions, "pred": "A red sign."}
            lines.append({"doc_id": image, "textcaps_CIDEr": said})
        path = write(tmp_path / f"{count}.jsonl", *lines)
        frames.append(cell(path, float(mean), "textcaps_mini", "textcaps_CIDEr"))
    assert frames[0]["score"].item() != frames[1]["score"].item()
    made = score_samples(pd.concat(frames, ignore_index=True))
    assert made.notes == ()
    assert made.frame["cell"].value_counts().to_dict() == {0: 2, 1: 3}


ANSWER = st.sampled_from(
    ["A", "B", "(A)", "B.", "the answer is A", "cat", "a dog", "C or D", "", "E"]
)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.lists(st.tuples(ANSWER, st.sampled_from("AB")), min_size=1, max_size=3),
        min_size=1, max_size=5,
    ),
    st.randoms(use_true_random=False),
)  # fmt: skip
def test_mmbench_counts_a_question_right_if_all_its_orders_are(
    tmp_path_factory: pytest.TempPathFactory, questions: list[list[tuple[str, str]]], order: Any
) -> None:
    """lmms-eval's own mean over questions, whatever order the lines are in."""
    from lmms_eval.tasks.mmbench.mmbench_evals import MMBench_Evaluator

    items = [
        {"index": question + circle * 1_000_000, "prediction": said, "answer": wanted,
         "category": "x", "A": "cat", "B": "dog", "C": "nan", "D": None}
        for question, circles in enumerate(questions)
        for circle, (said, wanted) in enumerate(circles)
    ]  # fmt: skip
    order.shuffle(items)
    with redirect_stdout(None):
        mean, *_ = MMBench_Evaluator().eval_result(items, eval_method="static")
    path = tmp_path_factory.mktemp("mmbench") / "s.jsonl"
    write(path, *({"doc_id": n, "gpt_eval_score": item} for n, item in enumerate(items)))
    made = score_samples(cell(path, float(mean), "mmbench_en_dev_static", "gpt_eval_score"))
    assert made.notes == ()
    assert len(made.frame) == len(questions)
    assert set(made.frame["doc_id"]) == {n for n, i in enumerate(items) if i["index"] < 1_000_000}
