"""Logits that are no numbers: the sample fails with its cause, the others of its batch go on."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cache.models import SAMPLES, budgeted, method_for, prompt
from engine.fixtures import ask, log, pages, rows, sentence
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from sparsemm_eval.engine import lmms
from sparsemm_eval.engine.answers import SampleFailures
from sparsemm_eval.engine.decode import decode
from sparsemm_eval.engine.lmms import Qwen2VLSparseMM
from sparsemm_eval.methods import ObservationWindow, register_method, registry
from sparsemm_eval.methods.allocation import Uniform

WAYS = {
    "greedy": {"max_new_tokens": 6, "do_sample": False},
    "with a penalty": {"max_new_tokens": 6, "do_sample": False, "repetition_penalty": 1.3},
    "sampled": {"max_new_tokens": 6, "do_sample": True, "temperature": 0.7},
    "beams": {"max_new_tokens": 6, "do_sample": False, "num_beams": 2},
}
BAD_ROW = 2


def one(value: float) -> Callable[[Tensor], None]:
    """One number is it; the rest is as it was."""

    def spoil(logits: Tensor) -> None:
        logits[7] = value

    return spoil


def every(value: float) -> Callable[[Tensor], None]:
    def spoil(logits: Tensor) -> None:
        logits[:] = value

    return spoil


SPOILT = {
    "all NaN": every(math.nan),
    "one NaN": one(math.nan),
    "one infinite": one(math.inf),
    "all minus infinity": every(-math.inf),
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return budgeted("qwen2vl", seed=3)


@pytest.fixture(scope="module")
def inputs(model: PreTrainedModel) -> Mapping[str, Tensor]:
    return prompt(model, SAMPLES)


@contextmanager
def spoilt(
    model: PreTrainedModel, token: int, spoil: Callable[[Tensor], None], beams: int = 1
) -> Iterator[None]:
    """The logits of one row are no numbers when a new token is chosen, counted from 1."""
    calls = 0

    def hook(_: Any, __: Any, logits: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == token:
            logits = logits.clone()
            spoil(logits.flatten(0, -2)[beams * BAD_ROW])  # one place a row
        return logits

    handle = model.lm_head.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
@pytest.mark.parametrize("token", [1, 2, 4])
@pytest.mark.parametrize("way", WAYS)
def test_one_row_has_no_answer_and_the_others_have_theirs(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    way: str,
    token: int,
    spoil: Callable[[Tensor], None],
) -> None:
    options, methods = WAYS[way], [method_for(model, "snapkv")]
    torch.manual_seed(0)
    (wanted,) = decode(model, inputs, methods, options)
    assert wanted.not_finite == [None] * len(SAMPLES)
    torch.manual_seed(0)
    with spoilt(model, token, spoil, options.get("num_beams", 1)):
        (found,) = decode(model, inputs, methods, options)
    assert found.not_finite == [token if row == BAD_ROW else None for row in range(len(SAMPLES))]
    if way != "sampled":  # its draws depend on the rows before
        for row, (tokens, same) in enumerate(zip(found.tokens, wanted.tokens, strict=True)):
            assert row == BAD_ROW or torch.equal(tokens, same)


@pytest.mark.parametrize("way", WAYS)
def test_tokens_that_must_not_be_are_no_fault(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], way: str
) -> None:
    """Some logits of minus infinity are how a token is forbidden."""
    with spoilt(model, 2, one(-math.inf)):
        (found,) = decode(model, inputs, [method_for(model, "snapkv")], WAYS[way])
    assert found.not_finite == [None] * len(SAMPLES)


def test_what_comes_after_the_end_is_no_fault(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,) = decode(model, inputs, [method_for(model, "snapkv")], WAYS["greedy"])
    end = int(whole.tokens[BAD_ROW][2])
    assert end not in whole.tokens[BAD_ROW][:2]
    monkeypatch.setattr(model.generation_config, "eos_token_id", end)
    for options in (WAYS["greedy"], WAYS["greedy"] | {"min_new_tokens": 2}):
        with spoilt(model, 5, every(math.nan)):
            (found,) = decode(model, inputs, [method_for(model, "snapkv")], options)
        assert len(found.tokens[BAD_ROW]) == 2
        assert found.not_finite[BAD_ROW] is None


def test_full_kv_that_has_no_logits_compares_with_nothing(
    model: PreTrainedModel, inputs: Mapping[str, Tensor]
) -> None:
    methods = [method_for(model, "fullkv"), method_for(model, "snapkv")]
    calls = 0

    def hook(_: Any, __: Any, logits: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            logits = logits.clone()
            logits[2 * BAD_ROW] = math.nan  # full KV's row of the sample
        return logits

    handle = model.lm_head.register_forward_hook(hook)
    full, snapkv = decode(model, inputs, methods, WAYS["greedy"])
    handle.remove()
    assert [n is None for n in full.not_finite] == [True, True, False, True]
    assert snapkv.not_finite == [None] * 4
    assert [kl is None for kl in snapkv.kl_full] == [False, False, True, False]


def test_the_sample_fails_with_its_cause_and_no_other(
    qwen: Callable[..., Qwen2VLSparseMM], answers: Path, tmp_path: Path
) -> None:
    documents = pages(4)
    expected = ask(qwen(batch_size=4, answers=tmp_path / "undisturbed"), documents)
    model = qwen(batch_size=4)
    weights = model.runner.checkpoint.model
    failing = pytest.raises(SampleFailures, match="1 samples failed")
    with spoilt(weights, 2, every(math.nan)), log() as lines, failing as caught:
        ask(model, documents)
    assert "pages test 2: logits are not finite at new token 2 in float32" in sentence(caught)
    assert sum("ERROR" in line for line in lines) == 1
    found = {row.doc_id: row.text for row in rows(answers)}
    assert found == {f"test {n}": None if n == 2 else text for n, text in enumerate(expected)}
    assert ask(qwen(batch_size=4), documents) == expected
    assert len(rows(answers)) == 5


@dataclass(frozen=True)
class NoneForLong(ObservationWindow):
    """Scores that are NaN for prompts of so many tokens or more."""

    longest: int = 1

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        scores = super().__call__(query, key)
        return scores * math.nan if key.shape[1] >= self.longest else scores


def test_a_sample_whose_scores_are_none_fails_and_no_other(
    qwen: Callable[..., Qwen2VLSparseMM], answers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a method of one's own: the others of its batch have their answers."""
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    register_method("own", Uniform, scorer=NoneForLong)
    documents = pages(3)
    assert len(ask(qwen(batch_size=3), documents)) == 3
    lengths = {row.doc_id: row.record["prompt_tokens"] for row in rows(answers)}
    longest = max(lengths, key=lengths.get)
    settings = {"method": "own", "budget": 32, "window": 8, "longest": lengths[longest]}
    with pytest.raises(SampleFailures, match="1 samples failed") as caught:
        ask(qwen(batch_size=3, **settings), documents)
    assert f"pages {longest}: UserError: method=own: NoneForLong gives a score" in sentence(caught)
    assert "layer 0" in str(caught.value)
    of_own = {row.doc_id: row.text is None for row in rows(answers) if "own(" in row.cell}
    assert of_own == {name: name == longest for name in lengths}


def test_empty_answers_are_counted(
    qwen: Callable[..., Qwen2VLSparseMM], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[dict[str, Any]] = []
    monkeypatch.setattr(lmms, "log_metrics", lambda **kwargs: said.append(kwargs))
    texts = ask(qwen(), pages(3))
    first = {text[0] for text in texts}
    assert all(texts)
    ends = sorted(first)[:1]
    empty = sum(not text for text in ask(qwen(), pages(3), {"max_new_tokens": 8, "until": ends}))
    assert empty
    whole, cut = (one["additional_metrics"] for one in said)
    assert "empty_answers/pages" not in whole
    assert cut["empty_answers/pages"] == empty
    assert cut["samples"] == 3


@pytest.mark.parametrize("generation", [
    {"max_new_tokens": 4}, {"max_new_tokens": 4, "temperature": 0.5},
], ids=["greedy", "sampled"])  # fmt: skip
def test_weights_that_overflow_end_the_run_with_a_sentence(
    folder: Path, answers: Path, generation: Mapping[str, Any]
) -> None:
    """In half precision all samples fail alike; in float32 they have answers."""
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"].float() * 1e6
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    settings = {"pretrained": str(folder), "method": "fullkv", "answers": answers, "device": "cpu"}
    with pytest.raises(ValueError, match="not finite at new token 1 in float16") as caught:
        ask(Qwen2VLSparseMM(**settings, dtype="float16"), pages(4), generation)
    assert "take dtype=bfloat16 or float32" in sentence(caught)
    assert all(row.text is None for row in rows(answers))
    assert len(ask(Qwen2VLSparseMM(**settings, dtype="float32"), pages(4), generation)) == 4
