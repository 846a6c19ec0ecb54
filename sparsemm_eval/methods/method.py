"""A method: which tokens of a prompt each KV head keeps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsemm_eval.errors import UserError, check_int
from sparsemm_eval.methods.allocation import (
    Allocation,
    LayerAllocation,
    Prompt,
    share_out,
)
from sparsemm_eval.methods.head_scores import ModelShape
from sparsemm_eval.methods.layers import LayerShare
from sparsemm_eval.methods.picks import Pick
from sparsemm_eval.methods.scoring import (
    Checks,
    PromptLayer,
    Ranking,
    Scorer,
    is_plain_tensor,
    needs_of,
    scorer_of_layer,
)
from sparsemm_eval.methods.selection import keep_rows

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Method:
    """One way of compressing a prompt's cache: a scorer, rules that share the budget, a budget.

    A value: print it, compare it, key by it. Made by `make_method`, which checks the settings.

    Parameters
    ----------
    name : str
        As registered.
    shape : ModelShape
        The decoder it is for.
    budget : int, float or None
        Mean tokens kept per KV head, window included; below 1 the share of each prompt's tokens;
        None keeps everything.
    scorer : Scorer
        Ranks the tokens of a head.
    allocation : Allocation or LayerAllocation
        Shares the budget among the heads.
    exact : bool
        Spend exactly the budget instead of the published rounding.
    layers : LayerShare or Allocation, optional
        Shares the budget among layers, by what is found in them or by a table whose heads are
        alike; the allocation then shares each layer's part among its heads.
    picks : Pick, optional
        Chooses a head's tokens; its best by score without one.
    question : {"seen", "hidden"}
        Hidden, a prompt is compressed up to its last token that shows anything, as if the text
        behind were not known yet; that text is kept beside the budget.
    """

    name: str
    shape: ModelShape
    budget: int | float | None
    scorer: Scorer
    allocation: Allocation | LayerAllocation
    exact: bool = False
    layers: LayerShare | Allocation | None = None
    picks: Pick | None = None
    question: str = "seen"

    @property
    def parts(self) -> tuple[object, ...]:
        """What it is made of, whose fields are its settings."""
        parts = (self.scorer, self.allocation, self.layers, self.picks)
        return tuple(part for part in parts if part is not None)

    @property
    def needs(self) -> set[str]:
        """What it looks at beside query and key, of `sparsemm_eval.methods.scoring.NEEDS`."""
        needs = {need for part in self.parts for need in needs_of(part)}
        return needs | ({"visual"} if self.question == "hidden" else set())

    @property
    def query_aware(self) -> bool:
        """Whether what it keeps depends on the question; else it could be chosen before it."""
        return self.question != "hidden" and getattr(self.scorer, "query_aware", True)

    @property
    def least(self) -> int:
        """The smallest budget in tokens."""
        return max(self.scorer.least_budget, self.scorer.window + 1)

    def tokens(self, n: int) -> int:
        """The budget for a prompt of n tokens, in tokens per KV head."""
        if self.budget is None:
            return n
        if self.budget < 1:
            return max(self.least, math.floor(self.budget * n + _ROUNDING))
        return self.budget

    def keeps_all(self, n: int) -> bool:
        """Whether a prompt of n tokens is left whole."""
        return n <= self.tokens(n)

    def keep(
        self,
        query: Tensor,
        key: Tensor,
        layer: int,
        valid: Tensor | None = None,
        **given: Tensor,
    ) -> Tensor:
        """Choose the tokens of one layer that each KV head keeps.

        Parameters
        ----------
        query : Tensor
            [B, Hq, m, d] after RoPE: the last ``window`` positions (m = window) or all (m = n).
        key : Tensor
            [B, H, n, d] after RoPE.
        layer : int
            Index of the layer.
        valid : Tensor, optional
            [B, n] bool, False where a row is padded; on the left only. None: no padding.
        **given
            What the method `needs`, as `PromptLayer` has it, those of tokens with a row in front.

        Returns
        -------
        Tensor
            [B, H, n] bool; a padded row gets what it would get alone, its padding False.

        Raises
        ------
        ValueError
            If shapes do not fit the model or each other, or the padding is not on the left; or the
            method shares its budget among layers by what is in them (see `keep_prompt`).
        UserError
            If the method's scores or counts are none that tokens can be kept by.
        """
        import torch

        self._check_tensors(query, key, layer)
        if isinstance(self.layers, LayerShare):
            raise ValueError(f"{self.name} keeps by all layers of a prompt: use keep_prompt")
        rows, heads, n, _ = key.shape
        lengths = [n] * rows if valid is None else row_lengths(valid, rows, n)
        mask = torch.zeros(rows, heads, n, dtype=torch.bool, device=key.device)
        for row, length in enumerate(lengths):
            start = n - length
            own = {
                name: x if name == "output" else x[row, ..., start:] if x.ndim == 2
                else x[row, :, start:] for name, x in given.items()
            }  # fmt: skip
            asked = query[row, :, start:] if query.shape[2] == n else query[row]
            of_row = PromptLayer(layer, asked, key[row, :, start:], **own)
            mask[row, :, start:] = keep_rows((self,), of_row)[0]
        return mask

    def prompt(self, n: int) -> Prompt:
        """What the allocation knows of a prompt of n tokens, more than the budget."""
        window = self.scorer.window
        return Prompt(self.shape, self.tokens(n) - window, n - window)

    def most_kept(self, layer: int, n: int) -> int | None:
        """Tokens that a layer keeps of a prompt of n, over all its KV heads, or at most.

        Known without scores, and so without waiting for the device; None where only scores tell.
        """
        heads = self.shape.kv_heads
        if self.keeps_all(n):
            return heads * n
        if self.layers is not None or self.question == "hidden":
            return None
        window = heads * self.scorer.window
        if not isinstance(self.allocation, LayerAllocation):
            return window + int(self.counts(n)[layer].sum())
        beside = self.allocation.most(self.prompt(n), layer, self.exact)
        return None if beside is None else window + beside

    def counts(self, n: int) -> np.ndarray:
        """Tokens beside the window of a prompt of n by an `Allocation`, [L, H] int64.

        Raises
        ------
        UserError
            Naming the method, if its allotments are none that tokens can be kept by.
        """
        with self._named():
            return self.allocation.counts(self.prompt(n), self.exact)

    def layer_counts(self, n: int) -> np.ndarray:
        """`counts` by a table that shares the budget among layers, [L, H] int64."""
        with self._named():
            return self.layers.counts(self.prompt(n), self.exact)

    def counts_of_layer(
        self, prompt: Prompt, layer: int, ranking: Ranking, checks: Checks, total: int | None = None
    ) -> Tensor:
        """Tokens beside the window that each head of a layer keeps, by its scores: [H] int64.

        Parameters
        ----------
        prompt : Prompt
            As `prompt` has it.
        layer : int
            Index of the layer.
        ranking : Ranking
            The layer's scores.
        checks : Checks
            Where to leave what only the device knows.
        total : int, optional
            Tokens of the layer's heads together; the budget in each by default.

        Raises
        ------
        UserError
            As `counts`.
        """
        import torch

        heads = self.shape.kv_heads
        if total is not None:
            # Of fewer tokens than heads the first ones get one.
            prompt = replace(prompt, base=max(1, total // heads))
            if total == 0 or not isinstance(self.allocation, LayerAllocation):
                return torch.from_numpy(share_out(np.ones(heads), prompt.candidates, total))
        with self._named():
            counts = self.allocation.counts(prompt, ranking, self.exact, total)
        most = self.allocation.most(prompt, layer, self.exact)
        within = counts.amin() >= 0
        if most is not None:
            within &= counts.sum() <= max(most, total or 0)
        checks.add(
            within,
            f"method={self.name}: {type(self.allocation).__name__} gives a KV head of layer "
            f"{layer} a negative number of tokens, or the layer more than its `most`, {most}",
        )
        return counts

    def checked_weight(self, weight: float, layer: int) -> float:
        """A layer's weight; UserError, naming the method, if it is no number to share by."""
        if not 0 <= weight < math.inf:
            raise UserError(
                f"method={self.name}: {type(self.layers).__name__} gives layer {layer} a weight "
                f"of {weight}: it must be finite and not negative (or the model's own numbers are "
                "not finite; take another dtype)"
            )
        return weight

    def ranking(self, layer: PromptLayer, checks: Checks) -> Ranking:
        """Score and rank the candidates of one prompt.

        Raises
        ------
        UserError
            Naming the method, if the scores have another shape or are no floats; that they are
            finite and not negative is added to the checks.
        """
        key = layer.key
        scores = scorer_of_layer(self.scorer, layer.index)(
            layer.query, key, **layer.given(self.scorer)
        )
        wanted = (key.shape[0], key.shape[1] - self.scorer.window)
        scorer = f"method={self.name}: {type(self.scorer).__name__}"
        plain = is_plain_tensor(scores)
        if not plain or tuple(scores.shape) != wanted or not scores.dtype.is_floating_point:
            kind = scores.dtype if plain else type(scores).__name__
            raise UserError(
                f"{scorer} gives {kind} of shape {tuple(getattr(scores, 'shape', ()))}: it must "
                f"give a plain tensor of floats of shape {wanted}, one a KV head and token beside "
                "the window"
            )
        low, high = scores.aminmax()
        checks.add(
            (low >= 0) & (high < math.inf),
            f"{scorer} gives a score that is NaN, infinite or negative in layer {layer.index}: a "
            f"score is finite and not negative (or the model's own numbers are not finite in "
            f"{key.dtype}; take another dtype)",
        )
        return Ranking(scores)

    @property
    def rounds(self) -> bool:
        """Whether the published rounding is another than the exact one."""
        return self.allocation.rounds or (self.layers is not None and self.layers.rounds)

    @property
    def settings(self) -> dict[str, Any]:
        """All that makes this method what it is, plain values in a fixed order (a cell's)."""
        if self.budget is None:
            return {}
        values = {"budget": self.budget}
        if self.rounds:
            values["allocation"] = "exact" if self.exact else "paper"
        if self.question != "seen":
            values["question"] = self.question
        for part in self.parts:
            for field in fields(part):
                value = getattr(part, field.name)
                # Of what was read from a file: what decides anything of it.
                values[field.name] = getattr(value, "digest", value)
        return dict(sorted(values.items()))

    @property
    def calibration(self) -> Mapping[str, tuple[str, ...]]:
        """Digests of the documents that what it reads from a file was calibrated on, by kind.

        Empty where nothing was, or nothing is known of it.
        """
        for part in self.parts:
            for field in fields(part):
                if documents := getattr(getattr(part, field.name), "documents", None):
                    return documents
        return {}

    def __str__(self) -> str:
        inside = ",".join(f"{name}={_short(value)}" for name, value in self.settings.items())
        return f"{self.name}({inside})"

    @contextmanager
    def _named(self) -> Iterator[None]:
        """An allocation knows its class, and not what it is registered as."""
        try:
            yield
        except UserError as error:
            raise UserError(f"method={self.name}: {error}") from error

    def _check_tensors(self, query: Tensor, key: Tensor, layer: int) -> None:
        if query.ndim != 4 or key.ndim != 4 or query.shape[0] != key.shape[0]:
            raise ValueError(
                f"query {tuple(query.shape)} and key {tuple(key.shape)}: they must be "
                "[B, Hq, m, d] and [B, H, n, d]"
            )
        heads = (query.shape[1], key.shape[1])
        if heads != (self.shape.query_heads, self.shape.kv_heads) or not (
            0 <= layer < self.shape.layers
        ):
            raise ValueError(f"layer {layer} with {heads} (query, KV) heads is not in {self.shape}")
        n, window = key.shape[2], self.scorer.window
        # A scorer without a window does not read the query.
        if window and query.shape[2] not in (n, min(window, n)):
            raise ValueError(
                f"query of {query.shape[2]} positions: it must hold the last {window} (the window) "
                f"or all {n}"
            )


def row_lengths(valid: Tensor, rows: int, n: int) -> list[int]:
    """Tokens of each row, from a mask [rows, n] that is False on left padding only."""
    import torch

    if valid.shape != (rows, n) or valid.dtype != torch.bool:
        raise ValueError(f"valid is {tuple(valid.shape)} {valid.dtype}: it must be [B, n] bool")
    holes = (valid[:, :-1] & ~valid[:, 1:]).any(1)
    if holes.any():
        row = int(holes.nonzero()[0])
        raise ValueError(f"valid is False after a True in row {row}: padding must be on the left")
    return valid.sum(-1).tolist()


def tokens_per_head(method: Method, n: int) -> np.ndarray:
    """Tokens that each KV head keeps of a prompt of n tokens, window included.

    Parameters
    ----------
    method : Method
        One that looks at prompts' lengths alone, as SparseMM does (section 3.3).
    n : int
        Tokens of the prompt.

    Returns
    -------
    ndarray
        [L, H] int64; `Method.keep` keeps as many.

    Raises
    ------
    UserError
        If the method looks at the prompt's attention, or n is no number of tokens.
    """
    check_int("tokens", n, least=1)
    shape = method.shape
    if method.keeps_all(n):
        return np.full((shape.layers, shape.kv_heads), n)
    if isinstance(method.allocation, LayerAllocation) or isinstance(method.layers, LayerShare):
        raise UserError(
            f"method={method.name}: what its heads keep depends on each prompt's attention, not on "
            "its length alone; take a method that shares the budget before it sees a prompt"
        )
    return method.scorer.window + method.counts(n)


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


# 0.1 of 30 tokens are 3 of them.
_ROUNDING = 1e-9
