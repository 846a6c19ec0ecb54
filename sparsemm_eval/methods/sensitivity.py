"""Sensitivity: what a model loses where a KV head keeps less, measured without labels.

A file of it holds, by kind of calibration prompt, how far the next-token distribution moves when a
head is starved; by which rule each head best ranks a prompt's tokens; and, for some budgets, how
many tokens each head is best given. It serves two methods: ``sparsemm``, with divergences as head
scores, and ``sensitivity``, with rules and numbers of tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sparsemm_eval.errors import UserError, short_repr
from sparsemm_eval.methods.allocation import Allocation, Prompt, share_out
from sparsemm_eval.methods.head_scores import HeadScores, ModelShape
from sparsemm_eval.methods.scoring import attention_weights
from sparsemm_eval.paths import write_whole
from sparsemm_eval.stored import NoFile, NotUnderstood, read_json, read_json_as, with_checksum

if TYPE_CHECKING:
    from torch import Tensor

FILE_NAME = "head_scores.sensitivity.json"
# As settings name the file that lies beside a checkpoint, or where the command leaves it.
WORD = "sensitivity"
# Likewise, for its visual scores.
VISUAL = "visual"
FORMAT = "sparsemm-eval sensitivity 1"
# So many newest tokens come before all others, so that an answer has its question.
RECENT = 4
# What the weight of an attended token has faded to on the last token that it lends it to.
_FADED = 0.3
_POWERS = {"root": 0.5, "share": 1.0}
_MOST_TOKENS = 1 << 40


@dataclass(frozen=True)
class Rule:
    """How a KV head ranks a prompt's tokens.

    Parameters
    ----------
    queries : {"window", "last", "none"}
        Whose attention counts: the mean over the window's queries, the last query's alone, or
        nobody's; then the newest token comes first.
    pooling : {"avg", "ahead"}
        A token's score: the mean attention of so many neighbours on both sides, itself included,
        where there are none counted as zero; or the largest of its own and of the tokens' before
        it, fading with the distance: what stands behind an attended token may be read next.
    width : int
        Tokens that are pooled.
    """

    queries: str
    pooling: str = "avg"
    width: int = 1

    def __str__(self) -> str:
        return self.queries + (f"-{self.pooling}{self.width}" if self.queries != "none" else "")

    def pooled(self, attention: Tensor) -> Tensor:
        """Scores from attention, both [heads, tokens]."""
        import torch
        import torch.nn.functional as F

        if self.width == 1:
            return attention
        if self.pooling == "avg":
            return F.avg_pool1d(attention[:, None], self.width, 1, self.width // 2)[:, 0]
        lent = F.pad(attention, (self.width - 1, 0)).unfold(1, self.width, 1)
        fading = torch.linspace(_FADED, 1, self.width, dtype=lent.dtype, device=lent.device)
        return (lent * fading).amax(-1)


# The first is SnapKV's (arXiv 2404.14469).
RULES = (
    *(
        Rule(queries, pooling, width)
        for queries in ("window", "last")
        for pooling, width in (("avg", 5), ("avg", 1), ("avg", 9), ("ahead", 5), ("ahead", 9))
    ),
    Rule("none"),
)
NEWEST = len(RULES) - 1
_NAMES = {str(rule): number for number, rule in enumerate(RULES)}


def rule_scores(query: Tensor, key: Tensor, window: int, rules: Iterable[int]) -> dict[int, Tensor]:
    """Scores of all tokens of one prompt by rules: finite, not negative, the newest on top.

    Parameters
    ----------
    query : Tensor
        [Hq, m, d] after RoPE, the last ``window`` rows at least, or a shorter prompt's all.
    key : Tensor
        [H, n, d] after RoPE.
    window : int
        Queries that observe.
    rules : iterable of int
        Numbers in `RULES`.

    Returns
    -------
    dict
        [H, n] by number of the rule, float32 or better.
    """
    import torch

    wanted = sorted(set(rules))
    heads, n, _ = key.shape
    place = torch.arange(n, device=key.device)
    seen: dict[str, Tensor] = {}
    if any(RULES[rule].queries != "none" for rule in wanted):
        weights = attention_weights(query, key, min(window, n))  # [H, G, w, n]
        rows = weights.shape[-2]
        observers = (n - place).clamp(max=rows)
        exact = weights.dtype
        of_group = weights.mean(1, dtype=torch.float64)
        seen["window"] = (of_group.sum(1) / observers).to(exact)
        seen["last"] = of_group[:, -1].to(exact)
    newest = place >= n - RECENT
    scores = {}
    for rule in wanted:
        one = RULES[rule]
        if one.queries == "none":
            scores[rule] = place.to(torch.float32).expand(heads, n)
        else:  # no weight is more than 1
            pooled = one.pooled(seen[one.queries])
            scores[rule] = torch.where(newest, 2 + (place - n + RECENT).to(pooled), pooled)
    return scores


@dataclass(frozen=True, eq=False)
class Kind:
    """Calibration prompts of one kind, and what they lose.

    Parameters
    ----------
    divergence : ndarray
        [L, H] in nats: KL(all heads whole || this head starved) per answer token, mean over the
        prompts.
    prompts, answer_tokens : int
        How many it is from.
    documents : tuple of str
        SHA-256 of each prompt's content.
    """

    divergence: np.ndarray
    prompts: int
    answer_tokens: int
    documents: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False, repr=False)
class Sensitivity:
    """The sensitivity of a model's KV heads.

    Parameters
    ----------
    shape : ModelShape
        The model's.
    window : int
        Queries that observed, and the tokens that a starved head kept.
    kinds : mapping
        By name of the kind, such as a task's.
    rules : ndarray
        [L, H] numbers in `RULES`: how each head ranks.
    tables : mapping
        By budget: [L, H] tokens of each head, whose mean is the budget; each head has one at least.

    Raises
    ------
    UserError
        If a number is none that a model's heads can have.
    """

    shape: ModelShape
    window: int
    kinds: Mapping[str, Kind]
    rules: np.ndarray
    tables: Mapping[int, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wanted = (self.shape.layers, self.shape.kv_heads)
        numbers = {f"kind {name}": kind.divergence for name, kind in self.kinds.items()}
        numbers |= {f"the table of {budget}": table for budget, table in self.tables.items()}
        for name, array in {**numbers, "rules": self.rules}.items():
            if array.shape != wanted:
                raise UserError(f"sensitivity: {name} is of shape {array.shape}, not {wanted}")
            if not np.isfinite(array).all() or array.min() < 0:
                raise UserError(f"sensitivity: {name} has a number that is negative or not finite")
        if not self.kinds:
            raise UserError("sensitivity: it has no kind of prompts")
        for budget, table in self.tables.items():
            if budget < 2 or table.min() < 1 or table.sum() != budget * table.size:
                raise UserError(
                    f"sensitivity: the table of {budget} must give each head a token at least, "
                    f"and {budget} in the mean; it gives {table.min()} and {table.mean():g}"
                )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sensitivity) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Sensitivity({', '.join(self.kinds)}, {self.digest[:12]})"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that its file holds: what an answer is keyed by."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()

    @property
    def documents(self) -> dict[str, tuple[str, ...]]:
        """SHA-256 of each calibration prompt's content, by kind."""
        return {name: kind.documents for name, kind in self.kinds.items()}

    @classmethod
    def alike(cls, shape: ModelShape) -> Sensitivity:
        """One under which all heads are alike, for checks of settings without a model."""
        ones = np.ones((shape.layers, shape.kv_heads), dtype=np.int64)
        return cls(shape, 1, {"": Kind(ones.astype(float), 1, 1)}, 0 * ones, {2: 2 * ones})

    def check_shape(self, shape: ModelShape, source: str = "sensitivity") -> None:
        """Raise UserError unless this is of a model of this shape."""
        if self.shape != shape:
            raise UserError(
                f"{source} is of {self.shape}, but the model has {shape}: measure it on this model"
            )

    def share(self, power: float = 0.5, weights: Mapping[str, float] | None = None) -> np.ndarray:
        """What each KV head is to be given of a budget, [L, H] with sum 1.

        Of each kind the divergences to a power, as shares of their sum; of these the mean over the
        kinds. The root softens the few heads that hold nearly all, the share lets each kind count
        alike.

        Parameters
        ----------
        power : float
            0.5 is the root.
        weights : mapping, optional
            Of kinds; those that are not named are left out. Default: all alike.

        Raises
        ------
        UserError
            For a kind that there is not, or where nothing is lost by starving any head.
        """
        weights = dict.fromkeys(self.kinds, 1.0) if weights is None else weights
        if unknown := sorted(set(weights) - set(self.kinds)):
            raise UserError(
                f"sensitivity: it has no kind {unknown[0]}; it has {', '.join(self.kinds)}"
            )
        total = np.zeros((self.shape.layers, self.shape.kv_heads))
        for name, weight in weights.items():
            powered = self.kinds[name].divergence ** power
            if powered.any():
                total += weight * powered / powered.sum()
        if not total.any():
            raise UserError(
                "sensitivity: nothing is lost by starving any head on these prompts: no head is to "
                "be preferred; calibrate on prompts whose answers depend on their images"
            )
        return total / total.sum()

    def head_scores(self, mixture: str = "root") -> HeadScores:
        """As scores of query heads, a KV head's shared among them.

        Parameters
        ----------
        mixture : str
            "root" or "share" (of the divergences themselves), then, each behind a "+", the kinds
            that count, all if none is named; "gqa*2" counts twice.

        Raises
        ------
        UserError
            If it is no such text, or `share` raises it.
        """
        word, *named = mixture.split("+")
        if word not in _POWERS:
            raise UserError(
                f"mixture {short_repr(mixture)}: it must be one of {', '.join(_POWERS)}, and may "
                "name kinds behind it, such as root+docvqa_val+gqa*2"
            )
        weights = dict(map(_weighted, named)) or None
        of_kv = self.share(_POWERS[word], weights)
        of_query = np.repeat(of_kv / self.shape.group_size, self.shape.group_size, axis=1)
        return HeadScores(of_query, self.documents)

    def tokens(self, budget: int) -> np.ndarray:
        """Unrounded tokens of each head at a budget, [L, H] float64.

        The table of the nearest budget by ratio, scaled: each head's tokens beyond its first grow
        and shrink alike.
        """
        nearest = min(sorted(self.tables), key=lambda known: abs(math.log(known / budget)))
        return 1 + (self.tables[nearest] - 1.0) * (budget - 1) / (nearest - 1)

    def write(self, path: Path) -> None:
        """Write it whole, with a checksum of its content."""
        content = with_checksum(self._content())
        write_whole(path, json.dumps(content, indent=1) + "\n")

    @classmethod
    def read(cls, path: str | Path, shape: ModelShape | None = None) -> Sensitivity:
        """Read a file that `write` wrote.

        Parameters
        ----------
        path : str or Path
            The file.
        shape : ModelShape, optional
            The model it must fit.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        UserError
            Naming it, if it is no such file, was changed, or does not fit.
        """
        path = Path(path)
        try:
            stored = read_json_as(path, _Stored)
        except NoFile:
            raise FileNotFoundError(f"sensitivity={path}: there is no such file") from None
        except NotUnderstood as error:
            raise UserError(f"{path}: not a sensitivity file ({error})") from error
        try:
            found = stored.value()
        except (UserError, ValueError, LookupError) as error:
            raise UserError(f"{path}: not a sensitivity file ({error})") from error
        if shape is not None:
            found.check_shape(shape, str(path))
        return found

    def _content(self) -> dict[str, object]:
        return asdict(
            _Stored(
                FORMAT,
                self.shape.layers,
                self.shape.query_heads,
                self.shape.kv_heads,
                self.window,
                {
                    name: _StoredKind(
                        kind.prompts,
                        kind.answer_tokens,
                        [[float(f"{value:.6g}") for value in row] for row in kind.divergence],
                        list(kind.documents),
                    )
                    for name, kind in self.kinds.items()
                },
                [[str(RULES[rule]) for rule in row] for row in self.rules],
                {str(budget): table.tolist() for budget, table in sorted(self.tables.items())},
            )
        )


@dataclass(frozen=True)
class _StoredKind:
    prompts: int
    answer_tokens: int
    divergence: list[list[float]]
    documents: list[str]


@dataclass(frozen=True)
class _Stored:
    """As the file has it."""

    format: str
    layers: int
    query_heads: int
    kv_heads: int
    window: int
    kinds: dict[str, _StoredKind]
    rules: list[list[str]]
    tables: dict[str, list[list[int]]]

    def value(self) -> Sensitivity:
        if self.format != FORMAT:
            raise UserError(f"its format is {short_repr(self.format)}, not {FORMAT!r}")
        if not 1 <= self.window <= _MOST_TOKENS:
            raise UserError(f"its window is {self.window}")
        for name in (name for row in self.rules for name in row if name not in _NAMES):
            raise UserError(f"there is no rule {short_repr(name)}; there is {', '.join(_NAMES)}")
        return Sensitivity(
            ModelShape(self.layers, self.query_heads, self.kv_heads),
            self.window,
            {
                name: Kind(
                    np.array(kind.divergence, dtype=np.float64),
                    kind.prompts,
                    kind.answer_tokens,
                    tuple(kind.documents),
                )
                for name, kind in self.kinds.items()
            },
            np.array([[_NAMES[name] for name in row] for row in self.rules], dtype=np.int64),
            {
                int(budget): np.array(table, dtype=np.int64).clip(max=_MOST_TOKENS)
                for budget, table in self.tables.items()
            },
        )


def _weighted(named: str) -> tuple[str, float]:
    kind, star, weight = named.partition("*")
    if star and not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", weight):
        raise UserError(f"mixture: {short_repr(named)}: a kind's weight is a number, as in gqa*2")
    return kind, float(weight) if star else 1.0


def find_sensitivity(
    name: str | Path, shape: ModelShape | None = None
) -> tuple[Sensitivity, str] | None:
    """A sensitivity file, and the mixture that stands behind an "@"; None if the file is no such.

    Parameters
    ----------
    name : str or Path
        Such as ``scores.json`` or ``sensitivity.json@share+docvqa_val``.
    shape : ModelShape, optional
        The model it must fit.

    Raises
    ------
    FileNotFoundError, UserError
        As `Sensitivity.read`, or for a mixture of a file that has none.
    """
    path, mixture = Path(name), None
    if "@" in path.name and not path.exists():
        stem, _, mixture = path.name.partition("@")
        path = path.with_name(stem)
    try:
        content = read_json(path)
    except NotUnderstood:
        content = None  # who reads it as another file says what is wrong with it
    if isinstance(content, dict) and "format" in content:
        return Sensitivity.read(path, shape), mixture or "root"
    if mixture is not None:
        raise UserError(
            f"head_scores={name}: a mixture is chosen of a sensitivity file, and {path} is none; "
            "leave out what stands behind @"
        )
    return None


def read_head_scores(name: str | Path, shape: ModelShape | None = None) -> HeadScores:
    """Head scores from a score file, or as a mixture of a sensitivity file.

    Parameters
    ----------
    name, shape
        As for `find_sensitivity`.

    Raises
    ------
    FileNotFoundError, UserError
        As `HeadScores.read` and `find_sensitivity`.
    """
    found = find_sensitivity(name, shape)
    if found is None:
        return HeadScores.read(name, shape)
    sensitivity, mixture = found
    return sensitivity.head_scores(mixture)


@dataclass(frozen=True)
class ByRules:
    """Each head ranks by its own rule of `RULES`; the newest tokens come first.

    Parameters
    ----------
    sensitivity : Sensitivity
        Whose rules they are, and its window.
    """

    sensitivity: Sensitivity

    @property
    def window(self) -> int:
        """No token is set apart: the newest stand first in the ranking."""
        return 0

    @property
    def least_budget(self) -> int:
        """So that tables can be scaled."""
        return 2

    def of_layer(self, layer: int) -> RulesOfLayer:
        """What scores a layer."""
        return RulesOfLayer(tuple(self.sensitivity.rules[layer].tolist()), self.sensitivity.window)


@dataclass(frozen=True)
class RulesOfLayer:
    """One layer of `ByRules`.

    Parameters
    ----------
    rules : tuple of int
        Of each KV head.
    window : int
        Queries that observe.
    """

    rules: tuple[int, ...]
    window: int

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        """Scores [H, n] from query [Hq, window or more, d] and key [H, n, d]."""
        import torch

        scores = rule_scores(query, key, self.window, self.rules)
        return torch.stack([scores[rule][head] for head, rule in enumerate(self.rules)])


@dataclass(frozen=True)
class BySensitivity(Allocation):
    """As many tokens as the tables of a sensitivity file give each head, to the token.

    Parameters
    ----------
    sensitivity : Sensitivity
        Of the model.
    """

    rounds = False

    sensitivity: Sensitivity

    def check(self, shape: ModelShape) -> None:
        self.sensitivity.check_shape(shape)
        if not self.sensitivity.tables:
            raise UserError(
                "method=sensitivity: its file has divergences alone, and no table of tokens: "
                "search for one by `sparsemm-eval sensitivity … --budgets 64,32,16`, or take "
                "method=sparsemm,head_scores=FILE"
            )

    def paper(self, prompt: Prompt) -> np.ndarray:
        wants = self.wants(prompt)
        total = min(prompt.base, prompt.candidates) * wants.size
        return share_out(wants.ravel(), prompt.candidates, total).reshape(wants.shape)

    def wants(self, prompt: Prompt) -> np.ndarray:
        return self.sensitivity.tokens(prompt.base)
