"""Silenced heads equal the stock model with the same heads cut out of its projections."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cache.models import FAMILIES, SAMPLES, budgeted, build, method_for, prompt, shape_of
from cache.oracle import generate_masked, logits, new_tokens, run
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.utils import GenerateOutput

from sparsemm_eval.cache import CACHE_ARGUMENT, HeadBudgetCache
from sparsemm_eval.methods import MASK_MODES, HeadMask

# A layer with none, one head of a group and two heads that share no group.
HEADS = ((0, 1), (2, 0), (2, 3))
STEPS = {"max_new_tokens": 16}


@pytest.fixture(scope="module", params=FAMILIES)
def models(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, ...]:
    """The same model in float64: on the attention under test, on stock sdpa, for the oracle."""
    return tuple(make(request.param, 3, torch.float64) for make in (budgeted, build, build))


@contextmanager
def cut_out(model: PreTrainedModel, mask: HeadMask) -> Iterator[None]:
    """Zero the heads' part of what the query projection gives or the output projection gets."""
    hooks = []
    dim = model.model.language_model.layers[0].self_attn.head_dim
    for layer, head in mask.heads:
        part = slice(head * dim, (head + 1) * dim)
        attention = model.model.language_model.layers[layer].self_attn
        if mask.mode == "query":
            hooks.append(attention.q_proj.register_forward_hook(zero_output(part)))
        else:
            hooks.append(attention.o_proj.register_forward_pre_hook(zero_input(part)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def zero_output(part: slice) -> Any:
    def hook(module: torch.nn.Module, given: Any, out: Tensor) -> Tensor:
        return zeroed(out, part)

    return hook


def zero_input(part: slice) -> Any:
    def hook(module: torch.nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
        return (zeroed(given[0], part),)

    return hook


def zeroed(x: Tensor, part: slice) -> Tensor:
    x = x.clone()
    x[..., part] = 0
    return x


def silenced(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    mask: HeadMask | None,
    *names: str,
    **more: Any,
) -> tuple[GenerateOutput, HeadBudgetCache]:
    """Generate on the cache under test, under one method or several."""
    methods = [method_for(model, name) for name in names]
    cache = HeadBudgetCache(methods, mask=mask)
    return run(model, inputs, **{CACHE_ARGUMENT: cache}, **STEPS | more), cache


@pytest.mark.parametrize("mode", MASK_MODES)
@pytest.mark.parametrize("beams", [1, 3])
def test_full_cache_is_the_stock_model_without_these_heads(
    models: tuple[PreTrainedModel, ...], mode: str, beams: int
) -> None:
    """On a left-padded batch: tokens and logits of every step."""
    model, stock, _ = models
    inputs, mask = prompt(model, SAMPLES), HeadMask(HEADS, mode)
    ours, _ = silenced(model, inputs, mask, "fullkv", num_beams=beams)
    with cut_out(stock, mask):
        wanted = run(stock, inputs, num_beams=beams, **STEPS)
    whole = run(stock, inputs, num_beams=beams, **STEPS)
    assert torch.equal(ours.sequences, wanted.sequences)
    assert (logits(ours) - logits(wanted)).abs().max() < 1e-10
    assert (logits(wanted) - logits(whole))[:, 0].abs().amax(-1).min() > 1e-3, "no head is missed"


@pytest.mark.parametrize("mode", MASK_MODES)
@pytest.mark.parametrize("name", ["sparsemm", "adakv"])
def test_compressed_is_the_oracle_without_these_heads(
    models: tuple[PreTrainedModel, ...], mode: str, name: str
) -> None:
    """The observation window's score sees the silenced queries too."""
    model, _, stock = models
    inputs, mask = prompt(model, SAMPLES), HeadMask(HEADS, mode)
    ours, cache = silenced(model, inputs, mask, name)
    with cut_out(stock, mask):
        wanted, oracle = generate_masked(stock, inputs, method_for(stock, name), **STEPS)
    assert torch.equal(cache.kept(), oracle.counts())
    assert torch.equal(ours.sequences, wanted.sequences)
    assert (logits(ours) - logits(wanted)).abs().max() < 1e-10


@pytest.mark.parametrize("mode", MASK_MODES)
def test_a_row_alone_is_what_it_is_in_a_batch(
    models: tuple[PreTrainedModel, ...], mode: str
) -> None:
    model, *_ = models
    inputs, mask = prompt(model, SAMPLES), HeadMask(HEADS, mode)
    together = new_tokens(silenced(model, inputs, mask, "snapkv")[0], inputs)
    for row, sample in enumerate(SAMPLES):
        alone = prompt(model, [sample])
        assert torch.equal(
            new_tokens(silenced(model, alone, mask, "snapkv")[0], alone)[0], together[row]
        )


@pytest.mark.parametrize("mode", MASK_MODES)
def test_all_heads_silenced(models: tuple[PreTrainedModel, ...], mode: str) -> None:
    """Nothing is left of the prompt but its last token (output) or means over it (query)."""
    model, stock, _ = models
    shape = shape_of(model)
    heads = [(layer, q) for layer in range(shape.layers) for q in range(shape.query_heads)]
    inputs, mask = prompt(model, SAMPLES), HeadMask(tuple(heads), mode)
    ours, _ = silenced(model, inputs, mask, "fullkv")
    with cut_out(stock, mask):
        assert torch.equal(ours.sequences, run(stock, inputs, **STEPS).sequences)


def test_methods_that_share_a_prefill_share_the_mask(
    models: tuple[PreTrainedModel, ...],
) -> None:
    """Rows of two methods after one prefill hold what each would hold alone."""
    model, *_ = models
    inputs, mask = prompt(model, SAMPLES[:1]), HeadMask(HEADS)
    caches = []
    for names in (("snapkv", "adakv"), ("snapkv",), ("adakv",)):
        cache = HeadBudgetCache([method_for(model, name) for name in names], mask=mask)
        model(**inputs, **{CACHE_ARGUMENT: cache}, use_cache=True)
        caches.append(cache)
    both, *alone = caches
    assert torch.equal(both.kept(), torch.cat([cache.kept() for cache in alone]))


def test_a_head_the_model_does_not_have() -> None:
    model = build("mistral")
    with pytest.raises(ValueError, match="no head 2-4; its heads are 0-0 to 2-3"):
        HeadBudgetCache(method_for(model, "fullkv"), mask=HeadMask(((0, 1), (2, 4))))
