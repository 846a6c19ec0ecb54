"""RaggedKV: the keys and values of one layer, each (row, KV head) as long as it needs to be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsemm_eval.cache.kernels import append_attend

LEAST_SLACK = 16
MOST_SLACK = 256


@dataclass(frozen=True)
class CacheBytes:
    """Bytes a cache really holds.

    Parameters
    ----------
    keys, values : int
        Of tokens that are there.
    slack : int
        Slots reserved for tokens to come.
    metadata : int
        Offsets and lengths.
    """

    keys: int = 0
    values: int = 0
    slack: int = 0
    metadata: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.keys + self.values + self.slack + self.metadata

    def __add__(self, other: CacheBytes) -> CacheBytes:
        return CacheBytes(
            self.keys + other.keys,
            self.values + other.values,
            self.slack + other.slack,
            self.metadata + other.metadata,
        )


class RaggedKV:
    """Flat keys and values of one layer, with one range of slots a sequence.

    A sequence is one KV head of one row; sequence ``row * kv_heads + head`` owns the slots
    ``offsets[s] .. offsets[s + 1]``, of which the first ``lengths[s]`` are filled. Every sequence
    gets one token a step, so free slots run out everywhere at once: then, and only then, the
    layer is copied to a larger one.

    Parameters
    ----------
    keys, values : Tensor
        [T, D], all slots; unfilled ones are zero.
    kept : Tensor
        [rows, kv_heads] int64 on the CPU: tokens of the prompt in each sequence.
    slack : int
        Free slots of each sequence.
    steps : int
        Tokens appended to every sequence since the prompt.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, kept: Tensor, slack: int, steps: int = 0
    ) -> None:
        self.keys, self.values = keys, values
        self.kept, self.slack, self.steps = kept, slack, steps
        filled = kept.flatten() + steps
        offsets = torch.zeros(filled.numel() + 1, dtype=torch.int32)
        offsets[1:] = (filled + slack).cumsum(0)
        self.host_starts: list[int] = offsets[:-1].tolist()
        self.offsets = offsets.to(keys.device)
        self.lengths = filled.to(torch.int32).to(keys.device)

    @classmethod
    def pack(cls, key: Tensor, value: Tensor, mask: Tensor) -> RaggedKV:
        """Take the kept tokens out of one layer's dense keys and values.

        Parameters
        ----------
        key, value : Tensor
            [B, H, n, D].
        mask : Tensor
            [R, H, n] bool with R a multiple of B: rows ``b * R // B ..`` are made of sample b.
        """
        rows, heads, n = mask.shape
        kept = mask.sum(-1).cpu()
        slack = LEAST_SLACK  # most answers are short; whoever goes on grows in larger steps
        sequence, position = mask.view(rows * heads, n).nonzero(as_tuple=True)
        copies = rows // key.shape[0]
        source = (sequence // heads // copies * heads + sequence % heads) * n + position
        keys, values = (_spread(x.reshape(-1, x.shape[-1])[source], sequence, rows * heads, slack)
                        for x in (key, value))  # fmt: skip
        return cls(keys, values, kept, slack)

    @property
    def rows(self) -> int:
        """Samples under a method."""
        return self.kept.shape[0]

    @property
    def kv_heads(self) -> int:
        """KV heads a row."""
        return self.kept.shape[1]

    def host_lengths(self) -> list[int]:
        """`lengths`, known without asking the device."""
        return (self.kept.flatten() + self.steps).tolist()

    def append(self, key: Tensor, value: Tensor) -> None:
        """Write one token a sequence in place, [S, D] each; a free slot is there.

        `append_attend` makes room first and is the way in; this is for backends that have no op of
        their own for it.
        """
        slots = self.offsets[:-1] + self.lengths
        self.keys[slots], self.values[slots] = key, value
        self.lengths += 1
        self.count_token()

    def count_token(self) -> None:
        """Note on the host that every sequence on the device is one token longer."""
        self.steps += 1
        self.slack -= 1

    def append_attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, backend: str
    ) -> Tensor:
        """Append one token a row and let its query heads attend to what is there.

        Parameters
        ----------
        query : Tensor
            [R, Hq, 1, D].
        key, value : Tensor
            [R, H, 1, D].
        scale : float
            Of the logits.
        backend : str
            As resolved by `sparsemm_eval.cache.kernels.resolve_backend`.

        Returns
        -------
        Tensor
            [R, 1, Hq, D].
        """
        if self.slack == 0:
            self._grow()
        rows, query_heads, _, dim = query.shape
        sequences = rows * self.kv_heads
        out = append_attend(
            backend,
            query.reshape(sequences, query_heads // self.kv_heads, dim),
            key.reshape(sequences, dim),
            value.reshape(sequences, dim),
            self,
            scale,
        )
        return out.reshape(rows, 1, query_heads, dim)

    def select_rows(self, rows: Tensor) -> RaggedKV:
        """These rows, in this order and as often as named: [R'] indices."""
        rows = rows.cpu()
        heads = torch.arange(self.kv_heads)
        return self._gather((rows[:, None] * self.kv_heads + heads).flatten(), self.kept[rows])

    def bytes(self) -> CacheBytes:
        """Bytes held by this layer."""
        slot = self.keys.shape[-1] * self.keys.element_size()
        filled = (int(self.kept.sum()) + self.kept.numel() * self.steps) * slot
        slack = 2 * self.kept.numel() * self.slack * slot
        metadata = (self.offsets.numel() + self.lengths.numel()) * self.lengths.element_size()
        return CacheBytes(filled, filled, slack, metadata)

    def row_bytes(self) -> Tensor:
        """Bytes each row holds of this layer, slack and metadata included: [rows] int64, CPU."""
        slot = self.keys.shape[-1] * self.keys.element_size()
        slots = self.kept.sum(1) + self.kv_heads * (self.steps + self.slack)
        return 2 * slots * slot + 2 * self.kv_heads * self.lengths.element_size()

    def _grow(self) -> None:
        everything = torch.arange(self.rows * self.kv_heads)
        grown = self._gather(everything, self.kept)
        self.__dict__.update(grown.__dict__)

    def _gather(self, sequences: Tensor, kept: Tensor) -> RaggedKV:
        """Copy sequences into a new layer with fresh slack."""
        device = self.keys.device
        slack = _slack(kept + self.steps)
        counts = (kept.flatten() + self.steps).to(device)
        total = int(kept.sum()) + kept.numel() * self.steps
        count = torch.arange(len(sequences), device=device)
        new = torch.repeat_interleave(count, counts, output_size=total)
        within = torch.arange(total, device=device) - (counts.cumsum(0) - counts)[new]
        slots = self.offsets[sequences.to(device)][new] + within
        keys, values = (
            _spread(x[slots], new, len(sequences), slack) for x in (self.keys, self.values)
        )
        return RaggedKV(keys, values, kept, slack, self.steps)


def _slack(lengths: Tensor) -> int:
    """Free slots a sequence when a layer grows: 10% of the mean length, 16 to 256."""
    mean = int(lengths.sum()) // max(1, lengths.numel())
    return max(LEAST_SLACK, min(mean // 10, MOST_SLACK))


def _spread(tokens: Tensor, sequence: Tensor, sequences: int, slack: int) -> Tensor:
    """Lay tokens [K, D], ordered by sequence, into slots with free ones behind each sequence.

    Free slots are zero and not left as they were: a kernel that reads one and multiplies it by a
    weight of zero must not meet NaN.
    """
    slots = tokens.new_zeros(tokens.shape[0] + sequences * slack, tokens.shape[1])
    slots[torch.arange(tokens.shape[0], device=tokens.device) + sequence * slack] = tokens
    return slots
