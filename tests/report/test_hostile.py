"""Files of any content in a folder of results: each is shown or listed, and the rest is shown."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hostile import ODD, changed, hostile, places
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report.result_files import TARGETS, write_cell

from sparsemm_eval.report.cells import Filters
from sparsemm_eval.report.figures import draw_efficiency
from sparsemm_eval.report.page import write_page
from sparsemm_eval.report.paper_tables import written_table
from sparsemm_eval.report.results import gather, load

SLOW = settings(
    deadline=None,
    max_examples=10,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def show_all(folder: Path) -> str:
    """A table, and the page, which draws the figures too."""
    written_table([str(folder)], Filters(), "csv", None, ("score", "difference", "kept"))
    return write_page(gather([str(folder)]), folder / "page").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sound cells of one model."""
    folder = tmp_path_factory.mktemp("hostile")
    entry = {"schema": 1, "command": "x", "versions": {"torch": "2"}, "hardware": {"cpu_cores": 2}}
    write_cell(folder, "fullkv", None, TARGETS, entry=entry)
    write_cell(folder, "snapkv", 64, [*TARGETS[:3], "no"], entry=entry)
    write_cell(folder, "sparsemm", 64, [*TARGETS[:2], "no", "no"], entry=entry)
    return folder


def other(folder: Path, task: str, metric: str, values: Any) -> tuple[Path, Path]:
    """Results and samples file of a fourth cell."""
    path = write_cell(folder, "adakv", 32, TARGETS, task, metric, seed=3)
    samples = path.with_name(path.name.replace("_results.json", f"_samples_{task}.jsonl"))
    if values is not None:
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        text = "".join(json.dumps(line | {metric: values}) + "\n" for line in lines)
        samples.write_text(text)
    return path, samples


TASKS = st.sampled_from([
    ("docvqa_val", "anls", None),
    ("mmbench_en_dev", "gpt_eval_score", {"index": 3, "answer": "A", "prediction": "A", "A": "x"}),
    ("textcaps_val_mini", "textcaps_CIDEr", {"image_id": 1, "pred": "a", "answer": ["a"]}),
    ("own_task", "own", {"score": 1}),
])  # fmt: skip


@SLOW
@given(data=st.data())
def test_one_changed_place_takes_nothing_else_down(made: Path, data: st.DataObject) -> None:
    task, metric, values = data.draw(TASKS)
    path, samples = other(made, task, metric, values)
    try:
        whole = json.loads(path.read_text())
        first, *rest = samples.read_text().splitlines(keepends=True)
        line = json.loads(first)
        place = data.draw(st.sampled_from([("results", *p) for p in places(whole)]
                                          + [("samples", *p) for p in places(line)]))  # fmt: skip
        odd, rename = data.draw(ODD), data.draw(st.booleans())
        if place[0] == "results":
            path.write_text(json.dumps(changed(whole, place[1:], odd, rename)))
        else:
            samples.write_text(
                json.dumps(changed(line, place[1:], odd, rename)) + "\n" + "".join(rest)
            )
        page = show_all(made)
        assert all(f'data-method="{name}"' in page for name in ("FullKV", "SnapKV", "SparseMM"))
    finally:
        path.unlink()
        samples.unlink()


@SLOW
@given(content=st.binary(max_size=60) | st.sampled_from([
    b"[" * 50_000, b'{"results": {"t": {"m,none": 1' + b"0" * 400 + b"}}}", b'{"results": {}}',
    b'{"results": ' + b'{"a":' * 300 + b"1" + b"}" * 301, b'{"results": {"t": 1, "t": 2}}',
]))  # fmt: skip
def test_any_bytes_are_listed_and_the_rest_is_read(made: Path, content: bytes) -> None:
    path = made / "any_results.json"
    path.write_bytes(content)
    try:
        read = load([made])
        assert [file.path for file in read.unreadable] == [str(path)]
        assert len(read.cells) == 3
    finally:
        path.unlink()


def test_what_is_no_file_is_listed_and_nothing_waits(made: Path) -> None:
    os.mkfifo(made / "pipe_results.json")
    (made / "loop_results.json").symlink_to(made / "loop_results.json")
    (made / "gone_results.json").symlink_to(made / "nowhere")
    path, samples = other(made, "docvqa_val", "anls", None)
    samples.unlink()
    os.mkfifo(samples)
    try:
        read = load([made])
        assert sorted(Path(file.path).name for file in read.unreadable) == [
            "gone_results.json", "loop_results.json", "pipe_results.json",
        ]  # fmt: skip
        assert "a pipe or a device" in show_all(made)
    finally:
        for name in ("pipe_results.json", "loop_results.json", "gone_results.json"):
            (made / name).unlink()
        path.unlink()
        samples.unlink()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"budget": "0"}, "its budget is 0: it must be above 0"),
        ({"budget": "-64"}, "its budget is -64: it must be above 0"),
        ({"score": 1e300}, "anls=1e+300: that is no score"),
        ({"samples": -4}, "effective samples -4: it must be 0 or more"),
        ({"model": "m" * 301}, "a name has at most 300"),
    ],
)
def test_what_no_run_can_have_made_has_its_reason(
    content: dict, reason: str, tmp_path: Path
) -> None:
    write_cell(tmp_path, "fullkv", None, TARGETS)
    task = {"anls,none": content.get("score", 0.5)}
    args = f"pretrained={content.get('model', 'm')},method=snapkv,budget={content.get('budget', 9)}"
    (tmp_path / "a_results.json").write_text(json.dumps({
        "results": {"docvqa_val": task},
        "config": {"model_args": args},
        "n-samples": {"docvqa_val": {"effective": content.get("samples", 4)}},
    }))  # fmt: skip
    (file,) = load([tmp_path]).unreadable
    assert reason in file.reason


@SLOW
@given(data=st.data())
def test_an_efficiency_file_is_drawn_or_listed(made: Path, data: st.DataObject) -> None:
    row = {"model": "a", "method": "fullkv", "budget": None, "input_tokens": 1024,
           "decode_ms_per_token": 3.5, "peak_memory_gb": 14.0}  # fmt: skip
    sound = {"kind": "efficiency", "schema": 1, "rows": [row]}
    other_row = row | {"model": "b", "method": "x", "engine": "y", "budget": 32}
    folder = made / "efficiency"
    folder.mkdir(exist_ok=True)
    (folder / "a.json").write_text(json.dumps(sound))
    odd = data.draw(hostile({**sound, "rows": [other_row]}))
    (folder / "b.json").write_text(json.dumps(odd))
    done = draw_efficiency([str(folder)], made / "figures", ["svg"])
    assert len(done.files) == 1
