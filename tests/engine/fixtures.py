"""Documents, requests and stored rows that the tests of this folder share."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import av
import numpy as np
import pytest
import torch
from lmms_eval.api.instance import Instance
from loguru import logger
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature

from sparsemm_eval.engine.lmms import CellModel, Qwen2VLSparseMM, results_path, score
from sparsemm_eval.engine.requests import Request
from sparsemm_eval.engine.runner import Runner, raise_failures
from sparsemm_eval.engine.tasks import requests_of, task_manager
from sparsemm_eval.tiny import default_checkpoint
from sparsemm_eval.tiny.documents import PAGE, Layout, Split, draw_document, stream, value_question

TASK, SPLIT = "pages", "test"
SHORT = MappingProxyType({"max_new_tokens": 8})
# Pages of unlike height, so that prompts of one batch differ in length.
LAYOUTS = (PAGE, Layout(12, 22, 8, 14), Layout(20, 22, 10, 20))


def pages(count: int, first: int = 0, layouts: Sequence[Layout] = LAYOUTS) -> list[dict[str, Any]]:
    """Draw documents with one question each."""
    drawn = []
    for number in range(first, first + count):
        page = draw_document(stream(Split.HELD_OUT, 1, number), layouts[number % len(layouts)])
        question = value_question(page, number % len(page.entries))
        drawn.append({"images": [page.image], "question": question.prompt})
    return drawn


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Draw an image of coarse noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (4, 4, 3), dtype=torch.uint8, generator=generator)
    return Image.fromarray(coarse.numpy()).resize((width, height))


def film(
    path: Path, frames: int, size: tuple[int, int], seed: int = 0, codec: str = "mpeg4"
) -> Path:
    """Write a video of coarse noise that moves, 8 frames a second; its sides are even numbers."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=8, options={"g": "5", "bf": "2"})
        stream.width, stream.height = size
        still = np.asarray(photo(*size, seed=seed))
        for number in range(frames):
            moved = np.roll(still, 5 * number, (0, 1))
            file.mux(stream.encode(av.VideoFrame.from_ndarray(moved, format="rgb24")))
        file.mux(stream.encode())
    return path


def to_messages(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Put a document as one chat turn, images first."""
    images = [{"type": "image", "url": image} for image in document["images"]]
    return [{"role": "user", "content": [*images, {"type": "text", "text": document["question"]}]}]


def requests(
    count: int,
    generation: Mapping[str, Any],
    repeats: int = 1,
    messages: Any = to_messages,
    task: str = TASK,
) -> list[Instance]:
    """Make the requests lmms-eval makes of `count` documents."""
    return [
        Instance(
            request_type="generate_until",
            arguments=("", messages, dict(generation), doc_id, task, SPLIT),
            idx=0,
            metadata={"task": task, "doc_id": doc_id, "repeats": repeats},
        )
        for doc_id in range(count)
        for _ in range(repeats)
    ]


def ask(
    model: CellModel,
    documents: Sequence[Mapping[str, Any]],
    generation: Mapping[str, Any] = SHORT,
    repeats: int = 1,
    messages: Any = to_messages,
) -> list[str]:
    """Answer documents through ``generate_until``, as lmms-eval would."""
    model.task_dict = {TASK: {SPLIT: documents}}
    results = model.generate_until(requests(len(documents), generation, repeats, messages))
    return [result.text for result in results]


def ask_all(
    runner: Runner, documents: Sequence[Mapping[str, Any]], generation: Mapping[str, Any] = SHORT
) -> list[list[str]]:
    """Answer documents under all cells of a runner, each prompt read once."""
    datasets = {TASK: {SPLIT: documents}}
    asked = (Request.of(one, datasets) for one in requests(len(documents), generation))
    answered = runner.answer(asked)
    raise_failures(answered, runner.store, 1)
    return [[answer.text for answer in of_cell.answers] for of_cell in answered]


def answer(
    runner: Runner, task: str, samples: int | None = None, shard: int = 0, shards: int = 1,
    progress: Any = None,
) -> None:  # fmt: skip
    """Answer samples of a task under all cells, as a sweep's job does."""
    asked = requests_of(task, task_manager([task]), samples, shard, shards)
    raise_failures(runner.answer(asked, progress=progress), runner.store, 1)


def score_all(
    runner: Runner, cells: Sequence[Mapping[str, Any]], task: str, samples: int, out: Path
) -> list[Path]:
    """Score all cells of a runner on a task; their results files."""
    paths = [results_path(out / "cells", task, cell) for cell in cells]
    for cell, stated, path in zip(runner.cells, cells, paths, strict=True):
        score(CellModel(runner, cell), stated, task, samples, task_manager([task]), path)
    return paths


class Stock:
    """A checkpoint as transformers alone runs it: sdpa, a plain cache, one document at a time."""

    def __init__(self, folder: Path) -> None:
        self.processor = AutoProcessor.from_pretrained(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()

    def inputs(self, document: Mapping[str, Any]) -> BatchFeature:
        """The document through chat template and processor, with one <s> where there is one."""
        content = [{"type": "image"} for _ in document["images"]]
        content.append({"type": "text", "text": document["question"]})
        prompt = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return self.processor(
            text=[prompt.removeprefix("<s>")],
            images=document["images"] or None,
            return_tensors="pt",
        )

    def answer(self, document: Mapping[str, Any], generation: Mapping[str, Any] = SHORT) -> str:
        """Decode greedily, or by what `generation` says."""
        inputs = self.inputs(document)
        out = self.model.generate(**inputs, **{"do_sample": False} | dict(generation))
        new = out[0, inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.decode(new, skip_special_tokens=True).strip()


@dataclass(frozen=True)
class Row:
    """One stored answer, read past the code under test."""

    file: str
    key: str
    cell: str
    doc_id: str
    text: str | None
    error: str | None
    record: dict[str, Any]
    written: float


def rows(folder: Path) -> list[Row]:
    """All rows of all answers files, in the order they were written."""
    found = []
    for path in sorted(folder.glob("*.sqlite")):
        with closing(sqlite3.connect(path)) as file:
            for key, cell, doc_id, text, error, record, written in file.execute(
                "SELECT key, cell, doc_id, text, error, record, written FROM answers ORDER BY rowid"
            ):
                values = (key, cell, doc_id, text, error, json.loads(record), written)
                found.append(Row(path.name, *values))
    return sorted(found, key=lambda row: row.written)


@contextmanager
def log() -> Iterator[list[str]]:
    """Collect what is logged, one "LEVEL words" an entry."""
    lines: list[str] = []
    sink = logger.add(lambda line: lines.append(str(line).rstrip("\n")), format="{level} {message}")
    try:
        yield lines
    finally:
        logger.remove(sink)


def sentence(caught: pytest.ExceptionInfo[BaseException]) -> str:
    """The words of an error, which must be one line and no more than a few."""
    words = str(caught.value)
    assert words
    assert "\n" not in words
    assert len(words) < 900
    return words


def refused(error: type[Exception] = ValueError, **settings: Any) -> str:
    """The one sentence with which the command line's settings are refused."""
    given = {"pretrained": str(default_checkpoint()), "method": "snapkv", "budget": 64, "window": 8}
    given |= settings
    with pytest.raises(error) as caught:
        Qwen2VLSparseMM(**{name: value for name, value in given.items() if value is not None})
    return sentence(caught)


def change_config(folder: Path, part: str | None = None, **changes: Any) -> None:
    """Edit config.json, or one of its parts."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    (config if part is None else config[part]).update(changes)
    path.write_text(json.dumps(config))
