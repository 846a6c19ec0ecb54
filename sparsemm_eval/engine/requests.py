"""One request, read: a document's messages to prompt and visuals, which are images and videos."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import takewhile
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
    context : str
        lmms-eval's text of the prompt; with candidates it may differ within a document.
    candidates : tuple of str or callable
        Answers to be scored, or what makes one of the document; none where one is generated.
    """

    task: str
    document: str
    documents: Any
    number: int
    messages: Callable[[Any], list[dict]]
    generation: Mapping[str, Any]
    context: str = ""
    candidates: tuple[str | Callable[[Any], str], ...] = ()

    @classmethod
    def of(cls, instance: Instance, datasets: Mapping[str, Any]) -> Request:
        """Read one of lmms-eval's instances, as a chat model gets them or, with candidates or
        under --force_simple, a simple one; data sets by task, then by split.
        """
        context, second, third, number, task, split = instance.args
        chat = isinstance(third, Mapping)
        return cls(
            task,
            f"{split} {number}",
            datasets[task][split],
            number,
            second if chat else partial(_user_turn, context, third),
            third if chat else second if isinstance(second, Mapping) else {},
            context,
        )

    @cached_property
    def place(self) -> tuple[str, ...] | None:
        """What tells it from others in any process; None where the data set cannot say."""
        mark = getattr(self.documents, "_fingerprint", None)
        if mark is None:
            return None
        # A candidate that the document makes is known by the document.
        given = [one if isinstance(one, str) else None for one in self.candidates]
        asked = [self.generation, self.context if given else "", given]
        settings = json.dumps(asked, sort_keys=True, default=str)
        return mark, self.document, self.task, settings

    def read(self, processor: ProcessorMixin, family: Family) -> Reading:
        """As `read_chat`.

        Code of others runs here on a document's data: the data set's, the task's, the chat
        template's, PIL's. Whatever it raises is about this sample.
        """
        document = self.documents[self.number]
        texts = [one if isinstance(one, str) else one(document) for one in self.candidates]
        return read_chat(processor, self.messages(document), family, texts)


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
    candidates : tuple of tuple of int
        Tokens of each answer that is to be scored.
    """

    prompt: str
    visuals: tuple[Visual, ...]
    hashes: tuple[str, ...]
    digest: str
    candidates: tuple[tuple[int, ...], ...] = ()


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
    candidates : tuple of tuple of int
        Tokens of each answer that is to be scored; none where one is generated.
    """

    task: str
    doc_id: str
    prompt: str
    visuals: tuple[Visual, ...]
    options: tuple[tuple[str, Any], ...]
    until: tuple[str, ...]
    parts: Mapping[str, Any]
    candidates: tuple[tuple[int, ...], ...] = ()


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


def with_candidates(
    instances: Iterable[Instance], datasets: Mapping[str, Any]
) -> list[tuple[Request, list[list[Instance]]]]:
    """Requests whose candidates are scored; of each, the instances of every candidate in turn.

    lmms-eval asks for candidates one by one. Those of one prompt are one request, which is read
    once; copies of an instance, as it makes them to repeat or to keep ranks in step, are alike.
    """
    groups: dict[tuple, dict[int, list[Instance]]] = {}
    for one in instances:
        context, _, _, number, task, split = one.args
        group = groups.setdefault((task, split, number, context), {})
        group.setdefault(one.idx, []).append(one)
    found = []
    for group in groups.values():
        alike = [group[place] for place in sorted(group)]
        texts = tuple(first.args[1] for first, *_ in alike)
        found.append((replace(Request.of(alike[0][0], datasets), candidates=texts), alike))
    return found


def read_chat(
    processor: ProcessorMixin,
    messages: list[dict],
    family: Family,
    candidates: Sequence[str] = (),
) -> Reading:
    """Messages through the chat template, and the visuals they show, in order, decoded; as a
    family's settings have them.

    Candidates are tokenized as the model's own answer to the messages: see `_candidate`.

    Raises
    ------
    UserError
        If there is a sound among them, a video and the family or the chat template has none, or a
        candidate that is no answer.
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
    tokens = tuple(_candidate(processor, chat, prompt, text) for text in candidates)
    return Reading(prompt, tuple(shown), tuple(hashes), digest, tokens)


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


def _user_turn(context: str, doc_to_visual: Callable[[Any], Any], document: Any) -> list[dict]:
    """A document as lmms-eval's simple models get it: what it shows, then the text."""
    from lmms_eval.api.task import ConfigurableMessagesTask

    return ConfigurableMessagesTask._build_user_turn(doc_to_visual(document), context)


def _candidate(
    processor: ProcessorMixin, chat: ChatMessages, prompt: str, text: str
) -> tuple[int, ...]:
    """Tokens of an answer that the model might give to a prompt.

    What stands between prompt and answer is the chat template's to say, so that the blanks around
    the text, such as a task's target_delimiter, are left out, and the answer is taken from where
    the template puts it as the assistant's turn; what closes the turn is not scored. Prompt and
    answer are tokenized jointly, since a tokenizer may write a word differently at the beginning of
    a text; only where a token would reach over the border is the answer tokenized by itself, as the
    prompt, which all candidates share, ends where the model itself begins to write.
    """
    text = text.strip()
    if not text:
        raise UserError(
            "a candidate is empty, and an answer without a token has no likelihood: leave it out "
            "of the task's choices"
        )
    turn = {"role": "assistant", "content": [{"type": "text", "text": text}]}
    whole = processor.apply_chat_template([*chat.to_hf_messages(), turn], tokenize=False)
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False))
    shared = sum(1 for _ in alike)
    rest, begin = prompt[shared:], whole.find(text, shared)
    between = whole[shared:begin]
    if begin >= 0 and between.startswith(rest):
        answer = between[len(rest) :] + text
    elif begin >= 0 and not (rest + between).strip():  # OneVision's has a blank more in a turn
        answer = text
    else:
        raise UserError(
            f"the chat template does not put the answer {short_repr(text)} as it is behind the "
            "prompt, so that it cannot be scored; mend its chat_template.jinja, or choose tasks "
            "of output_type generate_until"
        )
    own, both, alone = (
        processor.tokenizer(part, add_special_tokens=False)["input_ids"]
        for part in (prompt, prompt + answer, answer)
    )
    return tuple(both[len(own) :] if both[: len(own)] == own else alone)


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
