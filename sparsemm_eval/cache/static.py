"""A cache whose buffers never move while a step of decoding runs again and again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from sparsemm_eval.cache.attention import SilencingLayer
from sparsemm_eval.cache.backends import append_attend
from sparsemm_eval.cache.ragged import RaggedKV
from sparsemm_eval.cache.sliding import slide
from sparsemm_eval.methods import HeadMask, ModelShape


class StaticCache(Cache):
    """Rows of a `HeadBudgetCache`, as a step that knows no lengths sees them.

    Offsets and lengths of all layers of a device lie in one tensor each; keys and values stay where
    the `HeadBudgetCache` has them. Nothing here is counted on the host.

    Parameters
    ----------
    devices : sequence of torch.device
        Where each layer lies.
    rows : int
        Those that are not used have no slots and are marked finished.
    shape : ModelShape
        Layers and heads.
    backend : str
        What attends, as resolved by `sparsemm_eval.cache.backends.resolve_backend`.
    mask : HeadMask, optional
        Query heads that are silenced.
    """

    def __init__(
        self,
        devices: Sequence[torch.device],
        rows: int,
        shape: ModelShape,
        backend: str,
        mask: HeadMask | None = None,
    ) -> None:
        self.rows, self.kv_heads = rows, shape.kv_heads
        sequences = rows * shape.kv_heads
        windows = shape.windows or (None,) * shape.layers
        self.offsets: list[Tensor] = []  # [layers, S + 1] of each device
        self.lengths: list[Tensor] = []  # [layers, S] of each device
        layers = []
        for device, places in groupby(range(len(devices)), lambda layer: devices[layer]):
            numbers = list(places)
            kind = {"dtype": torch.int32, "device": device}
            self.offsets.append(torch.zeros(len(numbers), sequences + 1, **kind))
            self.lengths.append(torch.full((len(numbers), sequences), -1, **kind))
            layers += [
                StaticLayer(shape.places[layer], offsets, lengths, backend, mask, windows[layer])
                for layer, offsets, lengths in zip(
                    numbers, self.offsets[-1], self.lengths[-1], strict=True
                )
            ]
        super().__init__(layers=layers)

    def load(self, stores: Sequence[RaggedKV], ended: Tensor) -> None:
        """Take over what layers hold; rows that have ended are left alone from here on.

        Parameters
        ----------
        stores : sequence of RaggedKV
            What each layer holds, at most ``rows`` rows, in a `Buffer` that outlives it.
        ended : Tensor
            [rows] bool.
        """
        first = 0
        for offsets, lengths in zip(self.offsets, self.lengths, strict=True):
            here = stores[first : first + len(offsets)]
            first += len(offsets)
            used = len(here[0].lengths)
            offsets[:, : used + 1] = torch.stack([store.offsets for store in here])
            offsets[:, used + 1 :] = offsets[:, used, None]
            lengths.fill_(-1)
            lengths[:, :used] = torch.stack([store.lengths for store in here])
        self.finish(ended)
        for layer, store in zip(self.layers, stores, strict=True):
            # All of the memory, whose size changes seldom: torch.compile compiles for each anew.
            layer.keys, layer.values = store.buffer.keys, store.buffer.values
            layer.longest = store.longest

    def finish(self, ended: Tensor) -> None:
        """Mark rows [rows] bool as finished, those that are not so yet."""
        ended = ended.repeat_interleave(self.kv_heads, output_size=self.lengths[0].shape[1])
        for lengths in self.lengths:
            done = ended.to(lengths.device) & (lengths >= 0)
            lengths.copy_(torch.where(done, ~lengths, lengths))

    def places(self) -> tuple[int, ...]:
        """Where keys and values lie: what has been captured holds as long as they stay there."""
        return tuple(x.data_ptr() for layer in self.layers for x in (layer.keys, layer.values))


class StaticLayer(SilencingLayer):
    """One layer of a StaticCache; what `sparsemm_eval.cache.backends` calls its slots."""

    is_compileable = True
    is_croppable = False

    def __init__(
        self,
        index: int | None,
        offsets: Tensor,
        lengths: Tensor,
        backend: str,
        mask: HeadMask | None,
        window: int | None,
    ) -> None:
        super().__init__(index, None if index is None else mask)
        self.offsets, self.lengths, self.backend = offsets, lengths, backend
        self.window = window
        self.longest = 0
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
        if self.window is not None:
            slide(self.offsets, self.lengths, self.window)
        out = append_attend(
            self.backend,
            query.reshape(rows * heads, query_heads // heads, dim),
            key.reshape(rows * heads, dim),
            value.reshape(rows * heads, dim),
            self,
            dim**-0.5 if scale is None else scale,
        )
        return out.reshape(rows, 1, query_heads, dim)

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
