"""What cannot be right is refused, by name, before it becomes a wrong answer."""

from collections.abc import Callable, Sequence

import pytest
import torch
from cache.models import FAMILIES, SAMPLES, Sample, budgeted, build, lengths, method_for, prompt
from cache.oracle import generate_budgeted, new_tokens, run
from cache.sequences import draw, feed
from torch import Tensor
from transformers import PreTrainedModel

from sparsemm_eval.cache import CACHE_ARGUMENT, HeadBudgetCache, use_head_budget_attention
from sparsemm_eval.choices import BACKENDS
from sparsemm_eval.errors import UserError
from sparsemm_eval.methods import ModelShape, make_method

SHAPE = ModelShape(1, 4, 2)
TEXTS = (Sample(60, seed=1), Sample(48, seed=2))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return budgeted(request.param, seed=9)


def small_cache(backend: str = "auto") -> HeadBudgetCache:
    return HeadBudgetCache(make_method("snapkv", SHAPE, budget=10, window=4), backend)


def causal(valid: Tensor) -> Tensor:
    """The 4-D mask of a 2-D one."""
    n = valid.shape[1]
    return valid[:, None, None] & torch.ones(n, n, dtype=torch.bool).tril()


# --- the model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_model_on_another_attention(family: str, implementation: str) -> None:
    """The handle that takes the tensors' place is no tensor: nothing is computed without it."""
    model = build(family)
    model.set_attn_implementation({"text_config": implementation})
    inputs = prompt(model, SAMPLES)
    with pytest.raises((AttributeError, TypeError), match="RaggedLayer"):
        generate_budgeted(model, inputs, method_for(model, "fullkv"))


def test_sliding_window_shorter_than_the_prompt() -> None:
    model = build("mistral", sliding=40)
    use_head_budget_attention(model)
    method = method_for(model, "snapkv")
    for samples in (TEXTS[:1], TEXTS):
        cache = HeadBudgetCache(method)
        with pytest.raises(NotImplementedError, match="sliding window"):
            model(**prompt(model, samples), **{CACHE_ARGUMENT: cache})


def test_sliding_window_shorter_than_the_text() -> None:
    """The prompt fits, and the answer runs out of the window."""
    model = build("mistral", sliding=70)
    use_head_budget_attention(model)
    inputs = prompt(model, TEXTS[:1])
    with pytest.raises(NotImplementedError, match=r"last 70 tokens.*71 were read"):
        generate_budgeted(model, inputs, method_for(model, "snapkv"), max_new_tokens=20)


def test_sliding_window_that_holds_the_text() -> None:
    model, stock = build("mistral", sliding=70), build("mistral", sliding=70)
    use_head_budget_attention(model)
    inputs = prompt(model, TEXTS)
    out, _ = generate_budgeted(model, inputs, method_for(model, "fullkv"), max_new_tokens=10)
    assert torch.equal(out.sequences, run(stock, inputs, max_new_tokens=10).sequences)


# --- the prompt ---------------------------------------------------------------------------------


def test_second_turn(model: PreTrainedModel) -> None:
    inputs = prompt(model, TEXTS)
    out, cache = generate_budgeted(model, inputs, method_for(model, "snapkv"), max_new_tokens=4)
    ids = torch.cat([out.sequences, torch.full((2, 5), 9)], 1)
    more = torch.cat([inputs["attention_mask"], torch.ones(2, 9, dtype=torch.long)], 1)
    turn = {"input_ids": ids, "attention_mask": more}
    with pytest.raises(NotImplementedError, match="second turn"):
        run(model, turn, **{CACHE_ARGUMENT: cache})


@pytest.mark.parametrize("chunk", [16, 30])
def test_chunked_prefill(model: PreTrainedModel, chunk: int) -> None:
    inputs = prompt(model, TEXTS[:1])
    inputs.pop("mm_token_type_ids", None)
    with pytest.raises(NotImplementedError, match="chunks"):
        generate_budgeted(model, inputs, method_for(model, "snapkv"), prefill_chunk_size=chunk)


@pytest.mark.parametrize("valid", [[1, 1, 1, 0, 0], [1, 1, 0, 1, 1], [0, 1, 0, 1, 1]])
def test_padding_that_is_not_on_the_left(model: PreTrainedModel, valid: list[int]) -> None:
    mask = torch.tensor([valid, [1, 1, 1, 1, 1]])
    inputs = {"input_ids": torch.full((2, 5), 9), "attention_mask": mask}
    with pytest.raises(ValueError, match="padding must be on the left"):
        generate_budgeted(model, inputs, method_for(model, "snapkv"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
@pytest.mark.parametrize("rows", [1, 2])
def test_attention_pattern_of_ones_own(
    model: PreTrainedModel, rows: int, dtype: torch.dtype
) -> None:
    """A 4-D mask in which a prompt's second half does not see its first token."""
    ids = torch.stack([sample.text()[:40] for sample in TEXTS[:rows]])
    seen = causal(torch.ones(rows, 40, dtype=torch.bool))
    seen[:, :, 20:39, 0] = False
    mask = seen if dtype == torch.bool else torch.zeros(seen.shape).masked_fill(~seen, -1e30)
    positions = torch.arange(40).expand(rows, 40)
    if hasattr(model.model, "rope_deltas"):
        positions = positions.expand(3, rows, 40)
    cache = HeadBudgetCache(method_for(model, "snapkv"))
    with pytest.raises(NotImplementedError, match="padding"):
        model(input_ids=ids, attention_mask=mask, position_ids=positions, **{CACHE_ARGUMENT: cache})


def test_a_pattern_that_is_padding_is_none_of_ones_own() -> None:
    """The 4-D form of a padding mask is what transformers makes of a 2-D one."""
    valid = torch.arange(30) >= torch.tensor([[0], [12]])
    cache = small_cache()
    feed(cache, 0, draw(2, (4, 2), 30, 8), causal(valid))
    assert cache.prompt_lengths() == [30, 18]


def test_row_that_is_all_padding() -> None:
    """It keeps nothing, and the row beside it gets what it gets alone."""
    qkv = draw(2, (4, 2), 30, 8)
    cache, alone = small_cache(), small_cache()
    feed(cache, 0, qkv, causal(torch.tensor([[False] * 30, [True] * 30])))
    feed(alone, 0, [x[1:] for x in qkv])
    assert cache.kept()[0].sum() == 0
    assert torch.equal(cache.kept()[1:], alone.kept())
    token = draw(2, (4, 2), 1, 8, seed=1)
    out = feed(cache, 0, token)
    torch.testing.assert_close(out[1:], feed(alone, 0, [x[1:] for x in token]))
    torch.testing.assert_close(out[0, 0], token[2][0, :, 0].repeat_interleave(2, 0))


# --- the rows -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_wrong_number_of_rows(rows: int) -> None:
    """Two samples under two methods are four rows; even one that would broadcast is refused."""
    methods = [make_method("snapkv", SHAPE, budget=budget, window=4) for budget in (8, 10)]
    cache = HeadBudgetCache(methods)
    feed(cache, 0, draw(2, (4, 2), 30, 8))
    with pytest.raises(ValueError, match=rf"^{rows} rows to decode.*holds 4.*2 methods"):
        feed(cache, 0, draw(rows, (4, 2), 1, 8))


def test_fewer_rows_than_read(model: PreTrainedModel) -> None:
    """The rows of several methods are not the rows of the batch."""
    inputs = prompt(model, TEXTS)
    methods = [method_for(model, name) for name in ("snapkv", "local")]
    with pytest.raises(ValueError, match="rows to decode"):
        generate_budgeted(model, inputs, methods)


@pytest.mark.parametrize("bad", [[], ["one", "other"]])
def test_methods_of_no_or_several_shapes(bad: Sequence[str]) -> None:
    shapes = [SHAPE, ModelShape(2, 4, 2)][: len(bad)]
    methods = [make_method("local", shape, budget=9) for shape in shapes]
    with pytest.raises(ValueError, match="one ModelShape"):
        HeadBudgetCache(methods)


@pytest.mark.parametrize("heads", [(8, 2), (4, 4), (4, 1)])
@pytest.mark.parametrize("name", ["snapkv", "adakv", "random"])
def test_methods_for_another_model(name: str, heads: tuple[int, int]) -> None:
    """Other head counts would share the budget among heads that are not there."""
    method = make_method(name, ModelShape(1, *heads), budget=10, window=4)
    with pytest.raises(ValueError, match="4 query heads and 2 KV heads, but the methods"):
        feed(HeadBudgetCache(method), 0, draw(1, (4, 2), 30, 8))


def test_method_for_a_model_of_fewer_layers() -> None:
    cache = small_cache()
    with pytest.raises(ValueError, match="a layer 1, but the methods are for 1 layers"):
        feed(cache, 1, draw(1, (4, 2), 30, 8))


# --- the backend --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "flash", "Torch"])
def test_unknown_backend(name: str) -> None:
    with pytest.raises(ValueError, match=f"backend='{name}'.*{', '.join(BACKENDS)}"):
        small_cache(name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_varlen_needs_a_gpu(dtype: torch.dtype) -> None:
    cache = small_cache("varlen")
    with pytest.raises(ValueError, match=r"backend=varlen cannot run.* on cpu.*backend=auto"):
        feed(cache, 0, [x.to(dtype) for x in draw(1, (4, 2), 30, 8)])


@pytest.mark.parametrize(
    ("name", "dtype", "runs"),
    [
        ("auto", torch.float32, "cuda_ext"),
        ("auto", torch.bfloat16, "cuda_ext"),
        ("auto", torch.float64, "torch"),
        ("cuda_ext", torch.float32, "cuda_ext"),
        ("torch", torch.float32, "torch"),
    ],
)
def test_what_runs_on_a_cpu(name: str, dtype: torch.dtype, runs: str) -> None:
    cache = small_cache(name)
    feed(cache, 0, [x.to(dtype) for x in draw(1, (4, 2), 30, 8)])
    assert cache.backend() == runs


def test_the_compiled_op_has_no_double_precision() -> None:
    cache = small_cache("cuda_ext")
    with pytest.raises(ValueError, match=r"backend=cuda_ext cannot run torch.float64.* on cpu"):
        feed(cache, 0, [x.double() for x in draw(1, (4, 2), 30, 8)])


# --- the cache ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ask", [HeadBudgetCache.kept, HeadBudgetCache.bytes])
def test_empty_cache(ask: Callable[[HeadBudgetCache], object]) -> None:
    cache = small_cache()
    with pytest.raises(RuntimeError, match="cache is empty"):
        ask(cache)
    feed(cache, 0, draw(1, (4, 2), 30, 8))
    ask(cache)
    cache.reset()
    with pytest.raises(RuntimeError, match="cache is empty"):
        ask(cache)


def test_tokens_cannot_be_taken_back() -> None:
    cache = small_cache()
    feed(cache, 0, draw(1, (4, 2), 30, 8))
    with pytest.raises(NotImplementedError, match="assisted decoding"):
        cache.crop(-1)
    with pytest.raises(NotImplementedError, match="offload"):
        cache.layers[0].offload()


def test_assisted_decoding(model: PreTrainedModel) -> None:
    """Both kinds hand over several tokens at once, to take some of them back.

    transformers 5.24 asks the cache whether it can be cropped, earlier ones crop it.
    """
    inputs = prompt(model, TEXTS[:1])
    method = method_for(model, "snapkv")
    with pytest.raises((NotImplementedError, ValueError), match=r"(?i)assisted decoding"):
        generate_budgeted(model, inputs, method, prompt_lookup_num_tokens=3)


@pytest.mark.parametrize(
    "use",
    [
        lambda cache: feed(cache, 0, draw(3, (4, 2), 1, 8)),
        HeadBudgetCache.kept,
        HeadBudgetCache.bytes,
        lambda cache: cache.stores,
    ],
    ids=["decode", "kept", "bytes", "stores"],
)
def test_scores_that_are_not_finite(use: Callable[[HeadBudgetCache], object]) -> None:
    """No layer waits to know; whatever is done with what was kept, the method is named instead."""
    shape = ModelShape(2, 4, 2)
    names = ("fullkv", "snapkv", "local")
    methods = [
        make_method(name, shape, **({} if name == "fullkv" else {"budget": 40})) for name in names
    ]
    cache = HeadBudgetCache(methods)
    for layer in range(2):
        query, key, value = draw(1, (4, 2), 50, 8)
        if layer == 1:
            key[0, 0, 3] = torch.nan
        feed(cache, layer, [query, key, value])
    with pytest.raises(UserError, match=r"method=snapkv.*layer 1"):
        use(cache)
    cache.reset()
    for layer in range(2):
        feed(cache, layer, draw(1, (4, 2), 50, 8))
    assert cache.kept()[:, 0, 0].tolist() == [50, 40, 40]


def test_a_failed_prompt_leaves_the_cache_usable_after_reset(model: PreTrainedModel) -> None:
    method = method_for(model, "snapkv")
    inputs = prompt(model, TEXTS)
    cache = HeadBudgetCache(method)
    wrong = {**inputs, "attention_mask": inputs["attention_mask"].flip(1)}
    assert lengths(wrong) == lengths(inputs)
    with pytest.raises(ValueError, match="left"):
        run(model, wrong, **{CACHE_ARGUMENT: cache})
    cache.reset()
    again = run(model, inputs, **{CACHE_ARGUMENT: cache})
    fresh, _ = generate_budgeted(model, inputs, method)
    assert torch.equal(new_tokens(again, inputs), new_tokens(fresh, inputs))
