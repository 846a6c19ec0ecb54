"""Rows on one shared prompt, against full copies of the cache in which the unseen is masked."""

import numpy as np
import pytest
import torch
from cache.models import SAMPLES, _norm_in_float64, build, prompt, shape_of
from cache.oracle import generate_masked, logits
from transformers import AutoModelForImageTextToText, LogitsProcessor, PreTrainedModel

from sparsemm_eval.cache import use_head_budget_attention
from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.errors import UserError
from sparsemm_eval.heads.capture import read_prompts
from sparsemm_eval.heads.starved import AnsweredPrompt
from sparsemm_eval.methods import make_method
from sparsemm_eval.methods.sensitivity import NEWEST, RECENT, RULES
from sparsemm_eval.tiny import embedded_checkpoints
from sparsemm_eval.tiny.documents import PAGE, Split, draw_document, stream, value_question

WINDOW = 8
TOLERANCE = 1e-9
MODELS = ("embedded:qwen2vl", "embedded:llava_next", "llama-mha", "llama-gqa", "qwen2vl")
TEXT = ("llama-mha text", "qwen2vl text")


def subject(name: str) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    """A model in float64 and one prompt with an image."""
    if not name.startswith("embedded:"):
        family, _, text = name.partition(" ")
        model = build(family, dtype=torch.float64)
        return model, prompt(model, SAMPLES[2:3] if text else SAMPLES[:1])
    folder = embedded_checkpoints()[name.removeprefix("embedded:")]
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64).eval()
    _norm_in_float64(model.model.language_model)
    page = draw_document(stream(Split.HELD_OUT, 1, 0), PAGE)
    question = value_question(page, 2).prompt
    inputs = read_prompts(Checkpoint(folder).processor, [page.image], [question])
    return model, dict(inputs.to(torch.float64))


def answered(name: str, tokens: int = 6) -> tuple[AnsweredPrompt, dict[str, torch.Tensor]]:
    model, inputs = subject(name)
    use_head_budget_attention(model)
    options = {"do_sample": False, "max_new_tokens": tokens}
    return AnsweredPrompt(model, inputs, WINDOW, options), inputs


class Forced(LogitsProcessor):
    """Writes a known answer."""

    def __init__(self, answer: list[int]) -> None:
        self.answer = list(answer)

    def __call__(self, input_ids, scores):
        chosen = torch.full_like(scores, -torch.inf)
        chosen[:, self.answer.pop(0)] = 0
        return chosen


def copied(name: str, answer: list[int], kept: torch.Tensor) -> torch.Tensor:
    """Log probabilities of the answer's tokens after the first, on a whole cache of one's own."""
    model, inputs = subject(name)
    forced = {"logits_processor": [Forced(answer)], "max_new_tokens": len(answer)}
    method = make_method("fullkv", shape_of(model))
    told = {layer: mask[None] for layer, mask in enumerate(kept)}
    out, _ = generate_masked(model, inputs, method, told, eos_token_id=None, **forced)
    return logits(out)[0, 1:].log_softmax(-1)


def diverged(whole: torch.Tensor, other: torch.Tensor) -> np.ndarray:
    return (whole.exp() * (whole - other)).sum(-1).numpy()


@pytest.mark.parametrize("name", MODELS + TEXT)
def test_rows_equal_full_copies(name: str) -> None:
    read, _ = answered(name)
    shape = shape_of(read.model)
    layers, heads, n = shape.layers, shape.kv_heads, read.n
    assert len(read.answer) > 1
    everything = np.full((layers, heads), n)
    rng = np.random.default_rng(0)
    # Each head alone starved, then two rows of counts and rules at random.
    starved = [(layer, head) for layer in range(layers) for head in range(heads)]
    rules = np.full((len(starved) + 2, layers, heads), NEWEST)
    counts = np.repeat(everything[None], len(rules), 0)
    for row, head in enumerate(starved):
        counts[(row, *head)] = WINDOW
    for row in (-1, -2):
        counts[row] = rng.integers(0, n + 1, (layers, heads))
        rules[row] = rng.integers(0, len(RULES), (layers, heads))
    found = read.divergence(rules, counts)
    ranks = [layer.ranks for layer in read.cache.layers]
    whole = copied(name, read.answer, torch.ones(layers, heads, n, dtype=torch.bool))
    chosen = [*range(0, len(starved), 7), len(starved), len(starved) + 1]
    for row in chosen:
        kept = torch.stack(
            [
                torch.stack(
                    [
                        ranks[layer][rules[row, layer, head], head] < counts[row, layer, head]
                        for head in range(heads)
                    ]
                )
                for layer in range(layers)
            ]
        )
        wanted = diverged(whole, copied(name, read.answer, kept))
        np.testing.assert_allclose(found[row], wanted, rtol=0, atol=TOLERANCE)
    assert found.max() > 0


def test_one_row_at_a_time_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    read, _ = answered("embedded:qwen2vl")
    shape = shape_of(read.model)
    rules = np.zeros((5, shape.layers, shape.kv_heads), dtype=int)
    counts = np.arange(5)[:, None, None] * 20 + np.zeros_like(rules)
    together = read.divergence(rules, counts)
    monkeypatch.setattr(AnsweredPrompt, "_rows_together", lambda self: 1)
    np.testing.assert_allclose(read.divergence(rules, counts), together, rtol=0, atol=TOLERANCE)
    assert together[0].mean() > together[-1].mean()


def test_a_row_that_sees_everything_loses_nothing() -> None:
    read, inputs = answered("embedded:llava_next")
    shape = shape_of(read.model)
    everything = np.full((1, shape.layers, shape.kv_heads), 10**6)
    for rule in range(len(RULES)):
        assert read.divergence(np.full_like(everything, rule), everything).max() < TOLERANCE
    again = AnsweredPrompt(read.model, inputs, WINDOW, {"do_sample": False}, read.answer)
    assert torch.allclose(again.whole, read.whole, rtol=0, atol=TOLERANCE)


def test_the_answer_is_transformers_own() -> None:
    read, inputs = answered("embedded:qwen2vl", tokens=12)
    model, _ = subject("embedded:qwen2vl")
    stock = model.generate(**inputs, do_sample=False, max_new_tokens=12)
    assert read.answer == stock[0, inputs["input_ids"].shape[1] :].tolist()


def test_rows_that_are_not_finite_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read, _ = answered("llama-gqa")
    shape = shape_of(read.model)
    few = np.full((1, shape.layers, shape.kv_heads), 3)
    lost = torch.full_like(read.whole, torch.nan)[None]
    monkeypatch.setattr(AnsweredPrompt, "_log_probabilities", lambda self, *rows: lost)
    with pytest.raises(UserError, match="means nothing, as logits are not finite"):
        read.divergence(np.zeros_like(few), few)


def test_newest_tokens_come_first_by_every_rule() -> None:
    read, _ = answered("embedded:qwen2vl")
    for layer in read.cache.layers:
        first = layer.ranks.argsort(-1)[..., :RECENT]
        newest = torch.arange(read.n - 1, read.n - 1 - RECENT, -1)
        assert (first == newest).all()


def test_no_copy_of_the_prompt_is_made() -> None:
    """However many rows there are, one prompt's keys and values are held."""
    read, _ = answered("llama-gqa")
    shape = shape_of(read.model)
    held = [(layer.key.data_ptr(), layer.key.shape) for layer in read.cache.layers]
    many = np.full((300, shape.layers, shape.kv_heads), 9)
    read.divergence(np.zeros_like(many), many)
    assert held == [(layer.key.data_ptr(), layer.key.shape) for layer in read.cache.layers]
    assert read.cache.layers[0].key.shape == (shape.kv_heads, read.n, 8)
