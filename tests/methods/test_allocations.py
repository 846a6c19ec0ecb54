"""How many tokens each head keeps, on cases small enough to work out by hand."""

from typing import Any

import numpy as np
import pytest
import torch
from methods.cases import crafted, even

from sparsemm_eval.methods import HeadScores, ModelShape, make_method

WINDOW = 2


def counts(
    name: str, shape: tuple[int, int, int], room: int, base: int, **settings: Any
) -> list[list[int]]:
    """Tokens beside the window per layer and KV head, for a prompt of `room` + window tokens."""
    model = ModelShape(*shape)
    method = make_method(name, model, budget=base + WINDOW, window=WINDOW, **settings)
    generator = torch.Generator().manual_seed(room)
    query = torch.randn(1, model.query_heads, WINDOW, 4, generator=generator)
    key = torch.randn(1, model.kv_heads, room + WINDOW, 4, generator=generator)
    masks = [method.keep(query, key, layer) for layer in range(model.layers)]
    return [(mask[0].sum(dim=-1) - WINDOW).tolist() for mask in masks]


def adakv(weights: list[list[float]], base: int, **settings: Any) -> list[list[int]]:
    """Positions kept beside the window, per head, when the window pays just these weights."""
    heads, room = len(weights), len(weights[0])
    method = make_method(
        "adakv",
        ModelShape(1, heads, heads),
        budget=base + WINDOW,
        window=WINDOW,
        kernel_size=1,
        **settings,
    )
    mask = method.keep(*crafted(weights, WINDOW), 0)
    assert mask[..., room:].all()
    return [row[:room].nonzero().flatten().tolist() for row in mask[0]]


def sizes(positions: list[list[int]]) -> list[int]:
    """Count each head's positions."""
    return [len(kept) for kept in positions]


# --- pyramidkv ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "room", "base", "paper", "exact"),
    [
        # lo 2, hi 78, step 76 // 4
        pytest.param(5, 100, 40, [78, 59, 40, 21, 2], [78, 59, 40, 21, 2], id="no-cap"),
        # step 38 // 3 = 12 leaves 1, 14, 27 where the ramp says 1
        pytest.param(4, 100, 20, [39, 27, 15, 3], [39, 26, 14, 1], id="step-rounded-down"),
        # hi 39 == n - w is capped to the same, and lo stays 1
        pytest.param(2, 39, 20, [39, 1], [39, 1], id="hi-meets-room"),
        # hi 39 -> 30, lo -> 10
        pytest.param(3, 30, 20, [30, 20, 10], [30, 20, 10], id="hi-above-room"),
        pytest.param(4, 21, 20, [21, 21, 21, 21], [21, 20, 20, 19], id="step-of-nothing"),
        pytest.param(1, 100, 20, [20], [20], id="one-layer"),
        pytest.param(1, 21, 20, [20], [20], id="one-layer-little-room"),
        pytest.param(2, 100, 1, [2, 0], [2, 0], id="base-one"),
    ],
)
def test_pyramid(layers: int, room: int, base: int, paper: list[int], exact: list[int]) -> None:
    for allocation, per_layer in (("paper", paper), ("exact", exact)):
        kept = counts("pyramidkv", (layers, 4, 2), room, base, allocation=allocation)
        assert kept == [[count, count] for count in per_layer]


@pytest.mark.parametrize(("layers", "base", "room"), [(21, 43, 84), (25, 103, 201), (29, 17, 34)])
def test_pyramids_ties_go_to_the_lower_layer(layers: int, base: int, room: int) -> None:
    """A step taken in float and multiplied up misses halves here: 20 * (82 / 20) is not 82."""
    high, low = room, 2 * base - room
    per_layer = [
        kept[0] for kept in counts("pyramidkv", (layers, 1, 1), room, base, allocation="exact")
    ]
    halves, steps = [], layers - 1
    for layer, kept in enumerate(per_layer):
        whole, rest = divmod(high * steps - layer * (high - low), steps)
        if 2 * rest == steps:
            halves.append(kept - whole)
        else:
            assert kept == whole + (2 * rest > steps), f"layer {layer}"
    assert halves == sorted(halves, reverse=True)
    assert 0 < sum(halves) < len(halves)
    assert sum(per_layer) == layers * base


# --- by head score ------------------------------------------------------------------------------


def test_sparsemm_rounds_halves_to_even() -> None:
    """Floor 1, pool 36: an eighth is 4.5 + 1, three eighths are 13.5 + 1."""
    scores = HeadScores(np.array([[1, 1], [3, 3]]))
    kept = counts("sparsemm", (2, 2, 2), 40, 10, head_scores=scores)
    assert kept == [[6, 6], [14, 14]]
    # Down here, and with the floor inside the rounding: 2.5 -> 2, 7.5 -> 8; 3.5 -> 4, 6.5 -> 6.
    assert counts("sparsemm", (2, 2, 2), 40, 5, head_scores=scores) == [[2, 2], [8, 8]]
    kept = counts("sparsemm", (2, 2, 2), 40, 5, head_scores=scores, ratio=0.4)
    assert kept == [[4, 4], [6, 6]]


def test_sparsemm_normalises_over_the_model_not_the_layer() -> None:
    scores = HeadScores(np.array([[1, 3], [5, 7]]))
    kept = counts("sparsemm", (2, 2, 2), 100, 8, head_scores=scores, ratio=0)
    assert kept == [[2, 6], [10, 14]]


def test_sparsemm_sums_a_group_of_neighbouring_query_heads() -> None:
    scores = HeadScores(np.array([[1, 2, 3, 10]]))
    kept = counts("sparsemm", (1, 4, 2), 100, 8, head_scores=scores, ratio=0)
    assert kept == [[3, 13]]


@pytest.mark.parametrize("allocation", ["paper", "exact"])
def test_ratio_one_is_uniform(allocation: str) -> None:
    scores = HeadScores(np.array([[1, 0], [5, 70]]))
    kept = counts("sparsemm", (2, 2, 2), 30, 9, head_scores=scores, ratio=1, allocation=allocation)
    assert kept == [[9, 9], [9, 9]]


def test_paper_loses_what_is_capped_and_exact_shares_it_by_want() -> None:
    """Floor 1 and pool 36: wants 19, 13, 7, 1 of a room for 12."""
    scores = HeadScores(np.array([[18, 12], [6, 0]]))
    paper = counts("sparsemm", (2, 2, 2), 12, 10, head_scores=scores)
    assert paper == [[12, 12], [7, 1]]
    # 16 are left for wants 7 and 1: 14 and 2; 14 is clipped, and the last head gets the rest.
    exact = counts("sparsemm", (2, 2, 2), 12, 10, head_scores=scores, allocation="exact")
    assert exact == [[12, 12], [12, 4]]


def test_exact_shares_equally_among_heads_that_want_nothing() -> None:
    """All of 40 go to one head with room for 20; ties go to the lower (layer, head)."""
    scores = HeadScores(np.array([[0, 9], [0, 0]]))
    paper = counts("sparsemm", (2, 2, 2), 20, 10, head_scores=scores, ratio=0)
    assert paper == [[0, 20], [0, 0]]
    exact = counts("sparsemm", (2, 2, 2), 20, 10, head_scores=scores, ratio=0, allocation="exact")
    assert exact == [[7, 20], [7, 6]]


def test_exact_gives_nothing_to_no_want_while_others_have_room() -> None:
    scores = HeadScores(np.array([[30, 9], [1, 0]]))
    exact = counts("sparsemm", (2, 2, 2), 20, 10, head_scores=scores, ratio=0, allocation="exact")
    # Wants 30, 9, 1, 0: 20 stay, 20 are shared 9 : 1.
    assert exact == [[20, 18], [2, 0]]


@pytest.mark.parametrize(
    ("scores", "base", "expected"),
    [
        # Wants 4/3, 4/3, 2, 10/3: three equal remainders, and floats see one of them larger.
        ([2, 2, 3, 5], 2, [2, 1, 2, 3]),
        ([3, 4, 4, 1], 2, [2, 3, 3, 0]),
        ([1, 1, 1, 1, 6], 1, [1, 1, 0, 0, 3]),
    ],
)
def test_ties_of_remainders_go_to_the_lower_head(
    scores: list[int], base: int, expected: list[int]
) -> None:
    heads = len(scores)
    settings = {"head_scores": HeadScores(np.array([scores])), "allocation": "exact", "ratio": 0}
    assert counts("sparsemm", (1, heads, heads), 50, base, **settings) == [expected]
    # The same down the layers.
    settings["head_scores"] = HeadScores(np.array(scores)[:, None])
    assert counts("sparsemm", (heads, 1, 1), 50, base, **settings) == [[x] for x in expected]


def test_random_is_sparsemm_on_a_recorded_draw() -> None:
    draw = np.random.Generator(np.random.PCG64(7)).random((3, 6))
    for allocation in ("paper", "exact"):
        common = {"ratio": 0.3, "allocation": allocation}
        own = counts("random", (3, 6, 2), 50, 20, seed=7, **common)
        assert own == counts("sparsemm", (3, 6, 2), 50, 20, head_scores=HeadScores(draw), **common)


# --- adakv --------------------------------------------------------------------------------------


def test_adakv_takes_the_layers_best_after_scaling() -> None:
    """Scales 1 and 4/10 make 1/3 and 0.04: the first head's three tokens, then five others."""
    assert sizes(adakv([even(3, 10), even(10, 10)], 4, floor=0)) == [3, 5]
    # Without the scaling, 0.1 of the second head would beat the 0.06 of the first.
    flat = [0.14, 0.14, 0.14, 0.14, 0.14, 0.06, 0.06, 0.06, 0.06, 0.06]
    assert sizes(adakv([flat, even(10, 10)], 5, floor=0)) == [5, 5]
    peaked = [0.5, 0.3, 0.05, 0.05, 0.05, 0.05, 0, 0, 0, 0]
    # Scales 0.85 and 0.3: 0.05 becomes 0.0425 and goes before 0.1, that becomes 0.03.
    assert sizes(adakv([peaked, even(10, 10)], 3, floor=0)) == [6, 0]


def test_adakv_rounds_halves_to_even() -> None:
    """Floor 2 beside half of 3 and 5, then of 1 and 7: 3.5, 4.5; 2.5, 5.5."""
    assert sizes(adakv([even(3, 10), even(10, 10)], 4, floor=0.5)) == [4, 4]
    assert sizes(adakv([even(1, 10), even(10, 10)], 4, floor=0.5)) == [2, 6]


def test_adakvs_floor_is_cut_down_to_a_whole_number() -> None:
    """int(0.2 * 4) = 0, so 0.8 of 3 and 5 is all they get: 2.4, 4.0."""
    weights = [even(3, 10), even(10, 10)]
    assert sizes(adakv(weights, 4)) == [2, 4]
    # Exact makes it 8 in all, in proportion: 3, 5.
    assert sizes(adakv(weights, 4, allocation="exact")) == [3, 5]


def test_adakvs_ties_go_to_the_lower_head() -> None:
    """16 equal scores, of which ten: 8 to the first head, 2 to the second."""
    same = [even(8, 8), even(8, 8)]
    assert adakv(same, 5, floor=0) == [list(range(8)), [0, 1]]
    assert sizes(adakv(same, 5)) == [7, 3]
    three = [even(4, 8, start=4), even(4, 8), even(4, 8, start=2)]
    assert adakv(three, 3, floor=0) == [[4, 5, 6, 7], [0, 1, 2, 3], [2]]


@pytest.mark.parametrize("floor", [0, 0.2])
def test_adakv_on_a_head_without_scores(floor: float) -> None:
    """Its factor is 1, its scores stay 0: it takes nothing, and keeps its floor's first tokens."""
    kept = adakv([[0.0] * 16, even(16, 16)], 5, floor=floor)
    assert sizes(kept) == [int(5 * floor), 9 if floor else 10]
    assert kept[0] == list(range(int(5 * floor)))


def test_adakv_on_a_layer_without_scores() -> None:
    """All tie at 0: the first head takes what it can."""
    assert adakv([[0.0] * 8, [0.0] * 8], 5, floor=0) == [list(range(8)), [0, 1]]


def test_adakvs_remainders_tie_as_fractions_do() -> None:
    """Of 15, heads hold 2, 7 and 6 and want 2.6, 6.6 and 5.8: the last and then the first.

    In floats 0.8 * 7 + 1 is a little above 6.6, and the second head would get the token.
    """
    weights = [even(2, 12), even(7, 12), even(12, 12)]
    assert sizes(adakv(weights, 5, floor=0)) == [2, 7, 6]
    assert sizes(adakv(weights, 5, allocation="exact")) == [3, 6, 6]


# --- selection ----------------------------------------------------------------------------------


def snapkv_positions(weights: list[float], base: int, **settings: Any) -> list[int]:
    """Positions one head keeps beside the window."""
    query, key = crafted([weights], WINDOW)
    method = make_method(
        "snapkv", ModelShape(1, 1, 1), budget=base + WINDOW, window=WINDOW, **settings
    )
    return method.keep(query, key, 0)[0, 0, : len(weights)].nonzero().flatten().tolist()


def test_equal_scores_go_to_the_lower_position() -> None:
    assert snapkv_positions(even(8, 16, start=4), 5, kernel_size=1) == [4, 5, 6, 7, 8]
    assert snapkv_positions(even(2, 16, start=9), 4, kernel_size=1) == [0, 1, 9, 10]


def test_average_pooling_counts_the_zeros_beyond_the_ends() -> None:
    """Even attention pools to 3/5 and 4/5 at the ends, so the middle comes first."""
    assert snapkv_positions(even(16, 16), 12) == list(range(2, 14))
    assert snapkv_positions(even(16, 16), 13) == [1, *range(2, 14)]
    assert snapkv_positions(even(16, 16), 14) == list(range(1, 15))


def test_maximum_pooling_spreads_a_peak_over_its_neighbours() -> None:
    peak = [0.0] * 16
    peak[1], peak[9] = 0.75, 0.25
    assert snapkv_positions(peak, 4, pooling="max") == [0, 1, 2, 3]
    assert snapkv_positions(peak, 6, pooling="max") == [0, 1, 2, 3, 7, 8]
    assert snapkv_positions(peak, 9, pooling="max") == [0, 1, 2, 3, 7, 8, 9, 10, 11]


def test_kernel_one_does_not_pool() -> None:
    peak = [0.0] * 16
    peak[5], peak[12] = 0.75, 0.25
    for pooling in ("avg", "max"):
        assert snapkv_positions(peak, 3, pooling=pooling, kernel_size=1) == [0, 5, 12]


def test_a_kernel_wider_than_the_prompt() -> None:
    assert snapkv_positions([0.25] * 4, 2, kernel_size=11) == [0, 1]


@pytest.mark.parametrize(("reduction", "expected"), [("mean", 3), ("max", 8)])
def test_query_heads_of_a_group_are_reduced(reduction: str, expected: int) -> None:
    """A token that both heads see a little against one that a single head sees more of."""
    query = torch.zeros(1, 2, WINDOW, 4)
    query[0, 0, :, 0] = query[0, 1, :, 1] = 1
    key = torch.full((1, 1, 12, 4), -2000.0)
    for token, seen in ((3, (0.4, 0.4)), (8, (0.6, 0.1)), (5, (0.0, 0.5))):
        for axis, weight in enumerate(seen):
            key[0, 0, token, axis] = 2 * np.log(weight) if weight else -2000.0
    method = make_method(
        "snapkv",
        ModelShape(1, 2, 1),
        budget=WINDOW + 1,
        window=WINDOW,
        kernel_size=1,
        group_reduction=reduction,
    )
    assert method.keep(query, key, 0)[0, 0, :10].nonzero().flatten().tolist() == [expected]


def test_the_windows_rows_are_causal() -> None:
    """A loud last token takes attention from the last row only; the first does not see it."""
    key = torch.zeros(1, 1, 10, 4)
    query = torch.zeros(1, 1, 2, 4)
    query[..., 0, 0] = query[..., 1, 1] = 1
    key[0, 0, 2, 0] = 2.0  # what the first row looks at
    key[0, 0, 6, 1] = 4.0  # what the last row would look at, were it not for the last token
    key[0, 0, 9, :2] = 40.0
    method = make_method("snapkv", ModelShape(1, 1, 1), budget=3, window=2, kernel_size=1)
    assert method.keep(query, key, 0)[0, 0].nonzero().flatten().tolist() == [2, 8, 9]
