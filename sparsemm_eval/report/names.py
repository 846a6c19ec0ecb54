"""What models and methods are called in the paper."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

# The paper's names, in its order; methods of one's own follow by name.
METHOD_NAMES = {
    "fullkv": "FullKV",
    "sparsemm": "SparseMM",
    "snapkv": "SnapKV",
    "pyramidkv": "PyramidKV",
    "adakv": "AdaKV",
    "random": "Random",
    "local": "Local",
    "streaming": "StreamingLLM",
}

# The paper's models, in its order.
MODEL_NAMES = ("LLaVA-NeXT-Vicuna-7B", "LLaVA-NeXT-Mistral-7B", "Qwen2-VL-7B-Instruct")

# By the last part of a folder or hub repository, in lower case.
_MODELS = {
    "llava-v1.6-vicuna-7b": MODEL_NAMES[0],
    "llava-v1.6-vicuna-7b-hf": MODEL_NAMES[0],
    "llava-v1.6-mistral-7b": MODEL_NAMES[1],
    "llava-v1.6-mistral-7b-hf": MODEL_NAMES[1],
    **{name.lower(): name for name in MODEL_NAMES},
}

# What a setting is where a results file does not state it, as `sparsemm_eval.methods` has it.
DEFAULTS: Mapping[str, Any] = {
    "window": 32,
    "kernel_size": 5,
    "pooling": "avg",
    "group_reduction": "mean",
    "ratio": 0.1,
    "floor": 0.2,
    "allocation": "paper",
    "seed": 0,
    "sinks": 4,
}


def paper_model(name: str) -> str | None:
    """The paper's name of a model; None if it is none of the paper's.

    Parameters
    ----------
    name : str
        A hub repository, a folder, or a name of one's own.
    """
    return _MODELS.get(last_part(name).lower())


def last_part(name: str) -> str:
    """The name of a checkpoint: a repository's or folder's last part, also in the hub's cache."""
    name = name.removeprefix("embedded:")
    parts = [part for part in PurePosixPath(name).parts if part != "/"]
    cached = [part for part in parts if part.startswith("models--")]
    return cached[-1].rpartition("--")[2] if cached else parts[-1] if parts else name


def method_label(method: str, settings: Mapping[str, Any]) -> str:
    """A method's name in tables, with the settings that tell it apart.

    >>> method_label("sparsemm", {"ratio": 0.2})
    'SparseMM (ratio=0.2)'
    """
    name = METHOD_NAMES.get(method, method)
    words = ", ".join(f"{key}={_word(value)}" for key, value in settings.items())
    return f"{name} ({words})" if words else name


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
