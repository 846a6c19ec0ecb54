"""Where tokens live: a head-budgeted KV cache for transformers models."""

from sparsemm_eval.cache.attention import ATTENTION, use_head_budget_attention
from sparsemm_eval.cache.kernels import BACKENDS
from sparsemm_eval.cache.layer import AttendingLayer, HeadBudgetCache
from sparsemm_eval.cache.ragged import CacheBytes, RaggedKV

__all__ = [
    "ATTENTION",
    "BACKENDS",
    "AttendingLayer",
    "CacheBytes",
    "HeadBudgetCache",
    "RaggedKV",
    "use_head_budget_attention",
]
