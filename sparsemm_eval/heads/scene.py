"""What heads are watched on: an image or a video, a question about it, where its answer stands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparsemm_eval.engine.requests import Visual, open_video
from sparsemm_eval.errors import UserError, one_line
from sparsemm_eval.families import Box, Family
from sparsemm_eval.heads.pages import read_image
from sparsemm_eval.tiny.documents import Split, draw_document, stream, value_question

# A drawn document of its own: neither a benchmark nor a chase shows it.
_SEED = 7_002


@dataclass(frozen=True, eq=False)
class Scene:
    """An image or a video, a question about it, and where its answer stands.

    Parameters
    ----------
    visual : Image or Video
        An image in RGB.
    question : str
        As the user asks it; the chat template goes around it.
    box : tuple or None
        Where the answer stands, (x0, y0, x1, y1) in pixels of the image, end exclusive.
    """

    visual: Visual
    question: str
    box: Box | None = None


def drawn_scene() -> Scene:
    """A drawn document and the question for the value in its middle."""
    document = draw_document(stream(Split.HELD_OUT, _SEED))
    question = value_question(document, len(document.entries) // 2)
    x0, y0, x1, y1 = zip(*document.boxes_of(question), strict=True)
    return Scene(document.image, question.prompt, (min(x0), min(y0), max(x1), max(y1)))


def read_scene(image: Path | None, question: str | None, box: str | None) -> Scene:
    """A scene from an image file; without one, the drawn document.

    Parameters
    ----------
    image : Path or None
        A file of any format that PIL reads.
    question : str or None
        What is asked about it.
    box : str or None
        Where the answer stands, such as "10,20,80,40": x0,y0,x1,y1 in pixels, end exclusive.

    Raises
    ------
    UserError
        If only a part of it is given, the image cannot be read, or the box is none.
    """
    if image is None:
        if question is not None or box is not None:
            raise UserError("a question or box without its image: give image=FILE too, or none")
        return drawn_scene()
    if question is None or not question.strip():
        raise UserError(f"image={image} has no question: give question=TEXT")
    place = None if box is None else _parse_box(box)
    return Scene(read_image(image, f"image={image}"), question, place)


def read_film(video: Path, question: str | None, family: Family) -> Scene:
    """A scene from a video file.

    Parameters
    ----------
    video : Path
        Its file.
    question : str or None
        What is asked about it.
    family : Family
        Whose frames are drawn.

    Raises
    ------
    UserError
        If there is no question, the family reads no videos, or the file cannot be decoded.
    """
    if question is None or not question.strip():
        raise UserError(f"video={video} has no question: give question=TEXT")
    try:
        return Scene(open_video(video, family), question)
    except (OSError, UserError, ValueError) as error:
        raise UserError(f"video={video}: {one_line(error)}") from error


def _parse_box(text: str) -> Box:
    try:
        x0, y0, x1, y1 = (float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"box={text!r}: it must be x0,y0,x1,y1 in pixels of the image") from error
    return x0, y0, x1, y1
