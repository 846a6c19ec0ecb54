"""The heads of a decoder: how many there are, and the visual score of each query head.

A score file has the published format: JSON ``{"layer-head": [value per image, or few means]}``.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sparsemm_eval.errors import UserError, short_repr
from sparsemm_eval.stored import NoFile, NotUnderstood, parse_json, read_json, read_text

# As files name a head. No model has a million layers.
_KEY = re.compile(r"([0-9]{1,6})-([0-9]{1,6})")
# So large that no mean of as many as a file can hold overflows.
_LARGEST = 1e300
FILE_NAME = "head_scores.json"
# Kinds of layers, as configs name them.
_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class ModelShape:
    """Layers and heads of a decoder.

    Parameters
    ----------
    layers : int
        Decoder layers (L) that methods compress: those that attend to all tokens, or, where none
        does, all of them. Layers are counted among these alone, here and in all files of scores.
    query_heads : int
        Query heads a layer.
    kv_heads : int
        KV heads a layer (H). Query head ``q`` reads KV head ``q // group_size``.
    head_dim : int, optional
        Numbers in one head's query, key or value (D). No method depends on it, so that it does not
        make two shapes unequal.
    windows : tuple, optional
        Of each layer of the model, to how many of the last tokens it attends, its own included;
        None where to all: those are the `layers`. Empty where no layer is left out. As `head_dim`
        it makes no two shapes unequal.

    Raises
    ------
    UserError
        If a count is not a positive integer or ``query_heads`` is no multiple of ``kv_heads``.
    """

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int | None = field(default=None, compare=False, repr=False)
    windows: tuple[int | None, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("layers", "query_heads", "kv_heads", "head_dim"):
            value = getattr(self, name)
            if name == "head_dim" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(f"{name}={value!r}: a ModelShape needs a positive integer here")
        if self.query_heads % self.kv_heads:
            raise UserError(
                f"query_heads={self.query_heads} is no multiple of kv_heads={self.kv_heads}: "
                "each KV head must serve the same number of query heads"
            )

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head (G)."""
        return self.query_heads // self.kv_heads

    @property
    def places(self) -> tuple[int | None, ...]:
        """Of each layer of the model its number among `layers`; None where it is left out."""
        if not self.windows:
            return tuple(range(self.layers))
        counted = iter(range(self.layers))
        return tuple(next(counted) if window is None else None for window in self.windows)

    @classmethod
    def from_config(cls, config: Any) -> "ModelShape":
        """Read the decoder's shape from a transformers config, of a whole model or its text part.

        Raises
        ------
        UserError
            If the config does not say how many layers and heads there are, or they do not fit; or
            if it has layers of other kinds than full and sliding attention.
        """
        text = config.get_text_config()
        windows = _windows(text)
        layers = getattr(text, "num_hidden_layers", None)
        query_heads = getattr(text, "num_attention_heads", None)
        if layers is None or query_heads is None:
            raise UserError(
                f"a config of type {getattr(text, 'model_type', '')!r} names no "
                f"{'num_hidden_layers' if layers is None else 'num_attention_heads'}: its decoder "
                "is none that SparseMM-Eval can share a budget in"
            )
        # Older configs name neither KV heads, where each query head has its own, nor a head's size.
        kv_heads = getattr(text, "num_key_value_heads", None)
        kv_heads = query_heads if kv_heads is None else kv_heads
        shape = cls(layers, query_heads, kv_heads, getattr(text, "head_dim", None))
        head_dim = shape.head_dim or text.hidden_size // shape.query_heads
        layers = windows.count(None) if windows else layers
        return cls(layers, query_heads, kv_heads, head_dim, windows)


def _windows(text: Any) -> tuple[int | None, ...]:
    """Windows of a decoder's layers, if they are of two kinds; () if all are of one."""
    kinds = tuple(getattr(text, "layer_types", None) or ())
    decoder = f"a decoder of model_type={getattr(text, 'model_type', '')}"
    if others := sorted(set(kinds) - {_FULL, _SLIDING}):
        raise UserError(
            f"{decoder} has layers of {others[0]}: SparseMM-Eval compresses layers of {_FULL}, "
            f"beside which there may be layers of {_SLIDING}; take another model"
        )
    if getattr(text, "is_heterogeneous", False):
        raise UserError(
            f"{decoder} has layers of unlike heads: a budget is shared among KV heads that are "
            "alike in all layers; take another model"
        )
    if getattr(text, "num_kv_shared_layers", None):
        raise UserError(
            f"{decoder} has num_kv_shared_layers={text.num_kv_shared_layers}: layers that read "
            "another layer's keys and values are not supported; take another model"
        )
    if len(set(kinds)) < 2:
        return ()
    window = getattr(text, "sliding_window", None)
    if not isinstance(window, int) or window < 2:
        raise UserError(
            f"{decoder} has layers of {_SLIDING} and sliding_window={short_repr(window)}: it must "
            "be an integer of at least 2"
        )
    return tuple(window if kind == _SLIDING else None for kind in kinds)


@dataclass(frozen=True, eq=False, repr=False)
class HeadScores:
    """Visual score of every query head.

    Parameters
    ----------
    values : array_like
        [L, Hq], finite and non-negative, not all zero. Larger means: looks at the image more.
    documents : mapping
        Digests of the documents they were calibrated on, by kind; none where that is not known. No
        answer depends on it.

    Raises
    ------
    UserError
        If the array has another number of dimensions or holds a value that is not allowed.
    """

    values: np.ndarray
    documents: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values = np.array(self.values, dtype=np.float64)
        if values.ndim != 2 or 0 in values.shape:
            raise UserError(f"head scores of shape {values.shape}: they must be [layers, heads]")
        _check_values(values, "head scores")
        values.setflags(write=False)
        object.__setattr__(self, "values", values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HeadScores) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"HeadScores({_count(self.values.shape)}, {self.digest[:12]})"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of shape and values: what an answer is keyed by."""
        shape = np.array(self.values.shape, dtype="<i8").tobytes()
        return hashlib.sha256(shape + self.values.astype("<f8").tobytes()).hexdigest()

    @classmethod
    def alike(cls, shape: ModelShape) -> "HeadScores":
        """Equal scores, for checks of settings without a model."""
        return cls(np.ones((shape.layers, shape.query_heads)))

    def check_shape(self, shape: ModelShape, source: str = "head scores") -> None:
        """Raise UserError unless these are scores for a model of this shape."""
        layers, heads = self.values.shape
        if (layers, heads) == (shape.layers, shape.query_heads):
            return
        if layers > shape.layers or heads > shape.query_heads:
            extra = f"{shape.layers}-0" if layers > shape.layers else f"0-{shape.query_heads}"
            fault = f"{extra} is no head of it"
        else:
            fault = f"{f'{layers}-0' if layers < shape.layers else f'0-{heads}'} has no score"
        wanted = _count((shape.layers, shape.query_heads))
        raise UserError(
            f"{source}: {_count((layers, heads))}, but the model has {wanted} ({fault}); use "
            "scores chased on this model"
        )

    def per_kv_head(self, kv_heads: int) -> np.ndarray:
        """Sum over the query heads of each KV head, [L, H] float64."""
        layers, query_heads = self.values.shape
        if query_heads % kv_heads:
            raise UserError(f"{query_heads} query heads cannot be shared by {kv_heads} KV heads")
        return self.values.reshape(layers, kv_heads, -1).sum(-1)

    @classmethod
    def read(cls, path: str | Path, shape: ModelShape | None = None) -> "HeadScores":
        """Read a score file by its "layer-head" keys, whatever their order.

        Parameters
        ----------
        path : str or Path
            JSON, ``{"layer-head": number or list of numbers}``; a list counts as its mean.
        shape : ModelShape, optional
            The model the scores must fit.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        UserError
            Naming file, key and value, if the file is no score file, does not fit, or is not the
            one that its provenance file, where there is one, was written with.
        """
        path = Path(path)
        try:
            content = read_text(path)
            table = parse_json(content)
        except NoFile:
            raise FileNotFoundError(f"head_scores={path}: there is no such file") from None
        except NotUnderstood as error:
            raise UserError(f"{path}: not a score file ({error})") from error
        _check_unchanged(content, path)
        scores = cls(_table_to_array(table, path))
        if shape is not None:
            scores.check_shape(shape, str(path))
        return scores

    def write(self, path: str | Path) -> None:
        """Write the published format, one number a head."""
        table = {
            f"{layer}-{head}": [float(value)]
            for layer, row in enumerate(self.values)
            for head, value in enumerate(row)
        }
        Path(path).write_text(json.dumps(table) + "\n", encoding="utf-8")


def provenance_file(scores: Path) -> Path:
    """Where a score file's making is written down: beside it, with its SHA-256."""
    return scores.with_name(f"{scores.stem}.provenance.json")


def _check_unchanged(content: str, path: Path) -> None:
    try:
        beside = read_json(provenance_file(path))
    except NotUnderstood:
        return  # the published files have none
    known = beside.get("scores_sha256") if isinstance(beside, dict) else None
    if known not in (None, hashlib.sha256(content.encode()).hexdigest()):
        raise UserError(
            f"{path}: it is not the file that {provenance_file(path).name} beside it was written "
            "with: make the scores again, or remove that file if these are others"
        )


def find_scores(setting: str, beside: Path, cached: Path, command: str) -> Path:
    """The file used for a setting when none is given.

    Parameters
    ----------
    setting : str
        ``head_scores`` or ``sensitivity``.
    beside : Path
        The file's place beside the checkpoint; comes first.
    cached : Path
        Where the command leaves it for this very checkpoint; comes second.
    command : str
        What would make it, for the error.

    Raises
    ------
    FileNotFoundError
        If neither exists: scores are never made up.
    """
    for path in (beside, cached):
        if path.is_file():
            return path
    what = "head scores" if setting == "head_scores" else setting
    also = " a published score file" if setting == "head_scores" else " a file of it"
    raise FileNotFoundError(
        f"no {what} for {beside.parent}: run `{command}`, or give{also} by {setting}=PATH"
    )


def _table_to_array(table: object, path: Path) -> np.ndarray:
    if not isinstance(table, dict) or not table:
        raise UserError(f'{path}: it must be a JSON object {{"layer-head": score}}')
    entries: dict[tuple[int, int], float] = {}
    for key, value in table.items():
        head = _parse_key(key, path)
        if head in entries:  # as 0-1 and 00-1
            raise UserError(f"{path}: {key} is there twice")
        entries[head] = _mean(key, value, path)
    layers = 1 + max(layer for layer, _ in entries)
    heads = 1 + max(head for _, head in entries)
    missing = layers * heads - len(entries)
    if missing:
        # Not made before they are counted: two keys can name two far corners.
        every = ((layer, head) for layer in range(layers) for head in range(heads))
        layer, head = next(one for one in every if one not in entries)
        raise UserError(f"{path}: no score for head {layer}-{head} ({missing} are missing)")
    array = np.zeros((layers, heads))
    for (layer, head), value in entries.items():
        array[layer, head] = value
    _check_values(array, str(path))
    return array


def _parse_key(key: str, path: Path) -> tuple[int, int]:
    head = _KEY.fullmatch(key)
    if head is None:
        raise UserError(f'{path}: key {short_repr(key)} is not "layer-head", such as "12-3"')
    return int(head[1]), int(head[2])


def _mean(key: str, value: object, path: Path) -> float:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise UserError(f"{path}: {key} has no value")
    for number in values:
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not is_number or not 0 <= number <= _LARGEST:
            raise UserError(
                f"{path}: {key} is {short_repr(number)}; a score is finite and not negative"
            )
    return math.fsum(values) / len(values)


def _check_values(values: np.ndarray, source: str) -> None:
    for layer, head in np.argwhere(~np.isfinite(values) | (values < 0))[:1]:
        raise UserError(
            f"{source}: {layer}-{head} is {values[layer, head]}; a score is finite and not negative"
        )
    with np.errstate(over="ignore"):
        total = values.sum()
    if not np.isfinite(total):
        raise UserError(f"{source}: the scores are too large to be summed; scale them down")
    if not values.any():
        raise UserError(f"{source}: all scores are 0; no budget can be shared by them")


def _count(shape: tuple[int, int]) -> str:
    return f"{shape[0]} layers of {shape[1]} heads"
