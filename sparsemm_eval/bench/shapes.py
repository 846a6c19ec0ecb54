"""What is measured: layers of real models, and how many tokens their heads keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

TOP_HEADS, TOP_TOKENS = 0.05, 0.55
DISTRIBUTIONS = ("heavy", "uniform")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LayerShape:
    """One attention layer of a model.

    Parameters
    ----------
    kv_heads : int
        KV heads.
    group : int
        Query heads a KV head.
    head_dim : int
        Width of a head.
    """

    kv_heads: int
    group: int
    head_dim: int = 128


SHAPES = {
    "vicuna": LayerShape(32, 1),  # LLaVA-NeXT Vicuna 7B
    "mistral": LayerShape(8, 4),  # LLaVA-NeXT Mistral 7B
    "qwen2vl": LayerShape(4, 7),  # Qwen2-VL 7B
}


@dataclass(frozen=True)
class Case:
    """One layer of a model with so many tokens.

    Parameters
    ----------
    shape : str
        A name in `SHAPES`.
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
    def layer(self) -> LayerShape:
        """The shape that is named."""
        return SHAPES[self.shape]

    @property
    def element_size(self) -> int:
        """Bytes of a number."""
        return DTYPES[self.dtype].itemsize

    def lengths(self) -> list[int]:
        """Tokens of each of the rows * KV heads sequences; the same in every run."""
        return draw_lengths(self.distribution, self.rows * self.layer.kv_heads, self.mean)


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


def bytes_moved(lengths: Sequence[int], shape: LayerShape, element_size: int) -> int:
    """The least that one token a sequence must move through memory.

    Keys and values of what each sequence then holds, the new token included, are read; the new
    token is written; queries are read and outputs written.
    """
    vectors = 2 * (sum(lengths) + len(lengths))  # read: keys, values
    vectors += 2 * len(lengths)  # written: the new token
    vectors += 2 * len(lengths) * shape.group  # queries, outputs
    return vectors * shape.head_dim * element_size
