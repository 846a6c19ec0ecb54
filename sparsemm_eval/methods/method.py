"""A method: which tokens of a prompt each KV head keeps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsemm_eval.errors import UserError, check_int
from sparsemm_eval.methods.allocation import (
    Allocation,
    LayerAllocation,
    Prompt,
)
from sparsemm_eval.methods.head_scores import ModelShape
from sparsemm_eval.methods.scoring import (
    Checks,
    Ranking,
    Scorer,
    is_plain_tensor,
    scorer_of_layer,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Method:
    """One way of compressing a prompt's cache: a scorer, an allocation and a budget.

    A value: print it, compare it, key by it. Made by `make_method`, which checks the settings.

    Parameters
    ----------
    name : str
        As registered.
    shape : ModelShape
        The decoder it is for.
    budget : int or None
        Mean tokens kept per KV head, window included; None keeps everything.
    scorer : Scorer
        Ranks the tokens of a head.
    allocation : Allocation or LayerAllocation
        Shares the budget among the heads.
    exact : bool
        Spend exactly the budget instead of the published rounding.
    """

    name: str
    shape: ModelShape
    budget: int | None
    scorer: Scorer
    allocation: Allocation | LayerAllocation
    exact: bool = False

    def keeps_all(self, n: int) -> bool:
        """Whether a prompt of n tokens is left whole."""
        return self.budget is None or n <= self.budget

    def keep(self, query: Tensor, key: Tensor, layer: int, valid: Tensor | None = None) -> Tensor:
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

        Returns
        -------
        Tensor
            [B, H, n] bool; a padded row gets what it would get alone, its padding False.

        Raises
        ------
        ValueError
            If shapes do not fit the model or each other, or the padding is not on the left.
        UserError
            If the method's scores or counts are none that tokens can be kept by.
        """
        import torch

        self._check_tensors(query, key, layer)
        rows, heads, n, _ = key.shape
        lengths = [n] * rows if valid is None else row_lengths(valid, rows, n)
        mask = torch.zeros(rows, heads, n, dtype=torch.bool, device=key.device)
        for row, length in enumerate(lengths):
            start = n - length
            mask[row, :, start:] = keep_rows((self,), query[row], key[row, :, start:], layer)[0]
        return mask

    def prompt(self, n: int) -> Prompt:
        """What the allocation knows of a prompt of n tokens, more than the budget."""
        window = self.scorer.window
        return Prompt(self.shape, self.budget - window, n - window)

    def most_kept(self, layer: int, n: int) -> int | None:
        """Tokens that a layer keeps of a prompt of n, over all its KV heads, or at most.

        Known without scores, and so without waiting for the device; None where only scores tell.
        """
        heads = self.shape.kv_heads
        if self.keeps_all(n):
            return heads * n
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

    def counts_of_layer(self, n: int, layer: int, ranking: Ranking, checks: Checks) -> Tensor:
        """Tokens beside the window of a prompt of n by a `LayerAllocation`, [H] int64.

        Raises
        ------
        UserError
            As `counts`; what only the device knows is added to the checks.
        """
        prompt = self.prompt(n)
        with self._named():
            counts = self.allocation.counts(prompt, ranking, self.exact)
        most = self.allocation.most(prompt, layer, self.exact)
        within = counts.amin() >= 0
        if most is not None:
            within &= counts.sum() <= most
        checks.add(
            within,
            f"method={self.name}: {type(self.allocation).__name__} gives a KV head of layer "
            f"{layer} a negative number of tokens, or the layer more than its `most`, {most}",
        )
        return counts

    def ranking(self, query: Tensor, key: Tensor, layer: int, checks: Checks) -> Ranking:
        """Score and rank the candidates of one prompt: query [Hq, m, d] and key [H, n, d].

        Raises
        ------
        UserError
            Naming the method, if the scores have another shape or are no floats; that they are
            finite and not negative is added to the checks.
        """
        scores = scorer_of_layer(self.scorer, layer)(query, key)
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
            f"{scorer} gives a score that is NaN, infinite or negative in layer {layer}: a score "
            f"is finite and not negative (or the model's own numbers are not finite in "
            f"{key.dtype}; take another dtype)",
        )
        return Ranking(scores)

    @property
    def settings(self) -> dict[str, Any]:
        """All that makes this method what it is, plain values in a fixed order (a cell's)."""
        if self.budget is None:
            return {}
        values = {"budget": self.budget}
        if self.allocation.rounds:
            values["allocation"] = "exact" if self.exact else "paper"
        for part in (self.scorer, self.allocation):
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
        for part in (self.scorer, self.allocation):
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


def keep_rows(
    methods: Sequence[Method],
    query: Tensor,
    key: Tensor,
    layer: int,
    checks: Checks | None = None,
) -> Tensor:
    """Choose the tokens of one layer that each KV head keeps of one prompt, under each method.

    Equal scorers score and rank the prompt once.

    Parameters
    ----------
    methods : sequence of Method
        All made for one shape.
    query : Tensor
        [Hq, m, d] after RoPE: the last ``window`` positions at least.
    key : Tensor
        [H, n, d] after RoPE, without padding.
    layer : int
        Index of the layer.
    checks : Checks, optional
        Where to leave what only the device knows of scores and counts; the caller settles it before
        what is kept is used. Without, it is settled here.

    Returns
    -------
    Tensor
        [M, H, n] bool: the window and each head's best candidates. Equal scores: the earlier token
        is kept.

    Raises
    ------
    UserError
        Naming the method, if its scores or counts are none that tokens can be kept by.
    """
    import torch

    left = Checks() if checks is None else checks
    heads, n, _ = key.shape
    sharing: dict[Scorer, list[int]] = {}
    for row, method in enumerate(methods):
        if not method.keeps_all(n):
            sharing.setdefault(method.scorer, []).append(row)
    kept = None
    for scorer, rows in sharing.items():
        ranking = methods[rows[0]].ranking(query, key, layer, left)
        ranks = ranking.ranks(scorer.window)
        # No rank is n or more: under methods that do not share this scorer it leaves out nothing.
        known = np.full((len(methods), heads), n, dtype=np.int64)
        asked: dict[int, Tensor] = {}
        for row in rows:
            method = methods[row]
            if isinstance(method.allocation, LayerAllocation):
                asked[row] = method.counts_of_layer(n, layer, ranking, left)
            else:
                known[row] = method.counts(n)[layer]
        counts = torch.from_numpy(known).to(ranks.dtype).to(ranks.device, non_blocking=True)
        for row, count in asked.items():
            counts[row] = count
        chosen = ranks < counts[:, :, None]
        kept = chosen if kept is None else kept & chosen
    if checks is None:
        left.settle()
    if kept is None:
        return torch.ones(len(methods), heads, n, dtype=torch.bool, device=key.device)
    return kept


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
    if isinstance(method.allocation, LayerAllocation):
        raise UserError(
            f"method={method.name}: what its heads keep depends on each prompt's attention, not on "
            "its length alone; take a method that shares the budget before it sees a prompt"
        )
    return method.scorer.window + method.counts(n)


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)
