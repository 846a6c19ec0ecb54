"""The miniature benchmarks: their schemas, and that every answer is what was drawn."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from datasets import load_dataset

from sparsemm_eval.tiny import benchmarks, documents
from sparsemm_eval.tiny.benchmarks import (
    BENCHMARKS,
    DEFAULT_SAMPLES,
    build,
    content_hash,
    draw,
    settings_key,
)
from sparsemm_eval.tiny.documents import Split, draw_document, stream
from sparsemm_eval.tiny.pictures import draw_chart, draw_scene, draw_signs

# What lmms-eval's task code reads of a document, and what the public data sets call it.
READ = {
    "docvqa": {"image", "question", "answers", "questionId", "docId", "question_types"},
    "ocrbench": {"image", "question", "answer", "dataset", "question_type"},
    "textvqa": {"image", "question", "question_id", "answers", "ocr_tokens"},
    "chartqa": {"image", "question", "answer", "type"},
    "textcaps": {"image", "caption_str", "image_id", "question_id", "question"},
    "mmbench": {
        "image", "question", "hint", "A", "B", "C", "D", "answer", "index", "category",
        "L2-category", "source", "split",
    },
    "gqa": {"question", "answer", "fullAnswer", "id", "imageId"},
    "vqav2": {"image", "question", "question_id", "answers", "multiple_choice_answer"},
}  # fmt: skip
# The first samples of seed 0. If a hash changes, so must the version.
CONTENT = {
    ("docvqa", 2): "a71224303bdb",
    ("ocrbench", 1): "1f217fc2a6d9",
    ("textvqa", 1): "a5a825538e65",
    ("chartqa", 1): "712cde97f3cc",
    ("textcaps", 1): "c33737190879",
    ("mmbench", 2): "09dd097ddb75",
    ("gqa", 2): "4859b576b7f5",
    ("vqav2", 2): "21c57a2e627f",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("datasets")


def test_there_are_eight_of_200_samples() -> None:
    assert set(BENCHMARKS) == set(READ)
    assert DEFAULT_SAMPLES == 200
    assert len({benchmark.place for benchmark in BENCHMARKS.values()}) == 8


@pytest.mark.parametrize("name", BENCHMARKS)
def test_it_loads_as_the_public_one_does(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    benchmark = BENCHMARKS[name]
    built = build(name, folder, samples=3, seed=5)
    for place, table in enumerate(benchmark.tables):
        config = None if table.config == "default" else table.config
        rows = load_dataset(str(built), config, split=table.split, cache_dir=str(tmp_path))
        assert rows.features == table.features
        assert len(rows) == 3
        for number, row in enumerate(rows):
            expected = draw(benchmark, 5, number)[place]
            if "image" in expected:
                image, drawn = row.pop("image"), expected.pop("image")
                assert image.mode == drawn.mode
                assert image.tobytes() == drawn.tobytes()
            assert row == expected
    assert READ[name] <= set(benchmark.tables[0].features)


@pytest.mark.parametrize(("name", "version"), CONTENT)
def test_the_content_of_a_version_is_pinned(name: str, version: int) -> None:
    benchmark = BENCHMARKS[name]
    assert benchmark.version == version
    assert content_hash(draw(benchmark, 0, number) for number in range(8)) == CONTENT[name, version]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_an_image_is_a_whole_number_of_cells(name: str) -> None:
    *_, row = draw(BENCHMARKS[name], 0, 1)
    assert [side % 16 for side in row["image"].size] == [0, 0]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_only_the_stream_of_benchmarks_is_drawn_from(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def spy(split: Split, seed: int, index: int = 0) -> np.random.Generator:
        asked.append((split, index))
        return stream(split, seed, index)

    monkeypatch.setattr(benchmarks, "stream", spy)
    monkeypatch.setattr(documents, "stream", spy)
    draw(BENCHMARKS[name], 0, 7)
    assert asked == [(Split.BENCHMARK, 1_000_000 * BENCHMARKS[name].place + 7)]


# --- every answer is right ----------------------------------------------------------------------


def own_stream(name: str, number: int) -> np.random.Generator:
    return stream(Split.BENCHMARK, 0, 1_000_000 * BENCHMARKS[name].place + number)


@pytest.mark.parametrize("number", range(6))
def test_docvqa_asks_for_a_value_on_the_page(number: int) -> None:
    (row,) = draw(BENCHMARKS["docvqa"], 0, number)
    page = draw_document(own_stream("docvqa", number))
    assert row["image"].convert("RGB").tobytes() == page.image.tobytes()
    values = {f"?{entry.key}:": [entry.value] for entry in page.entries}
    assert row["answers"] == values[row["question"]]


@pytest.mark.parametrize("number", range(6))
def test_textvqa_asks_for_the_text_of_one_of_several_signs(number: int) -> None:
    (row,) = draw(BENCHMARKS["textvqa"], 0, number)
    picture = draw_signs(own_stream("textvqa", number), 2, 4)
    assert row["image"].tobytes() == picture.image.tobytes()
    texts = {question.prompt: question.answer for _, question in picture.questions}
    assert len(texts) >= 2
    assert row["answers"] == [texts[row["question"]]] * 10


@pytest.mark.parametrize("number", range(6))
def test_chartqa_asks_for_a_number_or_an_extreme(number: int) -> None:
    (row,) = draw(BENCHMARKS["chartqa"], 0, number)
    picture = draw_chart(own_stream("chartqa", number))
    assert row["image"].tobytes() == picture.image.tobytes()
    said = {question.prompt: question.answer for _, question in picture.questions}
    numbers = {int(text): prompt[1:-1] for prompt, text in said.items() if prompt[0] == "?"}
    assert row["answer"] == said[row["question"]]
    if row["type"] == "human_test":
        extreme = {"longest": max, "shortest": min}[row["question"][:-1].split()[-1]]
        assert row["answer"] == numbers[extreme(numbers)]
    else:
        assert row["question"] == f"?{numbers[int(row['answer'])]}:"


@pytest.mark.parametrize("number", range(6))
def test_textcaps_has_five_captions_that_name_text_and_colour(number: int) -> None:
    (row,) = draw(BENCHMARKS["textcaps"], 0, number)
    picture = draw_signs(own_stream("textcaps", number), 1, 1)
    (_, sign), *_ = picture.questions
    color = sign.prompt.split()[-2]
    assert len(set(row["caption_str"])) == 5
    for caption in row["caption_str"]:
        assert {color, sign.answer} <= set(caption.split())


@pytest.mark.parametrize("number", range(6))
def test_mmbench_names_the_colour_among_four(number: int) -> None:
    (row,) = draw(BENCHMARKS["mmbench"], 0, number)
    picture = draw_scene(own_stream("mmbench", number))
    colors = {question.prompt: question.answer for _, question in picture.questions}
    assert row[row["answer"]] == colors[row["question"]]
    assert len({row[letter] for letter in "ABCD"}) == 4


@pytest.mark.parametrize("number", range(1, 12, 2))
def test_vqav2_and_gqa_answer_as_their_scene_does(number: int) -> None:
    (asked,) = draw(BENCHMARKS["vqav2"], 0, number)
    scene = draw_scene(own_stream("vqav2", number))
    assert (asked["question"], asked["multiple_choice_answer"]) in said_of(scene)
    assert {said["answer"] for said in asked["answers"]} == {asked["multiple_choice_answer"]}
    assert len({said["answer_id"] for said in asked["answers"]}) == 10
    instruction, picture = draw(BENCHMARKS["gqa"], 0, number)
    scene = draw_scene(own_stream("gqa", number))
    assert (instruction["question"], instruction["answer"]) in said_of(scene)
    assert instruction["imageId"] == picture["id"]
    assert picture["image"].tobytes() == scene.image.tobytes()


def said_of(picture: object) -> set[tuple[str, str]]:
    return {(question.prompt, question.answer) for _, question in picture.questions}


def test_no_answer_is_common_and_all_kinds_of_question_are_there() -> None:
    def first(name: str, count: int) -> list[dict]:
        return [draw(BENCHMARKS[name], 0, number)[0] for number in range(count)]

    yes = Counter(row["answer"] for row in first("gqa", 60))
    assert set(yes) == {"yes", "no"}
    assert min(yes.values()) >= 15
    letters = Counter(row["answer"] for row in first("mmbench", 40))
    assert set(letters) == set("ABCD")
    said = Counter(row["multiple_choice_answer"] for row in first("vqav2", 60))
    assert max(said.values()) <= 15
    assert set(map(str, range(6))) < set(said)
    assert len({row["question_type"] for row in first("ocrbench", 12)}) == 6


# --- building ------------------------------------------------------------------------------------


def test_a_second_call_builds_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build("vqav2", folder, samples=2)
    monkeypatch.setattr(benchmarks, "draw", None)
    assert build("vqav2", folder, samples=2) == built
    assert not list(folder.glob(".vqav2*"))


def test_the_card_states_the_content(folder: Path) -> None:
    card = (build("gqa", folder, samples=2) / "README.md").read_text()
    assert content_hash(draw(BENCHMARKS["gqa"], 0, number) for number in range(2)) in card


def test_the_key_depends_on_all_that_decides_the_content() -> None:
    drawn = BENCHMARKS["docvqa"]
    keys = {settings_key(drawn, 3, 5), settings_key(drawn, 4, 5), settings_key(drawn, 3, 6)}
    assert len(keys) == 3
    assert settings_key(drawn, 3, 5) == settings_key(drawn, 3, 5)


def test_a_build_that_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of ink")

    monkeypatch.setattr(benchmarks, "draw", fail)
    with pytest.raises(RuntimeError, match="out of ink"):
        build("docvqa", tmp_path, samples=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "samples", "seed"), [("nope", 1, 0), ("docvqa", 0, 0), ("docvqa", 1, -1)]
)
def test_bad_settings_are_refused(tmp_path: Path, name: str, samples: int, seed: int) -> None:
    with pytest.raises(ValueError, match=r"no benchmark|samples"):
        build(name, tmp_path, samples, seed)


def test_what_was_damaged_is_drawn_again(tmp_path: Path) -> None:
    built = build("vqav2", tmp_path, samples=2)
    files = [path for path in built.rglob("*") if path.is_file()]
    whole = {path: path.read_bytes() for path in files}
    assert len(whole) == 3
    for path, content in whole.items():
        for damaged in (content[: len(content) // 2], content[:-40] + b"?" + content[-39:], None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            benchmarks._is_whole.cache_clear()  # as another process would see it
            assert build("vqav2", tmp_path, samples=2) == built
            assert {path: path.read_bytes() for path in files} == whole
            assert [path.name for path in tmp_path.iterdir()] == [built.name]
