"""Which tokens of one prompt are kept, under many methods at once, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sparsemm_eval.methods.allocation import LayerAllocation
from sparsemm_eval.methods.layers import LayerShare
from sparsemm_eval.methods.scoring import Checks, PromptLayer, Ranking, Scorer

if TYPE_CHECKING:
    from torch import Tensor

    from sparsemm_eval.methods.method import Method
    from sparsemm_eval.methods.picks import Pick


@dataclass(frozen=True, eq=False)
class _Read:
    """A layer under a method whose layers share the budget when all of them were read."""

    ranking: Ranking
    ranks: Tensor
    needs: dict[str, Tensor]


class PromptSelection:
    """What methods keep of one prompt, told as its layers are read.

    Equal scorers score and rank the prompt once. A method that shares the budget among layers by
    what it finds in them keeps more of a layer at first than in the end, see `finish`.

    Parameters
    ----------
    methods : sequence of Method
        All made for one shape.
    checks : Checks
        Where to leave what only the device knows of scores and counts; the caller settles it before
        what is kept is used.
    """

    def __init__(self, methods: Sequence[Method], checks: Checks) -> None:
        self.methods, self.checks = methods, checks
        # By row of a method that shares among layers: what is needed again, layer by layer.
        self.read: dict[int, list[_Read]] = {}
        self.weights: dict[int, list[float]] = {}
        # Of the layer that is read: rows of one rule differ in their budgets alone.
        self.weighed: dict[tuple[LayerShare, Ranking], float] = {}
        self.kept: list[Tensor] = []
        self.context: int | None = None

    def layer(self, layer: PromptLayer) -> Tensor:
        """Tokens that are kept of the next layer: [M, H, n] bool.

        The window and each head's best candidates; equal scores: the earlier token is kept.

        Raises
        ------
        UserError
            Naming the method, if its scores or counts are none that tokens can be kept by.
        """
        n = layer.tokens
        self.weighed.clear()
        groups: dict[tuple[Scorer, Pick | None, bool], list[int]] = {}
        for row, method in enumerate(self.methods):
            hidden = method.question == "hidden"
            if not method.keeps_all(self._context(layer) if hidden else n):
                groups.setdefault((method.scorer, method.picks, hidden), []).append(row)
        kept = None
        rankings: dict[tuple[Scorer, bool], tuple[Ranking, Tensor]] = {}
        for (scorer, picks, hidden), rows in groups.items():
            part = layer.first(self._context(layer)) if hidden else layer
            if (scorer, hidden) not in rankings:
                ranking = self.methods[rows[0]].ranking(part, self.checks)
                rankings[scorer, hidden] = ranking, ranking.ranks(scorer.window)
            ranking, ranks = rankings[scorer, hidden]
            counts = self._counts(rows, part, ranking, ranks)
            if picks is None and not hidden:
                # No rank is n or more: of other rows nothing is left out.
                chosen = ranks < counts[:, :, None]
                kept = chosen if kept is None else kept & chosen
                continue
            kept = self._all(layer) if kept is None else kept
            needs = {} if picks is None else part.given(picks)
            chosen = _choose(picks, ranking, ranks, counts[rows], needs)
            kept[rows, :, : part.tokens] &= chosen
        kept = self._all(layer) if kept is None else kept
        if self.read:
            self.kept.append(kept)
        return kept

    def finish(self) -> list[Tensor] | None:
        """What is kept in the end, once all layers were read, a tensor [M, H, n] a layer.

        Returns
        -------
        list of Tensor or None
            Of each layer a part of what `layer` told; None where that was all of it already.
        """
        if not self.read:
            return None
        kept = [layer.clone() for layer in self.kept]
        for row, layers in self.read.items():
            method = self.methods[row]
            prompt = method.prompt(layers[0].ranks.shape[1])
            totals = method.layers.totals(prompt, np.array(self.weights[row]), method.exact)
            for index, (one, total) in enumerate(zip(layers, totals.tolist(), strict=True)):
                counts = method.counts_of_layer(prompt, index, one.ranking, self.checks, int(total))
                counts = counts.to(one.ranks.device)[None]
                chosen = _choose(method.picks, one.ranking, one.ranks, counts, one.needs)
                kept[index][row, :, : chosen.shape[-1]] &= chosen[0]
        return kept

    def _counts(
        self, rows: Sequence[int], layer: PromptLayer, ranking: Ranking, ranks: Tensor
    ) -> Tensor:
        """Tokens beside the window of each head under some methods, n under others: [M, H]."""
        import torch

        n = layer.tokens
        known = np.full((len(self.methods), len(ranks)), n, dtype=np.int64)
        asked: dict[int, Tensor] = {}
        for row in rows:
            method = self.methods[row]
            if isinstance(method.layers, LayerShare):
                known[row] = self._for_now(row, layer, ranking, ranks)
            elif isinstance(method.allocation, LayerAllocation):
                total = None
                if method.layers is not None:
                    total = int(method.layer_counts(n)[layer.index].sum())
                asked[row] = method.counts_of_layer(
                    method.prompt(n), layer.index, ranking, self.checks, total
                )
            else:
                known[row] = method.counts(n)[layer.index]
        counts = torch.from_numpy(known).to(ranks.dtype).to(ranks.device, non_blocking=True)
        for row, count in asked.items():
            counts[row] = count
        return counts

    def _for_now(self, row: int, layer: PromptLayer, ranking: Ranking, ranks: Tensor) -> int:
        """At least what each head keeps in the end, whatever the layers to come are like."""
        method = self.methods[row]
        share, window = method.layers, method.scorer.window
        if (share, ranking) not in self.weighed:
            weight = share.weight(ranking, layer.query, layer.key, window, **layer.given(share))
            self.weighed[share, ranking] = method.checked_weight(float(weight), layer.index)
        prompt = method.prompt(layer.tokens)
        weights = self.weights.setdefault(row, [])
        weights.append(self.weighed[share, ranking])
        needs = {} if method.picks is None else layer.given(method.picks)
        self.read.setdefault(row, []).append(_Read(ranking, ranks, needs))
        most = share.most(prompt, np.array(weights))
        if isinstance(method.allocation, LayerAllocation):
            most = min(most * len(ranks), prompt.candidates)  # one head may get all
        return most if method.picks is None else method.picks.enough(most, prompt.candidates)

    def _context(self, layer: PromptLayer) -> int:
        """Tokens before the question: up to the last that shows something; all where none does."""
        if self.context is None:
            if layer.visual is None:
                raise ValueError("question=hidden needs visual, which was not given")
            places = layer.visual.nonzero()
            self.context = int(places[-1]) + 1 if len(places) else layer.tokens
        return self.context

    def _all(self, layer: PromptLayer) -> Tensor:
        import torch

        heads, n = layer.key.shape[:2]
        return torch.ones(len(self.methods), heads, n, dtype=torch.bool, device=layer.key.device)


def keep_rows(
    methods: Sequence[Method], layer: PromptLayer, checks: Checks | None = None
) -> Tensor:
    """Choose the tokens of one layer that each KV head keeps of one prompt, under each method.

    Parameters
    ----------
    methods : sequence of Method
        All made for one shape; none shares the budget among layers by what it finds in them.
    layer : PromptLayer
        What the methods look at.
    checks : Checks, optional
        As of `PromptSelection`; without, they are settled here.

    Returns
    -------
    Tensor
        [M, H, n] bool.

    Raises
    ------
    UserError
        As `PromptSelection.layer`.
    """
    left = Checks() if checks is None else checks
    kept = PromptSelection(methods, left).layer(layer)
    if checks is None:
        left.settle()
    return kept


def keep_prompt(methods: Sequence[Method], layers: Sequence[PromptLayer]) -> list[Tensor]:
    """Choose the tokens of one prompt that each KV head of each layer keeps, under each method.

    Parameters
    ----------
    methods : sequence of Method
        All made for one shape.
    layers : sequence of PromptLayer
        All of the model's, in order.

    Returns
    -------
    list of Tensor
        [M, H, n] bool, one a layer.

    Raises
    ------
    UserError
        As `PromptSelection.layer`.
    """
    checks = Checks()
    selection = PromptSelection(methods, checks)
    kept = [selection.layer(layer) for layer in layers]
    kept = selection.finish() or kept
    checks.settle()
    return kept


def _choose(
    picks: Pick | None, ranking: Ranking, ranks: Tensor, counts: Tensor, needs: dict[str, Tensor]
) -> Tensor:
    """[R, H, n] bool: the window, and so many candidates of each head."""
    if picks is None:
        return ranks < counts[:, :, None]
    kept = (ranks < 0).expand(len(counts), *ranks.shape).clone()
    kept[..., : ranking.scores.shape[1]] |= picks.choose(ranking, counts, **needs)
    return kept
