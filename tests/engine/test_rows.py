"""Many methods from one reading: rows drop out as they end, and say what they would alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from engine.fixtures import LAYOUTS, Stock, ask_all, pages, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.decode import Decoded, _generate, decode
from sparsemm_eval.engine.lmms import make_runner
from sparsemm_eval.methods import Method, make_method

NEW = 30
LONG = {"max_new_tokens": NEW, "do_sample": False}


def methods_for(checkpoint: Checkpoint) -> list[Method]:
    """Full KV among methods that drop most of a prompt."""
    squeezed = [
        make_method(name, checkpoint.shape, budget=budget, window=8)
        for name, budget in (("snapkv", 12), ("adakv", 12), ("pyramidkv", 40))
    ]
    return [squeezed[0], make_method("fullkv", checkpoint.shape), *squeezed[1:]]


@pytest.fixture(scope="module")
def inputs(reader: Checkpoint) -> Mapping[str, Tensor]:
    """Three pages of unlike length, padded."""
    stock = [page["images"][0] for page in pages(len(LAYOUTS))]
    prompts = [
        reader.processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": words}]}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for words in (page["question"] for page in pages(len(LAYOUTS)))
    ]
    return reader.processor(text=prompts, images=stock, padding=True, return_tensors="pt")


def by_generate(
    checkpoint: Checkpoint, inputs: Mapping[str, Tensor], method: Method, options: Mapping[str, Any]
) -> Decoded:
    """One method by itself, in one call of transformers' ``generate``."""
    with torch.inference_mode():
        return _generate(checkpoint.model, inputs, method, options, "auto", None)


def alone(
    reader: Checkpoint, inputs: Mapping[str, Tensor], options: Mapping[str, Any]
) -> list[Decoded]:
    """Each method by itself, in one call of ``generate``."""
    return [by_generate(reader, inputs, method, options) for method in methods_for(reader)]


def together(
    reader: Checkpoint, inputs: Mapping[str, Tensor], options: Mapping[str, Any]
) -> list[Decoded]:
    return decode(reader.model, inputs, methods_for(reader), options)


def said(decoded: Sequence[Decoded]) -> list[list[list[int]]]:
    return [[row.tolist() for row in found.tokens] for found in decoded]


@pytest.fixture
def ends(reader: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int] | None], None]:
    """Set the tokens at which answers end."""

    def put(tokens: list[int] | None) -> None:
        monkeypatch.setattr(reader.model.generation_config, "eos_token_id", tokens)

    return put


def test_rows_that_end_at_very_unlike_steps(
    reader: Checkpoint, inputs: Mapping[str, Tensor], ends: Callable[..., None]
) -> None:
    """Without an end all go on to the last step; then each token said ends some of them."""
    ends(None)
    whole = said(alone(reader, inputs, LONG))
    assert said(together(reader, inputs, LONG)) == whole
    assert all(len(row) == NEW for of_method in whole for row in of_method)
    cuts = [
        [token, [[_before(token, row) for row in of_method] for of_method in whole]]
        for token in {token for of_method in whole for row in of_method for token in row}
    ]
    cuts.sort(key=lambda cut: -_steps(cut[1]))
    assert _steps(cuts[0][1]) > 4
    for token, expected in cuts[:5]:
        ends([token])
        assert said(together(reader, inputs, LONG)) == expected


def _before(token: int, row: list[int]) -> list[int]:
    return row[: row.index(token)] if token in row else row


def _steps(answers: list[list[list[int]]]) -> int:
    """After how many different steps answers end."""
    return len({len(row) for of_method in answers for row in of_method})


def test_what_was_kept_is_stated_for_rows_that_dropped_out(
    reader: Checkpoint, inputs: Mapping[str, Tensor]
) -> None:
    for found, own in zip(together(reader, inputs, LONG), alone(reader, inputs, LONG), strict=True):
        assert torch.equal(found.kept, own.kept)
        assert found.kept_bytes == own.kept_bytes
        assert found.prompt_tokens == own.prompt_tokens
        token = own.kept_bytes[0] // int(own.kept[0].sum()) * own.kept[0].numel()
        for held, kept, tokens in zip(
            found.cache_bytes, found.kept_bytes, found.tokens, strict=True
        ):
            # All but the last token went through the model; at most 256 slots are free.
            assert held >= kept + len(tokens) * token
            assert held <= kept + (NEW + 256) * token


def test_ended_rows_are_not_decoded_on(reader: Checkpoint, inputs: Mapping[str, Tensor]) -> None:
    """Never more than twice as many row steps as the answers have tokens, one to compare aside."""
    steps: list[int] = []
    hook = reader.model.lm_head.register_forward_hook(
        lambda module, given, out: steps.append(out.shape[0])
    )
    with hook:
        decoded = together(reader, inputs, LONG)
    every = sum(len(found.tokens) for found in decoded)
    wanted = sum(len(tokens) for found in decoded for tokens in found.tokens)
    assert steps[0] == len(inputs["input_ids"])
    assert sum(steps[1:]) <= 2 * wanted + every
    assert len(set(steps[1:])) > 1


OPTIONS = st.fixed_dictionaries(
    {"max_new_tokens": st.integers(1, 10)},
    optional={
        "min_new_tokens": st.integers(0, 12) | st.none(),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 2.5]),
    },
)


@pytest.mark.filterwarnings("ignore:Unfeasible length")
@settings(max_examples=8, deadline=None, derandomize=True)
@given(OPTIONS)
def test_generation_settings_act_as_in_one_call(
    reader: Checkpoint, inputs: Mapping[str, Tensor], options: dict[str, Any]
) -> None:
    options = {"do_sample": False, **options}
    assert said(together(reader, inputs, options)) == said(alone(reader, inputs, options))


@pytest.mark.parametrize("least", [0, 1, 2, 6])
def test_least_tokens_of_the_checkpoint_itself(
    reader: Checkpoint,
    inputs: Mapping[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    least: int,
) -> None:
    monkeypatch.setattr(reader.model.generation_config, "min_new_tokens", least)
    expected = said(alone(reader, inputs, LONG))
    assert said(together(reader, inputs, LONG)) == expected
    assert min(len(row) for of_method in expected for row in of_method) >= least


def test_samples_that_end_with_their_first_token(
    reader: Checkpoint, inputs: Mapping[str, Tensor], ends: Callable[..., None]
) -> None:
    """One of them, then all."""
    ends(None)
    first = [row[0] for row in said(alone(reader, inputs, {**LONG, "max_new_tokens": 1}))[0]]
    assert len(set(first)) > 1
    for stops in (first[:1], first):
        ends(stops)
        decoded = together(reader, inputs, LONG)
        assert said(decoded) == said(alone(reader, inputs, LONG))
        for found in decoded:
            short = [token in stops for token in first]
            assert [not len(row) for row in found.tokens][: len(short)] == short
            assert all(kl is None for kl, ended in zip(found.kl_full, short, strict=True) if ended)
            assert all(size > 0 for size in found.cache_bytes)


def test_a_llava_too(llava: Checkpoint) -> None:
    """It has no text positions of its own to be kept in step."""
    stock = Stock(llava.folder)
    documents = [stock.inputs(page) for page in pages(1)]
    methods = methods_for(llava)
    options = {**LONG, "max_new_tokens": 12}
    apart = [by_generate(llava, documents[0], method, options) for method in methods]
    assert said(decode(llava.model, documents[0], methods, options)) == said(apart)


def test_answers_in_the_store_say_their_tokens(reader: Checkpoint, answers: Any) -> None:
    cells = [{"method": "fullkv"}, {"method": "snapkv", "budget": 12, "window": 8}]
    runner = make_runner(reader, cells, answers, 3)
    texts = [text for of_cell in ask_all(runner, pages(3)) for text in of_cell]
    full = runner.words(runner.cells[0], "pages")
    decode_text = reader.processor.tokenizer.decode
    stored = sorted(rows(answers), key=lambda row: (row.cell != full, row.doc_id))
    assert [decode_text(row.record["tokens"]).strip() for row in stored] == texts
    assert [len(row.record["tokens"]) for row in stored] == [
        row.record["new_tokens"] for row in stored
    ]
