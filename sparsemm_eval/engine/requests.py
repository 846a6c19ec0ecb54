"""One request, read: a document's messages to prompt and visuals, which are images and videos."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageFile

from sparsemm_eval.engine.videos import Video, check_regular, read_video
from sparsemm_eval.errors import UserError, one_line, short_repr
from sparsemm_eval.families import Family, VideoFamily, video_families

if TYPE_CHECKING:  # images are read, and refused, before anything heavy is there
    from lmms_eval.api.instance import Instance
    from lmms_eval.protocol import ChatMessages, ChatVideoContent
    from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

Visual = Image.Image | Video


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

    def read(self, processor: ProcessorMixin, family: Family) -> Reading:
        """As `read_chat`.

        Code of others runs here on a document's data: the data set's, the task's, the chat
        template's, PIL's. Whatever it raises is about this sample.
        """
        return read_chat(processor, self.messages(self.documents[self.number]), family)


@dataclass(frozen=True, eq=False)
class Reading:
    """A document as a model is to read it.

    Parameters
    ----------
    prompt : str
        Through the chat template, placeholders of visuals included.
    visuals : tuple of Image or Video
        In the order of their placeholders.
    hashes : tuple of str
        `image_hash` or `Video.hash` of each.
    digest : str
        SHA-256 of what the document shows and asks, before any setting of a model's: alike for
        every checkpoint, family and protocol, and for calibration and evaluation.
    """

    prompt: str
    visuals: tuple[Visual, ...]
    hashes: tuple[str, ...]
    digest: str


@dataclass(frozen=True, eq=False)
class Sample:
    """One request, ready for the model.

    Parameters
    ----------
    task, doc_id : str
        Where it is from.
    prompt : str
        Through the chat template, placeholders of visuals included.
    visuals : tuple of Image or Video
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
    visuals: tuple[Visual, ...]
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
        self._known: dict[tuple[str, ...], tuple[Mapping[str, Any], str]] = {}

    def find(self, request: Request) -> tuple[Mapping[str, Any], str] | None:
        """Parts and digest of a sample that was read before, or None."""
        return self._known.get(request.place)

    def keep(self, request: Request, parts: Mapping[str, Any], digest: str) -> None:
        """Remember a sample's parts, and its document's digest."""
        if request.place is not None:
            self._known[request.place] = parts, digest


def read_chat(processor: ProcessorMixin, messages: list[dict], family: Family) -> Reading:
    """Messages through the chat template, and the visuals they show, in order, decoded; as a
    family's settings have them.

    Raises
    ------
    UserError
        If there is a sound among them, or a video and the family or the chat template has none.
    """
    from lmms_eval.protocol import ChatMessages

    chat = ChatMessages(messages=family.read_messages(messages))
    contents = [content for message in chat.messages for content in message.content]
    if any(content.type == "audio" for content in contents):
        raise UserError("images, videos and text are read, no sound: choose tasks without it")
    shown: list[Visual] = []
    own, hashes = [], []  # as the document has it, and as the model gets it
    for content in contents:
        if content.type == "video":
            video = _shown_video(content, family)
            shown.append(video)
            own.append(video.source)
            hashes.append(video.hash())
        elif content.type == "image":
            url = content.url
            image = url if isinstance(url, Image.Image) else open_image(Path(url)).convert("RGB")
            image.load()  # some are decoded on first use only: a broken one is to be found here
            shown.append(family.read_image(image, processor))
            own.append(image_hash(image))
            hashes.append(own[-1] if shown[-1] is image else image_hash(shown[-1]))
    asked = [
        content.text
        for message in ChatMessages(messages=messages).messages
        for content in message.content
        if content.type == "text"
    ]
    digest = hashlib.sha256(json.dumps([asked, own]).encode()).hexdigest()
    prompt = _prompt(processor, chat)
    videos = sum(isinstance(one, Video) for one in shown)
    if videos and prompt.count(processor.video_token) < videos:
        raise UserError(
            "a video is shown, and the checkpoint's chat template leaves it out: mend its "
            "chat_template.jinja, or choose tasks without videos"
        )
    return Reading(prompt, tuple(shown), tuple(hashes), digest)


def open_video(
    path: Path, family: Family, start: float | None = None, end: float | None = None
) -> Video:
    """A video file, or a part of it, as a family draws frames from it.

    Raises
    ------
    UserError
        If the family reads no videos; naming those that do.
    OSError, ValueError
        As `read_video`.
    """
    check_reads_videos(type(family))
    return read_video(path, family.frame_places, start, end)


def check_reads_videos(family: type[Family]) -> None:
    """Raise UserError if a family reads no videos, naming those that do."""
    if not issubclass(family, VideoFamily):
        raise UserError(
            f"a video is shown, and of a {family.model_type} model only images and text are read: "
            f"choose tasks without videos, or a model of {', '.join(video_families())}"
        )


def _shown_video(content: ChatVideoContent, family: Family) -> Video:
    place, start, end = content.url, content.start_time, content.end_time
    if isinstance(place, Mapping):  # lmms-eval leaves a visual of a task as it is if it has times
        start, end = place.get("video_start", start), place.get("video_end", end)
        place = place.get("url") or place.get("path")
    if not isinstance(place, str | Path):
        raise ValueError(f"a video is given as {type(place).__name__}, and not as a path")
    return open_video(Path(place), family, start, end)


def model_inputs(
    processor: ProcessorMixin,
    family: type[Family] | Family,
    prompts: Sequence[str],
    visuals: Sequence[Sequence[Visual]],
) -> BatchFeature:
    """Prompts and the visuals of each through the processor, padded on the left.

    Parameters
    ----------
    processor : ProcessorMixin
        The checkpoint's.
    family : Family
        The checkpoint's, whose processor may take images in a way of its own.
    prompts : sequence of str
        Through the chat template.
    visuals : sequence of sequence of Image or Video
        Those of each prompt; none of one of text alone.
    """
    bos = processor.tokenizer.bos_token
    images = [
        [visual for visual in of_prompt if not isinstance(visual, Video)] for of_prompt in visuals
    ]
    videos = [visual for of_prompt in visuals for visual in of_prompt if isinstance(visual, Video)]
    given: dict[str, Any] = {"images": family.arrange_images(images)}
    if videos:
        given["videos"] = [video.frames for video in videos]
        given["video_metadata"] = [video.metadata for video in videos]
        given["do_sample_frames"] = False
    return processor(
        text=list(prompts),
        **given,
        padding=True,
        return_tensors="pt",
        # Some templates write it themselves.
        add_special_tokens=not (bos and prompts[0].startswith(bos)),
    )


def to_model(inputs: BatchFeature, model: PreTrainedModel) -> BatchFeature:
    """A processor's output where a model lies, pixels in its dtype.

    Pixels alone: the seconds between a video's frames, of which positions are made, stay exact.
    """
    inputs = inputs.to(model.device)
    for name in [name for name in inputs if name.startswith("pixel_values")]:
        inputs[name] = inputs[name].to(model.dtype)
    return inputs


def open_image(path: Path) -> Image.Image:
    """As PIL opens it, a regular file alone."""
    check_regular(path)
    return Image.open(path)


def _prompt(processor: ProcessorMixin, chat: ChatMessages) -> str:
    return processor.apply_chat_template(
        chat.to_hf_messages(), tokenize=False, add_generation_prompt=True
    )


def check_template(processor: ProcessorMixin, pretrained: str, family: Family) -> None:
    """Try the chat template once, on a question about one image.

    Raises
    ------
    UserError
        If it raises, or leaves out the question or a system prompt: it would for every sample.
    """
    from lmms_eval.protocol import ChatMessages

    question = "What is it?"
    content = [{"type": "image", "url": Image.new("RGB", (8, 8))}]
    content.append({"type": "text", "text": question})
    try:
        chat = ChatMessages(messages=family.read_messages([{"role": "user", "content": content}]))
        prompt = _prompt(processor, chat)
    except Exception as error:  # a template is the checkpoint's code, and raises what it likes
        raise UserError(
            f"pretrained={pretrained}: its chat template fails on a question about one image "
            f"({type(error).__name__}: {one_line(error)}); mend its chat_template.jinja"
        ) from error
    if question not in prompt:
        raise UserError(
            f"pretrained={pretrained}: its chat template leaves out the question of a chat; mend "
            "its chat_template.jinja"
        )
    if (family.system_prompt or "").strip() not in prompt:
        raise UserError(
            f"system_prompt={short_repr(family.system_prompt)}: the chat template of {pretrained} "
            "leaves it out; mend its chat_template.jinja, or give system_prompt= without text"
        )


@contextmanager
def truncated_images(allowed: bool) -> Iterator[None]:
    """Whether images whose files are cut off are read, and filled up in grey, or are an error.

    It is a switch of PIL's for the whole process, which lmms-eval turns on as it is imported; it is
    put back as it was.
    """
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = allowed
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


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
