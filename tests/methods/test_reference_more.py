"""The slow references against what the rules themselves imply, and cases done by hand."""

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import reference
from methods import reference_more as more

TRIES = settings(max_examples=25, deadline=None, derandomize=True, database=None)


def rotate(vector: np.ndarray, position: Any) -> np.ndarray:
    """Turn four numbers as two pairs, by a fast and a slow angle (of two axes, if it has three)."""
    fast, slow = (position[1], position[2]) if np.ndim(position) else (position, position)
    turned = np.zeros(4)
    for low, angle in ((0, 1.0 * fast), (1, 0.1 * slow)):
        a, b = vector[low], vector[low + 2]
        turned[low] = a * math.cos(angle) - b * math.sin(angle)
        turned[low + 2] = b * math.cos(angle) + a * math.sin(angle)
    return turned


@dataclass(frozen=True)
class Layer:
    """What a scorer is given of one layer, and its window."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    out_weight: np.ndarray
    visual: np.ndarray
    window: int

    def score(self, name: str, **setting: Any) -> np.ndarray:
        """Score the tokens before the window."""
        setting = {"window": self.window, "rotate": rotate, "future": 8, **setting}
        inputs = (self.query, self.key, self.value, self.out_weight, self.visual)
        return more.SCORERS[name](*inputs, **setting)


@st.composite
def layers(draw: st.DrawFn, group: int | None = None) -> Layer:
    heads = draw(st.integers(1, 3))
    group = draw(st.integers(1, 3)) if group is None else group
    window = draw(st.integers(1, 4))
    tokens = window + draw(st.integers(6, 18))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    first = draw(st.integers(0, 4))
    last = draw(st.integers(first + 1, tokens - 1))
    visual = np.array([first <= at < last for at in range(tokens)])
    return Layer(
        random.standard_normal((heads * group, tokens, 4)) * 2,
        random.standard_normal((heads, tokens, 4)),
        random.standard_normal((heads, tokens, 3)),
        random.standard_normal((5, heads * group * 3)),
        visual,
        window,
    )


# --- scorers ------------------------------------------------------------------------------------


@TRIES
@given(layer=layers())
@pytest.mark.parametrize("name", more.SCORERS)
def test_a_scorer_scores_the_tokens_before_the_window(name: str, layer: Layer) -> None:
    scores = layer.score(name)
    heads, tokens = layer.key.shape[:2]
    assert scores.shape == (heads, tokens - layer.window)
    assert scores.dtype == np.float64
    assert not np.isnan(scores).any()
    if name not in ("vlcache", "tgvkv", "expected"):  # which read more than the window's queries
        short = replace(layer, query=layer.query[:, -layer.window :])
        assert (short.score(name) == scores).all()


@TRIES
@given(
    layer=layers(), pooling=st.sampled_from(["avg", "max"]), how=st.sampled_from(["mean", "max"])
)
def test_window_attention_is_the_present_reference(layer: Layer, pooling: str, how: str) -> None:
    setting = reference.Setting(
        "snapkv", 1, len(layer.query), len(layer.key), window=layer.window, kernel_size=3,
        pooling=pooling, group_reduction=how,
    )  # fmt: skip
    scores = layer.score("snapkv", kernel_size=3, pooling=pooling, group_reduction=how)
    wanted = np.array(reference.layer_scores(setting, layer.query, layer.key))
    np.testing.assert_allclose(scores, wanted, rtol=1e-12)


@TRIES
@given(layer=layers())
def test_mixkv_between_its_ends(layer: Layer) -> None:
    """With no redundancy and constant norms it is SnapKV; with all of it, KeyDiff."""
    level = replace(layer, value=np.ones_like(layer.value))
    attention = layer.score("snapkv")
    assert (level.score("mixkv", r=0.0) == attention).all()
    diversity = layer.score("mixkv", r=1.0)
    assert (diversity.argsort() == layer.score("keydiff").argsort()).all()
    np.testing.assert_allclose(diversity.mean(1), attention.mean(1))
    np.testing.assert_allclose(layer.score("mixkv", r=0.0).mean(1), 2 * attention.mean(1))
    assert (diversity.min(1) == 0).all()


@TRIES
@given(layer=layers())
def test_mixkv_share_is_the_mean_similarity_of_two_keys(layer: Layer) -> None:
    for key in layer.key:
        units = key / np.linalg.norm(key, axis=-1, keepdims=True)
        pairs = [units[a] @ units[b] for a in range(len(key)) for b in range(a)]
        assert more.similarity(key) == pytest.approx(np.mean(pairs), abs=1e-12)
    assert more.similarity(np.ones((9, 4))) == pytest.approx(1)


@TRIES
@given(layer=layers())
def test_keydiff_is_of_directions_alone(layer: Layer) -> None:
    scale = np.random.default_rng(0).uniform(1, 3, layer.key.shape[:2])[..., None]
    longer = replace(layer, key=layer.key * scale)
    np.testing.assert_allclose(longer.score("keydiff"), layer.score("keydiff"), atol=1e-12)
    assert (np.abs(layer.score("keydiff")) <= 1 + 1e-12).all()
    same = more.keydiff(layer.query, np.ones((2, 7, 4)))
    assert same.tolist() == [[-1.0] * 7] * 2


def test_knorm_by_hand() -> None:
    key = np.array([[[3.0, 4.0], [0.0, 0.0], [0.0, -2.0]]])
    assert more.knorm(key, key).tolist() == [[-5.0, 0.0, -2.0]]


@TRIES
@given(layer=layers())
def test_tova_is_equal_over_heads(layer: Layer) -> None:
    scores = layer.score("tova")
    assert (scores == scores[0]).all()
    whole = layer.score("tova", window=0)
    np.testing.assert_allclose(whole.sum(1), 1)


@TRIES
@given(layer=layers(group=1))
def test_lava_is_window_attention_by_largest_value(layer: Layer) -> None:
    scores = layer.score("lava", kernel_size=3)
    plain = layer.score("snapkv", kernel_size=3, pooling="max")
    largest = np.abs(layer.value).sum(-1).max(-1)
    np.testing.assert_allclose(scores, plain * largest[:, None], rtol=1e-12)


@TRIES
@given(layer=layers())
def test_cake_without_variance_is_snapkv(layer: Layer) -> None:
    plain = layer.score("snapkv")
    np.testing.assert_allclose(layer.score("cake", gamma=0.0), plain, rtol=1e-12)
    assert (layer.score("cake") >= plain - 1e-15).all()
    if layer.window > 1:
        spread = layer.score("cake") - plain
        unbiased = layer.score("cake", ddof=1) - plain
        np.testing.assert_allclose(unbiased, spread * layer.window / (layer.window - 1), atol=1e-12)
    else:
        np.testing.assert_allclose(layer.score("cake"), plain, rtol=1e-12)


@TRIES
@given(layer=layers())
def test_vlcache_counts_what_the_text_after_the_image_pays(layer: Layer) -> None:
    tokens = layer.key.shape[1]
    rows = tokens - 1 - int(np.flatnonzero(layer.visual)[-1])
    np.testing.assert_allclose(layer.score("vlcache", window=0).sum(1), rows)
    density = more.vlcache_density(layer.query, layer.key, layer.visual)
    assert 0 < density <= 1
    even = more.vlcache_density(0 * layer.query, layer.key, layer.visual)
    assert even == 1
    with pytest.raises(ValueError, match="no text after"):
        more.post_vision(np.array([False, True]), 2)


@TRIES
@given(layer=layers(), axes=st.booleans())
def test_expected_of_one_query_is_its_attention(layer: Layer, axes: bool) -> None:
    """All queries alike before RoPE: no covariance, and the softmax of the one, turned on."""
    heads, tokens = layer.key.shape[:2]
    positions = np.arange(3, tokens + 3)
    constant = np.array([0.5, -1.0, 2.0, 0.25])
    query = np.array([[rotate(constant, p) for p in positions]] * len(layer.query))
    given = np.stack([positions] * 3) if axes else positions
    scores = more.expected(
        query, layer.key, layer.value, positions=given, rotate=rotate, future=1, sinks=2
    )
    later = rotate(constant, tokens + 3)
    for head in range(heads):
        weights = np.exp(layer.key[head] @ later / 2)
        wanted = weights / weights.sum() * np.linalg.norm(layer.value[head], axis=-1)
        assert (scores[head, :2] == np.inf).all()
        np.testing.assert_allclose(scores[head, 2:], wanted[2:], rtol=1e-9)


def test_expected_attention_of_a_gaussian() -> None:
    """The mean of exp(q k / sqrt(d)) over many queries is what the formula says."""
    random = np.random.default_rng(0)
    mix = random.standard_normal((4, 4)) / 3
    sample = random.standard_normal((400_000, 4)) @ mix.T + [0.3, 0.0, -0.2, 0.1]
    key = random.standard_normal((1, 6, 4))
    query = sample[None, :3000]
    # As many keys as queries: those of length 0 have weight 1, and what the others have beside it
    # is the mean wanted, the softmax aside.
    padded = np.concatenate([key, np.zeros((1, 2994, 4))], axis=1)
    value = np.ones((1, 3000, 1))
    scores = more.expected(query, padded, value, rotate=lambda v, p: v, future=1, sinks=0)
    wanted = np.exp(sample @ key[0].T / 2).mean(0)
    np.testing.assert_allclose(scores[0, :6] / scores[0, 10], wanted, rtol=0.05)


@TRIES
@given(layer=layers(), heads=st.sampled_from(["group", "layer"]), full=st.booleans())
def test_tgvkv_keeps_text_first(layer: Layer, heads: str, full: bool) -> None:
    scores = layer.score("tgvkv", window=0, heads=heads, full_softmax=full)
    for row in scores:
        assert row[~layer.visual].min() > row[layer.visual].max()
        assert (row >= 0).all()
    if heads == "layer":
        assert (scores == scores[0]).all()
    mass = more.tgvkv_mass(layer.query, layer.key, layer.visual)
    assert 0 < mass < (~layer.visual).sum()


def test_tgvkv_by_hand() -> None:
    """No query prefers any key: text tokens share evenly what each of them can see."""
    query, key = np.zeros((1, 4, 2)), np.ones((1, 4, 2))
    visual = np.array([False, True, True, False])
    scores = more.tgvkv(query, key, visual=visual)[0]
    # Text 0 gets 1 from itself and 1/2 from text 3, two rows; text 3 gets 1/2 from itself.
    # Text 3 alone sees the image, and pays each half of it 1/2.
    assert scores.tolist() == [1.25 + 0.75, 0.25, 0.25, 1.25 + 0.5]


# --- layers and heads ---------------------------------------------------------------------------

WEIGHTS = st.lists(st.floats(0, 100), min_size=1, max_size=8)


@TRIES
@given(weights=WEIGHTS, base=st.integers(1, 40), room=st.integers(1, 60))
def test_layers_share_the_total(weights: list[float], base: int, room: int) -> None:
    exact = more.share_layers(weights, base, room, "exact")
    assert sum(exact) == len(weights) * min(base, room)
    paper = more.share_layers(weights, base, room)
    assert all(0 <= count <= room for count in exact + paper)
    if max(paper) < room:
        assert abs(sum(paper) - len(weights) * base) <= len(weights) / 2
    order = np.argsort(weights, kind="stable")
    assert (np.diff(np.array(paper)[order]) >= 0).all()


@TRIES
@given(
    heads=st.integers(1, 3), room=st.integers(2, 30), base=st.integers(1, 30),
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_lava_spends_the_total_and_its_cascade_ends_there(
    heads: int, room: int, base: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    scores = [random.random((heads, room)) ** random.integers(1, 9) for _ in range(5)]
    exact = more.lava_counts(scores, base, "exact")
    assert sum(map(sum, exact)) == 5 * heads * min(base, room)
    wanted = [
        more.keep(layer, counts, 2)
        for layer, counts in zip(scores, more.lava_counts(scores, base), strict=True)
    ]
    for mask, want in zip(more.lava_cascade(scores, base, 2), wanted, strict=True):
        assert (mask == want).all()
    # A layer's heads keep its best tokens, whoever holds them.
    for layer, mask in zip(scores, wanted, strict=True):
        kept = layer[mask[:, :room]]
        left = layer[~mask[:, :room]]
        assert not len(kept) or not len(left) or kept.min() >= left.max()


def test_lava_entropy_by_hand() -> None:
    assert more.lava_entropy(np.full((2, 8), 0.3)) == pytest.approx(1)
    assert more.lava_entropy(np.array([[0.0, 5.0], [0.0, 0.0]])) == 0
    assert more.lava_entropy(np.array([[1.0, 1.0], [0.0, 0.0]])) == pytest.approx(0.5)


@TRIES
@given(layer=layers(), tau=st.sampled_from([0.5, 1.0, 2.0]))
def test_cake_preference(layer: Layer, tau: float) -> None:
    """A window that never moves has no preference; tau bends it."""
    setting = {"window": layer.window}
    plain = more.cake_preference(layer.query, layer.key, **setting)
    assert plain > 0 or layer.window == 1
    bent = more.cake_preference(layer.query, layer.key, tau1=tau, tau2=tau, **setting)
    assert bent == pytest.approx(plain ** (1 / tau))
    assert more.cake_preference(layer.query[:, -1:], layer.key, window=1) == 0


@TRIES
@given(
    densities=st.lists(st.floats(0.001, 1), min_size=1, max_size=8), tokens=st.integers(1, 300),
    data=st.data(),
)  # fmt: skip
def test_vlcache_layers_stay_in_bounds(
    densities: list[float], tokens: int, data: st.DataObject
) -> None:
    budget = data.draw(st.integers(1, tokens))
    paper = more.vlcache_layers(densities, budget, tokens)
    assert all(max(1, round(Fraction(tokens, 100))) <= count <= tokens for count in paper)
    exact = more.vlcache_layers(densities, budget, tokens, "exact")
    assert sum(exact) == budget * len(densities)
    assert all(0 <= count <= tokens for count in exact)
    assert more.vlcache_layers([0.3] * 4, budget, tokens) == [budget] * 4


@TRIES
@given(layer=layers(), base=st.integers(1, 12), floor=st.sampled_from([0.0, 0.2, 1.0]))
def test_adakv_splits_any_scores(layer: Layer, base: int, floor: float) -> None:
    heads, room = len(layer.key), layer.key.shape[1] - layer.window
    base = min(base, room)
    for name in ("mixkv", "lava", "keydiff", "tova", "tgvkv"):
        scores = layer.score(name)
        exact = more.adakv_counts(scores, base, floor, "exact")
        assert sum(exact) == heads * base
        paper = more.adakv_counts(scores, base, floor)
        assert all(int(floor * base) <= count <= room for count in paper)
        assert sum(paper) <= heads * base + heads / 2
    pyramid = more.pyramid_counts(4, heads, base, room, "exact")
    assert sum(map(sum, pyramid)) == 4 * heads * base
    assert more.uniform_counts(4, heads, base, room) == [[base] * heads] * 4


# --- what is kept -------------------------------------------------------------------------------


def test_keep_gives_ties_to_the_earlier_token() -> None:
    scores = np.array([[1.0, 2.0, 1.0, 2.0, 1.0], [0.0, -0.0, 0.0, -1.0, 0.0]])
    mask = more.keep(scores, [3, 2], 1)
    assert mask.astype(int).tolist() == [[1, 1, 0, 1, 0, 1], [1, 1, 0, 0, 0, 1]]


@TRIES
@given(layer=layers(), data=st.data(), name=st.sampled_from(["snapkv", "mixkv", "lava", "cake"]))
def test_criticalkv_changes_the_second_half_alone(
    layer: Layer, data: st.DataObject, name: str
) -> None:
    scores, window = layer.score(name), layer.window
    room = scores.shape[1]
    counts = [data.draw(st.integers(0, room)) for _ in scores]
    norms = more.output_norms(layer.value, layer.out_weight, len(layer.query))
    base = more.keep(scores, counts, window)
    even = more.critical_keep(scores, counts, window, np.full_like(norms, 2.0))
    assert (even == base).all()
    critical = more.critical_keep(scores, counts, window, norms)
    assert (critical.sum(1) == base.sum(1)).all()
    sure = more.keep(scores, [count // 2 for count in counts], window)
    assert (critical | sure == critical).all()


def test_criticalkv_by_hand() -> None:
    scores = np.array([[5.0, 4.0, 3.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    norms = np.array([[1.0, 0.1, 1.0, 4.0, 1.0, 7.0], [1.0, 2.0, 3.0, 0.0, 3.0, 0.0]])
    mask = more.critical_keep(scores, [3, 1], 1, norms)
    assert [np.flatnonzero(row).tolist() for row in mask] == [[0, 2, 3, 5], [2, 5]]


def test_output_norms_by_hand() -> None:
    """Two query heads, one KV head: the mean of what each of them writes."""
    value = np.array([[[1.0, -1.0], [2.0, 0.0]]])
    out_weight = np.array([[1.0, 0.0, 0.0, 3.0], [0.0, 1.0, -1.0, 0.0]])
    assert more.output_norms(value, out_weight, 2).tolist() == [[(2 + 4) / 2, (2 + 2) / 2]]


@TRIES
@given(layer=layers(), data=st.data())
def test_vlcache_protects_the_recent(layer: Layer, data: st.DataObject) -> None:
    scores = layer.score("vlcache", window=0)
    count = data.draw(st.integers(1, scores.shape[1]))
    mask = more.vlcache_keep(scores, count)
    assert (mask.sum(1) == count).all()
    protected = count // 10
    assert mask[:, scores.shape[1] - protected :].all()
