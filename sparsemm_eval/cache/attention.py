"""Cache layers that attend themselves, and the attention a model must run on to let them."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sparsemm_eval.methods import HeadMask

ATTENTION = "sparsemm"


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
    index : int or None
        Which layer it is, among those that methods compress; None of another.
    mask : HeadMask, optional
        Query heads that are silenced, of all layers.
    """

    def __init__(self, index: int | None, mask: HeadMask | None = None) -> None:
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


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | AttendingLayer,
    value: Tensor | AttendingLayer,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Let the cache layer attend where it does so itself, else attend as sdpa does.

    Parameters
    ----------
    module : Module
        The attention module that asks.
    query : Tensor
        [B, Hq, m, D].
    key, value : Tensor or AttendingLayer
        What the cache's update returned.
    attention_mask : Tensor or None
        As sdpa's.

    Returns
    -------
    tuple
        Output [B, m, Hq, D], and None for the weights.
    """
    if isinstance(key, AttendingLayer):
        return key.attend(module, query, attention_mask, **kwargs), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def usual_scale(query: Tensor, scaling: float | None) -> Tensor:
    """Queries whose products with keys are to be scaled by 1/sqrt(D), as methods take them."""
    usual = query.shape[-1] ** -0.5
    same = scaling is None or abs(scaling - usual) < 1e-6 * usual
    return query if same else query * (scaling / usual)


# Without a mask function of the same name transformers passes no mask at all, and padded rows
# would be silently wrong.
AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def use_head_budget_attention(model: PreTrainedModel) -> None:
    """Put a model's decoder on this attention; a vision tower stays as it is.

    With any other cache, or none, the decoder computes what it does on sdpa.
    """
    decoder = "text_config" if model.config.get_text_config() is not model.config else ""
    model.set_attn_implementation({decoder: ATTENTION})
