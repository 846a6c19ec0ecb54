"""lmms-eval's own models on a checkpoint, and ours: what each feeds the model, and answers.

``python tests/engine/stock_wrappers.py --samples 30`` compares them over six tasks on both embedded
checkpoints.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import typer
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.tasks import get_task_dict
from tabulate import tabulate

from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.lmms import SparseMM
from sparsemm_eval.engine.tasks import task_manager
from sparsemm_eval.tiny import embedded_checkpoints

# What reads videos in the stock models' modules; it need not be there for images.
_DECORD = ("VideoReader", "cpu")
# Module and class of the stock model that reads a checkpoint, and whether it takes chat messages.
STOCK = {
    "qwen2vl": ("lmms_eval.models.simple.qwen2_vl", "Qwen2_VL", False),
    "llava_next": ("lmms_eval.models.chat.llava_hf", "LlavaHf", True),
    "qwen2_5_vl": ("lmms_eval.models.chat.qwen2_5_vl", "Qwen2_5_VL", True),
}
TASKS = (
    "docvqa_mini", "ocrbench_mini", "textvqa_mini", "chartqa_mini", "textcaps_mini", "gqa_mini",
)  # fmt: skip


@dataclass
class Seen:
    """What a model was given and what it answered, a sample at each place.

    Parameters
    ----------
    inputs : list of dict
        The processor's output.
    new_tokens : list of int
        Limits of the answers.
    texts : list of str
        Answers.
    """

    inputs: list[dict[str, Any]] = field(default_factory=list)
    new_tokens: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)


@contextmanager
def without_videos() -> Iterator[None]:
    """An empty module in the place of decord, where it is not installed."""
    empty = ModuleType("decord")
    for name in _DECORD:
        setattr(empty, name, None)
    try:
        import_module("decord")
    except ImportError:
        sys.modules["decord"] = empty
    try:
        yield
    finally:
        if sys.modules.get("decord") is empty:
            del sys.modules["decord"]


def make_stock(name: str, folder: Path | None = None, **settings: Any) -> lmms:
    """A stock model on an embedded checkpoint or another folder, in float32 on the CPU."""
    module, kind, _ = STOCK[name]
    with without_videos():
        made = getattr(import_module(module), kind)
    folder = folder or embedded_checkpoints()[name]
    model = made(pretrained=str(folder), device="cpu", device_map="cpu", **settings)
    # It loads the checkpoint's own dtype, whose rounding would not tell equal inputs from others.
    model.model.float()
    return model


def instances(task: str, samples: int, chat: bool) -> tuple[list[Instance], Any]:
    """A task's first requests, with messages or as plain text and images, and its data."""
    tasks = get_task_dict([task], task_manager([task]), "chat" if chat else "simple")
    loaded = tasks[task]
    loaded.set_config(key="num_fewshot", value=0)
    loaded.build_all_requests(limit=samples)
    return loaded.instances, loaded.dataset


def ask_stock(model: lmms, requests: Sequence[Instance], datasets: Mapping[str, Any]) -> Seen:
    """Answer requests one by one through a stock model."""
    seen, generate = Seen(), model.model.generate
    chosen = {
        "input_ids", "attention_mask", "pixel_values", "image_grid_thw", "image_sizes",
        "pixel_values_videos", "video_grid_thw", "second_per_grid_ts",
    }  # fmt: skip

    def watched(**given: Any) -> torch.Tensor:
        seen.inputs.append({name: given[name] for name in chosen & set(given)})
        seen.new_tokens.append(given["max_new_tokens"])
        return generate(**given)

    model.model.generate = watched
    model.task_dict = dict(datasets)
    try:
        # One at a time: a stock model sorts its requests.
        for request in requests:
            (answer,) = model.generate_until([request])
            seen.texts.append((answer if isinstance(answer, str) else answer.text).strip())
    finally:
        model.model.generate = generate
    return seen


def ask_ours(model: SparseMM, requests: Sequence[Instance], datasets: Mapping[str, Any]) -> Seen:
    """Answer requests one by one through our model of one cell."""
    seen, runner = Seen(), model.runner
    read = runner.read_batch

    def watched(samples: Sequence[Any]) -> Any:
        inputs = read(samples)
        seen.inputs.append(dict(inputs))
        seen.new_tokens.append(dict(samples[0].options)["max_new_tokens"])
        return inputs

    runner.read_batch = watched
    model.task_dict = dict(datasets)
    try:
        for request in requests:
            (answer,) = model.generate_until([request])
            seen.texts.append(answer.text)
    finally:
        runner.read_batch = read
    return seen


def unlike(ours: Mapping[str, Any], stock: Mapping[str, Any]) -> list[str]:
    """Names of the inputs that differ in anything; there is at least one that is compared."""
    assert "input_ids" in stock
    return [
        name
        for name, value in stock.items()
        if value is not None and not torch.equal(torch.as_tensor(value), ours[name])
    ]


def main(samples: int = 10, protocol: str = "lmms-eval", answers: Path = Path("stock")) -> None:
    """Compare answers and inputs, sample by sample."""
    rows = []
    for name in embedded_checkpoints():
        checkpoint = Checkpoint(f"embedded:{name}", dtype="float32")
        given = {"checkpoint": checkpoint, "method": "fullkv", "protocol": protocol}
        ours = SparseMM(**given, answers=answers / name)
        stock = make_stock(name)
        for task in TASKS:
            chat, data = instances(task, samples, chat=True)
            mine = ask_ours(ours, chat, {task: data})
            own, data = instances(task, samples, STOCK[name][2])
            theirs = ask_stock(stock, own, {task: data})
            pairs = list(zip(mine.inputs, theirs.inputs, strict=True))
            rows.append(
                (
                    name,
                    task,
                    len(pairs),
                    sum(not unlike(*pair) for pair in pairs),
                    sum(a == b for a, b in zip(mine.texts, theirs.texts, strict=True)),
                )
            )
            print(*rows[-1], flush=True)
    print(tabulate(rows, ["checkpoint", "task", "samples", "inputs equal", "answers equal"]))


if __name__ == "__main__":
    typer.run(main)
