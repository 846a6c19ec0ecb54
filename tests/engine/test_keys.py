"""An answer is found again where nothing that decides it has changed, and nowhere else."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine.fixtures import SHORT, TASK, ask, pages, requests, rows, to_messages
from PIL import Image
from safetensors.torch import load_file, save_file

from sparsemm_eval.engine import checkpoint
from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.lmms import LlavaSparseMM, Qwen2VLSparseMM
from sparsemm_eval.methods import HeadScores

MakeQwen = Callable[..., Qwen2VLSparseMM]
SNAPKV = {"method": "snapkv", "budget": 64, "window": 8}
SPARSEMM = {"method": "sparsemm", "budget": 64, "window": 8}


@pytest.fixture
def document() -> dict[str, Any]:
    """One page and a question."""
    return pages(1)[0]


def assert_computed_anew(answers: Path, first: Callable, second: Callable) -> None:
    """The second run neither finds nor replaces the answer of the first."""
    first()
    second()
    found = rows(answers)
    assert len(found) == len({row.key for row in found}) == 2


def assert_found(answers: Path, first: Callable, second: Callable) -> None:
    """The second run computes nothing."""
    first()
    second()
    assert len(rows(answers)) == 1


@pytest.mark.parametrize(
    "changed",
    [
        {"budget": 65},
        {"window": 9},
        {"kernel_size": 7},
        {"pooling": "max"},
        {"group_reduction": "max"},
        {"method": "pyramidkv"},
        {"method": "fullkv"},
        {"max_pixels": 30_000},
        {"min_pixels": 400_000, "max_pixels": 500_000},
    ],
    ids=str,
)
def test_another_setting(
    qwen: MakeQwen, answers: Path, document: dict[str, Any], changed: dict[str, Any]
) -> None:
    assert_computed_anew(
        answers,
        lambda: ask(qwen(**SNAPKV), [document]),
        lambda: ask(qwen(**SNAPKV | changed), [document]),
    )


@pytest.mark.parametrize("changed", [{"ratio": 1}, {"seed": 1}, {"allocation": "exact"}], ids=str)
def test_another_setting_of_random(
    qwen: MakeQwen, answers: Path, document: dict[str, Any], changed: dict[str, Any]
) -> None:
    settings = SNAPKV | {"method": "random"}
    assert_computed_anew(
        answers,
        lambda: ask(qwen(**settings), [document]),
        lambda: ask(qwen(**settings | changed), [document]),
    )


@pytest.mark.parametrize(
    "generation",
    [
        {"max_new_tokens": 9},
        {**SHORT, "until": ["B"]},
        {**SHORT, "num_beams": 2},
        {**SHORT, "repetition_penalty": 1.5},
        {**SHORT, "min_new_tokens": 3},
        {**SHORT, "temperature": 0.5},
    ],
    ids=str,
)
def test_another_generation_setting(
    qwen: MakeQwen, answers: Path, document: dict[str, Any], generation: dict[str, Any]
) -> None:
    assert_computed_anew(
        answers,
        lambda: ask(qwen(), [document]),
        lambda: ask(qwen(), [document], generation),
    )


def test_another_temperature(qwen: MakeQwen, answers: Path, document: dict[str, Any]) -> None:
    assert_computed_anew(
        answers,
        lambda: ask(qwen(), [document], {**SHORT, "temperature": 0.5}),
        lambda: ask(qwen(), [document], {**SHORT, "temperature": 0.6}),
    )


def another_pixel(image: Image.Image) -> Image.Image:
    """The image with its last pixel inverted."""
    pixels = np.array(image)
    pixels[-1, -1] = 255 - pixels[-1, -1]
    return Image.fromarray(pixels)


def another_shape(image: Image.Image) -> Image.Image:
    """The same bytes as an image of other sides."""
    return Image.frombytes("RGB", (image.width * 2, image.height // 2), image.tobytes())


@pytest.mark.parametrize("change", [another_pixel, another_shape])
def test_another_image(
    qwen: MakeQwen, answers: Path, document: dict[str, Any], change: Callable
) -> None:
    other = document | {"images": [change(document["images"][0])]}
    assert_computed_anew(answers, lambda: ask(qwen(), [document]), lambda: ask(qwen(), [other]))


def test_another_palette(qwen: MakeQwen, answers: Path, document: dict[str, Any]) -> None:
    """The same indices, in other colours."""
    image = document["images"][0].convert("P")
    inverted = image.copy()
    inverted.putpalette([255 - value for value in image.getpalette()])
    assert inverted.tobytes() == image.tobytes()
    assert_computed_anew(
        answers,
        lambda: ask(qwen(), [document | {"images": [image]}]),
        lambda: ask(qwen(), [document | {"images": [inverted]}]),
    )


def test_another_prompt(qwen: MakeQwen, answers: Path, document: dict[str, Any]) -> None:
    other = document | {"question": document["question"] + " "}
    assert_computed_anew(answers, lambda: ask(qwen(), [document]), lambda: ask(qwen(), [other]))


def test_another_place_of_the_image(
    qwen: MakeQwen, answers: Path, document: dict[str, Any]
) -> None:
    def image_last(document: dict[str, Any]) -> list[dict[str, Any]]:
        (message,) = to_messages(document)
        return [message | {"content": message["content"][::-1]}]

    assert_computed_anew(
        answers,
        lambda: ask(qwen(), [document]),
        lambda: ask(qwen(), [document], messages=image_last),
    )


def test_another_document_of_the_same_content(
    qwen: MakeQwen, answers: Path, document: dict[str, Any]
) -> None:
    ask(qwen(), [document, document])
    assert len({row.key for row in rows(answers)}) == 2


def test_another_task(qwen: MakeQwen, answers: Path, document: dict[str, Any]) -> None:
    """Two tasks in one call, with the same documents: each has an answer of its own."""
    ask(qwen(), [document])
    model = qwen()
    model.task_dict = {TASK: {"test": [document]}, "other": {"test": [document]}}
    model.generate_until(requests(1, SHORT) + requests(1, SHORT, repeats=2, task="other"))
    assert len({row.key for row in rows(answers)}) == len(rows(answers)) == 2
    assert len({row.cell for row in rows(answers)}) == 2


def test_documents_of_two_tasks_that_have_one_number(
    qwen: MakeQwen, answers: Path, document: dict[str, Any]
) -> None:
    other = pages(1, first=3)[0]
    expected = [*ask(qwen(), [document]), *ask(qwen(), [other])]
    model = qwen(answers=answers / "both", batch_size=2)
    model.task_dict = {TASK: {"test": [document]}, "other": {"test": [other]}}
    both = requests(1, SHORT) + requests(1, SHORT, task="other")
    assert [result.text for result in model.generate_until(both)] == expected


# --- checkpoints --------------------------------------------------------------------------------


def test_another_dtype(
    qwen: MakeQwen, reader: Checkpoint, answers: Path, document: dict[str, Any]
) -> None:
    half = Checkpoint(reader.folder, "qwen2_vl", dtype="bfloat16")
    assert_computed_anew(
        answers,
        lambda: ask(qwen(), [document]),
        lambda: ask(qwen(checkpoint=half), [document]),
    )


def test_other_weights(
    qwen: MakeQwen, reader: Checkpoint, tmp_path: Path, answers: Path, document: dict[str, Any]
) -> None:
    folder = shutil.copytree(reader.folder, tmp_path / "other")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][0] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    other = Checkpoint(folder, "qwen2_vl", dtype="float32")
    assert_computed_anew(
        answers,
        lambda: ask(qwen(), [document]),
        lambda: ask(qwen(checkpoint=other), [document]),
    )


def test_the_same_weights_elsewhere(
    qwen: MakeQwen, reader: Checkpoint, tmp_path: Path, answers: Path, document: dict[str, Any]
) -> None:
    copy = Checkpoint(
        shutil.copytree(reader.folder, tmp_path / "copy"), "qwen2_vl", dtype="float32"
    )
    assert_found(
        answers,
        lambda: ask(qwen(), [document]),
        lambda: ask(qwen(checkpoint=copy), [document]),
    )


@pytest.fixture
def two_scores(reader: Checkpoint, tmp_path: Path) -> tuple[Path, Path]:
    """Files of two unlike head scores for the reader."""
    shape = (reader.shape.layers, reader.shape.query_heads)
    values = np.arange(1.0, 1 + shape[0] * shape[1]).reshape(shape)
    paths = tmp_path / "one.json", tmp_path / "two.json"
    for path, scores in zip(paths, (values, values[::-1]), strict=True):
        HeadScores(scores).write(path)
    return paths


def test_other_head_scores(
    qwen: MakeQwen, answers: Path, document: dict[str, Any], two_scores: tuple[Path, Path]
) -> None:
    one, two = map(str, two_scores)
    assert_computed_anew(
        answers,
        lambda: ask(qwen(**SPARSEMM, head_scores=one), [document]),
        lambda: ask(qwen(**SPARSEMM, head_scores=two), [document]),
    )


def test_the_same_head_scores_elsewhere(
    qwen: MakeQwen, answers: Path, document: dict[str, Any], two_scores: tuple[Path, Path]
) -> None:
    one, _ = two_scores
    copy = shutil.copy(one, one.with_name("copy.json"))
    assert_found(
        answers,
        lambda: ask(qwen(**SPARSEMM, head_scores=str(one)), [document]),
        lambda: ask(qwen(**SPARSEMM, head_scores=str(copy)), [document]),
    )


# --- what decides nothing -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [{"batch_size": 4}, {"batch_size": "2"}, {"backend": "torch"}, {"ratio": 0.5}],
    ids=str,
)
def test_how_it_is_computed(
    qwen: MakeQwen, answers: Path, document: dict[str, Any], changed: dict[str, Any]
) -> None:
    """Batch size, backend, and settings that the method does not read."""
    assert_found(
        answers,
        lambda: ask(qwen(**SNAPKV), [document]),
        lambda: ask(qwen(**SNAPKV | changed), [document]),
    )


def test_settings_named_and_left_to_their_defaults(
    qwen: MakeQwen, answers: Path, document: dict[str, Any]
) -> None:
    spelled = {"kernel_size": 5, "pooling": "avg", "group_reduction": "mean"}
    assert_found(
        answers,
        lambda: ask(qwen(**SNAPKV), [document]),
        lambda: ask(qwen(**SNAPKV | spelled), [document]),
    )


def test_a_whole_number_and_the_same_with_a_point(
    qwen: MakeQwen, answers: Path, document: dict[str, Any]
) -> None:
    """A command line says ratio=1, a grid says 1.0."""
    assert_found(
        answers,
        lambda: ask(qwen(**SPARSEMM, ratio=1), [document]),
        lambda: ask(qwen(**SPARSEMM, ratio=1.0), [document]),
    )


def test_full_kv_has_no_settings(qwen: MakeQwen, answers: Path, document: dict[str, Any]) -> None:
    assert_found(
        answers,
        lambda: ask(qwen(), [document]),
        lambda: ask(qwen(budget=64, window=8, seed=3), [document]),
    )


def test_the_device_is_not_in_the_key(
    reader: Checkpoint, answers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked without loading weights, so that devices that are not here can be named."""
    monkeypatch.setattr(checkpoint, "_check_device", lambda device_map: None)
    given = {"pretrained": str(reader.folder), "method": "fullkv", "answers": answers}
    models = [Qwen2VLSparseMM(**given, device=d) for d in (None, "cpu", "cuda:0", "cuda:1", "meta")]
    models.append(Qwen2VLSparseMM(**given, device_map="auto"))
    assert len({model.runner.key(model.cell, {"prompt": "p"}) for model in models}) == 1


def test_a_key_is_the_same_in_another_model_object(llava: Checkpoint, answers: Path) -> None:
    models = [
        LlavaSparseMM(checkpoint=fresh, method="fullkv", answers=answers)
        for fresh in (llava, Checkpoint(llava.folder, "llava_next", dtype="float32"))
    ]
    parts = {"prompt": "p", "generation": [["do_sample", False]], "until": ("a", "b")}
    assert len({model.runner.key(model.cell, parts) for model in models}) == 1
