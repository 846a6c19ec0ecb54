"""SlidingKV: the keys and values of a layer that attends to the last tokens only."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsemm_eval.cache.ragged import Buffer, RaggedKV, offsets_of


class SlidingKV(RaggedKV):
    """Keys and values of one layer of which every sequence holds no more than a window.

    A sequence whose window is full begins one slot later at every step; the slots it has left lie
    idle until the layer is copied, as it is when free ones run out. Keys are stored after RoPE, so
    that where they lie does not matter.
    """

    window: int

    @classmethod
    def pack_last(
        cls,
        key: Tensor,
        value: Tensor,
        seen: Tensor,
        held: list[int],
        window: int,
        copies: int,
        buffer: Buffer | None = None,
    ) -> SlidingKV:
        """Take a prompt's last tokens.

        Parameters
        ----------
        key, value : Tensor
            [B, H, n, D].
        seen : Tensor
            [B, n] bool: the tokens of each sample that its next one sees, at most window - 1.
        held : list of int
            How many these are, by sample.
        window : int
            Tokens that one attends to, its own included.
        copies : int
            Rows of each sample.
        buffer : Buffer, optional
            Where to lay them.
        """
        heads = key.shape[1]
        mask = seen[:, None, None].expand(-1, copies, heads, -1).flatten(0, 1)
        store = cls.pack(key, value, mask, copies * heads * sum(held), buffer)
        rows = torch.tensor(held).repeat_interleave(copies)
        store.kept = rows[:, None].expand(-1, heads).contiguous()
        store.window = window
        return store

    def held(self) -> Tensor:
        return super().held().clamp(max=self.window)

    def make_way(self) -> None:
        super().make_way()
        slide(self.offsets, self.lengths, self.window)

    def _gather(self, sequences: Tensor, kept: Tensor) -> SlidingKV:
        # Counted on the host: a static step slides offsets of its own.
        appended = (self.kept + self.steps).flatten()
        offsets = offsets_of(appended + self.slack)
        offsets[:-1] += (appended - self.window).clamp(min=0).int()
        self.offsets = offsets.to(self.keys.device, non_blocking=True)
        # What has left the window counts as never kept; `kept` may fall below zero.
        grown = super()._gather(sequences, kept.clamp(max=self.window - self.steps))
        grown.window = self.window
        return grown


def slide(offsets: Tensor, lengths: Tensor, window: int) -> None:
    """Let each sequence whose window is full leave its first token, in place, on the device.

    Parameters
    ----------
    offsets, lengths : Tensor
        [S + 1] and [S] int32, as of a `RaggedKV`.
    window : int
        The most tokens that one attends to.
    """
    full = (lengths == window).to(offsets.dtype)
    offsets[:-1].add_(full)
    lengths.sub_(full)
