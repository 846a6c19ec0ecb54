"""Which method is best at equal bytes: shares, ties, and who is compared with whom."""

import re
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report.result_files import TARGETS, write_cell, write_grid
from report.scored import NO_SCORES, by_name, coins, frames
from typer.testing import CliRunner

from sparsemm_eval.cli import app
from sparsemm_eval.errors import UserError
from sparsemm_eval.report.markup import to_format
from sparsemm_eval.report.ranking import Ranking, matched, pareto_front, rank_methods
from sparsemm_eval.report.ranking_table import ranking_table, ranking_words

FULL = ("fullkv", None)
SNAP, ADA, OURS, LOCAL = ((name, 64) for name in ("snapkv", "adakv", "sparsemm", "local"))
Scores = Mapping[tuple[str, float | None], Sequence[float]]


def made(
    tasks: Mapping[str, Scores], falling: Sequence[str] = (), **other: object
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One model's cells on several tasks, and the scores of their samples."""
    parts, samples = [], []
    for task, scores in tasks.items():
        about = {"task": task, "benchmark": task, "higher_is_better": task not in falling}
        cells, of_task = frames(scores, **(about | other))
        first = sum(map(len, parts))
        parts.append(cells.set_index(cells.index + first))
        samples.append(of_task.assign(cell=of_task["cell"] + first))
    return pd.concat(parts), pd.concat(samples, ignore_index=True)


def named(ranking: Ranking) -> pd.DataFrame:
    return ranking.rows.set_index("method")


def said(ranking: Ranking) -> str:
    return " ".join(line for _, lines in ranking_words(ranking) for line in lines)


def test_a_share_is_the_mean_over_tasks_of_score_by_full_kvs_score() -> None:
    tasks = {
        "one": {FULL: [1, 1, 1, 0.2], SNAP: [1, 0.6, 0, 0], ADA: [1, 1, 1, 0.2]},
        "two": {FULL: [0.5, 0.5], SNAP: [0.5, 0], ADA: [0.5, 0.5]},
        "errors": {FULL: [1, 3], SNAP: [2, 6], ADA: [1, 3]},
    }
    rows = named(rank_methods(*made(tasks, falling=["errors"])))
    assert rows.at["snapkv", "share"] == pytest.approx((0.5 + 0.5 + 0.5) / 3)
    assert rows.loc["adakv", ["share", "low", "high"]].tolist() == [1, 1, 1]
    assert rows.at["snapkv", "behind"] == pytest.approx(0.5)
    assert list(rows["won"]) == [3, 0]
    assert list(rows["mean_rank"]) == [1, 2]
    assert set(rows["tasks"]) == {3}


@pytest.mark.parametrize("falling", [(), ("one",), ("one", "two")])
def test_p_is_that_of_all_swaps_of_two_methods_answers(falling: Sequence[str]) -> None:
    """By an own sum over all sign patterns; shares are linear in the difference of two scores."""
    rng = np.random.default_rng(3)
    tasks = {
        task: {FULL: rng.uniform(0.5, 1, size), SNAP: rng.uniform(0.1, 1, size),
               ADA: rng.uniform(0.1, 1, size)}
        for task, size in (("one", 4), ("two", 6))
    }  # fmt: skip
    rows = named(rank_methods(*made(tasks, falling)))
    parts = []
    for task, scores in tasks.items():
        full, snap, ada = (np.mean(scores[name]) for name in (FULL, SNAP, ADA))
        weight = -full / (snap * ada) if task in falling else 1 / full
        parts.append(weight * (scores[ADA] - scores[SNAP]) / len(scores[ADA]) / 2)
    apart = np.concatenate(parts)
    assert abs(apart.sum()) == pytest.approx(rows["behind"].max())
    swapped = [abs(apart @ signs) for signs in product((-1, 1), repeat=len(apart))]
    expected = np.mean([value >= abs(apart.sum()) - 1e-9 for value in swapped])
    assert rows["p"].max() == pytest.approx(expected)


def test_the_interval_is_that_of_documents_drawn_within_each_task() -> None:
    full, ours, snap = coins(5, 400, 0.9, 0.8, 0.5)
    tasks = {"one": {FULL: full, OURS: ours, SNAP: snap},
             "two": {FULL: full[:100], OURS: ours[:100], SNAP: snap[:100]}}  # fmt: skip
    row = named(rank_methods(*made(tasks))).loc["snapkv"]
    rng = np.random.default_rng(11)
    shares = {"share": 0.0, "behind": 0.0}
    for size in (400, 100):
        drawn = rng.integers(0, size, (4000, size))
        whole, ahead, own = (column[drawn].mean(axis=1) for column in (full, ours, snap))
        shares["share"] += own / whole / 2
        shares["behind"] += (ahead - own) / whole / 2
    low, high = np.quantile(shares["share"], (0.025, 0.975))
    assert (row["low"], row["high"]) == pytest.approx((low, high), abs=0.006)
    low, high = np.quantile(shares["behind"], (0.025, 0.975))
    assert (row["behind_low"], row["behind_high"]) == pytest.approx((low, high), abs=0.006)


def test_what_is_sure_is_behind_and_what_may_be_chance_ties() -> None:
    full, best, near, far = coins(1, 300, 0.95, 0.9, 0.7, 0.5)
    close = best.copy()
    close[np.flatnonzero(close)[:2]] = 0
    ranking = rank_methods(*made({"one": {FULL: full, OURS: best, SNAP: near, ADA: far}}))
    assert list(ranking.rows["verdict"]) == ["best", "behind", "behind"]
    text = to_format(ranking_table(ranking), "markdown")
    assert re.search(r"SparseMM .*\*\*0\.\d{3} \[", text)
    assert "At 64 tokens (3 MiB a prompt) SparseMM keeps" in said(ranking)
    assert "over one task; behind it: SnapKV by" in said(ranking)
    assert "ties with" not in said(ranking)
    ranking = rank_methods(*made({"one": {FULL: full, OURS: best, SNAP: close, ADA: far}}))
    assert list(ranking.rows["verdict"]) == ["best", "tie", "behind"]
    assert "SnapKV ties with it; behind it: AdaKV by" in said(ranking)
    marks = by_name(ranking_table(ranking), ranking_table(ranking).marks)["kept of full KV"]
    assert list(marks) == ["italic", "italic", ""]
    assert ranking.comparisons == 2
    assert "2 comparisons" in " ".join(ranking_table(ranking).caption)


def test_four_documents_are_no_proof_though_all_of_them_agree() -> None:
    """Every resample has the same sign; a permutation of four signs has p = 1/8."""
    (row,) = (
        rank_methods(*made({"one": {FULL: [1] * 4, OURS: [1] * 4, SNAP: [0] * 4}}))
        .rows[1:]
        .to_dict("records")
    )
    assert row["behind_low"] == 1
    assert row["p"] == 0.125
    assert row["verdict"] == "tie"


def test_a_budget_is_named_in_tokens_or_as_a_share_of_the_prompt() -> None:
    cells, scores = made({"one": {FULL: [1, 1], OURS: [1, 1], SNAP: [1, 1]}})
    assert "At 64 tokens (3 MiB" in said(rank_methods(cells, scores))
    cells["budget"] = cells["budget"].where(cells["budget"].isna(), 0.1)
    assert "At 10% of the prompt (3 MiB" in said(rank_methods(cells, scores))


def test_equal_methods_tie_and_share_their_tasks() -> None:
    scores = {FULL: [1, 1, 1], OURS: [1, 0, 0], SNAP: [1, 0, 0]}
    rows = rank_methods(*made({"one": scores, "two": scores})).rows
    assert list(rows["verdict"]) == ["best", "tie"]
    assert list(rows["won"]) == [0, 0]
    assert list(rows["shared"]) == [2, 2]
    assert list(rows["mean_rank"]) == [1.5, 1.5]
    assert list(rows["p"])[1:] == [1]


def test_p_is_corrected_for_all_comparisons_of_all_models() -> None:
    full, best, near = coins(2, 60, 0.95, 0.9, 0.7)
    one = made({"one": {FULL: full, OURS: best, SNAP: near}})
    again = one[0].assign(model="other").set_index(one[0].index + 3)
    scores = pd.concat([one[1], one[1].assign(cell=one[1]["cell"] + 3)])
    alone, both = rank_methods(*one).rows, rank_methods(pd.concat([one[0], again]), scores).rows
    assert both["p_corrected"].dropna().tolist() == [2 * alone["p_corrected"].max()] * 2


def test_unlike_bytes_are_shown_and_not_ranked() -> None:
    full, best, near, far = coins(1, 100, 0.95, 0.9, 0.7, 0.5)
    cells, scores = made({"one": {FULL: full, OURS: best, SNAP: near, ADA: far}})
    cells = cells.assign(kept_kv_bytes=[9e6, 0.9e6, 1e6, 1.04e6])
    ranking = rank_methods(cells, scores)
    rows = named(ranking)
    assert rows.loc["sparsemm", ["unranked", "verdict"]].tolist() == ["alone", ""]
    assert rows.loc[["snapkv", "adakv"], "verdict"].tolist() == ["best", "behind"]
    assert pd.isna(rows.at["sparsemm", "mean_rank"])
    assert "Not ranked at 64 tokens: SparseMM (keeps" in said(ranking)
    assert "at 0.858 MiB: unlike bytes, and more in the mean" in said(ranking)
    assert "than SnapKV in fewer bytes)" in said(ranking)
    assert "as few bytes (the front): SparseMM at 64." in said(ranking)
    everyone = rank_methods(cells, scores, tolerance=0.2)
    assert named(everyone).at["sparsemm", "verdict"] == "best"
    assert "within 20% of each other" in " ".join(ranking_table(everyone).caption)


def test_bytes_must_be_alike_on_every_task_and_not_in_the_mean_alone() -> None:
    scores = {FULL: [1, 1], OURS: [1, 1], SNAP: [1, 1]}
    cells, samples = made({"one": scores, "two": scores})
    ranking = rank_methods(cells.assign(kept_kv_bytes=[9, 1, 2, 9, 2, 1]), samples)
    assert set(ranking.rows["unranked"]) == {"alone"}
    ranking = rank_methods(cells.assign(kept_kv_bytes=[9, 1, np.nan, 9, 2, 1]), samples)
    assert named(ranking).at["snapkv", "unranked"] == "bytes"


sizes = st.lists(st.tuples(*[st.integers(50, 150)] * 2), min_size=1, max_size=8)


@given(sizes, st.sampled_from([0.0, 0.05, 0.3]))
def test_rows_of_a_group_are_within_the_tolerance_of_each_other(
    drawn: list[tuple[int, int]], tolerance: float
) -> None:
    frame = pd.DataFrame(drawn, dtype=float)
    groups = list(matched(frame, tolerance))
    assert sorted(row for some in groups for row in some) == [*range(len(drawn))]
    for some in groups:
        part = frame.loc[some]
        assert (part.max() <= part.min() * (1 + tolerance) + 1e-9).all()
    lengths = [len(some) for some in groups]
    assert lengths == sorted(lengths, reverse=True)


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_the_front_is_what_no_other_exceeds(points: list[tuple[int, int]]) -> None:
    rows = pd.DataFrame(points, columns=["kept_kv_bytes", "share"], dtype=float)
    front = {tuple(row) for row in pareto_front(rows).to_numpy()}
    assert front == {
        (size, share)
        for size, share in points
        if not any(
            (a <= size and b > share) or (a < size and b >= share) for a, b in points
        )
    }  # fmt: skip


def test_methods_that_see_the_question_are_never_ranked_with_those_that_do_not() -> None:
    full, best, near, far = coins(1, 100, 0.95, 0.9, 0.7, 0.5)
    streaming = ("streaming", 64)
    scores = {FULL: full, OURS: best, SNAP: near, LOCAL: far, streaming: near}
    ranking = rank_methods(*made({"one": scores}))
    rows = named(ranking)
    assert list(rows.index) == ["sparsemm", "snapkv", "streaming", "local"]
    assert list(rows["verdict"]) == ["best", "behind", "best", "behind"]
    assert [title for title, _ in ranking_words(ranking)] == [
        "small, query-aware methods (full KV: 3 MiB a prompt)",
        "small, query-agnostic methods (full KV: 3 MiB a prompt)",
    ]
    alone = rank_methods(*made({"one": {FULL: full, OURS: best, LOCAL: far}})).rows
    assert set(alone["unranked"]) == {"alone"}


def test_a_task_counts_where_full_kv_is_above_chance_and_0() -> None:
    rng = np.random.default_rng(0)
    guessed = (rng.permutation(40) < 22).astype(float)
    about = {"metric": "exact_match"}
    tasks = {
        "gqa_mini": {FULL: guessed, OURS: guessed, SNAP: guessed},
        "zero": {FULL: [0, 0], OURS: [1, 1], SNAP: [0, 0]},
        "errors": {FULL: [1, 1], OURS: [0, 0], SNAP: [1, 1]},
        "one": {FULL: [1] * 9, OURS: [1] * 9, SNAP: [0] * 9},
    }
    ranking = rank_methods(*made(tasks, ["errors"], **about))
    assert ranking.tasks == {"small": ("one",)}
    assert [note.partition(":")[0] for note in ranking.notes] == [
        "small, errors", "small, gqa_mini", "small, zero"
    ]  # fmt: skip
    assert "full KV's 0.550 (from 0." in ranking.notes[1]
    assert "is not above chance, 0.505" in ranking.notes[1]
    assert "is not above 0" in ranking.notes[2]
    assert set(ranking.rows["of_tasks"]) == {1}


def test_without_full_kv_there_is_no_share() -> None:
    tasks = {"one": {OURS: [1, 1], SNAP: [1, 0]}}
    with pytest.raises(UserError, match="one: left out, there is no full KV of it"):
        rank_methods(*made(tasks))
    tasks["two"] = {FULL: [1, 1], OURS: [1, 1], SNAP: [1, 0]}
    ranking = rank_methods(*made(tasks))
    assert ranking.notes == ("small, one: left out, there is no full KV of it",)
    assert set(ranking.rows["tasks"]) == {1}


def test_who_lacks_a_task_or_documents_is_shown_and_not_ranked() -> None:
    tasks = {
        "one": {FULL: [1] * 8, OURS: [1] * 8, SNAP: [0] * 8, ADA: [1] * 7 + [np.nan]},
        "two": {FULL: [1] * 8, SNAP: [0] * 8, ADA: [1] * 8},
    }
    ranking = rank_methods(*made(tasks))
    assert named(ranking)["unranked"].to_dict() == {
        "sparsemm": "tasks", "adakv": "documents", "snapkv": "alone",
    }  # fmt: skip
    assert "SparseMM (keeps 1.000 at 3 MiB: 1 of 2 tasks)" in said(ranking)
    assert "AdaKV (keeps 1.000 at 3 MiB: other documents)" in said(ranking)


def test_without_samples_it_says_so_instead_of_ranking() -> None:
    cells, _ = made({"one": {FULL: [1, 1], OURS: [1, 1], SNAP: [1, 0]}})
    ranking = rank_methods(cells, NO_SCORES)
    assert set(ranking.rows["unranked"]) == {"samples"}
    assert list(ranking.rows["share"]) == [1, 0.5]
    assert "There is no ranking: without scores by sample" in said(ranking)
    table = ranking_table(ranking)
    assert list(by_name(table)["behind the best"]) == ["no samples"] * 2
    assert not any("Holm" in line for line in table.caption)


def test_methods_that_keep_nothing_are_not_praised() -> None:
    ranking = rank_methods(*made({"one": {FULL: [1] * 4, OURS: [0] * 4, SNAP: [0] * 4}}))
    assert said(ranking) == (
        "Of one comparison at equal bytes, best or tied with the best: none. "
        "At 64 tokens (3 MiB a prompt) none of 2 methods keeps any of full KV's score."
    )


def test_a_cell_twice_and_a_wrong_tolerance_are_refused() -> None:
    cells, scores = made({"one": {FULL: [1, 1], OURS: [1, 1], SNAP: [1, 0]}})
    with pytest.raises(UserError, match="one: SparseMM is there several times"):
        rank_methods(cells.assign(label=["FullKV", "SparseMM", "SparseMM"]), scores)
    with pytest.raises(UserError, match="within=-1: it must be 0 or more"):
        rank_methods(cells, scores, tolerance=-1)


def test_the_papers_cells_and_other_tools_models_are_no_rivals() -> None:
    cells, scores = made(
        {"one": {FULL: [1, 1], OURS: [1, 1], SNAP: [1, 0], ("llava", None): [1, 1]}}
    )
    cells.loc[2, "source"] = "table3"
    assert list(rank_methods(cells, scores).rows["method"]) == ["sparsemm"]


def test_shares_in_percent_and_numbers_for_machines() -> None:
    full, best, near = coins(1, 100, 0.95, 0.9, 0.7)
    ranking = rank_methods(*made({"one": {FULL: full, OURS: best, SNAP: near}}))
    share = best.mean() / full.mean()
    table = ranking_table(ranking, percent=True)
    assert by_name(table)["kept of full KV"].iloc[0].startswith(f"{100 * share:.1f} [")
    assert f"SparseMM keeps {100 * share:.1f} [" in table.words[1]
    assert float(table.plain.at[0, "share"]) == pytest.approx(share)
    assert table.plain.at[0, "unranked"] == ""


def test_the_command_writes_words_and_table(tmp_path: Path) -> None:
    write_grid(tmp_path)

    def run(*words: str):
        return CliRunner().invoke(app, ["table", str(tmp_path), "--like", "ranking", *words])

    done = run("--models", "small")
    assert done.exit_code == 0, done.output
    assert "At 256 tokens (1 MiB a prompt) SparseMM keeps 1.000 [1.000, 1.000]" in done.stdout
    assert "SnapKV ties with it" in done.stdout
    assert "| small   | the question" in done.stdout
    assert run("--models", "small").stdout == done.stdout
    assert run("--models", "small", "--methods", "sparsemm,snapkv").stdout == done.stdout
    for words in (["--show", "kept"], ["--long"], ["--against", "fullkv"]):
        refused = run(*words)
        assert refused.exit_code == 1
        assert "like=ranking shows" in refused.stderr
    write_cell(tmp_path / "more", "snapkv", 64, TARGETS, task="own", metric="hit")
    alone = CliRunner().invoke(app, ["table", str(tmp_path / "more"), "--like", "ranking"])
    assert alone.exit_code == 1
    assert "a ranking needs full KV" in alone.stderr
