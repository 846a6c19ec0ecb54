"""Visual scores of the query heads: read, check, write, sum over groups, find the default.

File format, the published one: JSON ``{"layer-head": [value per image, or few means]}``.
"""

import hashlib
import json
import math
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from sparsemm_eval.errors import UserError
from sparsemm_eval.methods.shape import ModelShape

FILE_NAME = "head_scores.json"


@dataclass(frozen=True, eq=False, repr=False)
class HeadScores:
    """Visual score of every query head.

    Parameters
    ----------
    values : array_like
        [L, Hq], finite and non-negative, not all zero. Larger means: looks at the image more.

    Raises
    ------
    ValueError
        If the array has another number of dimensions or holds a value that is not allowed.
    """

    values: np.ndarray

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

    def check_shape(self, shape: ModelShape, source: str = "head scores") -> None:
        """Raise ValueError unless these are scores for a model of this shape."""
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
        ValueError
            Naming file, key and value, if the file is no score file or does not fit.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"head_scores={path}: there is no such file")
        try:
            pairs = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=list)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not a JSON file ({error})") from error
        scores = cls(_pairs_to_array(pairs, path))
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


def find_head_scores(checkpoint: Path, cached: Path, chase_command: str) -> Path:
    """The score file used when none is given.

    Parameters
    ----------
    checkpoint : Path
        Folder of the checkpoint; ``head_scores.json`` there comes first.
    cached : Path
        Where a chase on this very checkpoint leaves its scores; comes second.
    chase_command : str
        The command that would make them, for the error.

    Raises
    ------
    FileNotFoundError
        If neither exists: scores are never made up.
    """
    for path in (checkpoint / FILE_NAME, cached):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"no head scores for {checkpoint}: run `{chase_command}`, or give a published score file "
        "by head_scores=PATH"
    )


def _pairs_to_array(pairs: object, path: Path) -> np.ndarray:
    """Pairs and not a dict: a head that is named twice must not count by its place in the file."""
    is_object = isinstance(pairs, list) and all(isinstance(pair, tuple) for pair in pairs)
    if not is_object or not pairs:
        raise UserError(f'{path}: it must be a JSON object {{"layer-head": score}}')
    entries: dict[tuple[int, int], float] = {}
    for key, value in pairs:
        head = _parse_key(key, path)
        if head in entries:
            raise UserError(f"{path}: {key} is there twice")
        entries[head] = _mean(key, value, path)
    layers = 1 + max(layer for layer, _ in entries)
    heads = 1 + max(head for _, head in entries)
    missing = [
        f"{layer}-{head}"
        for layer in range(layers)
        for head in range(heads)
        if (layer, head) not in entries
    ]
    if missing:
        raise UserError(f"{path}: no score for head {missing[0]} ({len(missing)} are missing)")
    array = np.zeros((layers, heads))
    for (layer, head), value in entries.items():
        array[layer, head] = value
    _check_values(array, str(path))
    return array


def _parse_key(key: str, path: Path) -> tuple[int, int]:
    layer, dash, head = key.partition("-")
    if not (dash and layer.isdecimal() and head.isdecimal()):
        raise UserError(f'{path}: key {key!r} is not "layer-head", such as "12-3"')
    return int(layer), int(head)


def _mean(key: str, value: object, path: Path) -> float:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise UserError(f"{path}: {key} has no value")
    for number in values:
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        # Compared and not converted: an integer may be too large for a float.
        if not is_number or not 0 <= number <= sys.float_info.max:
            raise UserError(
                f"{path}: {key} is {str(number)[:40]}; a score is finite and not negative"
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
