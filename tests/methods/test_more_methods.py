"""The field's other methods against references that were written from their rules alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from methods import reference, reference_more

from sparsemm_eval.errors import UserError
from sparsemm_eval.methods import (
    AHEAD,
    HeadScores,
    Method,
    ModelShape,
    PromptLayer,
    keep_prompt,
    make_method,
)

# Near-equal numbers are left out: float32 or float64, one of two orders is as good as the other.
NEAR = 1e-9
DIM = 4


@dataclass(frozen=True, repr=False)
class Drawn:
    """One prompt's layers in float64, as numpy has them."""

    seed: int
    shape: ModelShape
    query: list[np.ndarray]
    key: list[np.ndarray]
    value: list[np.ndarray]
    output: list[np.ndarray]
    visual: np.ndarray
    head_scores: np.ndarray

    def __repr__(self) -> str:
        return f"Drawn({self.seed}, {self.shape}, {self.visual.astype(int)})"

    @property
    def tokens(self) -> int:
        return self.key[0].shape[1]

    def layers(self, dtype: torch.dtype = torch.float64) -> list[PromptLayer]:
        """The same for the package."""
        names = ("query", "key", "value", "output")
        return [
            PromptLayer(
                index,
                **{name: torch.tensor(getattr(self, name)[index], dtype=dtype) for name in names},
                visual=torch.tensor(self.visual),
                rotation=torch.tensor(turns(self.tokens + AHEAD), dtype=dtype),
            )
            for index in range(self.shape.layers)
        ]

    def scores(self, name: str, **settings: Any) -> list[np.ndarray]:
        """Scores of each layer by the reference."""
        score = reference_more.SCORERS[name]
        return [
            score(q, k, v, o, self.visual, None, **settings)
            for q, k, v, o in zip(self.query, self.key, self.value, self.output, strict=True)
        ]

    def norms(self) -> list[np.ndarray]:
        """What values become in the output, by the reference."""
        return [
            reference_more.output_norms(v, o, self.shape.query_heads)
            for v, o in zip(self.value, self.output, strict=True)
        ]

    def make(self, name: str, **given: Any) -> Method:
        """The method under test."""
        if "sparsemm" in name:
            given["head_scores"] = HeadScores(self.head_scores)
        return make_method(name, self.shape, **given)


def turns(count: int) -> np.ndarray:
    """Cosines and sines of RoPE at the first positions, [2, count, d]."""
    angles = np.arange(count)[:, None] / 100.0 ** (np.arange(0, DIM, 2) / DIM)
    angles = np.concatenate([angles, angles], 1)
    return np.stack([np.cos(angles), np.sin(angles)])


def rotated(vector: np.ndarray, position: int) -> np.ndarray:
    """A vector at a position."""
    cos, sin = turns(position + 1)[:, position]
    first, second = np.split(vector, 2)
    return vector * cos + np.concatenate([-second, first]) * sin


@st.composite
def prompts(draw: st.DrawFn, most: int = 4) -> Drawn:
    """Random layers of unlike sharpness; an image with text before and behind it."""
    heads, group = draw(st.integers(1, min(3, most))), draw(st.sampled_from([1, 2, 3, 7][:most]))
    shape = ModelShape(draw(st.integers(1, most)), heads * group, heads)
    before, image, behind = (
        draw(st.integers(0, 6)),
        draw(st.integers(3, 40)),
        draw(st.integers(1, 9)),
    )
    n, dim = before + image + behind, DIM
    seed = draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)

    def normal(*size: int) -> list[np.ndarray]:
        return [rng.standard_normal(size) for _ in range(shape.layers)]

    query = [q * rng.choice([0.3, 1, 3], (len(q), 1, 1)) for q in normal(heads * group, n, dim)]
    return Drawn(
        seed,
        shape,
        query,
        normal(heads, n, dim),
        normal(heads, n, dim),
        normal(5, heads * group * dim),
        _between(n, before, image),
        rng.random((shape.layers, heads * group)) ** 3 + 1e-3,
    )


def _between(n: int, first: int, count: int) -> np.ndarray:
    places = np.arange(n)
    return (places >= first) & (places < first + count)


Counts = list[list[int]]


def uniform(drawn: Drawn, scores: list[np.ndarray], base: int, allocation: str) -> Counts:
    heads = drawn.shape.kv_heads
    return reference_more.uniform_counts(drawn.shape.layers, heads, base, scores[0].shape[1])


def adakv(drawn: Drawn, scores: list[np.ndarray], base: int, allocation: str) -> Counts:
    return [reference_more.adakv_counts(layer, base, allocation=allocation) for layer in scores]


def pyramid(drawn: Drawn, scores: list[np.ndarray], base: int, allocation: str) -> Counts:
    shape, room = drawn.shape, scores[0].shape[1]
    return reference_more.pyramid_counts(shape.layers, shape.kv_heads, base, room, allocation)


def sparsemm(drawn: Drawn, scores: list[np.ndarray], base: int, allocation: str) -> Counts:
    shape = drawn.shape
    setting = reference.Setting(
        "sparsemm", shape.layers, shape.query_heads, shape.kv_heads, base, 0,
        allocation=allocation, head_scores=drawn.head_scores,
    )  # fmt: skip
    return reference.sparsemm(setting, scores[0].shape[1])


def pyramid_ada(drawn: Drawn, scores: list[np.ndarray], base: int, allocation: str) -> Counts:
    bases = pyramid(drawn, scores, base, allocation)
    return [
        reference_more.adakv_counts(layer, counts[0], allocation=allocation)
        for layer, counts in zip(scores, bases, strict=True)
    ]


def lava(drawn: Drawn, scores: list[np.ndarray], base: int, allocation: str) -> Counts:
    return reference_more.lava_counts(scores, base, allocation)


def _shared(
    weigh: Callable[..., float], budget: Callable[..., list[int]] = reference_more.share_layers
) -> Callable[..., Counts]:
    def counts(drawn: Drawn, scores: list[np.ndarray], base: int, allocation: str) -> Counts:
        window = drawn.tokens - scores[0].shape[1]
        weights = [
            weigh(q, k, visual=drawn.visual, window=window)
            for q, k in zip(drawn.query, drawn.key, strict=True)
        ]
        wants = np.array(weights) / (sum(weights) or 1) * len(weights) * base
        # A share of 27.5 is one or the other, as its last bit falls.
        assume((np.abs(wants % 1 - 0.5) > NEAR).all())
        layers = budget(weights, base, scores[0].shape[1], allocation)
        return [[count] * drawn.shape.kv_heads for count in layers]

    return counts


cake = _shared(reference_more.cake_preference)
tgvkv = _shared(reference_more.tgvkv_mass)
vlcache = _shared(reference_more.vlcache_density, reference_more.vlcache_layers)
# Scorer and counts of the reference by the method's name.
METHODS: Mapping[str, tuple[str, Callable[..., Counts]]] = {
    "mixkv": ("mixkv", uniform),
    "mixkv+adakv": ("mixkv", adakv),
    "mixkv+pyramidkv": ("mixkv", pyramid),
    "mixkv+sparsemm": ("mixkv", sparsemm),
    "pyramidkv+adakv": ("snapkv", pyramid_ada),
    "criticalkv": ("snapkv", uniform),
    "criticalkv+adakv": ("snapkv", adakv),
    "criticalkv+sparsemm": ("snapkv", sparsemm),
    "criticalkv+cake": ("cake", cake),
    "lava": ("lava", lava),
    "vlcache": ("vlcache", vlcache),
    "keydiff": ("keydiff", uniform),
    "tova": ("tova", uniform),
    "knorm": ("knorm", uniform),
    "cake": ("cake", cake),
    "tgvkv": ("tgvkv", tgvkv),
    "keydiff+sparsemm": ("keydiff", sparsemm),
    "expected": ("expected", uniform),
}
# Tokens that are set apart by those that have no window.
RESERVED = {"expected": 0, "vlcache": 0, "tova": 1, "keydiff": 0, "knorm": 0, "tgvkv": 0}

# The reference has the public code's pooling for these.
LIKE_OURS = {
    "lava": {"kernel_size": 5, "pooling": "avg"},
    "expected": {"rotate": lambda vector, position: rotated(vector, int(position))},
}


def apart(scores: np.ndarray) -> bool:
    """Whether no two scores of a head are nearly but not quite equal."""
    ordered = np.sort(scores, axis=-1)
    gaps = np.diff(ordered, axis=-1)
    return not ((gaps > 0) & (gaps < NEAR * np.abs(ordered[:, 1:]).clip(1e-12))).any()


@pytest.mark.parametrize("allocation", ["paper", "exact"])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "expected"])
@settings(max_examples=25, deadline=None)
@given(prompts(), st.integers(1, 40), st.integers(1, 4))
def test_a_prompt_keeps_what_the_reference_keeps(
    name: str, allocation: str, drawn: Drawn, base: int, window: int
) -> None:
    compare(name, allocation, drawn, base, window)


@settings(max_examples=8, deadline=None)
@given(prompts(most=2), st.integers(5, 20))
def test_expected_attention_keeps_what_the_reference_keeps(drawn: Drawn, base: int) -> None:
    """Of few heads, as the reference is slow; the sinks and one more token at least."""
    compare("expected", "paper", drawn, base, 1)


def compare(name: str, allocation: str, drawn: Drawn, base: int, window: int) -> None:
    """A prompt under a method, and by the reference."""
    scorer, count = METHODS[name]
    window = min(window, drawn.tokens - 2)
    reserved = RESERVED.get(scorer, window)
    given = {} if scorer in RESERVED else {"window": window}
    budget = base + reserved
    assume(budget < drawn.tokens)
    if name == "expected":  # the sinks and one more at least; the reference is slow
        assume(budget > 4 and drawn.shape.layers == 1 and drawn.shape.query_heads <= 3)
    method = drawn.make(name, budget=budget, **given, allocation=allocation)
    scores = drawn.scores(scorer, window=reserved, **LIKE_OURS.get(scorer, {}))
    assume(all(apart(layer) for layer in scores))
    counts = count(drawn, scores, base, "exact" if method.exact else "paper")
    kept = keep_prompt([method], drawn.layers())
    norms = drawn.norms()
    for layer, of_layer in enumerate(kept):
        if name.startswith("criticalkv"):
            wanted = reference_more.critical_keep(
                scores[layer], counts[layer], reserved, norms[layer]
            )
        elif name == "vlcache":
            wanted = reference_more.vlcache_keep(scores[layer], counts[layer][0])
        else:
            wanted = reference_more.keep(scores[layer], counts[layer], reserved)
        assert of_layer[0].sum(-1).tolist() == wanted.sum(-1).tolist(), (layer, counts)
        assert torch.equal(of_layer[0], torch.tensor(wanted)), layer
    if method.exact:
        assert sum(int(of_layer.sum()) for of_layer in kept) == (
            budget * drawn.shape.layers * drawn.shape.kv_heads
        )


@settings(max_examples=25, deadline=None)
@given(prompts(), st.integers(1, 30))
def test_methods_together_keep_what_each_keeps_alone(drawn: Drawn, base: int) -> None:
    """Those of one layer at a time, those of all layers, and full KV."""
    assume(base + 2 < drawn.tokens and base > 3)
    methods = [
        drawn.make("fullkv"),
        *(
            drawn.make(name, budget=base + 2, **given)
            for name, (scorer, _) in METHODS.items()
            for given in ({} if scorer in RESERVED else {"window": 2},)
        ),
    ]
    layers = drawn.layers(torch.float32)
    together = keep_prompt(methods, layers)
    for row, method in enumerate(methods):
        for both, alone in zip(together, keep_prompt([method], layers), strict=True):
            assert torch.equal(both[row], alone[0]), method


@settings(max_examples=25, deadline=None)
@given(prompts(), st.integers(3, 30))
def test_identities(drawn: Drawn, base: int) -> None:
    """What one method becomes where what sets it apart does not."""
    assume(base + 2 < drawn.tokens)
    layers = drawn.layers()

    def keep(name: str, given: list[PromptLayer]) -> list[torch.Tensor]:
        return keep_prompt([drawn.make(name, budget=base + 2, window=2)], given)

    def alike(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    # Equal norms behind the output projection.
    equal = [
        PromptLayer(one.index, one.query, one.key, torch.ones_like(one.value), one.output)
        for one in layers
    ]
    for base_method in ("adakv", "sparsemm", "pyramidkv"):
        joined = f"criticalkv+{base_method}"
        # The first half's threshold and the second's are of one order then.
        assert alike(keep(joined, equal), keep(base_method, equal))
    # Values of one norm, and keys that are alike by 0: in pairs that point away from each other.
    opposite = []
    for one in layers:
        key = torch.zeros_like(one.key)
        key[..., 0] = torch.where(torch.arange(key.shape[1]) % 2 == 0, 1.0, -1.0)
        opposite.append(PromptLayer(one.index, one.query, key, torch.ones_like(one.value)))
    if drawn.tokens % 2 == 0:
        # r is -1/(n - 1) then, and the mean key 0, so that all are equally unlike it.
        assert alike(keep("mixkv", opposite), keep("snapkv", opposite))


def test_hidden_is_what_a_prompt_without_its_question_keeps() -> None:
    """Up to the last visual token as a prompt of that length; all that stands behind is kept."""
    shape = ModelShape(3, 4, 2)
    generator = torch.Generator().manual_seed(3)
    n, image = 60, 50
    visual = torch.zeros(n, dtype=torch.bool)
    visual[5:image] = True
    layers = [
        PromptLayer(
            layer,
            torch.randn(4, n, 8, generator=generator),
            torch.randn(2, n, 8, generator=generator),
            visual=visual,
        )
        for layer in range(3)
    ]
    short = [layer.first(image) for layer in layers]
    for name in ("snapkv", "adakv", "cake", "keydiff"):
        given = {"budget": 20, "window": 4}
        if name == "keydiff":
            del given["window"]
        hidden = make_method(name, shape, **given, question="hidden")
        seen = make_method(name, shape, **given)
        whole = keep_prompt([seen, hidden], layers)
        for kept, of_short in zip(whole, keep_prompt([seen], short), strict=True):
            assert torch.equal(kept[1][:, :image], of_short[0])
            assert kept[1][:, image:].all()
        assert not hidden.query_aware
        assert seen.query_aware == (name != "keydiff")


def test_a_share_of_the_prompt_is_a_budget() -> None:
    method = make_method("snapkv", ModelShape(2, 4, 2), budget=0.1, window=4)
    assert [method.tokens(n) for n in (30, 100, 1005)] == [5, 10, 100]
    assert not method.keeps_all(30)
    assert "budget=0.1" in str(method)
    query, key = torch.randn(1, 4, 100, 8), torch.randn(1, 2, 100, 8)
    assert method.keep(query, key, 0).sum(-1).tolist() == [[10, 10]]
    for wrong in (1.5, 0.0, -0.1, 1.0):
        with pytest.raises(UserError, match=r"between 0 and 1, such as 0\.1"):
            make_method("snapkv", ModelShape(2, 4, 2), budget=wrong)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("adakv+mixkv", "it is written mixkv+adakv"),
        ("mixkv+snapkv", "snapkv brings nothing"),
        ("mixkv+fullkv", "fullkv brings nothing"),
        ("mixkv+cake", "mixkv and cake both score tokens"),
        ("sparsemm+adakv", "sparsemm and adakv both share the budget among heads"),
        ("pyramidkv+sparsemm", "pyramidkv and sparsemm both share the budget among layers"),
        ("mixkv+nothing", "method='nothing' in 'mixkv+nothing': it must be one of fullkv"),
        ("lava+adakv", "lava and adakv both share the budget among heads"),
    ],
)
def test_what_does_not_fit_together_is_refused(name: str, words: str) -> None:
    with pytest.raises(UserError) as refused:
        make_method(name, ModelShape(2, 4, 2), budget=64)
    assert words in str(refused.value)


@pytest.mark.parametrize("seen", [0, 40, 33], ids=["no image", "no text", "a question"])
@pytest.mark.parametrize("question", ["seen", "hidden"])
@pytest.mark.parametrize("name", ["vlcache", "tgvkv"])
def test_prompts_of_text_or_of_an_image_alone(name: str, question: str, seen: int) -> None:
    shape = ModelShape(2, 4, 2)
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(heads, 40, 8, generator=generator) for heads in (4, 2))
    layers = [PromptLayer(layer, query, key, visual=torch.arange(40) < seen) for layer in (0, 1)]
    for budget in (1, 12):
        method = make_method(name, shape, budget=budget, allocation="exact", question=question)
        kept = sum(int(mask.sum()) for mask in keep_prompt([method], layers))
        behind = 40 - seen if question == "hidden" and seen else 0
        assert kept == 2 * 2 * (budget + behind)
