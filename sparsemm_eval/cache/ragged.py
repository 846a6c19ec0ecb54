"""RaggedKV: the keys and values of one layer, each (row, KV head) as long as it needs to be."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from sparsemm_eval.cache.backends import append_attend

LEAST_SLACK = 16
MOST_SLACK = 256
# Bytes of keys or values that a layer gets beyond what is asked for, at most: for the next prompt.
HEADROOM = 16 << 20


class Buffer:
    """Memory for one layer's slots that outlives the layer: the next one is laid where it was.

    What reads slots at a fixed place, a CUDA graph, thus stays valid from prompt to prompt, unless
    more is needed than there is. Only the newest layer that was laid here may be used.
    """

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def take(self, name: str, slots: int, like: Tensor) -> Tensor:
        """Hand out [slots, D] of the keys' or values' memory, as it was left there."""
        held = getattr(self, name)
        if held is None or len(held) < slots or not _alike(held, like):
            setattr(self, name, None)  # given back before more is asked for
            more = min(slots // 4, HEADROOM // (like.shape[-1] * like.element_size()))
            held = like.new_zeros(slots + more, like.shape[-1])
            setattr(self, name, held)
        return held[:slots]

    def bytes(self) -> int:
        """Bytes held, in use or not."""
        return sum(held.nbytes for held in (self.keys, self.values) if held is not None)


@dataclass(frozen=True)
class CacheBytes:
    """Bytes a cache really holds.

    Parameters
    ----------
    keys, values : int
        Bytes of the tokens that are there.
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
        [T, D], all slots; free ones are zero, and those that belong to no sequence, behind the last
        one's, hold any token.
    offsets : Tensor
        [rows * kv_heads + 1] int32.
    shape : (int, int)
        Rows and KV heads.
    slack : int
        Free slots of each sequence.
    steps : int
        Tokens appended to every sequence since the prompt.
    buffer : Buffer, optional
        Where keys and values lie, and will when they are copied.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        offsets: Tensor,
        shape: tuple[int, int],
        slack: int,
        steps: int = 0,
        buffer: Buffer | None = None,
    ) -> None:
        self.keys, self.values, self.offsets = keys, values, offsets
        self.rows, self.kv_heads = shape
        self.slack, self.steps, self.buffer = slack, steps, buffer
        self.lengths = offsets.diff() - slack

    @classmethod
    def pack(
        cls,
        key: Tensor,
        value: Tensor,
        mask: Tensor,
        most: int | None = None,
        buffer: Buffer | None = None,
    ) -> RaggedKV:
        """Take the kept tokens out of one layer's dense keys and values.

        Parameters
        ----------
        key, value : Tensor
            [B, H, n, D].
        mask : Tensor
            [R, H, n] bool with R a multiple of B: rows ``b * R // B ..`` are made of sample b.
        most : int, optional
            At least as many as the mask has True. Without it the device is asked and waited for.
        buffer : Buffer, optional
            Where to lay them; new memory otherwise.
        """
        rows, heads, n = mask.shape
        sequences, device = rows * heads, key.device
        slack = LEAST_SLACK  # most answers are short; whoever goes on grows in larger steps
        kept = int(torch.count_nonzero(mask)) if most is None else most
        # Where the mask is True, in its order; what `most` says too much stands at its end.
        at = torch.nonzero_static(mask.reshape(-1), size=kept, fill_value=mask.numel())[:, 0]
        borders = torch.arange(sequences + 1, device=device)
        offsets = (torch.searchsorted(at, borders * n) + borders * slack).to(torch.int32)
        sequence = at // n
        slots = torch.arange(kept, device=device) + sequence * slack
        sample, head = borders // heads // (rows // key.shape[0]), borders % heads
        free = offsets[1:, None] - torch.arange(1, slack + 1, device=device)
        packed, sources = [], {}
        for name, x in (("keys", key), ("values", value)):
            tokens, steps = _in_memory_order(x)
            if steps not in sources:
                # A token's place is its sequence's and so many steps; behind all, the first one's.
                begin = sample * steps[0] + head * steps[1] - borders * n * steps[2]
                begin[-1] = -mask.numel() * steps[2]
                source = at.new_zeros(kept + sequences * slack)
                source.scatter_(0, slots, begin[sequence] + at * steps[2])
                sources[steps] = source
            source = sources[steps]
            laid = memory_for(buffer, name, len(source), tokens)
            torch.index_select(tokens.detach(), 0, source, out=laid)
            # Free slots are zero and not left as they were: a kernel that reads one and multiplies
            # it by a weight of zero must not meet NaN.
            packed.append(laid.index_fill_(0, free.flatten(), 0))
        return cls(*packed, offsets, (rows, heads), slack, buffer=buffer)

    @cached_property
    def kept(self) -> Tensor:
        """Tokens of the prompt in each sequence, [rows, kv_heads] int64 on the CPU."""
        return self.kept_of(self.offsets.cpu())

    def kept_of(self, offsets: Tensor) -> Tensor:
        """`kept`, from a copy of the offsets on the CPU."""
        counts = offsets.diff().long() - self.steps - self.slack
        return counts.view(self.rows, self.kv_heads)

    @property
    def longest(self) -> int:
        """Slots of the longest sequence, known without asking the device."""
        return int(self.kept.max()) + self.steps + self.slack

    def count_token(self, tokens: int = 1) -> None:
        """Note on the host that every sequence on the device is so many tokens longer."""
        self.steps += tokens
        self.slack -= tokens

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
            What the logits are multiplied by.
        backend : str
            As resolved by `sparsemm_eval.cache.backends.resolve_backend`.

        Returns
        -------
        Tensor
            [R, 1, Hq, D].
        """
        self.make_way()
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
        self.count_token()
        return out.reshape(rows, 1, query_heads, dim)

    def make_way(self) -> None:
        """Have a free slot in every sequence for the next token."""
        if self.slack == 0:
            self.grow()

    def held(self) -> Tensor:
        """Tokens that each sequence holds by now, [rows, kv_heads] int64 on the CPU."""
        return self.kept + self.steps

    def select_rows(self, rows: Tensor) -> RaggedKV:
        """These rows, in this order and as often as named: [R'] indices."""
        rows = rows.cpu()
        heads = torch.arange(self.kv_heads)
        return self._gather((rows[:, None] * self.kv_heads + heads).flatten(), self.kept[rows])

    def cut(self, kept: Tensor, stay: Tensor) -> RaggedKV:
        """Only tokens of the prompt that stay, before any was appended.

        Parameters
        ----------
        kept, stay : Tensor
            [R, H, n] bool: what is held, and the part of it that stays.
        """
        n = kept.shape[-1]
        at = kept.reshape(-1).nonzero()[:, 0]
        slots = torch.arange(len(at), device=at.device) + at // n * self.slack
        slots = slots[stay.reshape(-1)[at]]
        counts, slack = stay.sum(-1).flatten(), self.slack
        owners = torch.repeat_interleave(counts, output_size=len(slots))
        places = torch.arange(len(slots), device=at.device) + owners * slack
        laid = []
        for name, x in (("keys", self.keys), ("values", self.values)):
            tokens = x[slots]  # a copy: the buffer may be handed out anew where they lay
            size = len(slots) + len(counts) * slack
            laid.append(memory_for(self.buffer, name, size, tokens).zero_())
            laid[-1][places] = tokens
        shape = (self.rows, self.kv_heads)
        return RaggedKV(*laid, offsets_of(counts + slack), shape, slack, buffer=self.buffer)

    def bytes(self) -> CacheBytes:
        """Bytes held by this layer."""
        slot = self.keys.shape[-1] * self.keys.element_size()
        filled = int(self.held().sum()) * slot
        slack = 2 * (len(self.keys) * slot - filled)
        metadata = (self.offsets.numel() + self.lengths.numel()) * self.lengths.element_size()
        return CacheBytes(filled, filled, slack, metadata)

    def row_bytes(self) -> Tensor:
        """Bytes each row holds of this layer, slack and metadata included: [rows] int64, CPU."""
        slot = self.keys.shape[-1] * self.keys.element_size()
        slots = self.kept.sum(1) + self.kv_heads * (self.steps + self.slack)
        return 2 * slots * slot + 2 * self.kv_heads * self.lengths.element_size()

    def grow(self) -> None:
        """Copy the layer to a larger one, with fresh slack."""
        everything = torch.arange(self.rows * self.kv_heads)
        self.__dict__ = self._gather(everything, self.kept).__dict__

    def _gather(self, sequences: Tensor, kept: Tensor) -> RaggedKV:
        """Copy sequences into a new layer with fresh slack."""
        device = self.keys.device
        slack = _slack(kept + self.steps)
        if self.buffer is not None:
            # What reads it there has to be told of every copy: make them rare.
            slack = max(slack, min(self.steps, MOST_SLACK))
        counts = (kept.flatten() + self.steps).to(device, non_blocking=True)
        total = int(kept.sum()) + kept.numel() * self.steps
        count = torch.arange(len(sequences), device=device)
        new = torch.repeat_interleave(count, counts, output_size=total)
        within = torch.arange(total, device=device)
        sequences = sequences.to(device, non_blocking=True)
        slots = self.offsets[sequences][new] + within - (counts.cumsum(0) - counts)[new]
        places, size = within + new * slack, total + len(sequences) * slack
        gathered = []
        for name, x in (("keys", self.keys), ("values", self.values)):
            tokens = x[slots]  # a copy: the buffer may be handed out anew where they lay
            laid = memory_for(self.buffer, name, size, tokens).zero_()
            laid[places] = tokens
            gathered.append(laid)
        shape = (kept.shape[0], self.kv_heads)
        offsets = offsets_of(counts + slack)
        grown = type(self)(*gathered, offsets, shape, slack, self.steps, self.buffer)
        grown.kept = kept
        return grown


def _slack(lengths: Tensor) -> int:
    """Free slots a sequence when a layer grows: 10% of the mean length, 16 to 256."""
    mean = int(lengths.sum()) // max(1, lengths.numel())
    return max(LEAST_SLACK, min(mean // 10, MOST_SLACK))


def offsets_of(capacities: Tensor) -> Tensor:
    """First slot of each sequence, and the end of the last: [S + 1] int32."""
    ends = capacities.cumsum(0, dtype=torch.int32)
    return functional.pad(ends, (1, 0))


def _in_memory_order(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Tokens of [B, H, n, D] as [B * H * n, D], and steps to the next sample, head and position.

    Models make them as [B, n, H, D] and swap: they are read so, without a copy of the layer.
    """
    _, heads, n, dim = x.shape
    swapped = x.transpose(1, 2)
    if swapped.is_contiguous():
        return swapped.view(-1, dim), (n * heads, 1, heads)
    return x.reshape(-1, dim), (heads * n, n, 1)


def memory_for(buffer: Buffer | None, name: str, slots: int, like: Tensor) -> Tensor:
    """[slots, D] of a buffer's keys or values, or of new memory where there is no buffer."""
    return (
        like.new_empty(slots, like.shape[-1]) if buffer is None else buffer.take(name, slots, like)
    )


def _alike(one: Tensor, other: Tensor) -> bool:
    kinds = [(x.dtype, x.device, x.shape[-1]) for x in (one, other)]
    return kinds[0] == kinds[1]
