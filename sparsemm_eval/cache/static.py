"""A cache whose buffers never move, for a step of decoding that is captured once and replayed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from sparsemm_eval.cache.attention import SilencingLayer
from sparsemm_eval.cache.backends import append_attend
from sparsemm_eval.cache.ragged import RaggedKV
from sparsemm_eval.methods import HeadMask

BACKEND = "cuda_ext"  # the one whose calls do not depend on what lengths are


class StaticCache(Cache):
    """Rows of a `HeadBudgetCache`, as a step that knows no lengths sees them.

    Offsets and lengths of all layers lie in one tensor each; keys and values stay where the
    `HeadBudgetCache` has them. Nothing here is counted on the host.

    Parameters
    ----------
    layers, rows, kv_heads : int
        Sizes; rows that are not used have no slots and are marked finished.
    device : torch.device
        Where all lies.
    mask : HeadMask, optional
        Query heads that are silenced.
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        kv_heads: int,
        device: torch.device,
        mask: HeadMask | None = None,
    ) -> None:
        self.rows, self.kv_heads = rows, kv_heads
        sequences = rows * kv_heads
        self.offsets = torch.zeros(layers, sequences + 1, dtype=torch.int32, device=device)
        self.lengths = torch.full((layers, sequences), -1, dtype=torch.int32, device=device)
        super().__init__(
            layers=[
                StaticLayer(layer, self.offsets[layer], self.lengths[layer], mask)
                for layer in range(layers)
            ]
        )

    def load(self, stores: Sequence[RaggedKV], ended: Tensor) -> None:
        """Take over what layers hold; rows that have ended are left alone from here on.

        Parameters
        ----------
        stores : sequence of RaggedKV
            What each layer holds, at most ``rows`` rows, in a `Buffer` that outlives it.
        ended : Tensor
            [rows] bool.
        """
        offsets = torch.stack([store.offsets for store in stores])
        lengths = torch.stack([store.lengths for store in stores])
        used = lengths.shape[1]
        self.offsets[:, : used + 1] = offsets
        self.offsets[:, used + 1 :] = offsets[:, -1:]
        self.lengths.fill_(-1)
        self.lengths[:, :used] = lengths
        self.finish(ended)
        for layer, store in zip(self.layers, stores, strict=True):
            # All of the memory, whose size changes seldom: torch.compile compiles for each anew.
            layer.keys, layer.values = store.buffer.keys, store.buffer.values

    def finish(self, ended: Tensor) -> None:
        """Mark rows [rows] bool as finished, those that are not so yet."""
        ended = ended.repeat_interleave(self.kv_heads, output_size=self.lengths.shape[1])
        self.lengths.copy_(torch.where(ended & (self.lengths >= 0), ~self.lengths, self.lengths))

    def places(self) -> tuple[int, ...]:
        """Where keys and values lie: what has been captured holds as long as they stay there."""
        return tuple(x.data_ptr() for layer in self.layers for x in (layer.keys, layer.values))


class StaticLayer(SilencingLayer):
    """One layer of a StaticCache; what `sparsemm_eval.cache.backends` calls its slots."""

    is_compileable = True
    is_croppable = False

    def __init__(self, index: int, offsets: Tensor, lengths: Tensor, mask: HeadMask | None) -> None:
        super().__init__(index, mask)
        self.offsets, self.lengths = offsets, lengths
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        if self.silent is not None:
            self.silent = self.silent.to(lengths.device)
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to be done."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[StaticLayer, StaticLayer]:
        self.pending = (key_states, value_states)
        return self, self

    def _attend(
        self, module: torch.nn.Module, query: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        key, value = self.pending
        self.pending = None
        rows, heads, _, dim = key.shape
        query_heads = query.shape[1]
        scale = kwargs.get("scaling")
        out = append_attend(
            BACKEND,
            query.reshape(rows * heads, query_heads // heads, dim),
            key.reshape(rows * heads, dim),
            value.reshape(rows * heads, dim),
            self,
            dim**-0.5 if scale is None else scale,
        )
        return out.reshape(rows, 1, query_heads, dim)

    def count_token(self, tokens: int = 1) -> None:
        """Lengths on the device are all there is."""

    def get_seq_length(self) -> int:
        """Not known here: positions are given."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """The name of `get_max_length` in transformers 5.17."""
        return -1
