"""TGV-KV: what the text looks at, weighted by how much the text looks at it in turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparsemm_eval.methods.layers import LayerShare
from sparsemm_eval.methods.scoring import WithoutWindow

if TYPE_CHECKING:
    from torch import Tensor

    from sparsemm_eval.methods.scoring import Ranking


@dataclass(frozen=True)
class TextToVision(WithoutWindow):
    """Attention of the text to the vision, each text token weighted by the text's attention to it.

    TGV-KV (arXiv 2606.03075): softmax over the visual keys alone, and over those of the text for
    the weights, which are means over the text from that token on. Text stands above all vision,
    ordered by its weight. The published code takes one softmax over all keys.
    """

    needs: ClassVar[tuple[str, ...]] = ("visual",)

    def __call__(self, query: Tensor, key: Tensor, visual: Tensor) -> Tensor:
        """Scores [H, n] from query [Hq, n, d], key [H, n, d] and visual [n]."""
        import torch

        visual = visual.to(key.device)
        text = (~visual).nonzero()[:, 0]
        to_text = _attention(query, key, text, ~visual)[..., text]  # [H, G, T, T]
        later = torch.arange(len(text), 0, -1, device=key.device)
        weight = to_text.sum(-2, dtype=torch.float64) / later  # [H, G, T]
        to_vision = _attention(query, key, text, visual).double()  # [H, G, T, n]
        seen = torch.einsum("hgt,hgtn->hn", weight, to_vision) / weight.shape[1]
        above = 1 + seen.amax(-1, keepdim=True)
        seen[:, text] = above + weight.mean(1)
        return seen


@dataclass(frozen=True)
class ByVision(LayerShare):
    """By how much of its attention the text pays to the vision, of the softmax over all keys."""

    needs: ClassVar[tuple[str, ...]] = ("visual",)

    def weight(
        self, ranking: Ranking, query: Tensor, key: Tensor, window: int, visual: Tensor
    ) -> Tensor:
        import torch

        visual = visual.to(key.device)
        text = (~visual).nonzero()[:, 0]
        paid = _attention(query, key, text, torch.ones_like(visual))[..., visual]
        return paid.sum(dtype=torch.float64)


def _attention(query: Tensor, key: Tensor, rows: Tensor, among: Tensor) -> Tensor:
    """Softmax of some queries over some keys, causal: [H, G, rows, n]; 0 where a query sees none.

    Parameters
    ----------
    query, key : Tensor
        [Hq, n, d] and [H, n, d].
    rows : Tensor
        Positions of the queries.
    among : Tensor
        [n] bool, the keys.
    """
    import torch

    exact = torch.promote_types(key.dtype, torch.float32)
    heads, n, dim = key.shape
    asked = query[:, rows].to(exact).reshape(heads, len(query) // heads * len(rows), dim)
    logits = (asked @ key.to(exact).transpose(1, 2)).mul_(dim**-0.5)
    unseen = ~among | (torch.arange(n, device=key.device) > rows[:, None])
    logits = logits.view(heads, len(query) // heads, len(rows), n).masked_fill_(unseen, -torch.inf)
    return logits.softmax(-1).nan_to_num_(0.0)
