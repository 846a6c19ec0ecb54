"""The embedded default: tiny trained models that read, and the pages they read."""

from __future__ import annotations

from pathlib import Path

__all__ = ["default_checkpoint", "embedded_checkpoints"]


def default_checkpoint() -> Path:
    """Return the folder of the trained tiny Qwen2-VL that ships with the package.

    Returns
    -------
    pathlib.Path
        A folder for ``from_pretrained``; it holds model, processor and model card.
    """
    return embedded_checkpoints()["qwen2vl"]


def embedded_checkpoints() -> dict[str, Path]:
    """Return the folders of all trained tiny models by name, the default first.

    Returns
    -------
    dict of str to pathlib.Path
        ``qwen2vl`` and ``llava_next``.
    """
    here = Path(__file__).resolve().parent
    return {name: here / name for name in ("qwen2vl", "llava_next")}
