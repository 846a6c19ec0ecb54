"""What a model answers: what transformers alone answers, whatever stands beside it in a batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.fixtures import SHORT, TASK, Row, Stock, ask, log, pages, photo, requests, rows
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.generation import cut, generation_options
from sparsemm_eval.engine.lmms import LlavaSparseMM, Qwen2VLSparseMM
from sparsemm_eval.methods import HeadScores
from sparsemm_eval.tiny.documents import PAGE

MakeQwen = Callable[..., Qwen2VLSparseMM]
MakeLlava = Callable[..., LlavaSparseMM]
# One tile, two side by side or above each other, four; most of them padded.
SIZES = ((32, 32), (60, 20), (20, 60), (70, 70), (64, 31), (200, 9), (33, 64), (40, 40))
LONG = {"max_new_tokens": 16}


@pytest.fixture(scope="session")
def stock_reader(reader: Checkpoint) -> Stock:
    """The trained reader without this package."""
    return Stock(reader.folder)


@pytest.fixture(scope="session")
def stock_llava(llava: Checkpoint) -> Stock:
    """The same LLaVA-NeXT without this package."""
    return Stock(llava.folder)


def photos(count: int = len(SIZES)) -> list[dict[str, Any]]:
    """Images of unlike tiling under prompts of unlike length."""
    return [
        {"images": [photo(*size, seed=number)], "question": "what is it? " * (1 + number % 3)}
        for number, size in enumerate(SIZES[:count])
    ]


def squeezed(method: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """Settings of a method under which most of these prompts' tokens are dropped."""
    settings: dict[str, Any] = {"method": method}
    if method != "fullkv":
        settings["budget"] = 24
    if method in ("snapkv", "pyramidkv", "adakv", "sparsemm", "random"):
        settings["window"] = 8
    if method == "sparsemm":
        heads = torch.arange(checkpoint.shape.layers * checkpoint.shape.query_heads) % 7 + 1
        path = checkpoint.scores_cache()
        path.parent.mkdir(parents=True)
        HeadScores(heads.view(checkpoint.shape.layers, -1).numpy()).write(path)
    return settings


# --- against transformers alone -----------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 8])
def test_full_kv_on_qwen2vl(qwen: MakeQwen, stock_reader: Stock, batch_size: int) -> None:
    documents = pages(8)
    said = ask(qwen(batch_size=batch_size), documents)
    assert said == [stock_reader.answer(document) for document in documents]
    assert len(set(said)) > 4


@pytest.mark.parametrize("batch_size", [1, 3])
def test_full_kv_on_llava(llava_model: MakeLlava, stock_llava: Stock, batch_size: int) -> None:
    documents = photos()
    model = llava_model(batch_size=batch_size)
    assert ask(model, documents, LONG) == [stock_llava.answer(d, LONG) for d in documents]
    assert len(set(ask(model, documents, LONG))) > 4
    lengths = [stock_llava.inputs(document)["input_ids"].shape[1] for document in documents]
    assert len(set(lengths)) > 4


def test_a_prompt_begins_with_one_bos(
    llava_model: MakeLlava, stock_llava: Stock, answers: Any
) -> None:
    """Whether the chat template writes it or the tokenizer adds it."""
    (document,) = photos(1)
    ask(llava_model(), [document])
    inputs = stock_llava.inputs(document)["input_ids"]
    bos = stock_llava.processor.tokenizer.bos_token_id
    assert int((inputs == bos).sum()) == 1
    assert rows(answers)[0].record["prompt_tokens"] == inputs.shape[1]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_no_image_one_and_two(qwen: MakeQwen, stock_reader: Stock, batch_size: int) -> None:
    first, second, third = pages(3)
    both = {"images": first["images"] + third["images"], "question": third["question"]}
    documents = [{"images": [], "question": "AB:"}, second, both]
    said = ask(qwen(batch_size=batch_size), documents)
    assert said == [stock_reader.answer(document) for document in documents]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_no_image_one_and_two_on_llava(
    llava_model: MakeLlava, stock_llava: Stock, batch_size: int
) -> None:
    first, second, third = photos(3)
    both = {"images": first["images"] + third["images"], "question": "which?"}
    documents = [{"images": [], "question": "who? "}, second, both]
    expected = [stock_llava.answer(document, LONG) for document in documents]
    assert ask(llava_model(batch_size=batch_size), documents, LONG) == expected


def text_only(count: int) -> list[dict[str, Any]]:
    """Questions without images, of unlike length."""
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" * 3
    return [
        {"images": [], "question": letters[number : 40 + 4 * number]} for number in range(count)
    ]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_text_alone(qwen: MakeQwen, stock_reader: Stock, answers: Any, batch_size: int) -> None:
    """Also right behind prompts with images, whose positions count in another way."""
    documents = [*pages(batch_size), *text_only(batch_size)]
    said = ask(qwen(batch_size=batch_size), documents)
    assert said == [stock_reader.answer(document) for document in documents]
    ask(qwen(batch_size=batch_size, method="snapkv", budget=24, window=8), documents)
    kept = [row.record for row in rows(answers)][len(documents) :]
    assert all(record["kept_per_head"] == 24 < record["prompt_tokens"] for record in kept)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_text_alone_on_llava(
    llava_model: MakeLlava, stock_llava: Stock, answers: Any, batch_size: int
) -> None:
    documents = [*photos(batch_size), *text_only(batch_size)]
    said = ask(llava_model(batch_size=batch_size), documents, LONG)
    assert said == [stock_llava.answer(document, LONG) for document in documents]
    ask(llava_model(batch_size=batch_size, method="snapkv", budget=24, window=8), documents)
    kept = [row.record for row in rows(answers)][len(documents) :]
    assert all(record["kept_per_head"] == 24 < record["prompt_tokens"] for record in kept)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK"])
def test_images_of_any_mode(qwen: MakeQwen, mode: str) -> None:
    (document,) = pages(1)
    other = document | {"images": [document["images"][0].convert(mode)]}
    assert ask(qwen(), [other]) == ask(qwen(), [document])


def test_an_image_given_by_its_path(qwen: MakeQwen, tmp_path: Any) -> None:
    """Read when its turn has come; the answer is that of its pixels, found again under them."""
    (document,) = pages(1)
    path = tmp_path / "page.png"
    document["images"][0].save(path)
    expected = ask(qwen(), [document])
    assert ask(qwen(), [document | {"images": [str(path)]}]) == expected
    assert len(rows(tmp_path / "answers")) == 1


def test_beams(llava_model: MakeLlava, stock_llava: Stock, answers: Any) -> None:
    """A beam search holds many rows a sample; what was kept is that of the sample."""
    documents = photos(4)
    generation = {"max_new_tokens": 6, "num_beams": 3}
    said = ask(llava_model(batch_size=2), documents, generation)
    assert said == [stock_llava.answer(document, generation) for document in documents]
    assert said != [stock_llava.answer(document, {"max_new_tokens": 6}) for document in documents]
    assert [row.record["kept_per_head"] for row in rows(answers)] == [
        stock_llava.inputs(document)["input_ids"].shape[1] for document in documents
    ]


# --- one row and many ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["snapkv", "adakv", "sparsemm", "pyramidkv", "streaming"])
def test_a_batch_answers_as_its_rows_alone(
    qwen: MakeQwen, reader: Checkpoint, tmp_path: Any, method: str
) -> None:
    """In float32; prompts of three lengths, so most rows are padded."""
    documents = pages(7)
    settings = squeezed(method, reader)
    alone, together = (
        ask(qwen(**settings, batch_size=size, answers=tmp_path / str(size)), documents)
        for size in (1, 8)
    )
    assert alone == together
    assert len(set(alone)) > 1
    one, many = (kept(rows(tmp_path / size)) for size in ("1", "8"))
    assert one == many


@pytest.mark.parametrize("method", ["sparsemm", "adakv", "local", "random"])
def test_a_batch_of_llava_answers_as_its_rows_alone(
    llava_model: MakeLlava, llava: Checkpoint, tmp_path: Any, method: str
) -> None:
    documents = photos()
    settings = squeezed(method, llava)
    alone, together = (
        ask(llava_model(**settings, batch_size=size, answers=tmp_path / str(size)), documents, LONG)
        for size in (1, 8)
    )
    assert alone == together
    assert kept(rows(tmp_path / "1")) == kept(rows(tmp_path / "8"))


def kept(stored: list[Row]) -> dict[str, tuple[int, float, int]]:
    """By document: prompt tokens, and what was kept of them."""
    names = ("prompt_tokens", "kept_per_head", "kept_bytes")
    return {row.doc_id: tuple(row.record[name] for name in names) for row in stored}


def test_kept_tokens_and_bytes_are_those_of_the_method(
    qwen: MakeQwen, reader: Checkpoint, stock_reader: Stock, answers: Any
) -> None:
    documents = pages(3)
    ask(qwen(method="snapkv", budget=40, window=8, batch_size=3), documents)
    lengths = [stock_reader.inputs(document)["input_ids"].shape[1] for document in documents]
    head_dim = reader.config.get_text_config().hidden_size // reader.shape.query_heads
    token = 2 * head_dim * 4 * reader.shape.layers * reader.shape.kv_heads
    assert kept(rows(answers)) == {
        f"test {number}": (length, 40, 40 * token) for number, length in enumerate(lengths)
    }
    for row in rows(answers):
        assert row.record["cache_bytes"] >= row.record["kept_bytes"]
        assert row.record["batch_size"] == 3
        assert row.record["device"] == "cpu"
        assert row.record["backend"] == "cuda_ext"
        assert 0 < row.record["seconds"] < 60


@pytest.mark.parametrize("method", ["fullkv", "sparsemm", "pyramidkv", "adakv"])
def test_backends_give_the_same_texts(qwen: MakeQwen, tmp_path: Path, method: str) -> None:
    """In folders apart: an answer is found again whatever backend it came from."""
    budget = {} if method == "fullkv" else {"budget": 24, "window": 8}
    texts, backends = [], set()
    for backend in ("cuda_ext", "torch"):
        folder = tmp_path / backend
        model = qwen(method=method, backend=backend, batch_size=4, answers=str(folder), **budget)
        texts.append(ask(model, pages(8)))
        backends |= {row.record["backend"] for row in rows(folder)}
    assert texts[0] == texts[1]
    assert backends == {"cuda_ext", "torch"}


# --- generation settings ------------------------------------------------------------------------


def test_until_cuts_the_answer(qwen: MakeQwen, answers: Any) -> None:
    (document,) = pages(1)
    model = qwen()
    (whole,) = ask(model, [document])
    assert len(whole) > 2
    assert ask(model, [document], {**SHORT, "until": [whole[2:]]}) == [whole[:2]]
    assert ask(model, [document], {**SHORT, "until": whole[1]}) == [whole.split(whole[1])[0]]
    assert ask(model, [document], {**SHORT, "until": ["\n\n", ""]}) == [whole]
    assert len(rows(answers)) == 4


TEXT = st.text("abc", max_size=12)


@settings(deadline=None, derandomize=True)
@given(TEXT, st.lists(TEXT, max_size=3))
def test_a_cut_text_holds_no_end(text: str, until: list[str]) -> None:
    left = cut(text, until)
    assert text.startswith(left)
    assert not any(end in left for end in until if end)
    if not any(end in text for end in until if end):
        assert left == text


def test_defaults_of_generation() -> None:
    """Greedy, with none of the checkpoint's own sampling, and lmms-eval's 1,024 tokens."""
    options, until = generation_options({})
    assert dict(options) == {
        "do_sample": False,
        "max_new_tokens": 1024,
        "temperature": None,
        "top_k": None,
        "top_p": None,
    }
    assert until == ()
    assert dict(generation_options({"max_new_tokens": None})[0])["max_new_tokens"] == 1024
    assert generation_options({"until": "\n\n", "image_aspect_ratio": "pad"})[1] == ("\n\n",)
    assert dict(generation_options({"do_sample": True, "temperature": 0})[0])["do_sample"] is False


@pytest.mark.parametrize("value", [0, -1, 2.5, "many"])
def test_max_new_tokens_that_are_none(value: Any) -> None:
    with pytest.raises(ValueError, match=rf"max_new_tokens={value!r}"):
        generation_options({"max_new_tokens": value})


def test_max_new_tokens_end_an_answer(qwen: MakeQwen, answers: Any) -> None:
    documents = pages(2, layouts=[PAGE])
    whole = ask(qwen(batch_size=2), documents)
    assert ask(qwen(), documents, {"max_new_tokens": 2}) == [text[:2] for text in whole]
    assert [row.record["new_tokens"] for row in rows(answers)] == [*map(len, whole), 2, 2]


@pytest.mark.parametrize("more", [[], ["A"], None])
def test_an_answer_ends_at_any_end_token(
    qwen: MakeQwen,
    reader: Checkpoint,
    stock_reader: Stock,
    monkeypatch: pytest.MonkeyPatch,
    answers: Any,
    more: list[str] | None,
) -> None:
    """One, several or none, as the checkpoint's generation_config has it."""
    ends = None
    if more is not None:
        tokenizer = reader.processor.tokenizer
        ends = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(more)]
    documents = pages(4)
    for model in (reader.model, stock_reader.model):
        monkeypatch.setattr(model.generation_config, "eos_token_id", ends)
    said = ask(qwen(batch_size=4), documents)
    expected = [stock_reader.answer(document) for document in documents]
    assert said == [cut(text, more or ()) for text in expected]
    if more is None:
        assert [row.record["new_tokens"] for row in rows(answers)] == [8] * 4


def test_repeats_of_a_sampled_answer_are_draws_of_their_own(qwen: MakeQwen, answers: Any) -> None:
    documents = pages(2)
    generation = {**SHORT, "temperature": 3.0, "do_sample": True}
    torch.manual_seed(0)
    first = ask(qwen(batch_size=2), documents, generation, repeats=3)
    assert len(set(first[:3])) > 1
    assert len(set(first[3:])) > 1
    assert len({row.key for row in rows(answers)}) == len(rows(answers)) == 6
    assert ask(qwen(batch_size=4), documents, generation, repeats=3) == first
    assert len(rows(answers)) == 6
    more = ask(qwen(), documents, generation, repeats=4)
    assert more[:3] + more[4:7] == first
    assert len(rows(answers)) == 8


def test_tasks_of_unlike_settings_do_not_share_a_batch(qwen: MakeQwen, answers: Any) -> None:
    """Though lmms-eval sends the requests of all tasks in one call."""
    documents = pages(3, layouts=[PAGE])
    model = qwen(batch_size=4)
    model.task_dict = {TASK: {"test": documents}, "brief": {"test": documents}}
    whole, brief = requests(3, SHORT), requests(3, {"max_new_tokens": 2}, task="brief")
    mixed = [request for pair in zip(whole, brief, strict=True) for request in pair]
    said = [result.text for result in model.generate_until(mixed)]
    assert said[1::2] == [text[:2] for text in said[::2]]
    assert {row.record["batch_size"] for row in rows(answers)} == {3}


def test_a_greedy_repeat_is_answered_once(qwen: MakeQwen, answers: Any) -> None:
    """So are the requests that lmms-eval clones to fill up a rank."""
    documents = pages(3)
    said = ask(qwen(batch_size=2), documents, repeats=2)
    assert said == [text for text in said[::2] for _ in range(2)]
    found = {row.doc_id: row.record["batch_size"] for row in rows(answers)}
    assert found == {"test 0": 2, "test 1": 2, "test 2": 1}


# --- what is said about it ----------------------------------------------------------------------


def test_a_warning_when_most_prompts_fit_the_budget(qwen: MakeQwen, tmp_path: Any) -> None:
    """Pages 0, 2 and 3 of 352, 440 and 352 image tokens; page 1 has 264."""
    documents = pages(4)
    warned = {}
    for budget in (300, 400):
        model = qwen(method="snapkv", budget=budget, answers=tmp_path / str(budget))
        with log() as lines:
            ask(model, documents)
        warned[budget] = [line for line in lines if line.startswith("WARNING")]
    assert warned[300] == []
    (words,) = warned[400]
    assert "3 of 4" in words
    assert "budget=400" in words
    with log() as lines:
        ask(qwen(), documents)
    assert not [line for line in lines if line.startswith("WARNING")]
