"""Numbers known of the real thing: on heavy-tailed scores `paper` loses tokens, `exact` none."""

import numpy as np
import pytest
import torch

from sparsemm_eval.methods import HeadScores, ModelShape, make_method

SHAPE = ModelShape(layers=32, query_heads=32, kv_heads=32)
TOKENS = 2400


def vicuna_like() -> HeadScores:
    """Make 1,024 scores that fall by rank, the top 5% of which hold 55% of the mass."""
    top = round(0.05 * 1024)
    scale = -top / np.log(1 - 0.55)
    values = np.exp(-np.arange(1024) / scale)
    return HeadScores(np.random.default_rng(0).permutation(values).reshape(32, 32))


@pytest.fixture(name="kept", scope="module")
def _kept() -> dict[tuple[str, int], float]:
    """Share of the nominal tokens that is kept, by allocation and budget."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 32, 32, 4, generator=generator)
    key = torch.randn(1, 32, TOKENS, 4, generator=generator)
    shares = {}
    for allocation in ("paper", "exact"):
        for budget in (256, 1024, 2048):
            method = make_method(
                "sparsemm", SHAPE, budget=budget, head_scores=vicuna_like(), allocation=allocation
            )
            tokens = sum(int(method.keep(query, key, layer).sum()) for layer in range(32))
            shares[allocation, budget] = tokens / (budget * 1024)
    return shares


def test_the_tail_is_as_heavy_as_vicunas() -> None:
    values = np.sort(vicuna_like().values, axis=None)[::-1]
    assert values[:51].sum() / values.sum() == pytest.approx(0.55, abs=0.001)


def test_exact_keeps_the_nominal_tokens(kept: dict[tuple[str, int], float]) -> None:
    assert [kept["exact", budget] for budget in (256, 1024, 2048)] == [1, 1, 1]


@pytest.mark.parametrize(("budget", "share"), [(256, 0.94), (1024, 0.545), (2048, 0.377)])
def test_paper_loses_what_it_loses_on_vicuna(
    kept: dict[tuple[str, int], float], budget: int, share: float
) -> None:
    """The shares were measured with Vicuna's own scores; a tail as heavy comes close to them."""
    assert kept["paper", budget] == pytest.approx(share, abs=0.03)
