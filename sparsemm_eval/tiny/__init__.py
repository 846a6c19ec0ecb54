"""The embedded default: tiny trained models that read, and the pages they read."""

from __future__ import annotations

from pathlib import Path

from sparsemm_eval.choices import EMBEDDED
from sparsemm_eval.errors import UserError

__all__ = ["EMBEDDED", "default_checkpoint", "embedded_checkpoints", "find_checkpoint"]


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


def find_checkpoint(name: str) -> str:
    """Return the folder that ``embedded:NAME`` stands for; any other name as it is.

    Parameters
    ----------
    name : str
        ``embedded:qwen2vl``, ``embedded:llava_next``, a folder or a hub repository.

    Raises
    ------
    UserError
        If no checkpoint of this name ships with the package.
    """
    if not name.startswith(EMBEDDED):
        return name
    known = {f"{EMBEDDED}{own}": str(folder) for own, folder in embedded_checkpoints().items()}
    if name not in known:
        raise UserError(f"pretrained={name!r}: it must be one of {', '.join(known)}")
    return known[name]
