"""Whose fault it is: a document's stays with its sample, a task's or ours ends the run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from engine.fixtures import ask, log, pages, rows, sentence, to_messages
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from PIL import ImageFile

from sparsemm_eval.engine import decode as decoding
from sparsemm_eval.engine import runner as runners
from sparsemm_eval.engine.answers import SampleFailures
from sparsemm_eval.engine.lmms import Qwen2VLSparseMM
from sparsemm_eval.engine.runner import AllFailed
from sparsemm_eval.tiny import default_checkpoint

MakeQwen = Callable[..., Qwen2VLSparseMM]


class OfAnotherLibrary(Exception):
    """Of no class that this package knows."""


FAULTS = [
    AttributeError("'NoneType' object has no attribute 'convert'"),
    TypeError("no string"),
    AssertionError(),
    StopIteration(),
    NotImplementedError("no such split"),
    KeyError("question"),
    OfAnotherLibrary("anything"),
    RecursionError("too deep"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
]


class Documents(list):
    """Documents of which some raise an error when they are read."""

    def __init__(self, documents: list, errors: Mapping[int, Exception]) -> None:
        super().__init__(documents)
        self.errors = errors

    def __getitem__(self, number: int) -> Any:
        if number in self.errors:
            raise self.errors[number]
        return super().__getitem__(number)


def failing(error: Exception, documents: list, place: int) -> Callable[[Any], Any]:
    """A task's code that raises an error for one document."""

    def messages(document: Mapping[str, Any]) -> list[dict[str, Any]]:
        if document is documents[place]:
            raise error
        return to_messages(document)

    return messages


def causes(answers: Path) -> dict[str, str]:
    return {row.doc_id: row.error for row in rows(answers) if row.error is not None}


# --- a document's -------------------------------------------------------------------------------


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["data set", "task"])
def test_what_others_code_raises_is_its_samples_failure(
    qwen: MakeQwen, answers: Path, error: Exception, where: str
) -> None:
    documents = pages(4)
    given = {"messages": failing(error, documents, 1)} if where == "task" else {}
    asked = documents if where == "task" else Documents(documents, {1: error})
    with pytest.raises(SampleFailures, match="1 samples failed") as caught:
        ask(qwen(batch_size=2), asked, **given)
    assert f"pages test 1: {type(error).__name__}: " in sentence(caught)
    assert list(causes(answers)) == ["test 1"]
    assert len(rows(answers)) == 4


@pytest.mark.parametrize("spoil", [{"images": [None]}, {"question": None}, {"images": None}])
def test_a_document_with_a_hole_fails_alone(
    qwen: MakeQwen, answers: Path, spoil: dict[str, Any]
) -> None:
    documents = pages(3)
    documents[2] |= spoil
    with pytest.raises(SampleFailures, match="1 samples failed"):
        ask(qwen(batch_size=3), documents)
    assert list(causes(answers)) == ["test 2"]


def test_what_the_processor_raises_is_its_samples_failure(
    qwen: MakeQwen, answers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, documents = qwen(batch_size=4), pages(4)
    processor = type(model.runner.processor)
    call, lost = processor.__call__, documents[2]["question"]

    def stumble(self: Any, *given: Any, **named: Any) -> Any:
        if any(lost in text for text in named["text"]):
            raise TypeError("cannot handle this")
        return call(self, *given, **named)

    monkeypatch.setattr(processor, "__call__", stumble)
    with pytest.raises(SampleFailures, match="1 samples failed"):
        ask(model, documents)
    assert causes(answers) == {"test 2": "TypeError: cannot handle this"}


# --- nobody's document --------------------------------------------------------------------------


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_task_that_fails_on_every_document_ends_the_run(
    qwen: MakeQwen, answers: Path, batch_size: int
) -> None:
    """With the traceback, and before weights load."""

    def messages(document: Any) -> Any:
        return document.no_such_field

    with pytest.raises(AllFailed, match="no_such_field") as caught:
        ask(qwen(batch_size=batch_size), pages(9), messages=messages)
    assert "in messages" in str(caught.value)
    assert len(rows(answers)) == max(3, batch_size)


def test_those_that_wait_have_not_failed(qwen: MakeQwen, answers: Path) -> None:
    """Of the first six, four fail alike while two wait for their batch to be full."""
    error = ValueError("broken")
    asked = Documents(pages(8), dict.fromkeys((0, 2, 4, 5), error))
    with pytest.raises(SampleFailures, match="4 samples failed"):
        ask(qwen(batch_size=4), asked)
    assert len(rows(answers)) == 8


def test_an_error_of_ours_ends_the_run(
    qwen: MakeQwen, answers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise TypeError("ours")

    monkeypatch.setattr(decoding, "prefill", broken)
    with pytest.raises(TypeError, match="ours"):
        ask(qwen(batch_size=2), pages(4))
    assert rows(answers) == []
    monkeypatch.setattr(runners, "_parts", broken)
    with pytest.raises(TypeError, match="ours"):
        ask(qwen(batch_size=2), pages(4))


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('only text') }}", "only text"),
        ("{% for m in messages %}{{ m['content'] + 'x' }}{% endfor %}", "TypeError"),
        ("{{ messages[0].no.such }}", "UndefinedError"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "leaves out the question"),
    ],
)
def test_a_template_that_always_fails_is_refused(
    folder: Path, answers: Path, template: str, words: str
) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=words) as caught:
        Qwen2VLSparseMM(str(folder), method="fullkv", answers=answers)
    assert f"pretrained={folder}: its chat template" in sentence(caught)


def test_a_template_that_fails_on_one_document(folder: Path, answers: Path) -> None:
    path = folder / "chat_template.jinja"
    documents = pages(3)
    documents[1]["question"] += "#"
    guard = "{% if '#' in messages[0]['content'][-1]['text'] %}{{ raise_exception('no #') }}"
    path.write_text(guard + "{% endif %}" + path.read_text())
    with pytest.raises(SampleFailures, match="pages test 1: TemplateError: no #"):
        ask(Qwen2VLSparseMM(str(folder), method="fullkv", answers=answers), documents)


# --- cut images ---------------------------------------------------------------------------------


def test_cut_images_are_read_where_the_user_says_so(
    qwen: MakeQwen, answers: Path, tmp_path: Path
) -> None:
    """They are answers of another kind, and PIL's switch is as it was, before and after."""
    documents = pages(2)
    path = tmp_path / "page.png"
    documents[1]["images"][0].save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    documents[1]["images"] = [str(path)]
    for before in (True, False):
        ImageFile.LOAD_TRUNCATED_IMAGES = before
        try:
            with pytest.raises(SampleFailures, match="pages test 1: OSError: "):
                ask(qwen(), documents)
            assert len(ask(qwen(truncated_images=True), documents)) == 2
            assert ImageFile.LOAD_TRUNCATED_IMAGES is before
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = True
    keys = [row.key for row in rows(answers) if row.doc_id == "test 0"]
    assert len(set(keys)) == 2
    with pytest.raises(ValueError, match="truncated_images='often': it must be true"):
        qwen(truncated_images="often")


# --- samples that may fail ----------------------------------------------------------------------


def test_so_many_may_fail_as_the_user_says(qwen: MakeQwen, answers: Path) -> None:
    asked = Documents(pages(6), dict.fromkeys((0, 1, 2, 4), ValueError("broken")))
    with pytest.raises(SampleFailures, match=r"4 samples failed \(allow_failed=3\)"):
        ask(qwen(allow_failed=3), asked)
    texts = ask(qwen(allow_failed=4), asked)
    assert [bool(text) for text in texts] == [False, False, False, True, False, True]
    assert set(causes(answers)) == {"test 0", "test 1", "test 2", "test 4"}


@pytest.mark.parametrize("value", [-1, 1.5, "many", True])
def test_allow_failed_that_is_none(qwen: MakeQwen, value: Any) -> None:
    with pytest.raises(ValueError, match=f"allow_failed={value!r}: it must be an integer"):
        qwen(allow_failed=value)


@pytest.fixture
def own_task(tmp_path: Path) -> Callable[[list[int]], TaskManager]:
    """A task of one's own on six drawn pages, some of them files that are cut off."""
    folder = tmp_path / "task"
    folder.mkdir()

    def make(cut: list[int]) -> TaskManager:
        lines = []
        for number, page in enumerate(pages(6)):
            path = folder / f"{number}.png"
            page["images"][0].save(path)
            if number in cut:
                path.write_bytes(path.read_bytes()[:300])
            target = "" if number % 2 else "always"
            lines.append({"image": str(path), "question": page["question"], "answer": target})
        (folder / "data.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        (folder / "own.py").write_text(
            "from PIL import Image\n\n\n"
            "def image(doc):\n    return [Image.open(doc['image']).convert('RGB')]\n\n\n"
            "def score(doc, results):\n"
            "    return {'own': float(bool(results[0]) == bool(doc['answer']))}\n"
        )
        (folder / "own.yaml").write_text(
            f"task: own_pages\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: "
            f"{folder / 'data.jsonl'}}}}}\ntest_split: test\noutput_type: generate_until\n"
            "doc_to_visual: !function own.image\ndoc_to_text: '{{question}}'\n"
            "doc_to_target: '{{answer}}'\nprocess_results: !function own.score\n"
            "generation_kwargs: {max_new_tokens: 4}\n"
            "metric_list: [{metric: own, aggregation: mean, higher_is_better: true}]\n"
        )
        return TaskManager("WARNING", include_path=str(folder), include_defaults=False)

    return make


def test_lmms_eval_scores_the_others_alone(
    qwen: MakeQwen, own_task: Callable[[list[int]], TaskManager]
) -> None:
    """A failed sample is no empty answer: the metric never sees its document."""
    given = {"tasks": ["own_pages"], "task_manager": own_task([1, 3]), "verbosity": "WARNING"}
    with pytest.raises(SampleFailures, match="2 samples failed"):
        simple_evaluate(model=qwen(allow_failed=1), **given)
    results = simple_evaluate(model=qwen(allow_failed=2), **given)
    assert [one["doc_id"] for one in results["samples"]["own_pages"]] == [0, 2, 4, 5]
    # All answers hold text: right for 0, 2 and 4. Failed ones as empty answers would make 5 of 6.
    assert results["results"]["own_pages"]["own,none"] == 0.75
    assert results["throughput"]["avg_failed_samples/own_pages"] == 2
    assert results["throughput"]["avg_samples"] == 4


def test_a_task_without_any_answer_has_no_score(
    qwen: MakeQwen, own_task: Callable[[list[int]], TaskManager]
) -> None:
    manager = own_task([0, 1])
    results = simple_evaluate(
        model=qwen(allow_failed=5), tasks=["own_pages"], task_manager=manager, limit=2
    )
    assert "own,none" not in results["results"]["own_pages"]


def test_answers_of_lmms_evals_own_cache_say_that_nothing_is_known_of_them(
    own_task: Callable[[list[int]], TaskManager], tmp_path: Path, answers: Path
) -> None:
    def run(cut: list[int]) -> dict[str, Any]:
        return simple_evaluate(
            model="qwen2vl_sparsemm",
            model_args=f"pretrained={default_checkpoint()},method=fullkv,allow_failed=1,"
            f"dtype=float32,answers={answers}",
            tasks=["own_pages"],
            task_manager=own_task(cut),
            use_cache=str(tmp_path / "cache"),
            device="cpu",
            verbosity="WARNING",
        )

    assert run([3])["throughput"]["avg_failed_samples/own_pages"] == 1
    # That one is not among the answers that are found again.
    again = run([3])["throughput"]
    assert again["avg_failed_samples/own_pages"] == 1
    whole = run([])
    assert whole["throughput"]["avg_samples"] == 1
    assert "avg_served_by_use_cache" not in whole["throughput"]
    with log() as lines:
        served = run([])
    assert served["results"] == whole["results"]
    assert served["throughput"]["avg_served_by_use_cache"] == 1
    assert "avg_kept_tokens_per_head" not in served["throughput"]
    assert [line for line in lines if line.startswith("WARNING") and "--use_cache" in line]


# --- what lmms-eval is asked for and would not do -----------------------------------------------


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"apply_chat_template": True}, "--apply_chat_template: all prompts go through"),
        ({"cache_requests": True}, "own_pages: lmms-eval's --cache_requests forgets"),
        ({"gen_kwargs": "stop_words=x"}, "own_pages: generation_kwargs stop_words='x'"),
        ({"gen_kwargs": "temperature=-1"}, "own_pages: generation_kwargs temperature=-1"),
        ({"gen_kwargs": "temperature=nan"}, "own_pages: generation_kwargs temperature="),
    ],
    ids=str,
)
def test_options_of_lmms_eval_are_not_dropped_without_a_word(
    qwen: MakeQwen,
    own_task: Callable[[list[int]], TaskManager],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, Any],
    words: str,
) -> None:
    monkeypatch.setattr("lmms_eval.caching.cache.PATH", str(tmp_path / "requests"))
    with pytest.raises(ValueError, match=words) as caught:
        simple_evaluate(model=qwen(), tasks=["own_pages"], task_manager=own_task([]), **given)
    sentence(caught)


def test_examples_that_no_message_holds_are_refused(
    qwen: MakeQwen, own_task: Callable[[list[int]], TaskManager], tmp_path: Path
) -> None:
    own_task([])
    path = tmp_path / "task/own.yaml"
    path.write_text(path.read_text() + "fewshot_split: test\nfewshot_config: {sampler: first_n}\n")
    manager = TaskManager("WARNING", include_path=str(path.parent), include_defaults=False)
    with pytest.raises(ValueError, match="own_pages: num_fewshot=2: lmms-eval puts no examples"):
        simple_evaluate(model=qwen(), tasks=["own_pages"], task_manager=manager, num_fewshot=2)


@pytest.mark.usefixtures("unloaded")
def test_a_folder_that_cannot_be_written_to_is_found_before_weights_load(
    qwen: MakeQwen, answers: Path
) -> None:
    model = qwen()
    answers.rmdir()
    answers.touch()  # a file in its place: no one can write below it, whoever runs this
    with pytest.raises(OSError, match="see that it can be written to"):
        ask(model, pages(2))


@pytest.mark.usefixtures("unloaded")
def test_numbers_that_lmms_eval_makes_of_words(qwen: MakeQwen) -> None:
    for path in (5, 2.5):
        with pytest.raises(FileNotFoundError, match=f"{path}: there is no such file") as caught:
            qwen(method="sparsemm", budget=64, window=8, head_scores=path)
        sentence(caught)
    for size in (10**15 + 1, 10_001):
        with pytest.raises(ValueError, match=f"kernel_size={size}: it must be at most 9,999"):
            qwen(method="snapkv", budget=64, window=8, kernel_size=size)
