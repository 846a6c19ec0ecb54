"""Ragged caches of many layers at once, and what their attention should give."""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from sparsemm_eval.bench.shapes import DTYPES, Case
from sparsemm_eval.cache import RaggedKV

SLACK = 16  # of a cache just packed


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
            Token(draw(sequences, case.layer.group), draw(sequences), draw(sequences))
            for _ in range(count)
        ]
        # One tensor behind all layers' lengths: one copy takes the last token of each back.
        self._first = torch.stack([store.lengths for store in self.stores])
        self._now = self._first.clone()
        for store, lengths in zip(self.stores, self._now, strict=True):
            store.lengths = lengths

    @staticmethod
    def bytes(case: Case) -> int:
        """Of one layer's keys and values."""
        lengths = case.lengths()
        slots = sum(lengths) + SLACK * len(lengths)
        return 2 * slots * case.layer.head_dim * case.element_size

    def rewind(self) -> None:
        """Forget what was appended."""
        self._now.copy_(self._first)
        for store in self.stores:
            store.steps, store.slack = 0, SLACK

    def slots(self) -> Tensor:
        """Where the tokens of every layer lie, sequence by sequence: [sum of lengths] int64."""
        store = self.stores[0]
        return torch.cat(
            [
                torch.arange(start, start + length, device=self.device)
                for start, length in zip(store.host_starts, self.lengths, strict=True)
            ]
        )

    @cached_property
    def wanted(self) -> Tensor:
        """What the first layer should give once its token is appended: [S, G, D] float64."""
        store, token = self.stores[0], self.tokens[0]
        outs = []
        for s, (start, length) in enumerate(zip(store.host_starts, self.lengths, strict=True)):
            keys, values = (
                torch.cat([held[start : start + length], new[s : s + 1]]).double()
                for held, new in ((store.keys, token.key), (store.values, token.value))
            )
            weights = (token.query[s].double() @ keys.T * self.scale).softmax(-1)
            outs.append(weights @ values)
        return torch.stack(outs)
