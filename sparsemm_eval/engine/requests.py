"""One request, read: messages to prompt and images, a task's settings to transformers' options."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.protocol import ChatMessages
from PIL import Image
from transformers import ProcessorMixin

from sparsemm_eval.errors import UserError

DEFAULT_NEW_TOKENS = 1024
# What one sample may raise while it is processed or generated, by what its data does. Everything
# else, such as a TypeError, is an error of this program and ends the run.
SAMPLE_ERRORS = (
    ArithmeticError,
    Image.DecompressionBombError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,  # PIL's word for a broken PNG
    ValueError,
)
# While it is read a task's own code runs, which may stumble over what a document lacks.
READING_ERRORS = (*SAMPLE_ERRORS, TypeError)
_GENERATION = {
    "do_sample", "max_new_tokens", "min_new_tokens", "num_beams", "repetition_penalty",
    "temperature", "top_k", "top_p",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Request:
    """What lmms-eval asks of a document, not read yet.

    Parameters
    ----------
    task : str
        Name of the task.
    document : str
        "split number" of the document.
    documents : object
        The data set, by number.
    number : int
        Of the document.
    messages : callable
        The task's own way from a document to chat messages.
    generation : mapping
        The task's generation_kwargs.
    """

    task: str
    document: str
    documents: Any
    number: int
    messages: Callable[[Any], list[dict]]
    generation: Mapping[str, Any]

    @classmethod
    def of(cls, instance: Instance, datasets: Mapping[str, Any]) -> Request:
        """Read one of lmms-eval's instances; data sets by task, then by split."""
        _, messages, generation, number, task, split = instance.args
        documents = datasets[task][split]
        return cls(task, f"{split} {number}", documents, number, messages, generation)

    @cached_property
    def place(self) -> tuple[str, ...] | None:
        """What tells it from others in any process; None where the data set cannot say."""
        mark = getattr(self.documents, "_fingerprint", None)
        if mark is None:
            return None
        settings = json.dumps(self.generation, sort_keys=True, default=str)
        return mark, self.document, self.task, settings

    def read(self, processor: ProcessorMixin) -> tuple[str, tuple[Image.Image, ...]]:
        """Prompt and images, as `read_chat`."""
        return read_chat(processor, self.messages(self.documents[self.number]))


@dataclass(frozen=True, eq=False)
class Sample:
    """One request, ready for the model.

    Parameters
    ----------
    task, doc_id : str
        Where it is from.
    prompt : str
        Through the chat template, image placeholders included.
    images : tuple of Image
        In the order of their placeholders.
    options : tuple
        Generation settings, sorted (name, value) pairs; equal ones share a batch.
    until : tuple of str
        The answer ends before any of these.
    parts : mapping
        What the keys of its answers are made of, beside the cell.
    """

    task: str
    doc_id: str
    prompt: str
    images: tuple[Image.Image, ...]
    options: tuple[tuple[str, Any], ...]
    until: tuple[str, ...]
    parts: Mapping[str, Any]


class Memo:
    """What answers are keyed by, sample by sample, so that cells that are scored one by one read
    each only once.

    Kept for data sets that state by a fingerprint what is in them, as those of ``datasets`` do; a
    set that was loaded anew is known again by it.
    """

    def __init__(self) -> None:
        self._parts: dict[tuple[str, ...], Mapping[str, Any]] = {}

    def find(self, request: Request) -> Mapping[str, Any] | None:
        """Parts of a sample that was read before, or None."""
        return self._parts.get(request.place)

    def keep(self, request: Request, parts: Mapping[str, Any]) -> None:
        """Remember a sample's parts."""
        if request.place is not None:
            self._parts[request.place] = parts


def read_chat(
    processor: ProcessorMixin, messages: list[dict]
) -> tuple[str, tuple[Image.Image, ...]]:
    """Messages through the chat template, and the images they show, in order.

    Raises
    ------
    ValueError
        If there is a video or a sound among them.
    """
    chat = ChatMessages(messages=messages)
    urls, videos, sounds = chat.extract_media()
    if videos or sounds:
        raise UserError("images and text are read, no video or sound: choose tasks without them")
    images = tuple(
        url if isinstance(url, Image.Image) else Image.open(url).convert("RGB") for url in urls
    )
    prompt = processor.apply_chat_template(
        chat.to_hf_messages(), tokenize=False, add_generation_prompt=True
    )
    return prompt, images


def generation_options(
    gen_kwargs: Mapping[str, Any],
) -> tuple[tuple[tuple[str, Any], ...], tuple[str, ...]]:
    """A task's generation_kwargs as transformers' options, and the strings that end an answer.

    Greedy unless the task asks for a temperature above 0; 1,024 new tokens unless it says less,
    as lmms-eval's own models do.

    Raises
    ------
    ValueError
        If max_new_tokens is no positive integer.
    """
    until = gen_kwargs.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    options = {name: value for name, value in gen_kwargs.items() if name in _GENERATION}
    if options.get("max_new_tokens") is None:
        options["max_new_tokens"] = DEFAULT_NEW_TOKENS
    options["max_new_tokens"] = positive_int("max_new_tokens", options["max_new_tokens"])
    if (options.get("temperature") or 0) > 0:
        options["do_sample"] = True
    else:
        # None takes a default of the checkpoint's own generation_config out of force.
        options |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return tuple(sorted(options.items())), until


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of the strings that end it."""
    for end in until:
        if end:
            text = text.split(end)[0]
    return text


def positive_int(name: str, value: Any) -> int:
    text = str(value)
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{name}={value!r}: it must be an integer of at least 1")
    return int(text)


def image_hash(image: Image.Image) -> str:
    digest = hashlib.sha256(f"{image.mode} {image.size} ".encode())
    digest.update(image.tobytes())
    digest.update(bytes(image.getpalette() or ()))
    return digest.hexdigest()
