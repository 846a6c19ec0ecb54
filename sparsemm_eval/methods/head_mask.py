"""HeadMask: query heads that are silenced, to see what a model cannot do without them.

SparseMM silences its visual heads and as many others, and compares what a benchmark loses.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sparsemm_eval.errors import UserError, check_choice
from sparsemm_eval.methods.head_scores import HeadScores, ModelShape

MASK_MODES = ("query", "output")
LEAST_VISUAL = 0.1
_FORMS = (
    "visual:SHARE, random:SHARE:SEED with a share between 0 and 1 and an integer seed, or heads "
    "as layer-head joined by +, such as 3-1+4-0"
)


@dataclass(frozen=True)
class HeadMask:
    """Query heads that are silenced, while a prompt is read and while it is answered.

    Parameters
    ----------
    heads : tuple of (int, int)
        (layer, query head), each once, in any order.
    mode : {"query", "output"}
        ``query`` sets a head's query to zero, so that it attends alike to all it may see (the
        paper's way); ``output`` sets what it adds to the layer's output to zero.

    Raises
    ------
    UserError
        For no head, a head that is there twice, or an unknown mode.
    """

    heads: tuple[tuple[int, int], ...]
    mode: str = "query"

    def __post_init__(self) -> None:
        check_choice("mask_mode", self.mode, MASK_MODES)
        object.__setattr__(self, "heads", tuple(sorted(self.heads)))
        if not self.heads:
            raise UserError("mask_heads is empty: name at least one head, such as 3-1")
        head, times = Counter(self.heads).most_common(1)[0]
        if times > 1:
            raise UserError(f"mask_heads: head {_name(head)} is given twice; name each head once")

    def check_shape(self, shape: ModelShape) -> None:
        """Raise UserError unless every head is one of a model of this shape."""
        for layer, head in self.heads:
            if not (0 <= layer < shape.layers and 0 <= head < shape.query_heads):
                raise UserError(
                    f"mask_heads: the model has no head {_name((layer, head))}; its heads are 0-0 "
                    f"to {_name((shape.layers - 1, shape.query_heads - 1))}"
                )

    def of_layer(self, layer: int) -> list[int]:
        """The silenced query heads of one layer."""
        return [head for of, head in self.heads if of == layer]

    @property
    def names(self) -> str:
        """The heads as ``mask_heads`` takes them, such as "3-1+4-0"."""
        return "+".join(map(_name, self.heads))

    @property
    def settings(self) -> dict[str, str]:
        """What an answer is keyed by: equal for equal heads, however they were asked for."""
        return {"heads": self.names, "mode": self.mode}

    def __str__(self) -> str:
        digest = hashlib.sha256(self.names.encode()).hexdigest()[:12]
        return f"masked({self.mode},{len(self.heads)} heads,{digest})"


def read_head_mask(
    text: object, mode: str, shape: ModelShape, scores: Callable[[], HeadScores]
) -> HeadMask:
    """Read ``mask_heads`` and ``mask_mode`` as they stand in ``--model_args``.

    Parameters
    ----------
    text : str
        ``visual:0.05`` for the best 5% of the heads by visual score, ``random:0.05:7`` for as
        many others, drawn with seed 7, or a list such as ``3-1+4-0``.
    mode : {"query", "output"}
        How they are silenced.
    shape : ModelShape
        The model.
    scores : callable
        Gives the model's visual scores; called for ``visual`` and ``random`` only.

    Raises
    ------
    UserError
        In one sentence, if the text is none of these, or names heads that are not there.
    """
    # lmms-eval makes a number of a text such as 3.
    kind, *rest = str(text).split(":")
    if kind == "visual" and len(rest) == 1:
        heads = visual_heads(scores(), _share(text, rest[0]))
    elif kind == "random" and len(rest) == 2 and rest[1].isdecimal():
        heads = random_heads(scores(), _share(text, rest[0]), int(rest[1]))
    elif re.fullmatch(r"\d+-\d+(\+\d+-\d+)*", str(text)):
        pairs = (name.split("-") for name in str(text).split("+"))
        heads = tuple((int(layer), int(head)) for layer, head in pairs)
    else:
        raise UserError(f"mask_heads={text!r}: it must be {_FORMS}")
    mask = HeadMask(heads, mode)
    mask.check_shape(shape)
    return mask


def visual_heads(scores: HeadScores, share: float) -> tuple[tuple[int, int], ...]:
    """The best heads by visual score, best first.

    Parameters
    ----------
    scores : HeadScores
        [L, Hq].
    share : float
        Which part of all query heads is taken, between 0 and 1, and at least one head. Of equal
        scores the lower (layer, head) comes first.
    """
    best = np.argsort(-scores.values, axis=None, kind="stable")
    return _heads(best[: _count(scores, share)], scores)


def random_heads(scores: HeadScores, share: float, seed: int) -> tuple[tuple[int, int], ...]:
    """As many heads as `visual_heads` takes, drawn among all that are not visual.

    Visual are at least the best 10%: one of them must not be drawn against a smaller share.

    A larger share adds heads to those that a smaller one draws with the same seed, but for those
    that have become visual ones.

    Parameters
    ----------
    scores : HeadScores
        [L, Hq].
    share : float
        Which part of all query heads is taken, between 0 and 1.
    seed : int
        Seed of numpy's PCG64.

    Raises
    ------
    UserError
        If there are not as many other heads.
    """
    visual = visual_heads(scores, max(share, LEAST_VISUAL))
    count, total = _count(scores, share), scores.values.size
    if count > total - len(visual):
        raise UserError(
            f"mask_heads=random:{share:g}:{seed}: only {total - len(visual)} of {total} heads are "
            f"left beside the {len(visual)} visual ones, so {count} random ones cannot be drawn; "
            f"take a {'share of at most 0.5' if share > 0.5 else 'smaller share'}"
        )
    drawn = np.random.Generator(np.random.PCG64(seed)).random(total).argsort(kind="stable")
    others = [head for head in _heads(drawn, scores) if head not in visual]
    return tuple(others[:count])


def _count(scores: HeadScores, share: float) -> int:
    return max(1, round(share * scores.values.size))


def _heads(flat: np.ndarray, scores: HeadScores) -> tuple[tuple[int, int], ...]:
    layers, heads = np.unravel_index(flat, scores.values.shape)
    return tuple(zip(layers.tolist(), heads.tolist(), strict=True))


def _share(text: object, number: str) -> float:
    try:
        share = float(number)
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise UserError(f"mask_heads={text!r}: it must be {_FORMS}")
    return share


def _name(head: tuple[int, int]) -> str:
    return f"{head[0]}-{head[1]}"
