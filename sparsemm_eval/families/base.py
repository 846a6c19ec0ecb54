"""What a model family is: all that is particular to the checkpoints of one model_type."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from io import BytesIO
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from sparsemm_eval.errors import UserError, check_int

if TYPE_CHECKING:  # families are asked for their settings before anything heavy is there
    from PIL.Image import Image
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel, ProcessorMixin

# The protocol of a run that names none: the task's messages and images as they are.
PLAIN = "plain"
Box = tuple[float, float, float, float]
IMAGE_TOKENS = ("all", "tiles")


@dataclass(frozen=True)
class Family:
    """A model family; one file each, registered by `sparsemm_eval.families.register_family`.

    A subclass is a frozen dataclass. Its fields are settings of ``--model_args`` and of a grid's
    models, each with a default; they decide answers, and stand in their keys. Its own
    ``__post_init__``, if it has one, calls this one.

    Parameters
    ----------
    system_prompt : str, optional
        A turn before messages that have none of the system's.
    jpeg_quality : int, optional
        1 to 100; images go through JPEG of this quality, in RGB.
    max_new_tokens : int, optional
        The limit where a task sets none.

    Raises
    ------
    UserError
        For a value that cannot be.
    """

    system_prompt: str | None = None
    jpeg_quality: int | None = None
    max_new_tokens: int | None = None

    model_type: ClassVar[str]
    """As the checkpoint's config.json has it, such as ``qwen2_vl``."""

    lmms_name: ClassVar[str]
    """What its answers and results are named by, such as ``qwen2vl_sparsemm``."""

    regions: ClassVar[type[Regions] | None] = None
    """Where image tokens lie; without it only chasing by OCR and drawing are missing."""

    protocols: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Settings by the name of a protocol: how another program feeds these checkpoints."""

    reading: ClassVar[tuple[str, ...]] = ("system_prompt", "jpeg_quality", "max_new_tokens")
    """Settings that change prompt, images or generation settings, which a key holds anyway."""

    def __post_init__(self) -> None:
        prompt, quality = self.system_prompt, self.jpeg_quality
        if prompt is not None and not isinstance(prompt, str):
            raise UserError(f"system_prompt={prompt!r}: it must be text")
        if quality is not None:
            check_int("jpeg_quality", quality, least=1)
            if quality > 100:
                raise UserError(f"jpeg_quality={quality}: it must be an integer from 1 to 100")
        if self.max_new_tokens is not None:
            check_int("max_new_tokens", self.max_new_tokens, least=1)

    @classmethod
    def under(cls, protocol: str = PLAIN, **given: Any) -> Family:
        """The family with the settings of a protocol; those that are given win.

        Raises
        ------
        UserError
            For an unknown protocol, or a value that cannot be.
        """
        known = (PLAIN, *cls.protocols)
        if protocol not in known:
            raise UserError(
                f"protocol={protocol!r}: for a {cls.model_type} checkpoint it must be one of "
                f"{', '.join(known)}"
            )
        return cls(**{**cls.protocols.get(protocol, {}), **given})

    @property
    def settings(self) -> dict[str, Any]:
        """Settings by name, those that are not given too."""
        return asdict(self)

    @property
    def keyed(self) -> dict[str, Any]:
        """Settings that an answer's key needs beside its prompt, images and generation settings."""
        return {name: value for name, value in self.settings.items() if name not in self.reading}

    @classmethod
    def setting_names(cls) -> list[str]:
        """Names of the family's settings."""
        return [field.name for field in fields(cls)]

    @classmethod
    def check(cls, config: PreTrainedConfig) -> None:
        """Refuse a checkpoint that cannot be run, by its config.

        Raises
        ------
        UserError
            In one sentence.
        """

    def configure(self, processor: ProcessorMixin) -> ProcessorMixin:
        """Apply the settings to a copy of a processor, which other cells share; or return it."""
        return processor

    def read_messages(self, messages: list[dict]) -> list[dict]:
        """A task's chat messages as the model is to get them."""
        if not self.system_prompt or any(message["role"] == "system" for message in messages):
            return messages
        content = [{"type": "text", "text": self.system_prompt}]
        return [{"role": "system", "content": content}, *messages]

    def read_image(self, image: Image, processor: ProcessorMixin) -> Image:
        """An image as the processor, by `configure`, is to get it."""
        if self.jpeg_quality is None:
            return image
        from PIL.Image import open as open_image

        file = BytesIO()
        image.convert("RGB").save(file, "JPEG", quality=self.jpeg_quality)
        read = open_image(file)
        read.load()
        return read

    @classmethod
    def arrange_images(cls, images: Sequence[Sequence[Image]]) -> list | None:
        """The images of each prompt of a batch, as the processor takes them.

        By default one list of all, in the order of the prompts.

        Returns
        -------
        list or None
            None where no prompt has any.
        """
        return [image for of_prompt in images for image in of_prompt] or None

    @classmethod
    def visual_tokens(cls, config: PreTrainedConfig) -> list[int]:
        """Ids that stand for images and videos in a prompt.

        By default those that a config of transformers names so; none in a model of text alone.
        """
        named = (getattr(config, f"{what}_token_id", None) for what in ("image", "video"))
        return [token for token in named if token is not None]

    @classmethod
    def rope_delta(cls, model: PreTrainedModel) -> Tensor | None:
        """How far text positions lag behind tokens after the prompts that were just read.

        By default what a model of transformers with threefold positions remembers of its prompts.

        Returns
        -------
        Tensor or None
            [samples, 1]; None where a token's position is its place among the prompt's.
        """
        return getattr(model.model, "rope_deltas", None)

    @classmethod
    def text_positions(cls, model: PreTrainedModel, positions: Tensor) -> Tensor:
        """Positions of one text token a row [rows, 1], as the model's forward takes them.

        By default [3, rows, 1] (time, height and width, alike for text) for a model of transformers
        with threefold positions, and as they are for any other.
        """
        threefold = hasattr(model.model, "rope_deltas")
        return positions.expand(3, -1, -1) if threefold else positions

    @classmethod
    def step_logits(cls, model: PreTrainedModel, ids: Tensor, **given: Any) -> Tensor:
        """Logits [rows, vocabulary] behind one text token a row, ids [rows, 1].

        Where they are no more than `decoder_logits`, a family may say so: a step on a CPU is a
        tenth faster without the model's look for images.
        """
        return model(input_ids=ids, **given, logits_to_keep=1).logits[:, -1]


@dataclass(frozen=True)
class VideoFamily(Family):
    """A family that reads videos too, each as frames drawn evenly from it.

    Parameters
    ----------
    frames : int
        How many are drawn; 32 as by default in lmms-eval's models of these families.
    """

    reading: ClassVar[tuple[str, ...]] = (*Family.reading, "frames")

    video_regions: ClassVar[type[SheetRegions] | None] = None
    """Where a video's tokens lie on its frames; without it only drawing them is missing."""

    frames: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("frames", self.frames, least=1)

    def frame_places(self, count: int) -> np.ndarray:
        """Numbers of the frames that are drawn from so many, ascending [drawn].

        By default always `frames`, in equal steps from the first to the last: of a short video some
        are drawn more than once.
        """
        return np.linspace(0, count - 1, self.frames, dtype=int)


def decoder_logits(model: PreTrainedModel, ids: Tensor, **given: Any) -> Tensor:
    """The language model and its head on text tokens: `Family.step_logits` without detours."""
    embedded = model.get_input_embeddings()(ids)
    hidden = model.model.language_model(inputs_embeds=embedded, **given)[0]
    return model.lm_head(hidden[:, -1])


@dataclass(frozen=True)
class Regions(ABC):
    """Where the tokens of one image lie on it.

    Parameters
    ----------
    width, height : int
        Of the image as it was given, in pixels.
    image_tokens : {"all", "tiles"}
        Whether a box is looked for in all tokens, or in those of tiles only, as published code
        does; the same thing where a family has no tokens of the whole image beside its tiles.
    """

    shown: ClassVar[str] = "image"
    """What is shown, in a word."""

    width: int
    height: int
    image_tokens: str = "all"

    @classmethod
    @abstractmethod
    def read(
        cls,
        config: PreTrainedConfig,
        processor: ProcessorMixin,
        inputs: Mapping[str, Tensor],
        index: int,
        size: tuple[int, int],
        image_tokens: str,
    ) -> Regions:
        """Regions of image or video `index` in a processor's output, by its width and height."""

    @property
    @abstractmethod
    def boxes(self) -> np.ndarray:
        """[count, 4]: what each token covers in the image's pixels; NaN where it covers nothing."""

    @property
    @abstractmethod
    def parts(self) -> np.ndarray:
        """[count] of str: "base" (of the whole image, squashed), "tile" or "newline"."""

    @property
    def count(self) -> int:
        """Image tokens this image has in the prompt."""
        return len(self.parts)

    def tokens(self, box: Box) -> np.ndarray:
        """Indices, among this image's tokens, of those whose region overlaps a box, ascending.

        Parameters
        ----------
        box : tuple
            (x0, y0, x1, y1) in pixels of the image as it was given, end exclusive.

        Returns
        -------
        ndarray
            Of int. It may be empty with ``image_tokens="tiles"``: LLaVA-NeXT's unpadding cuts
            away up to half a patch at the image's edges.

        Raises
        ------
        UserError
            If the box is empty or not within the image.
        """
        x0, y0, x1, y1 = box
        if not (0 <= x0 < x1 <= self.width and 0 <= y0 < y1 <= self.height):
            raise UserError(
                f"box {box} is empty or outside its image of {self.width}x{self.height} pixels"
            )
        left, top, right, bottom = self.boxes.T
        overlap = (left < x1) & (x0 < right) & (top < y1) & (y0 < bottom)
        if self.image_tokens == "tiles":
            overlap &= self.parts != "base"
        return overlap.nonzero()[0]


@dataclass(frozen=True, eq=False, kw_only=True)
class SheetRegions(Regions):
    """Where the tokens of a video lie on a sheet of its frames, row by row, about square.

    Where a token is made of more than one frame, the sheet has the first of them.

    Parameters
    ----------
    frame : ndarray
        [tokens of a frame, 4]: what each covers in the frame's pixels.
    steps : int
        Frames on the sheet.
    newlines : int
        Tokens behind all frames that cover nothing.
    """

    shown: ClassVar[str] = "video"

    frame: np.ndarray
    steps: int
    newlines: int = 0

    @classmethod
    def of_frames(
        cls, size: tuple[int, int], image_tokens: str, frame: np.ndarray, steps: int,
        newlines: int = 0,
    ) -> SheetRegions:  # fmt: skip
        """Lay out frames of a width and height."""
        columns = math.ceil(math.sqrt(steps))
        sides = size[0] * columns, size[1] * math.ceil(steps / columns)
        return cls(*sides, image_tokens, frame=frame, steps=steps, newlines=newlines)

    @property
    def corners(self) -> np.ndarray:
        """[steps, 2]: x and y of each frame's upper left corner on the sheet."""
        columns = math.ceil(math.sqrt(self.steps))
        rows = math.ceil(self.steps / columns)
        place = np.arange(self.steps)
        width, height = self.width // columns, self.height // rows
        return np.stack([place % columns * width, place // columns * height], 1)

    @property
    def boxes(self) -> np.ndarray:
        on_sheet = self.frame + np.tile(self.corners, 2)[:, None]
        return np.concatenate([on_sheet.reshape(-1, 4), np.full((self.newlines, 4), np.nan)])

    @property
    def parts(self) -> np.ndarray:
        return np.repeat(["tile", "newline"], [self.steps * len(self.frame), self.newlines])


def grid_boxes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Boxes between grid lines, row by row, [rows * columns, 4]."""
    return cell_boxes(x[:-1], x[1:], y[:-1], y[1:]).reshape(-1, 4)


def cell_boxes(
    left: np.ndarray, right: np.ndarray, top: np.ndarray, bottom: np.ndarray
) -> np.ndarray:
    """Boxes of all rows and columns, [rows, columns, 4]."""
    rows, columns = len(top), len(left)
    sides = (left, top[:, None], right, bottom[:, None])
    return np.stack([np.broadcast_to(side, (rows, columns)) for side in sides], -1)
