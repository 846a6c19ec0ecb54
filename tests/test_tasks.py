"""The task files: lmms-eval's own code on our data, offline, on both wrappers."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lmms_eval import tasks as lmms_tasks
from lmms_eval.api.task import ConfigurableMessagesTask, ConfigurableTask
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from lmms_eval.tasks.textcaps.utils import textcaps_cider
from lmms_eval.utils import load_yaml_config

from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.lmms import CellModel, LlavaSparseMM, Qwen2VLSparseMM
from sparsemm_eval.engine.requests import read_chat
from sparsemm_eval.families import Family
from sparsemm_eval.paths import tasks_folder
from sparsemm_eval.tiny import benchmarks, chance, embedded_checkpoints
from sparsemm_eval.tiny.benchmarks import BENCHMARKS
from sparsemm_eval.tiny.documents import Split, draw_document, stream, value_question
from sparsemm_eval.tiny.pictures import Kind, draw_chart, draw_scene, draw_signs, draw_word
from sparsemm_eval.tiny.training.family import FAMILIES
from sparsemm_eval.tiny.training.packing import pack

SAMPLES = 12
GROUPS = {
    "sparsemm_ocr_rich": ("docvqa_val", "ocrbench", "textvqa_val", "chartqa", "textcaps_val"),
    "sparsemm_general": ("mmbench_en_dev_static", "gqa", "vqav2_val"),
}
STOCK = {
    "docvqa": "docvqa/docvqa_val.yaml",
    "ocrbench": "ocrbench/ocrbench.yaml",
    "textvqa": "textvqa/textvqa_val.yaml",
    "chartqa": "chartqa/chartqa.yaml",
    "textcaps": "textcaps/textcaps_val.yaml",
    "mmbench": "mmbench/mmbench_en_dev_static.yaml",
    "gqa": "gqa/gqa.yaml",
    "vqav2": "vqav2/vqav2_val.yaml",
}
LONE_SIGN = partial(draw_signs, least=1, most=1)
SIGNS = partial(draw_signs, least=2, most=4)
DRAWN: dict[str, tuple[Callable, ...]] = {
    "docvqa": (draw_document,),
    "ocrbench": (draw_word, LONE_SIGN, SIGNS, draw_chart, draw_document, draw_chart),
    "textvqa": (SIGNS,),
    "chartqa": (draw_chart,),
    "textcaps": (LONE_SIGN,),
    "mmbench": (draw_scene,),
    "gqa": (draw_scene,),
    "vqav2": (draw_scene,),
}
WRAPPERS: dict[str, type[CellModel]] = {
    "qwen2vl": Qwen2VLSparseMM,
    "llava_next": LlavaSparseMM,
}


@pytest.fixture(scope="module", autouse=True)
def _few_samples(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Offline, caches of its own, and benchmarks of a few samples."""
    caches = tmp_path_factory.mktemp("caches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(caches))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setattr("datasets.config.HF_DATASETS_CACHE", caches / "datasets")
        patch.setattr(
            "lmms_eval.api.task._resolve_hf_datasets_cache_dir", lambda: str(caches / "datasets")
        )
        patch.setattr(benchmarks, "build", partial(benchmarks.build, samples=SAMPLES))
        yield


@pytest.fixture(scope="module")
def tasks(_few_samples: None) -> dict[str, ConfigurableTask]:
    return {name: chance.load_task(name, tasks_folder()) for name in BENCHMARKS}


@pytest.fixture(scope="module", params=WRAPPERS)
def checkpoint(request: pytest.FixtureRequest) -> Checkpoint:
    """An embedded model: answers of random weights would be empty, and equal for nothing."""
    folder = embedded_checkpoints()[request.param]
    return Checkpoint(folder, WRAPPERS[request.param].model_type, dtype="float32")


# --- what the files say -------------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_holds_the_papers_benchmarks_and_its_twin_their_miniatures(group: str) -> None:
    own = yaml.safe_load((tasks_folder() / f"{group}.yaml").read_text())
    assert own == {"group": group, "task": list(GROUPS[group])}
    twin = yaml.safe_load((tasks_folder() / f"{group}_mini.yaml").read_text())
    assert twin["group"] == f"{group}_mini"
    by_stock = {Path(path).stem: f"{name}_mini" for name, path in STOCK.items()}
    assert twin["task"] == [by_stock[task] for task in own["task"]]
    for task in own["task"]:
        (path,) = (path for path in STOCK.values() if Path(path).stem == task)
        text = (Path(lmms_tasks.__path__[0]) / path).read_text()
        assert re.search(rf'^task: "?{task}"?$', text, re.MULTILINE)


def test_the_readme_lists_every_task_and_group() -> None:
    text = (tasks_folder() / "README.md").read_text()
    for path in tasks_folder().glob("*.yaml"):
        assert f"`{path.stem}`" in text


@pytest.mark.parametrize("name", STOCK)
def test_questions_images_and_scores_are_lmms_evals_own(name: str) -> None:
    own = load_yaml_config(str(tasks_folder() / f"{name}_mini.yaml"))
    theirs = load_yaml_config(str(Path(lmms_tasks.__path__[0]) / STOCK[name]))
    for field in ("doc_to_visual", "doc_to_text", "process_results"):
        assert code(own.get(field)) == code(theirs.get(field)), field
    for field in ("output_type", "test_split", "dataset_name"):
        assert own.get(field) == theirs.get(field), field
    known = [metric["metric"] for metric in theirs["metric_list"]]
    assert {metric["metric"] for metric in own["metric_list"]} <= set(known)
    limits = (config["generation_kwargs"].get("max_new_tokens", 1024) for config in (own, theirs))
    assert next(limits) <= next(limits)


def code(function: Callable | None) -> CodeType | None:
    return None if function is None else function.__code__


# --- what is asked ------------------------------------------------------------------------------


def drawn_again(name: str, number: int, image: bytes) -> tuple[Any, dict[str, str]]:
    """The page or picture of a sample, and all questions about it with their answers."""
    rng: np.random.Generator = stream(
        Split.BENCHMARK, 0, benchmarks.MOST_SAMPLES * BENCHMARKS[name].place + number
    )
    draw = DRAWN[name][number % len(DRAWN[name])]
    for _ in range(50):
        page = draw(rng)
        if page.image.tobytes() != image:
            continue
        if draw is draw_document:
            asked = [value_question(page, index) for index in range(len(page.entries))]
        else:
            asked = [question for _, question in page.questions]
        return page, {question.prompt: question for question in asked}
    raise AssertionError("the image was never drawn")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_prompt_is_one_the_models_were_trained_on(
    name: str, tasks: dict[str, ConfigurableTask]
) -> None:
    task = tasks[name]
    right = chance.right_answers(task)
    assert len(right) == SAMPLES
    for number, document in enumerate(task.eval_docs):
        (image,) = task.doc_to_visual(document)
        _, asked = drawn_again(name, number, image.tobytes())
        assert asked[task.doc_to_text(document)].answer == right[number]


@pytest.mark.parametrize("name", BENCHMARKS)
@pytest.mark.parametrize("family_name", FAMILIES)
def test_the_tokens_are_those_of_training(
    family_name: str, name: str, tasks: dict[str, ConfigurableTask]
) -> None:
    """Through chat template and processor, as the wrapper puts them."""
    family = FAMILIES[family_name]()
    processor = family.build_processor()
    task = tasks[name]
    document = task.eval_docs[1]
    (image,) = task.doc_to_visual(document)
    page, asked = drawn_again(name, 1, image.tobytes())
    question = asked[task.doc_to_text(document)]
    messages = ConfigurableMessagesTask._build_user_turn([image], task.doc_to_text(document))
    read = read_chat(processor, messages, Family())
    inputs = processor(
        text=[read.prompt], images=list(read.visuals), return_tensors="pt", add_special_tokens=False
    )
    room = len(question.prompt) + len(question.answer) + 1
    batch = pack(family, [page], [[(Kind.VALUE, question)]], room)
    expected = batch.input_ids[:, : batch.input_ids.shape[1] - len(question.answer) - 1]
    assert inputs["input_ids"].tolist() == expected.tolist()
    torch.testing.assert_close(inputs["pixel_values"], batch.pixels["pixel_values"])


# --- what is scored -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", BENCHMARKS)
def test_right_answers_score_full_marks_and_none_scores_nothing(
    name: str, tasks: dict[str, ConfigurableTask]
) -> None:
    task = tasks[name]
    right = chance.right_answers(task)
    full = chance.score(task, right)
    if name == "textcaps":
        # CIDEr has no upper end of its own: the captions agree on the text, not on the wording.
        assert full > 3
        assert full > 3 * chance.score(task, [right[0]] * SAMPLES)
    else:
        assert full == (100 if name == "mmbench" else 1)
    assert chance.score(task, [""] * SAMPLES) == 0
    assert chance.score(task, right) == full, "nothing adds up over runs"


@pytest.mark.parametrize(("name", "least", "most"), [
    ("docvqa", 0, 0.25), ("chartqa", 0, 0.4), ("mmbench", 25, 60), ("gqa", 0.5, 0.9),
    ("vqav2", 1 / 12, 0.5),
])  # fmt: skip
def test_the_best_constant_answer_is_the_level_of_chance(
    name: str, least: float, most: float, tasks: dict[str, ConfigurableTask]
) -> None:
    answer, level = chance.constant_answer_score(name, tasks_folder())
    assert answer in chance.right_answers(tasks[name])
    assert least <= level <= most
    assert level <= chance.right_answer_score(name, tasks_folder())


@pytest.mark.skipif(shutil.which("java") is None, reason="lmms-eval's TextCaps needs java")
def test_cider_without_java_is_lmms_evals(
    tasks: dict[str, ConfigurableTask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    task = tasks["textcaps"]
    said = [caption.replace("sign", "board,") for caption in chance.right_answers(task)]
    said[0] = "Nothing, really: 7 of 9!"
    pairs = zip(task.eval_docs_no_media, said, strict=True)
    results = [task.process_results(doc, [text])["textcaps_CIDEr"] for doc, text in pairs]
    assert chance.score(task, said) == pytest.approx(textcaps_cider(results))


# --- runs ----------------------------------------------------------------------------------------


def run(checkpoint: Checkpoint, folder: Path, batch_size: int) -> dict[str, Any]:
    """Both groups of miniatures through lmms-eval, a few samples of each."""
    wrapper = next(w for w in WRAPPERS.values() if w.model_type == checkpoint.config.model_type)
    model = wrapper(
        checkpoint=checkpoint, method="snapkv", budget=48, window=8, batch_size=batch_size,
        answers=folder / f"answers-{batch_size}",
    )  # fmt: skip
    return simple_evaluate(
        model=model,
        tasks=[f"{group}_mini" for group in GROUPS],
        limit=2,
        task_manager=TaskManager(
            "WARNING", include_path=str(tasks_folder()), include_defaults=False
        ),
        verbosity="WARNING",
    )


def test_both_groups_run_alike_in_batches_of_1_and_8(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    working = tmp_path / "working"
    working.mkdir()
    monkeypatch.chdir(working)
    single, batched = (run(checkpoint, tmp_path, size) for size in (1, 8))
    assert set(single["samples"]) == {f"{name}_mini" for name in BENCHMARKS}
    said = set()
    for name, samples in single["samples"].items():
        metrics = [key for key in single["results"][name] if key.endswith(",none")]
        assert metrics, name
        texts = [sample["filtered_resps"] for sample in samples]
        assert len(texts) == 2
        said.update(text for (text,) in texts)
        assert texts == [sample["filtered_resps"] for sample in batched["samples"][name]]
        assert single["results"][name] == batched["results"][name]
    assert len(said) > len(BENCHMARKS), "most answers are not empty, and few are alike"
    assert not list(working.iterdir()), "nothing is written where nobody asked for it"
