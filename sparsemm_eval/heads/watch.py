"""Where heads look while an answer is written; no attention matrix is kept.

Prompt and answer are fed together, once. Each layer attends as ever, computes the weights of the
rows that write the answer again, a few at a time, and keeps of them only what was asked for.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sparsemm_eval.cache import AttendingLayer

# Rows whose logits over all keys are held at a time.
_BLOCK = 32


class WatchCache(Cache):
    """Remembers which position each head looked at most.

    Parameters
    ----------
    layers : int
        Of the decoder.
    rows : int
        Tokens of the longest answer; answers end where the rows of the batch end.
    """

    def __init__(self, layers: int, rows: int) -> None:
        super().__init__(layers=[_ArgmaxLayer(rows) for _ in range(layers)])

    def looked(self) -> Tensor:
        """[B, L, Hq, rows]: position of the largest weight in the row that wrote each token."""
        return torch.stack([layer.looked for layer in self.layers], 1).cpu()


class WeightCache(Cache):
    """Remembers the weights on some positions, averaged over the answer.

    Parameters
    ----------
    layers : int
        Of the decoder.
    rows : int
        Tokens of the answer; all answers of the batch have as many.
    positions : ndarray
        Of int: those whose weights are kept.
    """

    def __init__(self, layers: int, rows: int, positions: np.ndarray) -> None:
        columns = torch.from_numpy(positions)
        super().__init__(layers=[_MeanLayer(rows, columns) for _ in range(layers)])

    def weights(self) -> Tensor:
        """[B, L, Hq, positions]: mean over the rows that wrote the answer."""
        return torch.stack([layer.weights for layer in self.layers], 1)


class _WatchLayer(AttendingLayer):
    """Dense attention whose last rows are looked at."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    @abstractmethod
    def watch(self, blocks: Iterator[Tensor], scaling: float) -> None:
        """Take the answer's logits [B, Hq, rows, n], not scaled yet, block by block of rows."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[_WatchLayer, _WatchLayer]:
        self.lazy_initialization(key_states, value_states)
        self.pending = (key_states, value_states)
        return self, self

    def attend(
        self, module: torch.nn.Module, query: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        key, value = self.pending
        del self.pending
        out, _ = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        self.watch(self._logits(query, key, mask), kwargs["scaling"])
        return out

    def _logits(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        n, heads = key.shape[2], key.shape[1]
        exact = torch.promote_types(query.dtype, torch.float32)
        keys = key.to(exact)[:, :, None].transpose(-1, -2)  # [B, H, 1, D, n]
        grouped = query.unflatten(1, (heads, -1))  # [B, H, G, n, D]
        places = torch.arange(n, device=key.device)
        # Row r stands one before the token it writes: the last token of the text writes nothing.
        for start in range(n - self.rows - 1, n - 1, _BLOCK):
            rows = slice(start, min(start + _BLOCK, n - 1))
            logits = grouped[..., rows, :].to(exact) @ keys
            # A mask is there where it says more than causal: padding, or a sliding window.
            seen = places <= places[rows, None] if mask is None else mask[:, :, None, rows]
            yield logits.masked_fill(~seen, -torch.inf).flatten(1, 2)

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """The name of `get_max_length` in transformers 5.17."""
        return -1


class _ArgmaxLayer(_WatchLayer):
    looked: Tensor

    def watch(self, blocks: Iterator[Tensor], scaling: float) -> None:
        # The largest weight is where the largest logit is: no softmax is needed.
        self.looked = torch.cat([block.argmax(-1) for block in blocks], -1)


class _MeanLayer(_WatchLayer):
    weights: Tensor

    def __init__(self, rows: int, columns: Tensor) -> None:
        super().__init__(rows)
        self.columns = columns

    def watch(self, blocks: Iterator[Tensor], scaling: float) -> None:
        total = sum((block * scaling).softmax(-1).sum(-2) for block in blocks)
        self.weights = (total[..., self.columns.to(total.device)] / self.rows).cpu()
