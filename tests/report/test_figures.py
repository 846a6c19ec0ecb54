"""Score over budget: what lines, bands, levels and legends say."""

from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from report.result_files import write_grid
from report.scored import frames

from sparsemm_eval.report.cells import COLUMNS, Filters, cells_frame
from sparsemm_eval.report.figures import draw_ranking, draw_scores
from sparsemm_eval.report.figures.ranking import ranking_curves
from sparsemm_eval.report.figures.scores import score_curves
from sparsemm_eval.report.figures.style import (
    COLUMN,
    FONT,
    METHOD_STYLES,
    PAGE,
    line_styles,
    save,
    to_svg,
)
from sparsemm_eval.report.names import labels_in_order
from sparsemm_eval.report.paper import paper_cells
from sparsemm_eval.report.ranking import rank_methods

VICUNA = "LLaVA-NeXT-Vicuna-7B"
BUDGETS = (64, 128, 256)
LABELS = {"fullkv": "FullKV", "sparsemm": "SparseMM", "snapkv": "SnapKV"}


def made(
    model: str = VICUNA,
    benchmark: str = "DocVQA",
    metric: str = "ANLS",
    scale: float = 1.0,
    task: str | None = None,
) -> pd.DataFrame:
    """Full KV, and two methods at three budgets."""
    rows = [("fullkv", None, 0.9)]
    rows += [("sparsemm", budget, 0.8 + budget / 4096) for budget in BUDGETS]
    rows += [("snapkv", budget, 0.5 + budget / 1024) for budget in BUDGETS]
    return cells_frame(
        {
            **dict.fromkeys(COLUMNS),
            "model": model,
            "task": task or benchmark.lower(),
            "benchmark": benchmark,
            "metric_label": metric,
            "method": method,
            "label": LABELS[method],
            "budget": budget,
            "score": scale * score,
            "stderr": 0.01,
            "seeds": 1,
            "kept_tokens_per_head": 1000 if budget is None else budget * 0.9,
            "source": "measured",
        }
        for method, budget, score in rows
    )


def shown(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.get_visible()]


def titles(figure: Figure) -> list[str]:
    return [axes.get_title().replace("\n", " ") for axes in shown(figure)]


def line(axes: Axes, label: str, dashed: bool = False):
    """The one line of a label: the measured one, or the paper's behind it."""
    (found,) = [
        one for one in axes.lines if one.get_label() == label and one.is_dashed() == dashed
    ]  # fmt: skip
    return found


def words(figure: Figure) -> str:
    return " ".join(figure.get_supxlabel().split())


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_line_is_a_method_over_its_budgets_and_full_kv_is_a_level() -> None:
    (axes,) = shown(score_curves(made()))
    drawn = line(axes, "SparseMM")
    assert list(drawn.get_xdata()) == list(BUDGETS)
    assert drawn.get_ydata() == pytest.approx([0.8 + budget / 4096 for budget in BUDGETS])
    assert set(line(axes, "FullKV").get_ydata()) == {0.9}
    assert axes.get_xscale() == "log"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["64", "128", "256"]


def test_over_what_was_kept_a_line_stands_there() -> None:
    (axes,) = shown(score_curves(made(), "kept_tokens_per_head"))
    assert list(line(axes, "SnapKV").get_xdata()) == [0.9 * budget for budget in BUDGETS]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["64", "128"]


def test_kept_tokens_between_two_powers_have_ticks_too() -> None:
    cells = made().assign(kept_tokens_per_head=[1000, 33.4, 40, 60.2, 35, 41, 59])
    (axes,) = shown(score_curves(cells, "kept_tokens_per_head"))
    assert [text.get_text() for text in axes.get_xticklabels()] == ["33", "60"]


def test_a_model_of_which_only_full_kv_is_known_has_its_level() -> None:
    first, second = shown(score_curves(pd.concat([made("a"), made("b")[:1]])))
    assert [one.get_label() for one in second.lines] == ["FullKV"]
    assert second.get_xlim() == first.get_xlim()


def test_bands_are_intervals_where_known_and_else_standard_errors() -> None:
    cells = made()
    sparse = cells["method"] == "sparsemm"
    known = cells.assign(low=np.where(sparse, 0.7, np.nan), high=np.where(sparse, 0.95, np.nan))
    figure = score_curves(known)
    bands = {
        to_hex(band.get_facecolor()[0]).upper(): band.get_paths()[0].vertices[:, 1]
        for band in shown(figure)[0].collections
        if isinstance(band, PolyCollection)
    }
    sparsemm = bands[METHOD_STYLES["sparsemm"]["color"]]
    assert (sparsemm.min(), sparsemm.max()) == (0.7, 0.95)
    snapkv = bands[METHOD_STYLES["snapkv"]["color"]]
    assert snapkv.min() == pytest.approx(0.5 + 64 / 1024 - 0.0196)
    assert snapkv.max() == pytest.approx(0.5 + 256 / 1024 + 0.0196)
    assert "95% intervals, bootstrap" in words(figure)
    assert "where samples are not known, ±1.96 standard errors" in words(figure)
    assert "Bands" not in words(score_curves(cells.assign(stderr=np.nan)))


def test_panels_stand_in_the_papers_order_a_row_a_model() -> None:
    parts = [("Qwen2-VL-7B-Instruct", "GQA"), ("mine", "GQA"), (VICUNA, "GQA"), (VICUNA, "DocVQA")]
    figure = score_curves(pd.concat([made(*part) for part in parts]))
    assert titles(figure) == ["DocVQA (ANLS)", "GQA (ANLS)", "GQA (ANLS)", "GQA (ANLS)"]
    columns = {axes.get_title(): axes.get_subplotspec().colspan.start for axes in shown(figure)}
    assert columns == {"DocVQA (ANLS)": 0, "GQA (ANLS)": 1}
    first = [axes.get_subplotspec().rowspan.start for axes in shown(figure)]
    assert first == [0, 0, 1, 2]


def test_eight_benchmarks_of_one_model_are_two_rows_of_four() -> None:
    names = ("DocVQA", "OCRBench", "TextVQA", "ChartQA", "TextCaps", "MMBench", "GQA", "VQAv2")
    figure = score_curves(pd.concat([made("mine", name) for name in reversed(names)]))
    assert [title.split()[0] for title in titles(figure)] == list(names)
    places = [axes.get_subplotspec() for axes in shown(figure)]
    assert [place.rowspan.start for place in places] == [0] * 4 + [1] * 4
    assert figure.legends[0].get_title().get_text() == "mine"


def test_two_tasks_of_one_benchmark_are_told_apart() -> None:
    figure = score_curves(pd.concat([made(task="docvqa_val"), made(task="docvqa_mini")]))
    assert titles(figure) == ["docvqa_mini (ANLS)", "docvqa_val (ANLS)"]


def test_axes_go_to_one_but_for_cider_and_unknown_scales() -> None:
    parts = [made(), made(benchmark="TextCaps", metric="CIDEr"), made(benchmark="mme", scale=900)]
    cells = pd.concat(parts)
    tops = [axes.get_ylim()[1] for axes in shown(score_curves(cells))]
    assert tops[0] == 1.03
    assert 0.9 < tops[1] < 1
    assert tops[2] > 800
    zoomed = [axes.get_ylim() for axes in shown(score_curves(cells, zoom=True))]
    assert 0.5 < zoomed[0][0] < 0.5 + 64 / 1024
    assert 0.9 < zoomed[0][1] < 1


def test_the_papers_curves_are_dashed_behind_in_the_same_colours() -> None:
    figure = score_curves(pd.concat([made(), paper_cells()], ignore_index=True))
    (axes,) = shown(figure)
    paper = paper_cells("table3")
    of = paper["benchmark"].eq("DocVQA") & paper["model"].eq(VICUNA)
    expected = paper[of & paper["method"].eq("snapkv")].sort_values("budget")
    behind, own = line(axes, "SnapKV", dashed=True), line(axes, "SnapKV")
    assert list(behind.get_ydata()) == list(expected["score"])
    assert behind.get_color() == own.get_color()
    assert behind.get_zorder() < own.get_zorder()
    assert line(axes, "FullKV", dashed=True).get_ydata()[0] == 0.685
    assert legend(figure) == ["FullKV", "SparseMM", "SnapKV", "PyramidKV", "AdaKV", "Random",
                              "paper"]  # fmt: skip
    assert "some values of DocVQA read off its figure" in words(figure)


def test_the_paper_alone_is_drawn_in_full_lines_with_what_was_digitised_hollow() -> None:
    figure = score_curves(paper_cells())
    assert len(shown(figure)) == 18
    (axes, *_) = shown(figure)
    assert not any(one.is_dashed() for one in axes.lines)
    hollow = [one for one in axes.lines if one.get_markerfacecolor() == "white"]
    paper = paper_cells("table3")
    of = paper["benchmark"].eq("DocVQA") & paper["model"].eq(VICUNA) & paper["budget"].notna()
    count = (of & paper["source"].eq("figure4_digitised")).sum()
    assert sum(len(one.get_xdata()) for one in hollow) == count > 0


def test_the_ablations_are_no_curves() -> None:
    """Table 1 has one budget; Table 2's MMBench would be SparseMM's twice."""
    figure = score_curves(paper_cells())
    assert "Local" not in legend(figure)
    assert not [name for name in legend(figure) if "ratio" in name]


def test_every_curve_is_in_the_legend_and_told_apart() -> None:
    """More methods of one's own than colours, and settings that vary."""
    cells = made()
    own = [
        cells[cells["method"] == "snapkv"].assign(method=f"own{i}", label=f"own{i}")
        for i in range(19)
    ]
    varied = [
        cells[cells["method"] == "sparsemm"].assign(label=f"SparseMM (ratio=0.{i})")
        for i in range(1, 6)
    ]
    figure = score_curves(pd.concat([cells, *own, *varied], ignore_index=True))
    (axes,) = shown(figure)
    assert sorted(legend(figure)) == sorted({one.get_label() for one in axes.lines})
    looks = [(one.get_color(), one.get_marker(), str(one._unscaled_dash_pattern))
             for one in axes.lines]  # fmt: skip
    assert len(set(looks)) == len(looks) == 27
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert not any(box.overlaps(one.get_window_extent()) for one in shown(figure))
    assert 0 <= box.x0 < box.x1 <= figure.bbox.x1


@given(st.lists(st.sampled_from(["sparsemm", "snapkv", "mine", "yours", "fullkv"]), max_size=40))
def test_no_two_labels_look_alike(methods: list[str]) -> None:
    labels = {f"label {i}": method for i, method in enumerate(methods)}
    cells = pd.DataFrame({"label": list(labels), "method": list(labels.values())}, dtype=object)
    styles = line_styles(labels_in_order(cells))
    assert styles.keys() == labels.keys()
    assert len({str(sorted(style.items(), key=str)) for style in styles.values()}) == len(labels)
    for label, method in labels.items():
        if method in METHOD_STYLES:
            assert styles[label]["color"] == METHOD_STYLES[method]["color"]


@given(st.text(max_size=12).filter(lambda name: name not in METHOD_STYLES), st.booleans())
def test_a_method_of_ones_own_looks_the_same_beside_any_other(name: str, beside: bool) -> None:
    alone = line_styles({name: name})[name]
    others = {other: other for other in METHOD_STYLES if beside}
    assert line_styles({**others, "h2o": "h2o", name: name})[name] == alone or name == "h2o"
    assert alone["color"] not in {style["color"] for style in METHOD_STYLES.values()}


def test_settings_look_the_same_whatever_else_is_shown() -> None:
    names = [f"SparseMM (ratio={ratio})" for ratio in (0.05, 0.1, 0.2, 0.4)] + ["SparseMM"]
    together = line_styles(dict.fromkeys(names, "sparsemm") | {"SnapKV": "snapkv"})
    for name in names:
        assert together[name] == line_styles({name: "sparsemm"})[name]
    assert together["SparseMM"]["marker"] == METHOD_STYLES["sparsemm"]["marker"]


def test_a_pdf_has_letters_and_no_date(tmp_path: Path) -> None:
    figure = score_curves(made())
    (first,), (second,) = (save(figure, tmp_path / name, ["pdf"]) for name in "ab")
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes().startswith(b"%PDF")
    assert b"CreationDate" not in first.read_bytes()
    assert b"/Type3" not in first.read_bytes()


@pytest.mark.parametrize(("count", "width"), [(1, COLUMN), (2, PAGE), (5, PAGE), (8, PAGE)])
def test_figures_have_a_pages_width_and_letters_that_can_be_read(count: int, width: float) -> None:
    names = ("DocVQA", "OCRBench", "TextVQA", "ChartQA", "TextCaps", "MMBench", "GQA", "VQAv2")
    figure = score_curves(pd.concat([made(benchmark=name) for name in names[:count]]))
    figure.draw_without_rendering()
    assert figure.get_figwidth() == width
    for axes in shown(figure):
        labels = [label for label in axes.get_xticklabels() if label.get_text()]
        assert min(label.get_fontsize() for label in labels) >= FONT
        boxes = [label.get_window_extent() for label in labels]
        assert all(left.x1 < right.x0 for left, right in pairwise(boxes))
    boxes = [axes.title.get_window_extent() for axes in shown(figure)]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.parametrize(("cells", "over", "message"), [
    (made()[:0], "budget", "there is no cell to draw"),
    (made().assign(source="table1"), "budget", "there is no cell to draw"),
    (made()[:1], "budget", "none of the cells has a budget: there is no curve"),
    (pd.concat([made("mine")[:1], paper_cells()]), "budget", "none of the cells has a budget"),
    (paper_cells(), "kept_tokens_per_head", "none of the cells has a budget and kept_tokens"),
    (made(), "score", "over='score': it must be one of budget, kept_tokens_per_head"),
])  # fmt: skip
def test_nothing_to_draw_is_one_sentence(cells: pd.DataFrame, over: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_curves(cells, over)


def test_files_are_the_same_for_the_same_numbers_and_hold_no_bitmap(tmp_path: Path) -> None:
    first = save(score_curves(made()), tmp_path / "a" / "one", ("svg", "png"))
    second = save(score_curves(made()), tmp_path / "b" / "one", ("svg", "png"))
    assert [path.name for path in first] == ["one.svg", "one.png"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    tags = {element.tag.rpartition("}")[2] for element in ElementTree.parse(first[0]).iter()}
    assert "path" in tags
    assert "image" not in tags
    assert to_svg(score_curves(made())) in first[0].read_text(encoding="utf-8")


def test_a_format_that_is_none_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    for formats, message in ((["bmp"], "format='bmp': it must be one or more of svg, png, pdf"),
                             ([], "it must be one or more of svg, png")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            draw_scores([str(tmp_path / "nowhere")], "budget", tmp_path, formats)


def test_results_become_a_figure_with_their_intervals(tmp_path: Path) -> None:
    write_grid(tmp_path / "runs")
    (tmp_path / "runs" / "cut_results.json").write_text("{")
    filters = Filters(models=["small"])
    done = draw_scores([str(tmp_path / "runs")], "budget", tmp_path, ["svg"], filters, paper=True)
    assert [path.name for path in done.files] == ["score_over_budget.svg"]
    notes = "\n".join(done.notes)
    assert "cut_results.json" in notes
    assert "the paper has no curve of these models and benchmarks" in notes


def test_a_ranking_is_a_line_a_method_over_bytes_before_the_fronts(tmp_path: Path) -> None:
    full = dict.fromkeys([("fullkv", None)], [1.0] * 10)
    rows = full | {
        (method, budget): [1.0] * right + [0.0] * (10 - right)
        for method, rights in (("sparsemm", (8, 9)), ("snapkv", (4, 9)), ("local", (1, 3)))
        for budget, right in zip((64, 128), rights, strict=True)
    }
    cells, scores = frames(rows)
    cells["kept_kv_bytes"] = cells["budget"].fillna(512) * 2**14
    figure = ranking_curves(rank_methods(cells, scores))
    (axes,) = shown(figure)
    assert list(line(axes, "SnapKV").get_xdata()) == [1, 2]
    assert list(line(axes, "SnapKV").get_ydata()) == [0.4, 0.9]
    fronts = [one for one in axes.lines if one.get_label().startswith("front")]
    assert [list(front.get_ydata()) for front in fronts] == [[0.8, 0.9], [0.1, 0.3]]
    assert legend(figure)[-3:] == ["full KV", "front, query-aware", "front, query-agnostic"]
    assert "MiB of keys and values a prompt" in words(figure)
    with pytest.raises(ValueError, match="known bytes"):
        ranking_curves(rank_methods(cells.assign(kept_kv_bytes=np.nan), scores))
    write_grid(tmp_path / "runs")
    done = draw_ranking([str(tmp_path / "runs")], tmp_path, ["svg"])
    assert [path.name for path in done.files] == ["ranking.svg"]


def test_kept_tokens_are_not_in_the_paper(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="paper with kind=kept"):
        draw_scores(["paper"], "kept", tmp_path, ["svg"], paper=True)
