"""What each KV head keeps, known from a prompt's length, is what `keep` keeps."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemm_eval.methods import HeadScores, ModelShape, make_method, tokens_per_head

SHAPE = ModelShape(layers=3, query_heads=4, kv_heads=2)
SCORES = HeadScores(np.arange(1, 13).reshape(3, 4) ** 3)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(
        ["fullkv", "snapkv", "pyramidkv", "sparsemm", "random", "local", "streaming"]
    ),
    budget=st.integers(6, 40),
    n=st.integers(1, 60),
    allocation=st.sampled_from(["paper", "exact"]),
)
def test_it_is_what_a_prompt_keeps(name: str, budget: int, n: int, allocation: str) -> None:
    given = {} if name == "fullkv" else {"budget": budget, "allocation": allocation}
    given |= {"window": 4} if name not in ("fullkv", "local", "streaming") else {}
    given |= {"head_scores": SCORES} if name == "sparsemm" else {}
    method = make_method(name, SHAPE, **given)
    query, key = torch.randn(1, 4, n, 16), torch.randn(1, 2, n, 16)
    kept = [method.keep(query, key, layer)[0].sum(-1).tolist() for layer in range(3)]
    assert tokens_per_head(method, n).tolist() == kept


def test_a_method_that_looks_at_attention_is_refused_unless_all_is_kept() -> None:
    method = make_method("adakv", SHAPE, budget=40)
    assert (tokens_per_head(method, 40) == 40).all()
    with pytest.raises(ValueError, match="method=adakv: what its heads keep depends on"):
        tokens_per_head(method, 41)
    with pytest.raises(ValueError, match="tokens=0: it must be an integer of at least 1"):
        tokens_per_head(method, 0)
