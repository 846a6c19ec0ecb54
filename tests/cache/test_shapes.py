"""Shapes of today's decoders: query heads a KV head, sizes of heads, QK-norm, scales."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cache.models import method_for, text_config
from cache.oracle import generate_budgeted, generate_masked, logits, new_tokens, run
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sparsemm_eval.cache import backends, use_head_budget_attention
from sparsemm_eval.cache.backends import resolve_backend
from sparsemm_eval.errors import UserError

# Query heads, KV heads, size of a head.
HEADS = ((2, 2, 64), (4, 2, 80), (7, 1, 96), (14, 2, 64), (8, 1, 128), (16, 1, 192), (4, 4, 256),
         (16, 1, 128))  # fmt: skip
# With norms of queries and keys; with a scale of its own; with both, and layers that slide.
KINDS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "granite": (GraniteForCausalLM, GraniteConfig, {"attention_multiplier": 0.05}),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {
            "query_pre_attn_scalar": 30,
            "sliding_window": 20,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "tie_word_embeddings": False,
        },
    ),
}
CASES = [("llama", heads) for heads in HEADS] + [
    (kind, heads) for kind in ("qwen3", "granite", "gemma3") for heads in (HEADS[1], HEADS[5])
]


def draw(kind: str, heads: tuple[int, int, int]) -> PreTrainedModel:
    model, config, more = KINDS[kind]
    query_heads, kv_heads, head_dim = heads
    text = {**text_config(query_heads, kv_heads), "hidden_size": 16 * query_heads, **more}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        drawn = model(config(**text, head_dim=head_dim)).eval()
    drawn.generation_config.eos_token_id = None
    drawn.generation_config.pad_token_id = 0
    return drawn


def prompts() -> dict[str, Tensor]:
    """Two of 44 and 31 tokens, padded on the left."""
    generator = torch.Generator().manual_seed(2)
    mask = (torch.arange(44) >= torch.tensor([[0], [13]])).long()
    return {
        "input_ids": torch.randint(4, 120, (2, 44), generator=generator) * mask,
        "attention_mask": mask,
    }


@pytest.mark.parametrize(("kind", "heads"), CASES)
def test_keep_all_is_stock_and_compressed_is_the_oracle(
    kind: str, heads: tuple[int, int, int]
) -> None:
    model, stock, inputs = draw(kind, heads), draw(kind, heads), prompts()
    use_head_budget_attention(model)
    wanted = new_tokens(run(stock, inputs), inputs)
    assert wanted.unique().numel() > 4, "these tokens hardly vary"
    oracle, _ = generate_masked(stock, inputs, method_for(model, "snapkv"))
    for backend in ("cuda_ext", "torch"):
        full, _ = generate_budgeted(model, inputs, method_for(model, "fullkv"), backend)
        assert torch.equal(new_tokens(full, inputs), wanted)
        ours, cache = generate_budgeted(model, inputs, method_for(model, "snapkv"), backend)
        assert cache.backend() == backend
        assert torch.equal(new_tokens(ours, inputs), new_tokens(oracle, inputs))
        assert (logits(ours) - logits(oracle)).abs().max() < 1e-3


@pytest.mark.parametrize("group", [1, 2, 7, 8, 16])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_what_runs_on_a_gpu(head_dim: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled op where it has the shape, and what auto falls back to where it has not."""
    monkeypatch.setattr(backends, "_loads", lambda device: True)
    monkeypatch.setattr(backends, "_load", lambda device: None)
    gpu = torch.device("cuda")
    compiled = head_dim in (64, 96, 128) and group <= 8
    shape = (torch.bfloat16, head_dim, group)
    assert resolve_backend("auto", gpu, *shape) == ("cuda_ext" if compiled else "varlen")
    assert resolve_backend("auto", gpu, torch.float32, head_dim, group) == "torch"
    for dtype in (torch.float32, *([] if compiled else [torch.bfloat16])):
        with pytest.raises(UserError, match=f"backend=cuda_ext cannot run {dtype} with head size"):
            resolve_backend("cuda_ext", gpu, dtype, head_dim, group)
