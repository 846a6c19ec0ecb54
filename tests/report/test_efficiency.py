"""Efficiency files and their figure."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sparsemm_eval.report.cells import Filters
from sparsemm_eval.report.efficiency import gather_efficiency, read_efficiency
from sparsemm_eval.report.figures import draw_efficiency
from sparsemm_eval.report.figures.efficiency import efficiency_curves
from sparsemm_eval.report.paper import paper_efficiency

LENGTHS = (2048, 8192, 32768)
VICUNA = "LLaVA-NeXT-Vicuna-7B"


def row(**changes: Any) -> dict[str, Any]:
    return {
        "model": "llava-hf/llava-v1.6-vicuna-7b-hf", "method": "sparsemm", "budget": 256,
        "input_tokens": 2048, "decode_ms_per_token": 4.0, "peak_memory_gb": 14.0,
    } | changes  # fmt: skip


def write(path: Path, rows: Any, **changes: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"schema": 1, "kind": "efficiency", "rows": rows} | changes))
    return path


def measured(path: Path) -> Path:
    rows = [
        row(method=method, budget=budget, engine=engine, input_tokens=n, bound_ms_per_token=bound,
            decode_ms_per_token=4 + n / 8192)
        for n in LENGTHS
        for method, budget, engine, bound in (
            ("sparsemm", 256, None, 3.1), ("fullkv", None, "dynamic cache", None),
        )
    ]  # fmt: skip
    return write(path, rows)


def test_rows_are_read_with_the_papers_names(tmp_path: Path) -> None:
    rows = read_efficiency(measured(tmp_path / "e.json"))
    assert set(rows["model"]) == {VICUNA}
    assert set(rows["label"]) == {"SparseMM 256", "FullKV (dynamic cache)"}
    assert set(rows["source"]) == {"measured"}


def test_a_folder_is_searched_for_files_of_this_kind(tmp_path: Path) -> None:
    measured(tmp_path / "gpu" / "run.json")
    (tmp_path / "summary.json").write_text('{"kind": "kernels"}')
    broken = write(tmp_path / "broken.json", [row(input_tokens=0)])
    found = gather_efficiency([str(tmp_path), "paper"])
    assert len(found.rows) == 2 * len(LENGTHS) + len(paper_efficiency())
    ((path, reason),) = [(file.path, file.reason) for file in found.unreadable]
    assert path == str(broken)
    assert reason == "rows[0].input_tokens=0: it must be an integer of at least 1"


@pytest.mark.parametrize(("rows", "changes", "message"), [
    ([row()], {"kind": "kernels"}, 'its "kind" must be "efficiency"'),
    ([row()], {"schema": 2}, "its schema is 2; this version reads 1"),
    ([], {}, '"rows" must be a list of measurements'),
    ({}, {}, '"rows" must be a list of measurements'),
    ([3], {}, r"rows\[0\] is 3: it must be an object"),
    ([row(), row(model="")], {}, r"rows\[1\]\.model='': it must be a name"),
    ([row(method=None)], {}, "method=None: it must be a name"),
    ([row(engine=1)], {}, "engine=1: it must be a name or null"),
    ([row(input_tokens=1.5)], {}, "input_tokens=1.5: it must be an integer"),
    ([row(decode_ms_per_token="4")], {}, "decode_ms_per_token='4': it must be a number above 0"),
    ([row(peak_memory_gb=-1)], {}, "peak_memory_gb=-1: it must be a number above 0"),
    ([row(bound_ms_per_token=float("nan"))], {}, "bound_ms_per_token=nan: it must be a number"),
    ([row(budget=True)], {}, "budget=True: it must be a number above 0, or null"),
])  # fmt: skip
def test_a_wrong_file_is_one_sentence(
    rows: Any, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "e.json", rows, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        read_efficiency(path)
    assert str(caught.value).startswith(str(path))


def test_no_json_and_nothing_found_are_said(tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    path.write_bytes(b"\xff{")
    with pytest.raises(ValueError, match="it cannot be read as JSON"):
        read_efficiency(path)
    with pytest.raises(ValueError, match=r"there are no efficiency results here .*JSON"):
        gather_efficiency([str(path)])
    with pytest.raises(ValueError, match="there is no such file or folder"):
        gather_efficiency([str(tmp_path / "nowhere")])


def test_one_measurement_twice_names_both_files(tmp_path: Path) -> None:
    paths = [str(measured(tmp_path / name)) for name in ("a.json", "b.json")]
    with pytest.raises(ValueError, match=r"is there 2 times, in .*a\.json and .*b\.json"):
        gather_efficiency(paths)


def test_the_papers_curves_alone() -> None:
    figure = efficiency_curves(gather_efficiency(["paper"]).rows)
    decode, memory = figure.axes[0], figure.axes[3]
    paper = paper_efficiency()
    full = paper[(paper["model"] == VICUNA) & (paper["method"] == "fullkv")]
    (line,) = [one for one in decode.lines if one.get_label() == "FullKV"]
    assert list(line.get_xdata()) == list(full["input_tokens"])
    assert list(line.get_ydata()) == list(full["decode_ms_per_token"])
    (line,) = [one for one in memory.lines if one.get_label() == "FullKV"]
    assert list(line.get_ydata()) == list(full["peak_memory_gb"])
    assert not line.is_dashed()
    assert [axes.get_title() for axes in figure.axes[:3]] == list(dict.fromkeys(paper["model"]))
    assert (decode.get_ylabel(), memory.get_ylabel()) == (
        "decode (ms per token)", "peak memory (GiB)"
    )  # fmt: skip
    assert [text.get_text() for text in memory.get_xticklabels()] == [
        "2K", "4K", "8K", "16K", "32K"
    ]  # fmt: skip


def test_measured_curves_before_the_papers_with_their_bounds(tmp_path: Path) -> None:
    rows = gather_efficiency([str(measured(tmp_path / "e.json")), "paper"]).rows
    figure = efficiency_curves(rows)
    decode, memory = figure.axes
    lines = [one for one in decode.lines if one.get_label() == "SparseMM 256"]
    own, behind = ([one for one in lines if one.is_dashed() is dashed] for dashed in (False, True))
    assert list(own[0].get_ydata()) == [4 + n / 8192 for n in LENGTHS]
    assert behind[0].get_color() == own[0].get_color()
    bounds = [one for one in decode.lines if set(one.get_ydata()) == {3.1}]
    assert len(bounds) == 1
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["FullKV", "FullKV (dynamic cache)", "SparseMM 256", "byte bound", "paper"]
    assert memory.get_ylim()[1] > 32.9


def test_what_was_not_measured_has_no_panel(tmp_path: Path) -> None:
    path = write(tmp_path / "e.json", [row(peak_memory_gb=None, model="tiny")])
    figure = efficiency_curves(gather_efficiency([str(path)]).rows)
    assert [axes.get_ylabel() for axes in figure.axes] == ["decode (ms per token)"]
    path = write(tmp_path / "e.json", [row(peak_memory_gb=None, decode_ms_per_token=None)])
    with pytest.raises(ValueError, match="there is no measurement to draw"):
        efficiency_curves(gather_efficiency([str(path)]).rows)


def test_more_models_than_fit_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "e.json", [row(model=f"m{i}") for i in range(5)])
    with pytest.raises(ValueError, match="5 models: 4 fit side by side; choose among m0, m1"):
        efficiency_curves(gather_efficiency([str(path)]).rows)


def test_filters_and_files(tmp_path: Path) -> None:
    filters = Filters(models=[VICUNA], methods=["fullkv"])
    done = draw_efficiency(["paper"], tmp_path, ["svg", "png"], filters)
    assert [path.name for path in done.files] == ["efficiency.svg", "efficiency.png"]
    assert all(path.stat().st_size > 1000 for path in done.files)
    with pytest.raises(ValueError, match="models=x: it must be of"):
        draw_efficiency(["paper"], tmp_path, ["svg"], Filters(models=["x"]))
    with pytest.raises(ValueError, match="benchmarks=GQA: kind=efficiency knows none"):
        draw_efficiency(["paper"], tmp_path, ["svg"], Filters(benchmarks=["GQA"]))


def test_an_empty_frame_is_one_sentence() -> None:
    empty = gather_efficiency(["paper"]).rows[:0]
    assert isinstance(empty, pd.DataFrame)
    with pytest.raises(ValueError, match="there is no measurement to draw"):
        efficiency_curves(empty)
