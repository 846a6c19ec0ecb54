"""On a GPU: graphs give the tokens of the step they captured, and the host waits for nothing.

That the step itself gives the tokens of transformers' ``generate`` is tested on the CPU, in
float32. These tests need no more than torch and transformers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from sparsemm_eval.bench.models import endless, heavy_scores, random_prompts
from sparsemm_eval.bench.options import main
from sparsemm_eval.cache import CACHE_ARGUMENT, HeadBudgetCache
from sparsemm_eval.engine.decode import Decoded, _generate, decode
from sparsemm_eval.engine.decoder import decoder_of, held_bytes, release
from sparsemm_eval.methods import HeadMask, Method, ModelShape, make_method
from sparsemm_eval.methods.scoring import ObservationWindow

pytestmark = pytest.mark.gpu
LONG = {"max_new_tokens": 120, "do_sample": False}  # through several copies to larger layers
TEXT = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module", params=["llava", "qwen2vl"])
def model(request: pytest.FixtureRequest) -> Iterator[PreTrainedModel]:
    """Tiny, in half precision, with heads of the size that the kernels take."""
    torch.manual_seed(1)
    if request.param == "llava":
        vision = CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            image_size=28, patch_size=14,
        )  # fmt: skip
        config = LlavaNextConfig(
            vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_id=500
        )
        made = LlavaNextForConditionalGeneration(config)
    else:
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 12, 12]}
        vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 256}
        ids = {"image_token_id": 500, "video_token_id": 501,
               "vision_start_token_id": 502, "vision_end_token_id": 503}  # fmt: skip
        config = Qwen2VLConfig(
            text_config={**TEXT, "rope_parameters": rope}, vision_config=vision, **ids
        )
        made = Qwen2VLForConditionalGeneration(config)
    yield endless(made.to("cuda", torch.float16))
    release(made)


def prompt(model: PreTrainedModel, samples: int, tokens: int) -> dict[str, Tensor]:
    """Random text, padded on the left by unlike amounts."""
    ids = random_prompts(model, samples, tokens)
    mask = torch.ones_like(ids)
    for row in range(samples):
        mask[row, : 7 * row] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def methods(model: PreTrainedModel, budget: int = 48) -> list[Method]:
    shape = ModelShape.from_config(model.config)
    scores = heavy_scores(shape.layers, shape.query_heads)
    return [
        make_method("fullkv", shape),
        make_method("sparsemm", shape, budget=budget, head_scores=scores),
        make_method("adakv", shape, budget=budget),
        make_method("pyramidkv", shape, budget=budget),
    ]


def said(decoded: Sequence[Decoded]) -> list[list[list[int]]]:
    return [[row.tolist() for row in found.tokens] for found in decoded]


def assert_graph_is_the_step(
    model: PreTrainedModel, inputs: dict[str, Tensor], options: dict, mask: HeadMask | None = None
) -> list[list[list[int]]]:
    """Captured and not: the same tokens, and the same distance from full KV."""
    graph, step = (
        decode(model, inputs, methods(model), options, mask=mask, cuda_graph=way)
        for way in ("auto", "eager")
    )
    assert said(graph) == said(step)
    assert [found.kl_full for found in graph] == [found.kl_full for found in step]
    assert all(found.backend == "cuda_ext" for found in graph)
    assert any(step.graph is not None for step in decoder_of(model).steps.values())
    return said(graph)


@pytest.mark.parametrize("samples", [1, 3])
def test_graph_is_the_step(model: PreTrainedModel, samples: int) -> None:
    tokens = assert_graph_is_the_step(model, prompt(model, samples, 200), LONG)
    assert all(len(row) == 120 for of_method in tokens for row in of_method)


def test_first_tokens_are_those_of_generate(model: PreTrainedModel) -> None:
    """Half precision flips near ties later on; most rows agree for a while."""
    inputs = prompt(model, 3, 200)
    short = {**LONG, "max_new_tokens": 4}
    graph = said(decode(model, inputs, methods(model), short))
    with torch.inference_mode():
        plain = said(
            [_generate(model, inputs, method, short, "auto", None) for method in methods(model)]
        )
    pairs = [(a, b) for m, n in zip(graph, plain, strict=True) for a, b in zip(m, n, strict=True)]
    assert sum(a == b for a, b in pairs) >= 0.75 * len(pairs)


def test_rows_that_end(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends are seen late, and nothing after them is told."""
    inputs = prompt(model, 3, 150)
    whole = said(decode(model, inputs, methods(model), LONG))
    ends = {whole[0][0][5], whole[1][1][30], whole[2][2][0]}
    monkeypatch.setattr(model.generation_config, "eos_token_id", sorted(ends))
    cut = assert_graph_is_the_step(model, inputs, LONG)
    for of_method, of_whole in zip(cut, whole, strict=True):
        for row, uncut in zip(of_method, of_whole, strict=True):
            stops = [at for at, token in enumerate(uncut) if token in ends]
            assert row == (uncut[: stops[0]] if stops else uncut)


def test_prompts_of_unlike_size(model: PreTrainedModel) -> None:
    """Memory moves for a longer one and its graph is captured anew; shorter ones use it."""
    release(model)
    for samples, tokens in ((1, 60), (1, 900), (2, 100), (1, 60), (1, 61)):
        assert_graph_is_the_step(model, prompt(model, samples, tokens), LONG)
    held = held_bytes(model)
    graphs = {kind: id(step.graph) for kind, step in decoder_of(model).steps.items()}
    assert_graph_is_the_step(model, prompt(model, 1, 60), LONG)
    assert held_bytes(model) == held
    assert {kind: id(step.graph) for kind, step in decoder_of(model).steps.items()} == graphs


@pytest.mark.parametrize("mode", ["query", "output"])
def test_silenced_heads(model: PreTrainedModel, mode: str) -> None:
    mask = HeadMask(((0, 1), (2, 3)), mode)
    assert_graph_is_the_step(model, prompt(model, 2, 80), {**LONG, "max_new_tokens": 20}, mask)


def test_repetition_penalty(model: PreTrainedModel) -> None:
    options = {**LONG, "max_new_tokens": 30, "repetition_penalty": 1.3}
    assert_graph_is_the_step(model, prompt(model, 2, 80), options)


def test_one_prompt(model: PreTrainedModel) -> None:
    inputs = prompt(model, 1, 300)
    for method in methods(model):
        graph, step = (
            decode(model, inputs, [method], LONG, cuda_graph=way) for way in ("auto", "eager")
        )
        assert said(graph) == said(step)


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error wherever torch makes the host wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@torch.inference_mode()
def test_a_prompt_is_compressed_without_waiting(model: PreTrainedModel) -> None:
    """Scoring, selecting and packing in every layer."""
    ids = random_prompts(model, 1, 400)
    positions = torch.arange(400, device="cuda")[None]
    for method in methods(model):
        for watch in (nullcontext, no_waiting):  # the first time kernels are loaded
            cache = HeadBudgetCache(method)
            given = {"input_ids": ids, "position_ids": positions, CACHE_ARGUMENT: cache}
            with watch():
                model(**given, use_cache=True, logits_to_keep=1)
        assert cache.kept().shape[1:] == (3, 2)


@torch.inference_mode()
def test_replaying_waits_for_nothing(model: PreTrainedModel) -> None:
    inputs = prompt(model, 1, 100)
    decode(model, inputs, methods(model)[1:2], LONG)
    (step,) = [s for s in decoder_of(model).steps.values() if s.graph is not None][:1]
    before = step.positions.clone()
    with no_waiting():
        for _ in range(20):
            step.graph.replay()
    assert torch.equal(step.positions, before + 20)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "group"), [(8, 1), (2, 4), (4, 7)])
def test_scores_are_exact(heads: int, group: int, dtype: torch.dtype) -> None:
    """Half-precision keys are read as they are; sums are float32."""
    generator = torch.Generator("cuda").manual_seed(0)
    query, key = (
        torch.randn(count, 3000, 128, generator=generator, device="cuda").to(dtype)
        for count in (heads * group, heads)
    )
    scorer = ObservationWindow()
    wanted = scorer(query.double(), key.double())
    found = scorer(query, key)
    assert found.dtype == torch.float32
    assert ((found - wanted).norm() / wanted.norm()).item() < 1e-4


def test_efficiency_with_graphs(tmp_path: Path) -> None:
    assert main("efficiency", [
        "--quick", "--engines", "ours,ours_plain,hf_generate,concatenate", "--device", "cuda",
         "--out", str(tmp_path),
    ]) == 0  # fmt: skip
