"""A task's generation_kwargs: each is heeded, known to change nothing, or refused by its name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmms_eval.tasks
import pytest
import yaml
from engine.fixtures import Stock, ask, pages, rows, sentence

from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.generation import WITHOUT_EFFECT, check_generation, generation_options
from sparsemm_eval.engine.lmms import Qwen2VLSparseMM
from sparsemm_eval.engine.tasks import find_tasks, obstacle

MakeQwen = Callable[..., Qwen2VLSparseMM]
GREEDY = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}


@pytest.mark.parametrize(
    ("given", "heeded"),
    [
        ({"max_new_tokens": 1000.0}, {"max_new_tokens": 1000}),
        ({"max_new_tokens": "1e3"}, {"max_new_tokens": 1000}),  # as YAML reads 1e3
        ({"max_new_tokens": "16"}, {"max_new_tokens": 16}),
        ({"temperature": 1}, {"temperature": 1.0, "do_sample": True}),
        ({"temperature": "2e-1"}, {"temperature": 0.2, "do_sample": True}),
        ({"temperature": 1, "top_p": 0, "top_k": 1}, {"top_p": 0, "top_k": 1}),
        ({"temperature": 0, "top_p": 0.9}, GREEDY),
        ({"do_sample": True}, GREEDY),
        ({"repetition_penalty": 2}, {"repetition_penalty": 2.0}),
        ({"no_repeat_ngram_size": 3}, {"no_repeat_ngram_size": 3}),
        ({"num_beams": 2, "early_stopping": True, "length_penalty": -1}, {"length_penalty": -1.0}),
        ({"temperature": None, "max_new_tokens": None}, {"max_new_tokens": 1024}),
    ],
    ids=str,
)
def test_what_is_heeded(given: dict[str, Any], heeded: dict[str, Any]) -> None:
    options = dict(generation_options(given)[0])
    assert {name: options[name] for name in heeded} == heeded
    for name in ("temperature", "repetition_penalty"):
        # transformers takes them as a float, and fails on the integer 1.
        assert options.get(name) is None or isinstance(options[name], float)


@pytest.mark.parametrize(
    "given",
    [
        {"num_return_sequences": 2},
        {"num_return_sequence": 1},
        {"no_repeat_ngram": 3},
        {"no_repeat_ngram_size": -1},
        {"no_repeat_ngram_size": 1.5},
        {"max_gen_toks": 64},
        {"max_length": 64},
        {"penalty_alpha": 0.6},
        {"skip_special_tokens": False},
        {"use_cache": False},
        {"temperature": math.nan},
        {"temperature": -1},
        {"temperature": math.inf},
        {"temperature": "warm"},
        {"temperature": True},
        {"temperature": [0.5]},
        {"temperature": 10**400},
        {"top_p": 1.5, "temperature": 0.5},
        {"top_p": -0.1},
        {"top_p": math.nan},
        {"top_k": -1},
        {"top_k": 2.5},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"repetition_penalty": math.nan},
        {"length_penalty": math.inf},
        {"num_beams": 0},
        {"num_beams": True},
        {"do_sample": "yes"},
        {"max_new_tokens": 0},
        {"max_new_tokens": 1e300},
        {"max_new_tokens": 10**15},
        {"max_new_tokens": "1" * 5000},
        {"max_new_tokens": True},
        {"min_new_tokens": -1},
        {"until": [5]},
        {"until": 5},
        {"until": {"a": "b"}},
        {"stop_sequences": ["a", None]},
    ],
    ids=lambda given: str(given)[:40],
)
def test_what_cannot_be_is_refused_by_name(given: dict[str, Any]) -> None:
    name = next(iter(given))
    with pytest.raises(ValueError, match=f"^own_task: generation_kwargs {name}=") as caught:
        check_generation("own_task", given)
    sentence(caught)


@pytest.mark.parametrize("given", ["greedy", [1], 5])
def test_generation_kwargs_that_are_no_mapping(given: Any) -> None:
    with pytest.raises(ValueError, match=r"own_task: generation_kwargs=.* must be a mapping"):
        check_generation("own_task", given)


def test_ends_have_many_names() -> None:
    assert generation_options({"until": "\n"})[1] == ("\n",)
    given = {"until": ["A"], "stop": "B", "stop_sequences": ["C", "D"], "stop_strings": None}
    assert generation_options(given)[1] == ("A", "B", "C", "D")


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("given", [{"stop_words": "x"}, {"temperature": -1}, {"until": [5]}])
def test_refused_before_weights_load(qwen: MakeQwen, answers: Path, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^pages: generation_kwargs {next(iter(given))}="):
        ask(qwen(), pages(2), given)
    assert rows(answers) == []


def test_refused_before_a_sweep_begins(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(
        "task: own_words\ndataset_path: json\ntest_split: train\noutput_type: generate_until\n"
        "generation_kwargs: {max_new_tokens: 8, contrastive: 4}\n"
    )
    cause = obstacle(find_tasks(["own_words"], [tmp_path]), "own_words") or ""
    assert cause.startswith("own_words: generation_kwargs contrastive=4: ")


def test_an_integer_temperature_samples(qwen: MakeQwen) -> None:
    assert len(ask(qwen(), pages(1), {"max_new_tokens": 4, "temperature": 1})) == 1


def test_no_repeated_tokens_as_transformers_has_them(qwen: MakeQwen, reader: Checkpoint) -> None:
    """A setting that greedy steps do not know goes through transformers' own loop."""
    documents = pages(2)
    generation = {"max_new_tokens": 12, "no_repeat_ngram_size": 1, "min_new_tokens": 10}
    stock = Stock(reader.folder)
    expected = [stock.answer(document, generation) for document in documents]
    assert ask(qwen(), documents, generation) == expected
    assert ask(qwen(), documents, {"max_new_tokens": 12, "min_new_tokens": 10}) != expected


# --- what the tasks of lmms-eval ask for --------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """Reads task files without importing the code that they name."""


_Loader.add_multi_constructor("!", lambda loader, suffix, node: None)


def asked_for() -> dict[str, dict[str, Any]]:
    """All generation_kwargs of installed task files that generate, by one file of each."""
    found = {}
    root = Path(lmms_eval.tasks.__path__[0])
    for path in sorted(root.rglob("*yaml*")):
        if path.suffix not in ("", ".yaml") or not path.is_file():
            continue
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        if not isinstance(content, dict):
            continue
        kind = content.get("output_type", "generate_until")
        given = content.get("generation_kwargs")
        if kind == "generate_until" and isinstance(given, dict):
            found.setdefault(json.dumps(given), str(path.relative_to(root)))
    return {path: json.loads(given) for given, path in found.items()}


# Decoding to text without special tokens is what all answers have in common.
REFUSED = {"openai_math/openai_math_train.yaml": "skip_special_tokens"}


def test_installed_tasks_are_heeded_or_refused_for_a_reason() -> None:
    asked = asked_for()
    assert len(asked) > 50
    refused = {}
    for path, given in asked.items():
        try:
            options, _ = generation_options(given)
        except ValueError as error:
            refused[path] = str(error).partition("=")[0]
            continue
        known = {*dict(options), "until", "stop_sequences", *WITHOUT_EFFECT}
        assert set(given) <= known, path
    assert refused == REFUSED
