"""Which tokens each KV head keeps: pure tensor arithmetic, torch only."""

from sparsemm_eval.methods.allocation import Allocation, LayerAllocation, Prompt
from sparsemm_eval.methods.expected import AHEAD
from sparsemm_eval.methods.head_mask import (
    MASK_MODES,
    HeadMask,
    random_heads,
    read_head_mask,
    visual_heads,
)
from sparsemm_eval.methods.head_scores import HeadScores, ModelShape, find_scores
from sparsemm_eval.methods.layers import LayerShare
from sparsemm_eval.methods.method import Method, row_lengths, tokens_per_head
from sparsemm_eval.methods.picks import Pick
from sparsemm_eval.methods.plugins import Plugin, load_plugin
from sparsemm_eval.methods.registry import (
    FROM_FILES,
    Setting,
    canonical_settings,
    check_budget,
    check_method,
    make_method,
    method_digest,
    method_names,
    method_settings,
    register_method,
    settings_of,
    shown_name,
)
from sparsemm_eval.methods.scoring import (
    Checks,
    ObservationWindow,
    PromptLayer,
    Ranking,
    Recency,
    Scorer,
    SinksAndRecent,
    scorer_of_layer,
)
from sparsemm_eval.methods.selection import PromptSelection, keep_prompt, keep_rows
from sparsemm_eval.methods.sensitivity import Sensitivity, read_head_scores

__all__ = [
    "AHEAD",
    "FROM_FILES",
    "MASK_MODES",
    "Allocation",
    "Checks",
    "HeadMask",
    "HeadScores",
    "LayerAllocation",
    "LayerShare",
    "Method",
    "ModelShape",
    "ObservationWindow",
    "Pick",
    "Plugin",
    "Prompt",
    "PromptLayer",
    "PromptSelection",
    "Ranking",
    "Recency",
    "Scorer",
    "Sensitivity",
    "Setting",
    "SinksAndRecent",
    "canonical_settings",
    "check_budget",
    "check_method",
    "find_scores",
    "keep_prompt",
    "keep_rows",
    "load_plugin",
    "make_method",
    "method_digest",
    "method_names",
    "method_settings",
    "random_heads",
    "read_head_mask",
    "read_head_scores",
    "register_method",
    "row_lengths",
    "scorer_of_layer",
    "settings_of",
    "shown_name",
    "tokens_per_head",
    "visual_heads",
]
