"""Candidates are scored as if their tokens had been chosen, on the cache that each method left."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cache.models import FAMILIES, METHODS, SAMPLES, budgeted, build, method_for, prompt
from cache.oracle import Forced, generate_masked, likelihood, logits
from engine.fixtures import Stock, log, pages, photo, rows, sentence
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lmms_eval.api.instance import GenerationResult, Instance
from transformers import PreTrainedModel
from typer.testing import CliRunner

from sparsemm_eval.cli import app
from sparsemm_eval.engine import runner as runner_module
from sparsemm_eval.engine.answers import SampleFailures
from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.decode import Candidate, decode, score
from sparsemm_eval.engine.lmms import CellModel, make_runner
from sparsemm_eval.engine.requests import read_chat, with_candidates
from sparsemm_eval.engine.runner import Runner
from sparsemm_eval.errors import UserError
from sparsemm_eval.families import find_family
from sparsemm_eval.methods import HeadMask
from sparsemm_eval.tiny import find_checkpoint

GREEDY = {"do_sample": False}
NAMES = ("fullkv", *METHODS)
WORDS = st.lists(st.integers(4, 120), min_size=1, max_size=24).map(tuple)  # the slack is 16
TASK, SPLIT = "choices", "test"


def assert_equal(found: Candidate, wanted: tuple[float, bool]) -> None:
    assert found.log_likelihood == pytest.approx(wanted[0], abs=2e-3)
    assert found.is_greedy is wanted[1]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same model twice in float32: for the cache, and for the oracle."""
    return budgeted(request.param, 3), build(request.param, 3)


@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    candidates=st.lists(
        st.lists(WORDS, min_size=1, max_size=3), min_size=len(SAMPLES), max_size=len(SAMPLES)
    ),
    name=st.sampled_from(METHODS),
)
def test_equals_the_oracle_with_evicted_tokens_masked(
    pair: tuple[PreTrainedModel, PreTrainedModel],
    candidates: list[list[tuple[int, ...]]],
    name: str,
) -> None:
    """Drawn candidates of a padded batch, under full KV and a method, beside each one by itself."""
    model, stock = pair
    inputs = prompt(model, SAMPLES)
    both = [method_for(model, one) for one in ("fullkv", name)]
    found = score(model, inputs, both, candidates, GREEDY)
    for method, of_method in zip(both, found, strict=True):
        assert [[one.tokens for one in row] for row in of_method.candidates] == candidates
        for place in range(max(map(len, candidates))):
            chosen = [row[min(place, len(row) - 1)] for row in candidates]
            steps = max(map(len, chosen))
            padded = torch.tensor([[*tokens, *[4] * (steps - len(tokens))] for tokens in chosen])
            force = Forced(padded, inputs["input_ids"].shape[1])
            out, oracle = generate_masked(
                stock, inputs, method, max_new_tokens=steps, logits_processor=[force]
            )
            assert torch.equal(of_method.kept, oracle.counts())
            for row, tokens in enumerate(chosen):
                scored = of_method.candidates[row][candidates[row].index(tokens)]
                assert_equal(scored, likelihood(logits(out)[row], tokens))


def test_all_methods_of_a_batch_beside_each_alone(
    pair: tuple[PreTrainedModel, PreTrainedModel],
) -> None:
    """A candidate is scored alike with others beside it, other methods, padding, or none."""
    model, _ = pair
    candidates = [[(5, 6, 7), (9,)], [(8,) * 20], [(9, 9), (10, 11, 12)], [(5,), (5, 5), (5, 5, 5)]]
    methods = [method_for(model, name) for name in NAMES]
    mask = HeadMask(((0, 1), (2, 0)), "output")
    together = score(model, prompt(model, SAMPLES), methods, candidates, GREEDY, mask=mask)
    for method, of_method in zip(methods[::4], together[::4], strict=True):
        for sample, of_sample, row in zip(SAMPLES, candidates, of_method.candidates, strict=True):
            for tokens, one in zip(of_sample, row, strict=True):
                single = prompt(model, [sample])
                (alone,) = score(model, single, [method], [[tokens]], GREEDY, mask=mask)
                ((wanted,),) = alone.candidates
                assert_equal(one, (wanted.log_likelihood, wanted.is_greedy))


def test_an_answer_that_was_generated_is_greedy(
    pair: tuple[PreTrainedModel, PreTrainedModel],
) -> None:
    """Under the method that gave it, as long as it is; with one token changed it is not."""
    model, _ = pair
    inputs, methods = prompt(model, SAMPLES), [method_for(model, name) for name in NAMES]
    said = decode(model, inputs, methods, {**GREEDY, "max_new_tokens": 6})
    for place, method in enumerate(methods):
        answers = [tuple(row.tolist()) for row in said[place].tokens]
        changed = [(*row[:-1], row[-1] ^ 1) for row in answers]
        pairs = list(zip(answers, changed, strict=True))
        (found,) = score(model, inputs, [method], pairs, GREEDY)
        assert [tuple(row.tolist()) for row in found.tokens] == answers
        for row in found.candidates:
            assert [one.is_greedy for one in row] == [True, False]


# --- through requests ----------------------------------------------------------------------------

DOCUMENTS = [
    *pages(2),
    {"images": [], "question": "Which of these?"},
    {"images": [photo(64, 48), photo(40, 80, 1)], "question": "What do these show?"},
]
CHOICES = [["7", "a house"], ["Kim", "14 May", "x"], ["Kim"], ["a b c d e f g h", "no"]]


def asked(document: int, texts: Sequence[Any], task: str = TASK, context: str = "") -> list:
    """What lmms-eval asks of a document's choices."""

    def visual(shown: Mapping[str, Any]) -> list:
        return shown["images"]

    words = context or DOCUMENTS[document]["question"]
    return [
        Instance(
            "loglikelihood", (words, text, visual, document, task, SPLIT), idx,
            {"task": task, "doc_id": document, "repeats": 1},
        )
        for idx, text in enumerate(texts)
    ]  # fmt: skip


def cells(*names: str) -> list[dict[str, Any]]:
    return [
        {"method": name, **({} if name == "fullkv" else {"budget": 12, "window": 8})}
        for name in names
    ]


@pytest.fixture(scope="module", params=["qwen2vl", "llava_next"])
def embedded(request: pytest.FixtureRequest) -> Checkpoint:
    return Checkpoint(find_checkpoint(f"embedded:{request.param}"), dtype="float32")


def model_of(runner: Runner, place: int = 0) -> CellModel:
    model = CellModel(runner, runner.cells[place], is_simple=True)
    model.task_dict = {TASK: {SPLIT: DOCUMENTS}}
    return model


def test_keep_all_equals_the_stock_model_over_prompt_and_candidate(
    embedded: Checkpoint, tmp_path: Path
) -> None:
    """No image, one and two; tokenized jointly by the processor itself; in padded batches."""
    runner = make_runner(embedded, cells("fullkv", "snapkv"), tmp_path, 3)
    spaced = [[f" {text}" for text in texts] for texts in CHOICES]  # by a target_delimiter
    instances = [one for number, texts in enumerate(spaced) for one in asked(number, texts)]
    found = iter(model_of(runner).loglikelihood(instances))
    stock = Stock(Path(embedded.pretrained))
    for document, texts in zip(DOCUMENTS, CHOICES, strict=True):
        content: list[dict] = [{"type": "image"} for _ in document["images"]]
        content.append({"type": "text", "text": document["question"]})
        user = {"role": "user", "content": content}
        own = stock.inputs(document)["input_ids"].shape[1]
        for text in texts:
            answer = {"role": "assistant", "content": [{"type": "text", "text": text}]}
            whole = stock.processor.apply_chat_template([user, answer], tokenize=False)
            whole = whole[: whole.rindex(text) + len(text)].removeprefix("<s>")
            inputs = stock.processor(
                text=[whole], images=document["images"] or None, return_tensors="pt"
            )
            with torch.no_grad():
                out = stock.model(**inputs).logits[0, own - 1 : -1]
            wanted = likelihood(out, inputs["input_ids"][0, own:].tolist())
            loss, is_greedy = next(found).text
            assert loss == pytest.approx(-wanted[0], abs=2e-3)
            assert is_greedy is wanted[1]


def test_one_prefill_answers_all_choices_of_all_cells_once(
    embedded: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record holds them; another process finds it; other choices are another answer."""
    runner = make_runner(embedded, cells("fullkv", "snapkv", "adakv"), tmp_path, 2)
    read: list[int] = []
    batch = Runner.read_batch
    monkeypatch.setattr(
        Runner, "read_batch", lambda self, given: read.append(len(given)) or batch(self, given)
    )
    instances = [one for number, texts in enumerate(CHOICES) for one in asked(number, texts)]
    first = [one.text for one in model_of(runner).loglikelihood(instances)]
    assert read == [2, 2]
    records = [row.record for row in rows(tmp_path)]
    assert [len(record["candidates"]) for record in records] == [2, 3, 1, 2]
    for record in records:
        best = max(record["candidates"], key=lambda one: one["log_likelihood"])
        assert record["tokens"] == best["tokens"]
        assert record["cache_bytes"] > record["kept_bytes"] > 0
    again = make_runner(embedded, cells("fullkv", "snapkv", "adakv"), tmp_path, 2)
    repeated = [one for one in instances for _ in range(2)]  # as lmms-eval repeats a task
    assert [one.text for one in model_of(again).loglikelihood(repeated)][::2] == first
    assert read == [2, 2]
    model_of(again).loglikelihood(asked(0, ["7", "another"]))
    assert read == [2, 2, 1]
    # One document may be put in several ways, each with a choice of its own.
    both = [*asked(0, ["7"], context="One?"), *asked(0, ["7"], context="Two?")]
    (one, two) = (answer.text for answer in model_of(again).loglikelihood(both))
    assert one != two


def test_a_run_that_is_stopped_goes_on(
    embedded: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And where memory is short, each choice counts as a row: methods are decoded apart."""
    given = cells("fullkv", "snapkv", "adakv")
    instances = [one for number, texts in enumerate(CHOICES) for one in asked(number, texts)]
    whole = model_of(make_runner(embedded, given, tmp_path / "whole", 1), 1)
    wanted = [one.text for one in whole.loglikelihood(instances)]

    monkeypatch.setattr(runner_module, "free_memory", lambda _: 1)
    together: list[tuple[int, int]] = []
    decode_batch = Runner.decode_batch

    def stop(self: Runner, samples: Any, inputs: Any, cells: Any) -> Any:
        together.append((len(samples), len(cells)))
        if len(together) == 5:
            raise KeyboardInterrupt
        return decode_batch(self, samples, inputs, cells)

    monkeypatch.setattr(Runner, "decode_batch", stop)
    datasets = {TASK: {SPLIT: DOCUMENTS}}
    requests = [request for request, _ in with_candidates(instances, datasets)]
    with pytest.raises(KeyboardInterrupt):
        make_runner(embedded, given, tmp_path / "answers", 2).answer(requests)
    assert len(rows(tmp_path / "answers")) == 3 * 2 + 2
    runner = make_runner(embedded, given, tmp_path / "answers", 2)
    runner.answer(requests)
    assert together == [(2, 1)] * 7
    assert len(rows(tmp_path / "answers")) == 3 * 4
    for (loss, is_greedy), before in zip(
        (one.text for one in model_of(runner, 1).loglikelihood(instances)), wanted, strict=True
    ):
        assert loss == pytest.approx(before[0], abs=2e-3)
        assert is_greedy is before[1]


def test_what_a_task_makes_of_the_document_is_its_log_likelihood(
    embedded: Checkpoint, tmp_path: Path
) -> None:
    """Of output_type loglikelihood, whose perplexity wants it so; choices are compared by loss."""
    model = model_of(make_runner(embedded, cells("fullkv"), tmp_path))
    (loss,) = model.loglikelihood(asked(0, ["7"]))
    (log_likelihood,) = model.loglikelihood(asked(0, [lambda document: "7"]))
    assert isinstance(loss, GenerationResult)
    assert loss.text[0] == -log_likelihood.text[0] > 0
    assert loss.text[1] is log_likelihood.text[1]


def test_choices_of_one_token_are_full_kvs_and_that_is_said(
    embedded: Checkpoint, tmp_path: Path
) -> None:
    runner = make_runner(embedded, cells("fullkv", "snapkv"), tmp_path)
    with log() as lines:
        full, compressed = (
            [one.text for one in model_of(runner, place).loglikelihood(asked(0, ["7", "x"]))]
            for place in (0, 1)
        )
    assert full == compressed
    (line,) = [line for line in lines if "of one token" in line]
    assert "the choices of choices are" in line
    with log() as lines:
        model_of(runner, 1).loglikelihood(asked(0, ["7", "a house"]))
    assert not any("of one token" in line for line in lines)


class Letters:
    """A processor whose chat template is two texts, and whose tokens are letters."""

    def __init__(self, prompt: str, turn: str) -> None:
        self.prompt, self.turn, self.tokenizer = prompt, turn, self

    def apply_chat_template(self, messages: list[dict], add_generation_prompt: bool = False, **_):
        if add_generation_prompt:
            return self.prompt
        return self.turn.replace("…", messages[-1]["content"][0]["text"])

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


@pytest.mark.parametrize(("prompt", "turn", "answer"), [
    ("USER: a? ASSISTANT:", "USER: a? ASSISTANT: …</s>", " a"),
    ("[INST] a? [/INST]", "[INST] a? [/INST] …</s>", " a"),
    ("user\na?<end>\nmodel\n", "user\na?<end>\nmodel\n…<end>\n", "a"),
    # Of LLaVA-OneVision: a blank behind the role of a turn, and none in the generation prompt.
    ("<s>user a?<e><s>assistant\n", "<s>user a?<e><s>assistant \n…<e>", "a"),
    ("<s>user a?<e><s>assistant\n<think>\n", "<s>user a?<e><s>assistant\n…<e>", None),
    ("USER: a? ASSISTANT:", "USER: a? ASSISTANT:", None),
])  # fmt: skip
def test_an_answer_is_where_the_template_puts_it(
    prompt: str, turn: str, answer: str | None
) -> None:
    processor, content = Letters(prompt, turn), [{"type": "text", "text": "a?"}]
    asked = [{"role": "user", "content": content}]
    if answer is None:
        with pytest.raises(UserError, match="does not put the answer 'a' as it is behind"):
            read_chat(processor, asked, find_family("qwen2_vl")(), ["a"])
    else:
        chat = read_chat(processor, asked, find_family("qwen2_vl")(), [" a "])
        assert "".join(map(chr, chat.candidates[0])) == answer


@pytest.mark.parametrize("empty", ["", "  \n"])
def test_an_empty_choice_fails_its_sample_alone(
    embedded: Checkpoint, tmp_path: Path, empty: str
) -> None:
    """A likelihood of 1 would win over all others."""
    runner = make_runner(embedded, cells("fullkv"), tmp_path)
    instances = [*asked(0, ["7", empty]), *asked(1, ["7"])]
    with pytest.raises(SampleFailures, match=f"{SPLIT} 0: UserError: a candidate is empty"):
        model_of(runner).loglikelihood(instances)
    allowed = make_runner(embedded, [{**cells("fullkv")[0], "allow_failed": 1}], tmp_path)
    found = model_of(allowed).loglikelihood(instances)
    assert [one.doc_id for one in instances] == [None, None, 1]
    assert found[2].text[0] > 0


def test_what_is_asked_without_a_prompt_is_refused(embedded: Checkpoint, tmp_path: Path) -> None:
    model = model_of(make_runner(embedded, cells("fullkv"), tmp_path))
    (one,) = asked(0, ["7"])
    one.arguments = ("", "7")
    with pytest.raises(UserError, match="choices: its metric acc_mutual_info asks for") as caught:
        model.loglikelihood([one])
    sentence(caught)


# --- whole runs ----------------------------------------------------------------------------------

CODE = """
from lmms_eval.tasks.mmbench.en_utils import mmbench_doc_to_visual as visual


def choices(doc):
    return [doc[letter] for letter in "ABCD" if doc[letter] not in (None, "nan")]


def target(doc):
    return "ABCD".index(doc["answer"])
"""


@pytest.fixture
def own_tasks(tmp_path: Path) -> Path:
    """A task of choices over documents of a miniature."""
    from sparsemm_eval.paths import cache_folder
    from sparsemm_eval.tiny.benchmarks import build as build_benchmark

    data = build_benchmark("mmbench", cache_folder() / "benchmarks")
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "own.py").write_text(CODE)
    (folder / "own.yaml").write_text(
        f"task: own_choices\ndataset_path: {data}\ndataset_name: en\ntest_split: dev\n"
        "output_type: multiple_choice\ndoc_to_visual: !function own.visual\n"
        "doc_to_text: question\ndoc_to_choice: !function own.choices\n"
        "doc_to_target: !function own.target\n"
        "metric_list:\n"
        "  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
        "  - {metric: acc_norm, aggregation: mean, higher_is_better: true}\n"
    )
    return folder


def test_from_a_task_file_to_scores_and_tables(own_tasks: Path, tmp_path: Path) -> None:
    """Through ``python -m lmms_eval`` and through a sweep: the same scores."""
    grid = {
        "models": [{"name": "reader", "pretrained": "embedded:qwen2vl",
                    "settings": {"dtype": "float32"}}],
        "tasks": ["own_choices"], "methods": ["fullkv", "snapkv", "adakv"], "budgets": [16],
        "window": 8, "samples": 6, "batch_size": 3,
    }  # fmt: skip
    path, out = tmp_path / "grid.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(grid))
    words = ["sweep", str(path), "--out", str(out), "--include_path", str(own_tasks)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 0
    assert len(rows(out / "answers" / "reader")) == 3 * 6
    shown = CliRunner().invoke(app, ["table", str(out), "--show", "score,interval"])
    assert shown.exit_code == 0, shown.output
    assert "own_choices" in shown.output
    assert "(acc)" in shown.output
    swept = {}
    for file in (out / "cells" / "reader").glob("*_results.json"):
        content = json.loads(file.read_text())
        method = content["config"]["model_args"].split("method=")[1].split(",")[0]
        swept[method] = content["results"]
    assert set(swept) == {"fullkv", "snapkv", "adakv"}
    for of_cell in swept.values():
        assert 0 <= of_cell["own_choices"]["acc,none"] <= 1
    assert swept["fullkv"]["own_choices"]["acc_norm,none"] > 0.5

    arguments = (
        f"pretrained={find_checkpoint('embedded:qwen2vl')},dtype=float32,method=snapkv,budget=16,"
        f"window=8,answers={tmp_path / 'answers'}"
    )
    run = [
        sys.executable, "-m", "lmms_eval", "--model", "sparsemm", "--force_simple",
        "--tasks", "own_choices", "--include_path", str(own_tasks), "--limit", "6",
        "--model_args", arguments, "--batch_size", "2", "--log_samples",
        "--output_path", str(tmp_path / "plain"),
    ]  # fmt: skip
    plain = subprocess.run(run, capture_output=True, text=True)
    (results,) = (tmp_path / "plain").rglob("*_results.json")
    content = json.loads(results.read_text())
    for metric in ("acc,none", "acc_norm,none"):
        of_plain = content["results"]["own_choices"][metric]
        assert of_plain == swept["snapkv"]["own_choices"][metric], plain.stderr


def test_a_task_of_rounds_beside_others_is_refused_at_once(tmp_path: Path) -> None:
    """One of a folder too, and the answers of the others are not waited for."""
    (tmp_path / "rounds.yaml").write_text(
        "task: own_rounds\ndataset_path: json\noutput_type: generate_until_multi_round\n"
    )
    done = CliRunner().invoke(
        app,
        ["eval", "--model", "sparsemm", "--tasks", "docvqa_mini,own_rounds",
         "--include_path", str(tmp_path), "--model_args",
         f"pretrained={find_checkpoint('embedded:qwen2vl')},method=fullkv"],
    )  # fmt: skip
    assert done.exit_code == 1
    assert "own_rounds is of output_type generate_until_multi_round" in done.output
    assert done.output.count("\n") == 1
