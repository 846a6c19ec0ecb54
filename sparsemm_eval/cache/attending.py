"""Cache layers that do the attention themselves."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from sparsemm_eval.methods import HeadMask


class AttendingLayer(CacheLayerMixin):
    """A cache layer that does the attention itself.

    ``update`` returns the layer in place of keys and values; the attention function, which the
    model calls next, finds it there. Tensors are never passed on, so a model left on another
    attention fails instead of silently doing something else.
    """

    @abstractmethod
    def attend(
        self, module: torch.nn.Module, query: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        """Attention of the tokens just given to ``update``; [B, Hq, m, D] to [B, m, Hq, D]."""


class SilencingLayer(AttendingLayer):
    """An attending layer in which query heads may be silenced.

    Parameters
    ----------
    index : int
        Which layer it is.
    mask : HeadMask, optional
        Query heads that are silenced, of all layers.
    """

    def __init__(self, index: int, mask: HeadMask | None = None) -> None:
        super().__init__()
        self.index = index
        silent = [] if mask is None else mask.of_layer(index)
        self.silent = torch.tensor(silent) if silent else None
        self.silence = mask.mode if silent else None

    def attend(
        self, module: torch.nn.Module, query: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        if self.silence is None:
            return self._attend(module, query, mask, **kwargs)
        if self.silent.device != query.device:  # once: later steps find them there
            self.silent = self.silent.to(query.device, non_blocking=True)
        if self.silence == "query":
            return self._attend(module, query.index_fill(1, self.silent, 0), mask, **kwargs)
        return self._attend(module, query, mask, **kwargs).index_fill(2, self.silent, 0)

    @abstractmethod
    def _attend(
        self, module: torch.nn.Module, query: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        """`attend`, where no head is silenced."""
