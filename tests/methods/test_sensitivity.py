"""The value, the file and the method: rules against loops, totals to the token, mixtures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsemm_eval.errors import UserError
from sparsemm_eval.methods import (
    HeadScores,
    ModelShape,
    PromptLayer,
    Sensitivity,
    keep_rows,
    make_method,
    read_head_scores,
    tokens_per_head,
)
from sparsemm_eval.methods.sensitivity import NEWEST, RECENT, RULES, Kind, rule_scores

SHAPE = ModelShape(2, 4, 2)
FADED = 0.3


def sensitivity(budget: int = 10, rules: int | None = None, seed: int = 0) -> Sensitivity:
    rng = np.random.default_rng(seed)
    shape = (SHAPE.layers, SHAPE.kv_heads)
    drawn = rng.integers(0, len(RULES), shape) if rules is None else np.full(shape, rules)
    table = np.ones(shape, dtype=int)
    for head in rng.integers(0, table.size, (budget - 1) * table.size):
        table.flat[head] += 1
    kinds = {
        "pages": Kind(np.array([[0.0, 4.0], [1.0, 0.0]]), 3, 20, ("a", "b", "c")),
        "scenes": Kind(np.array([[9.0, 0.0], [0.0, 9.0]]), 2, 8, ("d", "e")),
    }
    return Sensitivity(SHAPE, 8, kinds, drawn, {budget: table})


def by_hand(query: torch.Tensor, key: torch.Tensor, window: int, rule: int) -> np.ndarray:
    """Scores [H, n] token by token."""
    heads, n, dim = key.shape
    group = len(query) // heads
    window = min(window, n)
    first = n - window
    scores = np.zeros((heads, n))
    for head in range(heads):
        seen: list[list[float]] = [[] for _ in range(n)]
        for q in range(head * group, (head + 1) * group):
            rows = range(first, n) if RULES[rule].queries == "window" else [n - 1]
            for row in rows:
                logits = (key[head, : row + 1] @ query[q, row - n]).double() * dim**-0.5
                for token, weight in enumerate(logits.softmax(0).tolist()):
                    seen[token].append(weight)
        attention = [float(np.mean(weights)) if weights else 0.0 for weights in seen]
        width = RULES[rule].width
        for token in range(n):
            if RULES[rule].pooling == "avg":
                near = range(token - width // 2, token + width // 2 + 1)
                scores[head, token] = sum(attention[t] for t in near if 0 <= t < n) / width
            else:
                lent = [
                    attention[token - back] * (1 - (1 - FADED) * back / (width - 1))
                    for back in range(width)
                    if token >= back
                ]
                scores[head, token] = max(lent)
    return scores


@pytest.mark.parametrize("n", [6, 30])
@pytest.mark.parametrize("rule", range(len(RULES)))
def test_rules_score_as_they_say(rule: int, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    query = torch.randn(4, n, 6, generator=generator)
    key = torch.randn(2, n, 6, generator=generator)
    found = rule_scores(query, key, 8, [rule])[rule].numpy()
    if rule == NEWEST:
        assert (np.diff(found) > 0).all()
        return
    np.testing.assert_allclose(
        found[:, :-RECENT], by_hand(query, key, 8, rule)[:, :-RECENT], rtol=0, atol=1e-6
    )
    # Whatever they are attended to, the newest come first.
    assert (np.diff(found[:, -RECENT:]) > 0).all()
    assert found[:, -RECENT:].min() > found[:, :-RECENT].max(initial=0)


def test_the_first_rule_ranks_as_snapkv() -> None:
    """Beside the window it is SnapKV's score."""
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(heads, 40, 8, generator=generator) for heads in (4, 2))
    snap = make_method("snapkv", SHAPE, budget=12, window=8)
    window = snap.scorer(query, key)
    found = rule_scores(query, key, 8, [0])[0]
    # The last two of the candidates are pooled with the window's first.
    torch.testing.assert_close(found[:, : window.shape[1] - 2], window[:, :-2])


@given(n=st.integers(3, 90), budget=st.integers(2, 60), seed=st.integers(0, 20))
def test_every_token_of_the_budget_is_spent(n: int, budget: int, seed: int) -> None:
    method = make_method("sensitivity", SHAPE, budget=budget, sensitivity=sensitivity(seed=seed))
    counts = tokens_per_head(method, n)
    assert counts.sum() == min(budget, n) * counts.size
    assert counts.min() >= 1
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(heads, n, 4, generator=generator) for heads in (4, 2))
    for layer in range(SHAPE.layers):
        kept = keep_rows((method,), PromptLayer(layer, query, key))[0]
        assert kept.sum(-1).tolist() == counts[layer].tolist()
        assert kept[:, -1].all()


def test_a_table_is_taken_at_its_own_budget() -> None:
    one = sensitivity(10)
    method = make_method("sensitivity", SHAPE, budget=10, sensitivity=one)
    assert (tokens_per_head(method, 1000) == one.tables[10]).all()


def test_the_nearest_table_is_scaled() -> None:
    one, other = sensitivity(10), sensitivity(40, seed=3)
    both = Sensitivity(SHAPE, 8, one.kinds, one.rules, {**one.tables, **other.tables})
    for budget, table, of in ((19, one.tables[10], 10), (21, other.tables[40], 40)):
        np.testing.assert_allclose(both.tokens(budget), 1 + (table - 1) * (budget - 1) / (of - 1))


def test_equal_methods_are_equal_and_keyed_by_content() -> None:
    make = lambda seed: make_method(  # noqa: E731
        "sensitivity", SHAPE, budget=10, sensitivity=sensitivity(seed=seed)
    )
    assert make(0) == make(0) != make(1)
    assert make(0).settings == {"budget": 10, "sensitivity": sensitivity().digest}


def test_mixtures() -> None:
    one = sensitivity()
    pages, scenes = np.array([[0, 2], [1, 0]]) / 3, np.array([[1, 0], [0, 1]]) / 2
    np.testing.assert_allclose(one.share(), (pages + scenes) / 2)
    of_kv = one.head_scores("root").per_kv_head(SHAPE.kv_heads)
    np.testing.assert_allclose(of_kv, (pages + scenes) / 2)
    of_kv = one.head_scores("share+pages").per_kv_head(SHAPE.kv_heads)
    np.testing.assert_allclose(of_kv, np.array([[0, 4], [1, 0]]) / 5)
    of_kv = one.head_scores("root+pages*3+scenes").per_kv_head(SHAPE.kv_heads)
    np.testing.assert_allclose(of_kv, (3 * pages + scenes) / 4)


@pytest.mark.parametrize(
    ("mixture", "words"),
    [("rot", "'rot'"), ("root+page", "no kind page"), ("root+pages*x", "weight is a number")],
)
def test_mixtures_that_cannot_be(mixture: str, words: str) -> None:
    with pytest.raises(UserError, match=words.replace("*", r"\*")):
        sensitivity().head_scores(mixture)


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    one, path = sensitivity(), tmp_path / "one.json"
    one.write(path)
    read = Sensitivity.read(path, SHAPE)
    assert read == one
    assert read.documents == {"pages": ("a", "b", "c"), "scenes": ("d", "e")}
    assert read_head_scores(path, SHAPE) == one.head_scores()
    assert read_head_scores(f"{path}@share+pages") == one.head_scores("share+pages")


def test_a_score_file_is_read_as_ever(tmp_path: Path) -> None:
    scores, path = HeadScores(np.arange(8).reshape(2, 4)), tmp_path / "scores.json"
    scores.write(path)
    assert read_head_scores(path, SHAPE) == scores
    with pytest.raises(UserError, match="mixture is chosen of a sensitivity file"):
        read_head_scores(f"{path}@root")
    with pytest.raises(UserError, match="not a sensitivity file"):
        Sensitivity.read(path)
    with pytest.raises(FileNotFoundError):
        read_head_scores(tmp_path / "none.json")


def changed(name: str, value: object) -> dict:
    return {**json.loads(json.dumps(sensitivity()._content())), name: value}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("format", "other", "its format is 'other'"),
        ("kinds", {}, "no kind of prompts"),
        ("window", 0, "its window is 0"),
        ("rules", [["window-avg5", "loud"], ["none", "none"]], "no rule 'loud'"),
        ("rules", [["none"]], "of shape"),
        ("tables", {"10": [[1, 1], [1, 1]]}, "10 in the mean"),
        ("tables", {"10": [[0, 20], [10, 10]]}, "a token at least"),
        ("tables", {"ten": [[10, 10], [10, 10]]}, "invalid literal"),
        ("layers", 3, "of shape"),
    ],
)
def test_files_that_cannot_be(tmp_path: Path, name: str, value: object, words: str) -> None:
    from sparsemm_eval.stored import with_checksum

    path = tmp_path / "one.json"
    path.write_text(json.dumps(with_checksum(changed(name, value))))
    with pytest.raises(UserError, match=words) as caught:
        Sensitivity.read(path)
    assert str(path) in str(caught.value)


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    sensitivity().write(path)
    path.write_text(path.read_text().replace("pages", "pager"))
    with pytest.raises(UserError, match=r"one\.json"):
        Sensitivity.read(path)


def test_plain_scores_have_no_table() -> None:
    one = sensitivity()
    plain = Sensitivity(SHAPE, 8, one.kinds, one.rules)
    with pytest.raises(UserError, match="--budgets"):
        make_method("sensitivity", SHAPE, budget=9, sensitivity=plain)
    with pytest.raises(UserError, match="measure it on this model"):
        make_method("sensitivity", ModelShape(3, 4, 2), budget=9, sensitivity=one)
