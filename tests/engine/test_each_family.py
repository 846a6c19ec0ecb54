"""Families beyond the paper's, each on a tiny random checkpoint of its real classes.

What stock transformers does with a conversation is the oracle: its own way from messages to
inputs, its own attention and cache.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache.models import shape_of
from cache.oracle import (
    Forced,
    generate_budgeted,
    generate_masked,
    likelihood,
    logits,
    new_tokens,
)
from engine.family_checkpoints import (
    TILE,
    build_gemma3,
    build_idefics3,
    build_internvl,
    build_qwen2,
    build_qwen3,
    build_qwen25,
    build_smolvlm,
    internvl_processor,
)
from engine.fixtures import change_config, film, photo
from engine.llava_checkpoints import build_llava, build_onevision
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    InternVLConfig,
    LlamaConfig,
    PreTrainedModel,
    SmolVLMConfig,
)
from transformers.video_utils import VideoMetadata, load_video

from sparsemm_eval.engine.decode import decode, score
from sparsemm_eval.engine.lmms import SparseMM
from sparsemm_eval.engine.memory import row_bytes, token_bytes
from sparsemm_eval.engine.requests import Sample, read_chat
from sparsemm_eval.engine.tasks import task_manager
from sparsemm_eval.errors import UserError
from sparsemm_eval.families import VideoFamily, family_of, find_family, smolvlm
from sparsemm_eval.heads.capture import ArgmaxCapture, feed, read_prompts
from sparsemm_eval.heads.starved import AnsweredPrompt
from sparsemm_eval.methods import AHEAD, make_method, register_method, registry
from sparsemm_eval.methods.sensitivity import RULES

BUILD: Mapping[str, Callable[[Path], Path]] = {
    "llava_onevision": build_onevision,
    "qwen2_vl": build_qwen2,
    "qwen2_5_vl": build_qwen25,
    "qwen3_vl": build_qwen3,
    "internvl": build_internvl,
    "internvl on qwen3": partial(build_internvl, decoder="qwen3"),
    "idefics3": build_idefics3,
    "smolvlm": build_smolvlm,
    # All prompts are longer than the window; some are, and some grow to be; none is.
    "gemma3": build_gemma3,
    "gemma3 of middling windows": partial(build_gemma3, window=40),
    "gemma3 of wide windows": partial(build_gemma3, window=4096),
}
WINDOW, BUDGET, STEPS = 8, 24, 16
# One image, two, none, and one of another shape; prompts of unlike length.
CONTENTS = (
    ((("image", (40, 70)),), "What is it?"),
    ((("image", (64, 64)), ("text", "And then: "), ("image", (90, 30))), "Which is larger?"),
    ((), "Name a colour that is not red, and say why it is none."),
    ((("image", (100, 52)),), "Read."),
)
# Of families that read videos: one, one behind an image, two of unlike shape and length.
OF_VIDEOS = (
    ((("video", 12, (48, 64)),), "What is it?"),
    ((("image", (40, 70)), ("text", "And: "), ("video", 6, (80, 32))), "Which is it?"),
    ((("video", 7, (64, 64)), ("text", "Or "), ("video", 20, (32, 48))), "Look."),
)
FRAMES = 6
OPTIONS = {"max_new_tokens": STEPS, "do_sample": False}


def film_task(folder: Path, count: int) -> TaskManager:
    """A task of videos, which it shows as lmms-eval's own do: paths, out of doc_to_visual."""
    (folder / "films.yaml").write_text(
        "task: films\ndataset_path: json\ntest_split: test\noutput_type: generate_until\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'films.jsonl'}}}}}\n"
        "doc_to_visual: !function films.visual\n"
        'doc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\n'
        "generation_kwargs: {max_new_tokens: 4}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    (folder / "films.py").write_text("def visual(doc):\n    return [doc['film']]\n")
    lines = [
        {"film": str(film(folder / f"{n}.mp4", 8 + n, (64, 48), seed=n)), "question": "What?",
         "answer": "A"}
        for n in range(count)
    ]  # fmt: skip
    (folder / "films.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return task_manager(["films"], [folder])


class Subject:
    """A checkpoint on this package's attention, and as transformers alone runs it."""

    def __init__(self, folder: Path, answers: Path) -> None:
        self.folder = folder
        given = {"pretrained": str(folder), "dtype": "float32", "answers": answers}
        kind = family_of(AutoConfig.from_pretrained(folder))
        self.reads_videos = issubclass(kind, VideoFamily)
        self.contents = CONTENTS + OF_VIDEOS if self.reads_videos else CONTENTS
        self.numbers = range(len(self.contents))
        if self.reads_videos:
            given["frames"] = FRAMES
        self.runner = SparseMM(**given, method="fullkv").runner
        self.model: PreTrainedModel = self.runner.checkpoint.model
        self.stock_processor = AutoProcessor.from_pretrained(folder)
        self.stock = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        for model in (self.model, self.stock):
            # Every run has its full length.
            model.generation_config.eos_token_id = None
            model.generation_config.pad_token_id = 0

    def messages(self, number: int) -> list[dict[str, Any]]:
        """One turn of a user's, for lmms-eval and for transformers."""
        parts, question = self.contents[number]
        content: list[dict[str, Any]] = []
        for place, (kind, *what) in enumerate(parts):
            seed = 10 * number + place
            if kind == "image":
                content.append({"type": "image", "url": photo(*what[0], seed=seed)})
            elif kind == "video":
                path = film(self.folder.parent / f"{seed}.mp4", *what, seed=seed)
                content.append({"type": "video", "url": str(path)})
            else:
                content.append({"type": "text", "text": what[0]})
        content.append({"type": "text", "text": question})
        return [{"role": "user", "content": content}]

    def read(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Conversations as an evaluation reads them, padded on the left."""
        samples = []
        for number in numbers:
            chat = read_chat(self.runner.processor, self.messages(number), self.runner.family)
            samples.append(Sample("t", str(number), chat.prompt, chat.visuals, (), (), {}))
        return dict(self.runner.read_batch(samples))

    def stock_inputs(self, number: int) -> dict[str, Tensor]:
        """A conversation as transformers reads it, from frames that its own loader decodes."""
        asked = [
            {"type": part["type"], **({part["type"]: part["url"]} if "url" in part else part)}
            for part in self.messages(number)[0]["content"]
        ]
        turns, options = [{"role": "user", "content": asked}], {"add_generation_prompt": True}
        videos = [part["video"] for part in asked if "video" in part]
        if not videos:
            return dict(
                self.stock_processor.apply_chat_template(
                    turns, tokenize=True, return_dict=True, return_tensors="pt", **options
                )
            )

        def places(metadata: VideoMetadata, **_: Any) -> np.ndarray:
            return self.runner.family.frame_places(metadata.total_num_frames)

        loaded = [load_video(video, "pyav", sample_indices_fn=places) for video in videos]
        return dict(
            self.stock_processor(
                text=self.stock_processor.apply_chat_template(turns, tokenize=False, **options),
                images=[part["image"] for part in asked if "image" in part] or None,
                videos=[frames for frames, _ in loaded],
                video_metadata=[metadata for _, metadata in loaded],
                do_sample_frames=False,
                return_tensors="pt",
            )
        )

    def stock_tokens(self, number: int, **options: Any) -> list[int]:
        inputs = self.stock_inputs(number)
        out = self.stock.generate(**inputs, **{**OPTIONS, **options})
        return out[0, inputs["input_ids"].shape[1] :].tolist()

    def method(self, name: str) -> Any:
        settings = {} if name == "fullkv" else {"budget": BUDGET, "window": WINDOW}
        return make_method(name, shape_of(self.model), **settings)


@pytest.fixture(scope="module", params=BUILD)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tmp_path_factory.mktemp("family")
    return Subject(BUILD[request.param](folder / request.param), folder / "answers")


def test_keep_all_is_stock_token_for_token(subject: Subject) -> None:
    for number in subject.numbers:
        inputs, stock = subject.read([number]), subject.stock_inputs(number)
        assert inputs.keys() == stock.keys()
        for name, value in stock.items():
            assert torch.equal(inputs[name], torch.as_tensor(value)), name
        (full,) = decode(subject.model, inputs, [subject.method("fullkv")], OPTIONS)
        assert full.tokens[0].tolist() == subject.stock_tokens(number)
        assert (full.kept == inputs["input_ids"].shape[1]).all()


def test_a_left_padded_batch_equals_singles(subject: Subject) -> None:
    methods = [subject.method("fullkv"), subject.method("snapkv")]
    numbers = subject.numbers
    together = decode(subject.model, subject.read(numbers), methods, OPTIONS)
    for number in numbers:
        alone = decode(subject.model, subject.read([number]), methods, OPTIONS)
        for batch, single in zip(together, alone, strict=True):
            assert batch.tokens[number].tolist() == single.tokens[0].tolist()
            assert batch.prompt_tokens[number] == single.prompt_tokens[0]
    kept = torch.tensor(together[1].prompt_tokens).clamp(max=BUDGET)
    assert (together[1].kept == kept[:, None, None]).all()
    assert max(together[1].prompt_tokens) > BUDGET


def test_a_long_answer_in_a_batch_is_stock(subject: Subject) -> None:
    """So long that layers are copied to larger ones, and sliding windows are left behind."""
    options = {**OPTIONS, "max_new_tokens": 50}
    numbers = range(len(CONTENTS))
    methods = [subject.method("fullkv"), subject.method("snapkv")]
    full, _ = decode(subject.model, subject.read(numbers), methods, options)
    for number in numbers:
        assert full.tokens[number].tolist() == subject.stock_tokens(number, **options)


def test_bytes_are_those_of_all_layers(subject: Subject) -> None:
    """What layers of a sliding window hold is no less there for being the same in all methods."""
    for method in (subject.method("fullkv"), subject.method("snapkv")):
        inputs = subject.read([0, 1])
        (found,) = decode(subject.model, inputs, [method], OPTIONS)
        shape, a_token = method.shape, 2 * 16 * 4
        for row, length in enumerate(found.prompt_tokens):
            in_windows = sum(min(length, w - 1) for w in shape.windows if w is not None)
            kept = int(found.kept[row].sum()) + shape.kv_heads * in_windows
            assert found.kept_bytes[row] == kept * a_token
            planned = row_bytes(method, length, STEPS, token_bytes(subject.model))
            assert found.kept_bytes[row] < found.cache_bytes[row] < 1.1 * planned


def test_snapkv_is_the_oracle_and_the_step_is_generate(subject: Subject) -> None:
    for numbers in ([0], [1], [0, 1, 2, 3], [4], [5], [4, 5, 6, 1]):
        if max(numbers) not in subject.numbers:
            continue
        inputs, method = subject.read(numbers), subject.method("snapkv")
        options = {"max_new_tokens": STEPS}
        ours, cache = generate_budgeted(subject.model, inputs, method, **options)
        (stepped,) = decode(subject.model, inputs, [method], OPTIONS)
        assert torch.stack(stepped.tokens).tolist() == new_tokens(ours, inputs).tolist()
        try:
            masked, oracle = generate_masked(subject.stock, inputs, method, **options)
        finally:
            subject.stock.set_attn_implementation({"text_config": "sdpa"})
        assert torch.equal(cache.kept(), oracle.counts())
        assert new_tokens(ours, inputs).tolist() == new_tokens(masked, inputs).tolist()
        assert (logits(ours) - logits(masked)).abs().max() < 1e-4


def test_candidates_are_scored_as_the_oracle_does(subject: Subject) -> None:
    """Behind an image, two, none, and what else it reads; so long that windows are left behind."""
    runner, texts = subject.runner, ("red", "It is a house, and behind it is another one.")
    chats = [
        read_chat(runner.processor, subject.messages(number), runner.family, texts)
        for number in subject.numbers
    ]
    candidates = [chat.candidates for chat in chats]
    methods = [subject.method("fullkv"), subject.method("snapkv")]
    inputs = subject.read(subject.numbers)
    found = score(subject.model, inputs, methods, candidates, {"do_sample": False})
    for method, of_method in zip(methods, found, strict=True):
        for place in range(len(texts)):
            tokens = [of_sample[place] for of_sample in candidates]
            (steps,) = {len(one) for one in tokens}
            force = Forced(torch.tensor(tokens), inputs["input_ids"].shape[1])
            try:
                out, _ = generate_masked(
                    subject.stock, inputs, method, max_new_tokens=steps, logits_processor=[force]
                )
            finally:
                subject.stock.set_attn_implementation({"text_config": "sdpa"})
            for row, one in zip(of_method.candidates, range(len(tokens)), strict=True):
                wanted, is_greedy = likelihood(logits(out)[one], tokens[one])
                assert row[place].log_likelihood == pytest.approx(wanted, abs=5e-3)
                assert row[place].is_greedy is is_greedy


def test_heads_can_be_starved_on_it(subject: Subject) -> None:
    for number in (1, 2, *subject.numbers[4:]):
        read = AnsweredPrompt(subject.model, subject.read([number]), WINDOW, OPTIONS)
        assert read.answer == subject.stock_tokens(number)
        assert read.whole.argmax(-1).tolist() == read.answer[1:]
        shape = shape_of(subject.model)
        everything = np.full((1, shape.layers, shape.kv_heads), 10**6)
        for rule in range(len(RULES)):
            rules = np.full_like(everything, rule)
            assert read.divergence(rules, everything).max() < 1e-6
        assert read.divergence(rules, np.full_like(everything, WINDOW)).max() > 1e-3


def test_where_heads_look_is_alike_in_a_padded_batch(subject: Subject) -> None:
    """What `chase` asks: prompts of one image each, with known answers, fed once."""
    checkpoint, shape = subject.runner.checkpoint, shape_of(subject.model)
    answer = [20, 21, 22, 23]

    def looked(*sizes: tuple[int, int]) -> list[Tensor]:
        images, questions = [photo(*size) for size in sizes], ["What is it?"] * len(sizes)
        inputs = read_prompts(checkpoint.processor, images, questions, checkpoint.family)
        capture = ArgmaxCapture(shape, len(answer))
        feed(checkpoint, inputs, [answer] * len(sizes), capture)
        padding = (1 - inputs["attention_mask"]).sum(1)
        return [row - skip for row, skip in zip(capture.looked(), padding, strict=True)]

    sizes = ((40, 70), (100, 30))
    for row, size in zip(looked(*sizes), sizes, strict=True):
        assert torch.equal(row, looked(size)[0])


def test_through_lmms_eval_to_a_score(subject: Subject, tmp_path: Path) -> None:
    settings = "dtype=float32,method=snapkv,budget=24,window=8"
    results = simple_evaluate(
        model="sparsemm",
        model_args=f"pretrained={subject.folder},answers={tmp_path / 'answers'},{settings}",
        tasks=["docvqa_mini"],
        limit=2,
        batch_size=2,
        device="cpu",
        task_manager=task_manager(["docvqa_mini"]),
    )
    assert 0 <= results["results"]["docvqa_mini"]["anls,none"] <= 1
    assert results["n-samples"]["docvqa_mini"]["effective"] == 2


def test_a_task_of_videos_through_lmms_eval_to_a_score(subject: Subject, tmp_path: Path) -> None:
    if not subject.reads_videos:
        pytest.skip("it reads no videos")
    manager = film_task(tmp_path, 3)
    settings = f"dtype=float32,method=snapkv,budget=24,window=8,frames={FRAMES}"
    results = simple_evaluate(
        model="sparsemm",
        model_args=f"pretrained={subject.folder},answers={tmp_path / 'answers'},{settings}",
        tasks=["films"],
        batch_size=2,
        device="cpu",
        task_manager=manager,
    )
    assert 0 <= results["results"]["films"]["exact_match,none"] <= 1
    assert results["n-samples"]["films"]["effective"] == 3


def test_a_task_of_videos_is_refused_where_the_family_reads_none(
    tmp_path: Path, unloaded: None
) -> None:
    manager = film_task(tmp_path, 3)
    folder = build_llava("llama", tmp_path / "model")
    with pytest.raises(
        UserError,
        match=r"films: a video is shown, and of a llava_next model only "
        r"images and text are read.*llava_onevision, qwen2_5_vl, qwen2_vl, qwen3_vl",
    ):
        simple_evaluate(
            model="sparsemm",
            model_args=f"pretrained={folder},answers={tmp_path / 'answers'},method=fullkv",
            tasks=["films"],
            device="cpu",
            task_manager=manager,
        )


def test_an_unknown_image_layout_is_refused_before_weights_load(
    tmp_path: Path, unloaded: None
) -> None:
    folder = build_onevision(tmp_path / "model")
    change_config(folder, vision_aspect_ratio="square")
    with pytest.raises(UserError, match="vision_aspect_ratio='square' in config"):
        SparseMM(str(folder), method="fullkv", answers=tmp_path / "answers")


def test_internvl_on_another_decoder_is_refused() -> None:
    config = InternVLConfig(text_config=LlamaConfig())
    with pytest.raises(UserError, match="a decoder of model_type=llama: it must be one of qwen2"):
        find_family("internvl").check(config)


def test_internvl_cuts_images_into_as_many_tiles_as_it_is_told() -> None:
    family, processor = find_family("internvl"), internvl_processor()
    images = {"text": ["<IMG_CONTEXT>"], "images": [photo(100, 300)], "return_tensors": "pt"}
    for settings, tiles in (({}, 4), ({"max_patches": 2}, 3), ({"max_patches": 1}, 1)):
        told = family(**settings).configure(processor)
        assert len(told(**images)["pixel_values"]) == tiles
    assert processor.image_processor.max_patches == 6  # other cells share it
    with pytest.raises(UserError, match="min_patches=7 is above max_patches=6"):
        family(min_patches=7).configure(processor)
    with pytest.raises(UserError, match="max_patches=0: it must be"):
        family(max_patches=0)


def test_idefics3_cuts_images_as_large_as_it_is_told(tmp_path: Path) -> None:
    family, processor = (
        find_family("idefics3"),
        AutoProcessor.from_pretrained(build_idefics3(tmp_path)),
    )
    images = {"text": ["<image>"], "images": [photo(100, 300)], "return_tensors": "pt"}
    for settings, tiles in (({}, 3), ({"longest_edge": TILE}, 1), ({"longest_edge": 4 * TILE}, 9)):
        told = family(**settings).configure(processor)
        assert told(**images)["pixel_values"].shape[1] == tiles
    with pytest.raises(UserError, match="longest_edge=0: it must be"):
        family(longest_edge=0)


def test_smolvlm_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smolvlm, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package num2words.*pip install num2words"):
        find_family("smolvlm").check(SmolVLMConfig())


SEEN: list[tuple[Tensor, Tensor]] = []


@dataclass(frozen=True)
class Recorder:
    """A scorer that notes keys and rotations, by the door that any method has."""

    needs = ("rotation",)
    window: int = 1
    least_budget: int = 2

    def __call__(self, query: Tensor, key: Tensor, rotation: Tensor) -> Tensor:
        """All tokens alike."""
        SEEN.append((key, rotation))
        return torch.ones(key.shape[0], key.shape[1] - 1)


def test_rotations_are_what_the_model_does(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys before RoPE, turned by what a method is handed, are the keys that it is handed."""
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    register_method("recorder", scorer=Recorder)
    method = make_method("recorder", shape_of(subject.model), budget=2)
    inputs = subject.read([0, 2])
    before: dict[torch.nn.Module, Tensor] = {}
    layers = [one.self_attn for one in subject.model.get_decoder().layers]
    last = [getattr(layer, "k_norm", None) or layer.k_proj for layer in layers]

    def note(part: torch.nn.Module, given: object, out: Tensor) -> None:
        before.setdefault(part, out)

    hooks = [part.register_forward_hook(note) for part in last]
    SEEN.clear()
    decode(subject.model, inputs, [method], OPTIONS)
    for hook in hooks:
        hook.remove()
    lengths = inputs["attention_mask"].sum(1).tolist()
    compressed = [part for part, layer in zip(last, layers, strict=True) if not is_sliding(layer)]
    for place, part in enumerate(compressed):
        for row, length in enumerate(lengths):
            key, rotation = SEEN[place * len(lengths) + row]
            plain, width = before[part][row], inputs["input_ids"].shape[1]
            if len(plain) != width:  # heads first
                plain = plain.transpose(0, 1)
            plain = plain.reshape(width, len(key), -1)[-length:].transpose(0, 1)
            cos, sin = rotation[:, :length]
            first, second = plain.chunk(2, -1)
            turned = plain * cos + torch.cat([-second, first], -1) * sin
            torch.testing.assert_close(turned, key)
            # What follows goes on from the largest position, step by step alike.
            assert rotation.shape[1] == length + AHEAD
    assert len(SEEN) == len(compressed) * len(lengths)


def is_sliding(attention: torch.nn.Module) -> bool:
    """Whether a layer attends to its last tokens alone."""
    return getattr(attention, "is_sliding", False)
