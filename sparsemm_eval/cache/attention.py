"""The attention and mask functions a model must run on, registered with transformers."""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sparsemm_eval.cache.attending import AttendingLayer

ATTENTION = "sparsemm"


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
