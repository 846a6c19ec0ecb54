"""Where tokens live: a head-budgeted KV cache for transformers models."""

from sparsemm_eval.cache.attention import ATTENTION, AttendingLayer, use_head_budget_attention
from sparsemm_eval.cache.backends import check_backend
from sparsemm_eval.cache.layer import CACHE_ARGUMENT, HeadBudgetCache
from sparsemm_eval.cache.ragged import CacheBytes, RaggedKV

__all__ = [
    "ATTENTION",
    "CACHE_ARGUMENT",
    "AttendingLayer",
    "CacheBytes",
    "HeadBudgetCache",
    "RaggedKV",
    "check_backend",
    "use_head_budget_attention",
]
