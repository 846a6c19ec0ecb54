"""Prompts and methods to try, and the comparison of a mask with the reference.

Queries and keys are small multiples of powers of two and the head dimension is a power of four, so
every attention logit is exact in float32, from whichever dtype the inputs come. What is left of
rounding moves a score by some 1e-7 of itself; that is all the comparison has to forgive.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from methods.reference import Answer, Setting, keep

from sparsemm_eval.methods import HeadScores, Method, ModelShape, make_method

SCORED = ("snapkv", "pyramidkv", "adakv", "sparsemm", "random")
BY_POSITION = ("fullkv", "local", "streaming")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Two tokens may change places when their reference scores differ by less than this (relative).
NEAR = 1e-6


@dataclass(frozen=True)
class Case:
    """A method and a left-padded batch of prompts; `tokens` are the rows' valid lengths."""

    method: str
    settings: Mapping[str, Any]
    shape: tuple[int, int, int]
    tokens: tuple[int, ...]
    padding: int = 0
    whole_query: bool = True
    dtype: torch.dtype = torch.float32
    seed: int = 0
    head_scores: np.ndarray | None = None

    @property
    def width(self) -> int:
        """Tokens of a row, padding included."""
        return max(self.tokens) + self.padding

    def make(self) -> Method:
        """Build the method under test."""
        settings = dict(self.settings)
        if self.head_scores is not None:
            settings["head_scores"] = HeadScores(self.head_scores)
        return make_method(self.method, ModelShape(*self.shape), **settings)

    def setting(self) -> Setting:
        """Build the same for the reference."""
        return Setting(self.method, *self.shape, head_scores=self.head_scores, **self.settings)

    def batch(self) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
        """Draw queries and keys of each layer, and which positions are valid."""
        layers, query_heads, kv_heads = self.shape
        rows = len(self.tokens)
        generator = np.random.default_rng(self.seed)
        dim = int(generator.choice([4, 16]))
        valid = np.arange(self.width) >= self.width - np.array(self.tokens)[:, None]
        queries, keys = [], []
        for _ in range(layers):
            # Heads of unlike sharpness, or AdaKV would have nothing to adapt to.
            sharpness = generator.choice([0.25, 0.5, 1.0, 2.0], size=(rows, query_heads, 1, 1))
            queries.append(
                _eighths(generator, (rows, query_heads, self.width, dim), valid) * sharpness
            )
            keys.append(_eighths(generator, (rows, kv_heads, self.width, dim), valid))
        as_tensor = [[torch.tensor(x, dtype=self.dtype) for x in side] for side in (queries, keys)]
        return as_tensor[0], as_tensor[1], torch.tensor(valid)

    def masks(self) -> np.ndarray:
        """Run the method under test: [layers, rows, kv heads, width]."""
        method = self.make()
        queries, keys, valid = self.batch()
        given = None if bool(valid.all()) else valid
        window = self.settings.get("window")
        if window is not None and not self.whole_query and window <= self.width:
            queries = [query[:, :, -window:] for query in queries]
        return np.stack(
            [
                method.keep(query, key, layer, valid=given).numpy()
                for layer, (query, key) in enumerate(zip(queries, keys, strict=True))
            ]
        )

    def answers(self) -> list[Answer]:
        """Ask the reference, row by row and without padding."""
        queries, keys, _ = self.batch()
        return [
            keep(
                self.setting(),
                [query[row, :, self.width - tokens :].double().numpy() for query in queries],
                [key[row, :, self.width - tokens :].double().numpy() for key in keys],
            )
            for row, tokens in enumerate(self.tokens)
        ]


def _eighths(
    generator: np.random.Generator, size: tuple[int, ...], valid: np.ndarray
) -> np.ndarray:
    drawn = np.clip(np.round(generator.standard_normal(size) * 8), -24, 24) / 8
    # Loud padding: were it looked at, it would take all the attention.
    return np.where(valid[:, None, :, None], drawn, 64.0)


@st.composite
def cases(draw: st.DrawFn, method: str, allocation: str = "paper") -> Case:
    """Draw a small case of a method."""
    kv_heads = draw(st.integers(1, 3))
    group = draw(st.sampled_from([1, 1, 2, 3, 4, 7, 8]))
    shape = (draw(st.integers(1, 6)), kv_heads * group, kv_heads)
    seed = draw(st.integers(0, 2**32 - 1))
    scores = None
    if method == "sparsemm":
        # From even to so unequal that few heads hold nearly all, some of them equal.
        spread = draw(st.sampled_from([0.0, 0.5, 2.0, 4.0]))
        normal = np.random.default_rng(seed).standard_normal(shape[:2])
        scores = np.exp(spread * normal)
        scores[normal < draw(st.sampled_from([-9.0, -0.5, 0.5]))] = draw(st.sampled_from([0, 1]))
        scores[0, 0] = 1.0
    return Case(
        method=method,
        settings=draw(_settings(method, allocation)),
        shape=shape,
        tokens=tuple(draw(st.lists(st.integers(1, 120), min_size=1, max_size=3))),
        padding=draw(st.sampled_from([0, 0, 1, 5])),
        whole_query=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=seed,
        head_scores=scores,
    )


@st.composite
def _settings(draw: st.DrawFn, method: str, allocation: str) -> dict[str, Any]:
    if method == "fullkv":
        return {}
    if method == "local":
        return {"budget": draw(st.integers(1, 60))}
    if method == "streaming":
        sinks = draw(st.integers(0, 8))
        return {"budget": sinks + draw(st.integers(1, 60)), "sinks": sinks}
    window = draw(st.integers(1, 12))
    settings = {
        "window": window,
        "budget": window + draw(st.integers(1, 40)),
        "kernel_size": draw(st.sampled_from([1, 3, 5, 7, 9])),
        "pooling": draw(st.sampled_from(["avg", "max"])),
        "group_reduction": draw(st.sampled_from(["mean", "max"])),
        "allocation": allocation,
    }
    share = st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0])
    if method == "adakv":
        settings["floor"] = draw(share)
    if method in ("sparsemm", "random"):
        settings["ratio"] = draw(share)
    if method == "random":
        settings["seed"] = draw(st.integers(0, 2**31))
    return settings


@dataclass
class Tally:
    """How much was compared, and how much of it was forgiven."""

    tokens: int = 0
    swapped: int = 0
    layers: int = 0
    unstable: int = 0
    forgiven: list[str] = field(default_factory=list)

    def compare(self, case: Case) -> None:
        """Compare the masks of all layers and rows of a case with the reference."""
        masks = case.masks()
        assert masks.dtype == bool
        for row, answer in enumerate(case.answers()):
            start = case.width - answer.tokens
            assert not masks[:, row, :, :start].any(), "padding is kept"
            for layer in range(case.shape[0]):
                self._compare_layer(masks[layer, row, :, start:], answer, layer)

    def _compare_layer(self, mask: np.ndarray, answer: Answer, layer: int) -> None:
        self.layers += 1
        counts = mask.sum(axis=-1).tolist()
        steady = answer.stable[layer] or counts == answer.counts[layer]
        if not steady:
            # The layer's cut runs through tokens of several heads that float32 cannot tell apart.
            self.unstable += 1
            off = [abs(a - b) for a, b in zip(counts, answer.counts[layer], strict=True)]
            assert max(off) <= 1, (counts, answer.counts[layer])
            self.forgiven.append(f"counts {counts}, reference {answer.counts[layer]}")
            return
        assert counts == answer.counts[layer], f"layer {layer}"
        for head, wanted in enumerate(answer.positions[layer]):
            kept = np.flatnonzero(mask[head]).tolist()
            self.tokens += len(kept)
            if kept != wanted:
                assert answer.scores is not None, (kept, wanted)
                self._forgive(answer.scores[layer][head], kept, wanted)

    def _forgive(self, scores: np.ndarray, kept: list[int], wanted: list[int]) -> None:
        """Let near-equal tokens change places; the window and exact ties are beyond it."""
        extra = sorted(set(kept) - set(wanted))
        missing = sorted(set(wanted) - set(kept))
        assert max(extra + missing) < len(scores), "the window is not whole"
        for token in extra:
            gaps = [scores[other] - scores[token] for other in missing]
            near = [0 < gap <= NEAR * scores[token] for gap in gaps]
            assert all(near), f"kept {extra}, not {missing}; scores apart by {gaps}"
        self.swapped += len(extra)
        self.forgiven.append(f"kept {extra}, reference {missing}")

    def assert_strict(self) -> None:
        """Check that next to nothing had to be forgiven."""
        assert self.layers > 0
        assert self.swapped <= 1e-4 * self.tokens, self.forgiven
        assert self.unstable <= 0.005 * self.layers, self.forgiven


def crafted(weights: list[list[float]], window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Make a query and a key of one row whose window pays each token just these weights.

    A row of `weights` is a KV head (and its only query head); zero weights come out as exact
    zeros, and equal weights whose number is a power of two as exact fractions.
    """
    rows = np.array(weights, dtype=np.float64)
    heads, tokens = rows.shape
    # The window itself gets nothing, so causality does not change the weights from row to row.
    logits = np.full((heads, tokens + window), -2000.0)
    positive = rows > 0
    logits[:, :tokens][positive] = np.log(rows[positive])
    # Except by heads that pay nothing to any token.
    logits[~positive.any(axis=1), tokens:] = 0.0
    query = torch.zeros(1, heads, window, 4)
    query[..., 0] = 1
    key = torch.zeros(1, heads, tokens + window, 4)
    key[0, ..., 0] = torch.tensor(2 * logits)
    return query, key


def even(tokens: int, room: int, start: int = 0) -> list[float]:
    """Spread a head's attention evenly over `tokens` of its `room` tokens."""
    return [1 / tokens if start <= at < start + tokens else 0.0 for at in range(room)]
