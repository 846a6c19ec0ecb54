"""Protocols: our model is given what other programs' models are given, to the pixel and token."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from engine.family_checkpoints import build_qwen25
from engine.fixtures import (
    SHORT,
    TASK,
    ask,
    film,
    pages,
    photo,
    refused,
    requests,
    rows,
    score_all,
    to_messages,
)
from engine.stock_wrappers import (
    STOCK,
    TASKS,
    Seen,
    ask_ours,
    ask_stock,
    instances,
    make_stock,
    unlike,
)
from hypothesis import example, given
from hypothesis import strategies as st
from lmms_eval.api.instance import Instance
from lmms_eval.models.model_utils.media_encoder import encode_image_to_data_url
from qwen_vl_utils import smart_resize, vision_process
from transformers import (
    AutoProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLVideoProcessor,
)

from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.generation import generation_options
from sparsemm_eval.engine.lmms import Qwen2VLSparseMM, SparseMM, make_runner
from sparsemm_eval.engine.requests import model_inputs, read_chat
from sparsemm_eval.errors import UserError
from sparsemm_eval.families import Family, find_family
from sparsemm_eval.families.llava_next import LlavaNext
from sparsemm_eval.families.qwen2_vl import Qwen2VL, Qwen25VL, rounded
from sparsemm_eval.report.results import load
from sparsemm_eval.tiny import embedded_checkpoints
from sparsemm_eval.tiny.training.qwen2_vl import build_config, build_processor

MakeQwen = Callable[..., Qwen2VLSparseMM]
PIXELS = 28 * 28


def build_qwen2_5(folder: Path) -> Path:
    """A tiny Qwen2.5-VL with random weights, whose processor is the embedded Qwen2-VL's."""
    config = build_config().to_dict()
    vision = {
        "depth": 2, "hidden_size": 32, "out_hidden_size": 128, "intermediate_size": 32,
        "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2, "window_size": 64,
        "fullatt_block_indexes": [1],
    }  # fmt: skip
    text = {name: value for name, value in config["text_config"].items() if name != "model_type"}
    tokens = {name: config[name] for name in config if name.endswith("token_id")}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint for each stock model."""
    small = build_qwen2_5(tmp_path_factory.mktemp("qwen2_5") / "model")
    return {**embedded_checkpoints(), "qwen2_5_vl": small}


@pytest.fixture(scope="module")
def stock(folders: dict[str, Path]) -> Callable[..., Any]:
    """Each stock model, made once."""
    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            made[name] = make_stock(name, folders[name])
        return made[name]

    return get


@pytest.fixture(scope="module")
def checkpoint(folders: dict[str, Path]) -> Callable[[str], Checkpoint]:
    """Each checkpoint as ours, loaded once."""
    made: dict[str, Checkpoint] = {}

    def get(name: str) -> Checkpoint:
        return made.setdefault(name, Checkpoint(folders[name], dtype="float32"))

    return get


@pytest.fixture
def ours(checkpoint: Callable[[str], Checkpoint], answers: Path) -> Callable[..., SparseMM]:
    """Our model on one of them, of full KV."""
    return lambda name, protocol: SparseMM(
        checkpoint=checkpoint(name), method="fullkv", protocol=protocol, answers=answers
    )


def odd_documents() -> list[dict[str, Any]]:
    """Images that a rounding, a limit or a conversion changes."""
    transparent = photo(300, 90).convert("RGBA")
    transparent.putalpha(photo(300, 90, seed=1).convert("L"))
    images = [
        photo(37, 211),  # no side is a whole number of patches
        photo(61, 20),  # below 4 x 28 x 28 pixels
        photo(11, 290),  # less than half of 28 pixels wide
        photo(850, 1100),  # above 602,112 pixels
        photo(100, 120).convert("L"),
        photo(96, 64).quantize(16),
        transparent,
    ]
    return [
        {"images": [image], "question": f"which {number}?"} for number, image in enumerate(images)
    ]


def plain_requests(count: int) -> list[Instance]:
    """As `requests`, for models that take text and images apart."""
    return [
        Instance(
            request_type="generate_until",
            arguments=(f"which {doc_id}?", {}, lambda doc: doc["images"], doc_id, TASK, "test"),
            idx=0,
            metadata={"task": TASK, "doc_id": doc_id, "repeats": 1},
        )
        for doc_id in range(count)
    ]


def seen_by(model: Any, name: str, documents: list[dict[str, Any]]) -> Seen:
    """What a stock model feeds; nothing is generated."""
    asked = requests(len(documents), {}) if STOCK[name][2] else plain_requests(len(documents))
    generate = model.model.generate
    model.model.generate = lambda **given: given["input_ids"]
    try:
        return ask_stock(model, asked, {TASK: {"test": documents}})
    finally:
        model.model.generate = generate


def fed_by(model: SparseMM, documents: list[dict[str, Any]]) -> Seen:
    """What ours feeds, likewise."""
    runner, fed = model.runner, Seen()
    for document in documents:
        read = read_chat(runner.processor, to_messages(document), runner.family)
        inputs = runner.processor(
            text=[read.prompt],
            images=list(read.visuals),
            return_tensors="pt",
            add_special_tokens=False,
        )
        options, _ = generation_options({}, runner.family.max_new_tokens)
        fed.inputs.append(dict(inputs))
        fed.new_tokens.append(dict(options)["max_new_tokens"])
    return fed


def differing(mine: Seen, theirs: Seen) -> list[list[str]]:
    """Inputs that differ, by document."""
    return [unlike(*pair) for pair in zip(mine.inputs, theirs.inputs, strict=True)]


# --- the same input -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STOCK)
def test_lmms_eval_is_fed_alike(name: str, stock: Callable, ours: Callable) -> None:
    """Every tensor of every odd image, and the limit where a task sets none."""
    documents = odd_documents()
    theirs = seen_by(stock(name), name, documents)
    mine = fed_by(ours(name, "lmms-eval"), documents)
    assert differing(mine, theirs) == [[]] * len(documents)
    assert all("pixel_values" in inputs for inputs in theirs.inputs)
    assert mine.new_tokens == theirs.new_tokens
    if name != "llava_next":  # whose stock model changes nothing
        assert any(differing(fed_by(ours(name, "plain"), documents), theirs))


class Frames:
    """What lmms-eval asks of decord, which is not installed; one of its own cannot read now."""

    def __init__(self, path: str) -> None:
        with av.open(path) as file:
            decoded = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
            self.rate = float(file.streams.video[0].average_rate)
        self.frames = np.stack(decoded)

    def __len__(self) -> int:
        return len(self.frames)

    def get_avg_fps(self) -> float:
        return self.rate

    def get_batch(self, places: list[int]) -> SimpleNamespace:
        return SimpleNamespace(asnumpy=lambda: self.frames[places])


def test_lmms_eval_is_fed_alike_with_videos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its chat model of Qwen2.5-VL: frames, sizes, and the seconds between frames; but for how
    sizes are reached, pixels."""
    folder = build_qwen25(tmp_path / "model")
    processor = AutoProcessor.from_pretrained(folder)
    # Patches as large as qwen_vl_utils takes all to be.
    processor.video_processor = Qwen2VLVideoProcessor()
    processor.save_pretrained(folder)
    model = make_stock("qwen2_5_vl", folder)
    decord = SimpleNamespace(VideoReader=Frames)
    monkeypatch.setitem(sys.modules, "decord", decord)
    monkeypatch.setattr(import_module(STOCK["qwen2_5_vl"][0]), "decord", decord)
    monkeypatch.setattr(vision_process, "get_video_reader_backend", lambda: "decord")
    monkeypatch.setattr(model.model, "generate", lambda **given: given["input_ids"])
    paths = [
        str(film(tmp_path / f"{count}.mp4", count, size))
        for count, size in ((3, (200, 120)), (5, (1280, 720)), (45, (64, 150)))
    ]

    def asking(path: str) -> list[dict[str, Any]]:
        content = [{"type": "video", "url": path}, {"type": "text", "text": "What is it?"}]
        return [{"role": "user", "content": content}]

    theirs = ask_stock(model, requests(3, {}, messages=asking), {TASK: {"test": paths}})
    assert [len(seen["pixel_values_videos"].shape) for seen in theirs.inputs] == [2, 2, 2]
    family = find_family("qwen2_5_vl").under("lmms-eval")
    told = family.configure(Checkpoint(folder, dtype="float32").processor)
    for path, seen in zip(paths, theirs.inputs, strict=True):
        read = read_chat(told, asking(path), family)
        fed = model_inputs(told, family, [read.prompt], [read.visuals])
        assert set(unlike(fed, seen)) <= {"pixel_values_videos"}
        # qwen_vl_utils scales in single precision, the processor between whole levels of grey.
        levels = (fed["pixel_values_videos"] - seen["pixel_values_videos"]).abs() * 255 / 4
        assert levels.mean() < 0.2


def test_the_paper_is_fed_alike(
    stock: Callable, ours: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published fork's qwen2_vl: lmms-eval's with other limits, told to the processor alone,
    and with PIL's default quality."""
    model = make_stock(
        "qwen2vl", min_pixels=32 * PIXELS, max_pixels=16_384 * PIXELS, use_flash_attention_2=False
    )
    # What the messages hold where they name no limits.
    model.min_pixels, model.max_pixels = 4 * PIXELS, 16_384 * PIXELS
    model._encode_image_data_url = lambda image: encode_image_to_data_url(
        image, image_format="JPEG", mime_type="image/jpeg", convert_rgb=True
    )
    documents = odd_documents()
    theirs = seen_by(model, "qwen2vl", documents)
    mine = fed_by(ours("qwen2vl", "paper"), documents)
    assert differing(mine, theirs) == [[]] * len(documents)
    assert {*mine.new_tokens, *theirs.new_tokens} == {128}
    assert all(differing(fed_by(ours("qwen2vl", "lmms-eval"), documents), theirs))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["qwen2vl", "llava_next"])
def test_answers_of_tasks_are_lmms_evals(
    name: str, task: str, stock: Callable, ours: Callable
) -> None:
    chat, data = instances(task, 2, chat=True)
    mine = ask_ours(ours(name, "lmms-eval"), chat, {task: data})
    own, data = instances(task, 2, STOCK[name][2])
    theirs = ask_stock(stock(name), own, {task: data})
    assert mine.texts == theirs.texts
    assert mine.new_tokens == theirs.new_tokens
    assert differing(mine, theirs) == [[], []]


@example(size=(300, 10), least=4 * PIXELS, most=602_112)
@example(size=(5, 13), least=4 * PIXELS, most=602_112)
@given(
    size=st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    least=st.sampled_from([4 * PIXELS, 32 * PIXELS, 256 * PIXELS]),
    most=st.sampled_from([602_112, 1_605_632, 16_384 * PIXELS]),
)
def test_rounding_is_that_of_qwen_vl_utils(size: tuple[int, int], least: int, most: int) -> None:
    width, height = size
    if max(size) > 200 * min(size):
        for refuse in (lambda: rounded(size, least, most),
                       lambda: smart_resize(height, width, 28, least, most)):  # fmt: skip
            with pytest.raises(ValueError, match="200"):
                refuse()
    else:
        expected = smart_resize(height, width, 28, least, most)
        assert rounded(size, least, most) == expected[::-1]


def test_image_tokens_of_a_page() -> None:
    """The numbers that tasks/PROTOCOLS.md states: a page of 1700 x 2200 pixels."""
    tokens = {}
    for protocol in ("lmms-eval", "paper"):
        family = Qwen2VL.under(protocol)
        width, height = rounded((1700, 2200), family.min_pixels, family.max_pixels)
        tokens[protocol] = width * height // PIXELS
    assert tokens == {"lmms-eval": 744, "paper": 4819}


# --- settings -------------------------------------------------------------------------------------


def test_a_given_setting_wins() -> None:
    family = Qwen2VL.under("lmms-eval", max_pixels=1_000_000, system_prompt="")
    assert (family.max_pixels, family.system_prompt) == (1_000_000, "")
    assert family.jpeg_quality == 85
    assert Qwen2VL.under() == Qwen2VL.under("plain") == Qwen2VL()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"protocol": "papers"}, "protocol='papers': for a qwen2_vl checkpoint it must be one"),
        ({"protocol": 7}, "it must be one of plain, lmms-eval, paper"),
        ({"jpeg_quality": 0}, "jpeg_quality=0: it must be an integer of at least 1"),
        ({"jpeg_quality": 101}, "jpeg_quality=101: it must be an integer from 1 to 100"),
        ({"jpeg_quality": "best"}, "jpeg_quality='best': it must be an integer"),
        ({"system_prompt": 5}, "system_prompt=5: it must be text"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: it must be an integer of at least 1"),
        ({"rounding": 28}, "rounding=28: it must be one of limits, loose"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("unloaded")
def test_settings_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    assert words in refused(**settings)


def test_protocols_of_other_families() -> None:
    words = "protocol='paper': for a qwen2_5_vl checkpoint it must be one of plain, lmms-eval"
    with pytest.raises(UserError, match=f"{words}$"):
        Qwen25VL.under("paper")
    assert LlavaNext.under("paper").max_new_tokens == 1024
    assert all("plain" not in find_family(name).protocols for name in ("llava_next", "qwen2_vl"))


def test_a_system_prompt_goes_before_messages_without_one() -> None:
    family = Family(system_prompt="Be brief.")
    asked = to_messages(pages(1)[0])
    first, *rest = family.read_messages(asked)
    assert first == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert rest == asked
    own = [{"role": "system", "content": [{"type": "text", "text": "Shout."}]}, *asked]
    assert family.read_messages(own) == own


@pytest.mark.usefixtures("unloaded")
def test_a_template_that_leaves_the_system_prompt_out(folder: Path) -> None:
    """It would be dropped without a word."""
    path = folder / "chat_template.jinja"
    left_out = "{% for message in messages %}{% if message['role'] != 'system' %}"
    template = path.read_text().replace("{% for message in messages %}", left_out, 1)
    path.write_text(template.removesuffix("{% endfor %}") + "{% endif %}{% endfor %}")
    given = {"pretrained": str(folder)}
    assert "system_prompt='Be brief.': the chat template of" in refused(
        **given, system_prompt="Be brief."
    )
    SparseMM(**given, method="fullkv", protocol="lmms-eval", system_prompt="")


def test_jpeg_is_read_back_whole() -> None:
    """Worse with less quality, in RGB, of the same size; the image that was given is as it was."""
    image = photo(64, 48).convert("RGBA")
    before = image.tobytes()
    seen = [
        torch.frombuffer(bytearray(Family(jpeg_quality=q).read_image(image, None).tobytes()),
                         dtype=torch.uint8).double()
        for q in (10, 95)
    ]  # fmt: skip
    original = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    far, near = ((one - original).abs().mean() for one in seen)
    assert near < far
    assert image.tobytes() == before


# --- keys -----------------------------------------------------------------------------------------


def answered(qwen: MakeQwen, answers: Path, generation: Any = SHORT, **settings: Any) -> int:
    """Rows in the store after a page was asked with these settings."""
    ask(qwen(**settings), pages(1), generation)
    return len(rows(answers))


def test_the_key_of_a_plain_run_is_that_of_before(qwen: MakeQwen) -> None:
    """Whatever was answered before there were protocols is found."""
    model = qwen()
    assert model.runner.family.keyed == {"min_pixels": None, "max_pixels": None}
    assert LlavaNext().keyed == {}
    assert qwen(protocol="plain").runner.key(model.cell, {}) == model.runner.key(model.cell, {})


def test_what_changes_nothing_is_found_again(qwen: MakeQwen, answers: Path) -> None:
    assert answered(qwen, answers) == 1
    assert answered(qwen, answers, protocol="plain") == 1
    assert answered(qwen, answers, max_new_tokens=9) == 1  # the task sets its own
    assert answered(qwen, answers, protocol="lmms-eval") == 2
    assert answered(qwen, answers, **Qwen2VL.protocols["lmms-eval"]) == 2


@pytest.mark.parametrize(
    "changed",
    [{"system_prompt": "b"}, {"jpeg_quality": 85}, {"rounding": "loose"}, {"protocol": "paper"}],
    ids=str,
)
def test_what_changes_the_input_is_computed(
    qwen: MakeQwen, answers: Path, changed: dict[str, Any]
) -> None:
    assert answered(qwen, answers) == 1
    assert answered(qwen, answers, **changed) == 2


def test_the_limit_where_a_task_sets_none(qwen: MakeQwen, answers: Path) -> None:
    for limit in (2, 3):
        ask(qwen(max_new_tokens=limit), pages(1), {})
    assert [row.record["new_tokens"] for row in rows(answers)] == [2, 3]


def test_results_state_a_prompt_with_commas(reader: Checkpoint, answers: Path) -> None:
    """A text of settings could not be read back."""
    stated = {"method": "fullkv", "protocol": "paper", "system_prompt": "Be brief, please."}
    runner = make_runner(reader, [stated], answers)
    (path,) = score_all(runner, [stated], "gqa_mini", 1, answers / "out")
    (settings,) = load([path]).cells["settings"]
    assert settings == stated
