"""Image box to image tokens, per model family."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Qwen2VLRegions:
    """Regions of one image under Qwen2-VL: a grid of merged patches, row by row.

    Parameters
    ----------
    rows, columns : int
        Image tokens in each direction.
    width, height : int
        Of the image as it was given, in pixels.
    """

    rows: int
    columns: int
    width: int
    height: int

    def tokens(self, box: Box) -> np.ndarray:
        """Indices, among this image's tokens, of those whose region overlaps a box.

        Parameters
        ----------
        box : tuple
            (x0, y0, x1, y1) in pixels of the image as it was given, end exclusive.

        Raises
        ------
        ValueError
            If the box is empty or not within the image.
        """
        x0, y0, x1, y1 = box
        if not (0 <= x0 < x1 <= self.width and 0 <= y0 < y1 <= self.height):
            raise ValueError(
                f"box {box} is empty or outside its image of {self.width}x{self.height} pixels"
            )
        left, right = _span(x0, x1, self.columns / self.width)
        top, bottom = _span(y0, y1, self.rows / self.height)
        rows, columns = np.mgrid[top:bottom, left:right]
        return (rows * self.columns + columns).ravel()


def _span(start: float, stop: float, scale: float) -> tuple[int, int]:
    return int(np.floor(start * scale)), int(np.ceil(stop * scale))
