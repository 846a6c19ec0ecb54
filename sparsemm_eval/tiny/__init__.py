"""The embedded default: a tiny trained model that reads, and the pages it reads."""

from __future__ import annotations

from pathlib import Path

__all__ = ["default_checkpoint"]


def default_checkpoint() -> Path:
    """Return the folder of the trained tiny Qwen2-VL that ships with the package.

    Returns
    -------
    pathlib.Path
        A folder for ``from_pretrained``; it holds model, processor and model card.
    """
    return Path(__file__).resolve().parent / "qwen2vl"
