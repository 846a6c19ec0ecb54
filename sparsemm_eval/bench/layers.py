"""What is attended to: a layer of a real model, how many tokens its heads keep, and tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsemm_eval.bench.models import DTYPES, shape_config
from sparsemm_eval.cache import RaggedKV
from sparsemm_eval.methods import ModelShape

TOP_HEADS, TOP_TOKENS = 0.05, 0.55
DISTRIBUTIONS = ("heavy", "uniform")
LAYERS = ("vicuna", "mistral", "qwen2vl")  # of LLaVA-NeXT 7B and of Qwen2-VL 7B
SLACK = 16  # of a cache just packed


@dataclass(frozen=True)
class Case:
    """One layer of a model with so many tokens.

    Parameters
    ----------
    shape : str
        A name in `LAYERS`.
    mean : int
        Tokens a KV head has kept, on average over rows and heads.
    distribution : {"heavy", "uniform"}
        How they are spread, see `draw_lengths`.
    rows : int
        Samples decoded together.
    dtype : str
        A name in `DTYPES`.
    """

    shape: str
    mean: int
    distribution: str
    rows: int
    dtype: str

    @property
    def layer(self) -> ModelShape:
        """The model that the shape names; a layer is like all its others."""
        return layer_shape(self.shape)

    @property
    def element_size(self) -> int:
        """Bytes of a number."""
        return DTYPES[self.dtype].itemsize

    def lengths(self) -> list[int]:
        """Tokens of each of the rows * KV heads sequences; the same in every run."""
        return draw_lengths(self.distribution, self.rows * self.layer.kv_heads, self.mean)


@cache
def layer_shape(name: str) -> ModelShape:
    """Heads of a model of `LAYERS`."""
    return ModelShape.from_config(shape_config(name))


def draw_lengths(distribution: str, sequences: int, mean: int, seed: int = 0) -> list[int]:
    """Tokens of each sequence (a row's KV head), in random order.

    Parameters
    ----------
    distribution : {"heavy", "uniform"}
        uniform: ``mean`` in each. heavy: the top 5% of all sequences (rounded, at least one: the
        largest head where there are few) hold 55% of the tokens, the others the rest; within each
        of the two the longest is up to three times the shortest.
    sequences, mean : int
        Their number and mean length; exact.
    seed : int
        Of the draw.
    """
    top = top_sequences(sequences)
    if distribution == "uniform" or top == sequences:
        return [mean] * sequences
    generator = np.random.default_rng(seed)
    total = mean * sequences
    most = round(TOP_TOKENS * total)
    parts = ((top, most), (sequences - top, total - most))
    lengths = [length for count, tokens in parts for length in _spread(generator, count, tokens)]
    return generator.permutation(lengths).tolist()


def top_sequences(sequences: int) -> int:
    """How many of all sequences are the top 5%."""
    return max(1, round(TOP_HEADS * sequences))


def _spread(generator: np.random.Generator, count: int, tokens: int) -> list[int]:
    """Integers that sum to ``tokens``, none more than about three times another."""
    shares = generator.uniform(0.5, 1.5, count)
    ends = np.rint(shares.cumsum() / shares.sum() * tokens).astype(int)
    return np.diff(ends, prepend=0).tolist()


def bytes_moved(lengths: Sequence[int], shape: ModelShape, element_size: int) -> int:
    """The least that one token a sequence must move through memory.

    Keys and values of what each sequence then holds, the new token included, are read; the new
    token is written; queries are read and outputs written.
    """
    vectors = 2 * (sum(lengths) + len(lengths))  # read: keys, values
    vectors += 2 * len(lengths)  # written: the new token
    vectors += 2 * len(lengths) * shape.group_size  # queries, outputs
    return vectors * shape.head_dim * element_size


class Token(NamedTuple):
    """What one step brings to a layer: query [S, G, D], key and value [S, D]."""

    query: Tensor
    key: Tensor
    value: Tensor


class Layers:
    """Layers of one case, each with buffers and a token of its own, all random.

    Free slots are random too: whoever reads one is found out.

    Parameters
    ----------
    case : Case
        Shape, lengths and dtype.
    count : int
        Layers.
    device : torch.device
        Where they lie.
    """

    def __init__(self, case: Case, count: int, device: torch.device) -> None:
        self.case, self.device = case, device
        self.lengths = case.lengths()
        self.scale = case.layer.head_dim**-0.5
        shape = (case.rows, case.layer.kv_heads)
        ends = torch.tensor([0, *(length + SLACK for length in self.lengths)]).cumsum(0)
        offsets = ends.to(device, torch.int32)
        generator = torch.Generator(device).manual_seed(len(self.lengths))
        slots = sum(self.lengths) + SLACK * len(self.lengths)

        def draw(*size: int) -> Tensor:
            size = (*size, case.layer.head_dim)
            return torch.randn(size, generator=generator, device=device, dtype=DTYPES[case.dtype])

        self.stores = [
            RaggedKV(draw(slots), draw(slots), offsets, shape, SLACK) for _ in range(count)
        ]
        sequences = len(self.lengths)
        self.tokens = [
            Token(draw(sequences, case.layer.group_size), draw(sequences), draw(sequences))
            for _ in range(count)
        ]
        # One tensor behind all layers' lengths: one copy takes the last token of each back.
        self._first = torch.stack([store.lengths for store in self.stores])
        self._now = self._first.clone()
        for store, lengths in zip(self.stores, self._now, strict=True):
            store.lengths = lengths

    @staticmethod
    def bytes(case: Case) -> int:
        """Bytes of one layer's keys and values."""
        lengths = case.lengths()
        slots = sum(lengths) + SLACK * len(lengths)
        return 2 * slots * case.layer.head_dim * case.element_size

    def rewind(self) -> None:
        """Forget what was appended."""
        self._now.copy_(self._first)
        for store in self.stores:
            store.steps, store.slack = 0, SLACK

    def slots(self, free: int = 0) -> Tensor:
        """Where the tokens of every layer lie, sequence by sequence, and free slots behind each.

        Parameters
        ----------
        free : int
            Free slots of a sequence that are listed too.

        Returns
        -------
        Tensor
            [sum of lengths + sequences * free] int64.
        """
        starts = self.stores[0].offsets.tolist()
        return torch.cat([
            torch.arange(start, start + length + free, device=self.device)
            for start, length in zip(starts, self.lengths, strict=False)
        ])  # fmt: skip

    @cached_property
    def wanted(self) -> Tensor:
        """What the first layer should give once its token is appended: [S, G, D] float64."""
        store, token = self.stores[0], self.tokens[0]
        outs = []
        for s, (start, length) in enumerate(
            zip(store.offsets.tolist(), self.lengths, strict=False)
        ):
            keys, values = (
                torch.cat([held[start : start + length], new[s : s + 1]]).double()
                for held, new in ((store.keys, token.key), (store.values, token.value))
            )
            weights = (token.query[s].double() @ keys.T * self.scale).softmax(-1)
            outs.append(weights @ values)
        return torch.stack(outs)
