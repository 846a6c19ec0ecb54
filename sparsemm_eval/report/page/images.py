"""Images as part of a page: small, and each once."""

from __future__ import annotations

import io
from base64 import b64encode

from PIL import Image

LONGEST_SIDE = 384  # pixels
_QUALITY = 60  # text stays legible


class Images:
    """Images of a page, equal ones kept once.

    Attributes
    ----------
    kept : list of tuple
        (data URI, width, height) of each, in pixels.
    """

    def __init__(self) -> None:
        self.kept: list[tuple[str, int, int]] = []
        self._places: dict[str, int] = {}

    def add(self, image: Image.Image) -> int:
        """Take an image in, and return its place in `kept`."""
        image = _small(image)
        uri = _data_uri(image)
        if uri not in self._places:
            self._places[uri] = len(self.kept)
            self.kept.append((uri, *image.size))
        return self._places[uri]


def _small(image: Image.Image) -> Image.Image:
    """In plain colours or greys, its longest side at most `LONGEST_SIDE`."""
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")  # what is transparent is read on white
        image = Image.alpha_composite(paper, image).convert("RGB")
    longest = max(image.size)
    if longest <= LONGEST_SIDE:
        return image
    size = tuple(max(1, round(side * LONGEST_SIDE / longest)) for side in image.size)
    return image.resize(size, Image.Resampling.LANCZOS)


def _data_uri(image: Image.Image) -> str:
    """As WebP or PNG, whichever is smaller."""
    forms = {"webp": {"quality": _QUALITY, "method": 4}, "png": {}}
    files = {}
    for form, options in forms.items():
        file = io.BytesIO()
        image.save(file, form, **options)
        files[form] = file.getvalue()
    form = min(files, key=lambda name: len(files[name]))
    return f"data:image/{form};base64,{b64encode(files[form]).decode('ascii')}"
