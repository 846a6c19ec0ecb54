"""On a GPU: varlen flash attention equals plain torch, and keep-all equals stock generation."""

import pytest
import torch
from cache.models import FAMILIES, SAMPLES, budgeted, build, method_for, prompt
from cache.oracle import logits, new_tokens, run
from cache.sequences import assert_books_agree, draw, sequences, softmax_attention
from transformers import PreTrainedModel

from sparsemm_eval.cache import CACHE_ARGUMENT, HeadBudgetCache, RaggedKV
from sparsemm_eval.methods import (
    AHEAD,
    HeadScores,
    ModelShape,
    PromptLayer,
    Sensitivity,
    keep_prompt,
    make_method,
    method_names,
    settings_of,
)

pytestmark = pytest.mark.gpu
ROWS, KV_HEADS, TOKENS = 3, 2, 300
STEPS = 40  # more than the slack, so that the layer is copied to a larger one on the way
# Of outputs up to about 4: half an ulp, and weights that the kernel rounds before it sums.
TOLERANCE = {torch.float16: 6e-3, torch.bfloat16: 5e-2}
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE)


def ragged_mask() -> torch.Tensor:
    """From no token to all of them, one sequence beside the other."""
    shares = torch.tensor([[0.0, 1.0], [0.3, 0.01], [0.9, 0.5]])
    drawn = torch.rand(ROWS, KV_HEADS, TOKENS, generator=torch.Generator().manual_seed(1))
    return drawn < shares[..., None]


@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize("dim", [64, 96, 128])
@each_dtype
def test_varlen_equals_torch(dtype: torch.dtype, dim: int, group: int) -> None:
    """Both against float64, on sequences of very unlike length that grow."""
    _, key, value = (x.to("cuda", dtype) for x in draw(ROWS, (1, KV_HEADS), TOKENS, dim))
    mask = ragged_mask().cuda()
    stores = {name: RaggedKV.pack(key, value, mask) for name in ("torch", "varlen")}
    scale = dim**-0.5
    for step in range(STEPS):
        drawn = draw(ROWS, (KV_HEADS * group, KV_HEADS), 1, dim, seed=step)
        token = [x.to("cuda", dtype) for x in drawn]
        outs = {name: kv.append_attend(*token, scale, name) for name, kv in stores.items()}
        if step % 13 and step != STEPS - 1:
            continue
        queries = token[0].reshape(ROWS * KV_HEADS, group, dim)
        held = sequences(stores["varlen"])
        wanted = torch.stack(
            [softmax_attention(q, k, v, scale) for q, (k, v) in zip(queries, held, strict=True)]
        )
        for name, out in outs.items():
            assert out.shape == (ROWS, 1, KV_HEADS * group, dim), name
            assert out.dtype == dtype, name
            error = (out.reshape(wanted.shape).double() - wanted).abs().max()
            assert error < TOLERANCE[dtype], name
    assert_books_agree(stores["varlen"])


@each_dtype
def test_varlen_with_sequences_of_equal_length(dtype: torch.dtype) -> None:
    """Torch takes one call for all of them; the kernel makes no difference."""
    _, key, value = (x.to("cuda", dtype) for x in draw(ROWS, (1, KV_HEADS), TOKENS, 64))
    mask = torch.ones(ROWS, KV_HEADS, TOKENS, dtype=torch.bool, device="cuda")
    stores = [RaggedKV.pack(key, value, mask) for _ in range(2)]
    token = [x.to("cuda", dtype) for x in draw(ROWS, (8, KV_HEADS), 1, 64, seed=1)]
    one, other = (
        kv.append_attend(*token, 0.125, name)
        for kv, name in zip(stores, ("torch", "varlen"), strict=True)
    )
    assert (one - other).abs().max() < TOLERANCE[dtype]


def test_large_cache_positions() -> None:
    """Slots beyond 2**16 are found: offsets are whole, not wrapped."""
    _, key, value = (x.to("cuda", torch.bfloat16) for x in draw(2, (1, 4), 20_000, 64))
    mask = torch.ones(2, 4, 20_000, dtype=torch.bool, device="cuda")
    kv = RaggedKV.pack(key, value, mask)
    # Each query looks for the token that was just appended, and finds no other like it.
    token = [x.to("cuda", torch.bfloat16) for x in draw(2, (4, 4), 1, 64, seed=1)]
    token[0] = 20 * token[1]
    out = kv.append_attend(*token, 1.0, "varlen")
    torch.testing.assert_close(out, token[2].transpose(1, 2), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("samples", [SAMPLES[:1], SAMPLES], ids=["one", "padded"])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_keep_all_gives_stock_tokens(family: str, seed: int, samples: tuple) -> None:
    model, stock = budgeted(family, seed).cuda(), build(family, seed).cuda()
    inputs = {name: x.cuda() for name, x in _on_cpu(family, seed, samples).items()}
    cache = HeadBudgetCache(method_for(model, "fullkv"))
    out = run(model, inputs, **{CACHE_ARGUMENT: cache}, max_new_tokens=32)
    assert torch.equal(out.sequences, run(stock, inputs, max_new_tokens=32).sequences)
    assert cache.backend() == "torch"


@each_dtype
@pytest.mark.parametrize("family", FAMILIES)
def test_auto_takes_varlen_in_half_precision(family: str, dtype: torch.dtype) -> None:
    """A compressed step by step answer is that of the torch backend, up to rounding."""
    model = budgeted(family, 1).to("cuda", dtype)
    inputs = _on_cpu(family, 1, SAMPLES)
    inputs = {
        name: x.to("cuda", dtype if x.is_floating_point() else None) for name, x in inputs.items()
    }
    outs = {}
    for backend, resolved in (("auto", "varlen"), ("torch", "torch")):
        cache = HeadBudgetCache(method_for(model, "adakv"), backend)
        outs[backend] = run(model, inputs, **{CACHE_ARGUMENT: cache}, max_new_tokens=2)
        assert cache.backend() == resolved
    # The first token comes from the dense prompt; both then read the same second step.
    first = [new_tokens(out, inputs)[:, 0] for out in outs.values()]
    assert torch.equal(*first)
    one, other = (logits(out).float() for out in outs.values())
    assert (one - other).abs().max() < 0.1 * one.abs().max()


@pytest.mark.parametrize("name", [*method_names(), "criticalkv+cake", "pyramidkv+adakv"])
def test_methods_keep_on_a_gpu_what_they_keep_on_a_cpu(name: str) -> None:
    """In float64, where no order of summation decides between two tokens."""
    shape = ModelShape(3, 8, 4)
    generator = torch.Generator().manual_seed(5)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    visual = torch.arange(200) < 180
    angles = random(200 + AHEAD, 8).repeat(1, 2)
    layers = [
        PromptLayer(
            index, random(8, 200, 16), random(4, 200, 16), random(4, 200, 16), random(64, 128),
            visual, torch.stack([angles.cos(), angles.sin()]),
        )
        for index in range(3)
    ]  # fmt: skip
    on_gpu = [
        PromptLayer(
            one.index, *(x.cuda() for x in (one.query, one.key, one.value, one.output)),
            one.visual, one.rotation.cuda(),
        )
        for one in layers
    ]  # fmt: skip
    known = {setting.name for setting in settings_of(name)}
    given = {"budget": 40, "head_scores": HeadScores(random(3, 8).exp().numpy())}
    given["sensitivity"] = Sensitivity.alike(shape)
    method = make_method(name, shape, **{k: v for k, v in given.items() if k in known})
    for here, there in zip(
        keep_prompt([method], layers), keep_prompt([method], on_gpu), strict=True
    ):
        assert there.is_cuda
        assert torch.equal(here, there.cpu())


def _on_cpu(family: str, seed: int, samples: tuple) -> dict[str, torch.Tensor]:
    model: PreTrainedModel = build(family, seed)
    return prompt(model, samples)
