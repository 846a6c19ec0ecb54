"""Where heads look, against softmax over all keys."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Cache

from sparsemm_eval.heads.watch import WatchCache, WeightCache

N, ROWS = 100, 40  # more rows than a block


def watched(cache: Cache, dtype: torch.dtype, padding: tuple[int, int]) -> torch.Tensor:
    """Show a cache 2 rows of a batch, 4 heads in pairs; the answer's weights [B, Hq, ROWS, N]."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, N, 8).to(dtype), torch.randn(2, 2, N, 8).to(dtype)
    places = torch.arange(N)
    mask = (places <= places[:, None]) & (places >= torch.tensor(padding)[:, None, None, None])
    layer, _ = cache.update(key, key.clone(), 0)
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    layer.attend(module, query, mask if any(padding) else None, scaling=0.4)
    logits = query.float() @ key.float().repeat_interleave(2, 1).transpose(-1, -2)
    weights = (0.4 * logits).masked_fill(~mask, -torch.inf).softmax(-1)
    return weights[:, :, N - ROWS - 1 : N - 1]


@pytest.mark.parametrize("padding", [(0, 0), (0, 45)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_argmax_is_that_of_the_softmax(padding: tuple, dtype: torch.dtype) -> None:
    cache = WatchCache(1, ROWS)
    weights = watched(cache, dtype, padding)
    assert cache.looked().shape == (2, 1, 4, ROWS)
    assert torch.equal(cache.looked()[:, 0], weights.argmax(-1))


@pytest.mark.parametrize("padding", [(0, 0), (0, 45)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_weights_are_the_mean_of_the_softmax(padding: tuple, dtype: torch.dtype) -> None:
    positions = np.array([3, 50, 51, 98])
    cache = WeightCache(1, ROWS, positions)
    weights = watched(cache, dtype, padding)
    found = cache.weights()
    assert found.shape == (2, 1, 4, len(positions))
    torch.testing.assert_close(found[:, 0].float(), weights.mean(-2)[..., positions])
