"""Memory that slots are laid in, kept from prompt to prompt."""

from __future__ import annotations

from torch import Tensor

# Bytes of keys or values that a layer gets beyond what is asked for, at most: for the next prompt.
HEADROOM = 16 << 20


class Room:
    """Memory for one layer's slots that outlives the layer: the next one is laid where it was.

    What reads slots at a fixed place, a CUDA graph, thus stays valid from prompt to prompt, unless
    more room is needed than there is. Only the newest layer that was laid here may be used.
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


def memory_for(room: Room | None, name: str, slots: int, like: Tensor) -> Tensor:
    """[slots, D] of a room's keys or values, or of new memory where there is no room."""
    return like.new_empty(slots, like.shape[-1]) if room is None else room.take(name, slots, like)


def _alike(one: Tensor, other: Tensor) -> bool:
    kinds = [(x.dtype, x.device, x.shape[-1]) for x in (one, other)]
    return kinds[0] == kinds[1]
