"""Ways to append one token and attend, side by side: ours, and those it is measured against."""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsemm_eval.bench.layers import Case, Layers, Token
from sparsemm_eval.bench.models import DTYPES
from sparsemm_eval.cache.backends import append, append_attend, resolve_backend


class Entry:
    """One way, over several layers.

    Parameters
    ----------
    layers : Layers
        Keys, values and tokens; an entry may take copies in a layout of its own.
    count : int
        The first so many layers are used.
    """

    name: str
    note = ""
    capturable = True  # in a CUDA graph
    graph_note = ""

    def __init__(self, layers: Layers, count: int) -> None:
        self.layers, self.count = layers, count

    @staticmethod
    def bytes(case: Case) -> int:
        """Bytes of memory a layer, beside the ragged cache that all entries share."""
        return 0

    @staticmethod
    def unfit(case: Case, device: torch.device) -> str:
        """Why it cannot run, if it cannot."""
        return ""

    def step(self, layer: int) -> Tensor:
        """Append the layer's token and attend: [S, G, D]."""
        raise NotImplementedError

    def newest(self, layer: int) -> tuple[Tensor, Tensor]:
        """Key and value [S, D] that the cache holds where the layer's token belongs."""
        raise NotImplementedError


class Ragged(Entry):
    """A backend of the ragged cache, called as `RaggedKV` calls it."""

    def step(self, layer: int) -> Tensor:
        query, key, value = self.layers.tokens[layer]
        store = self.layers.stores[layer]
        return append_attend(self.name, query, key, value, store, self.layers.scale)

    def newest(self, layer: int) -> tuple[Tensor, Tensor]:
        store = self.layers.stores[layer]
        slots = store.offsets[:-1] + torch.tensor(self.layers.lengths, device=self.layers.device)
        return store.keys[slots], store.values[slots]


class Compiled(Ragged):
    """This project's op: one call appends and attends."""

    name = "cuda_ext"

    @staticmethod
    def unfit(case: Case, device: torch.device) -> str:
        return _refused("cuda_ext", case, device)


class Varlen(Ragged):
    """Append by index, then varlen flash attention over the slots, free ones between them."""

    name = "varlen"

    @staticmethod
    def unfit(case: Case, device: torch.device) -> str:
        return _refused("varlen", case, device) if device.type == "cuda" else "CUDA only"


class Torch(Ragged):
    """Append by index, then SDPA sequence by sequence; one call where all are equally long."""

    name = "torch"
    capturable = False
    graph_note = "not captured: its calls depend on the lengths"


class Concatenate(Entry):
    """As published code decodes: every token copies the flat cache, then varlen attention.

    The copy is as fast as torch has it: buffers and indices are given, nothing is allocated.
    """

    name = "concatenate"
    note = "buffers and indices of the copy are given, not timed"
    graph_note = "captured, though its shapes change with every token"

    def __init__(self, layers: Layers, count: int) -> None:
        super().__init__(layers, count)
        self.backend = "varlen" if layers.device.type == "cuda" else "torch"
        ends = torch.tensor(layers.lengths, device=layers.device).cumsum(0)
        self.last = ends + torch.arange(len(ends), device=layers.device)  # new tokens, in the copy
        slots = layers.slots()
        # Slot of each token of the copy; for new ones any slot, as they are written after.
        self.source = slots.new_zeros(len(slots) + len(ends))
        old = torch.ones_like(self.source, dtype=torch.bool)
        old[self.last] = False
        self.source[old] = slots
        lengths = [length + 1 for length in layers.lengths]
        self.copies = [
            _Copy(store.keys, store.values, self.source, lengths) for store in layers.stores[:count]
        ]

    @staticmethod
    def bytes(case: Case) -> int:
        lengths = case.lengths()
        return 2 * (sum(lengths) + len(lengths)) * case.layer.head_dim * case.element_size

    @staticmethod
    def unfit(case: Case, device: torch.device) -> str:
        return _refused("varlen", case, device) if device.type == "cuda" else ""

    def step(self, layer: int) -> Tensor:
        query, key, value = self.layers.tokens[layer]
        copy = self.copies[layer]
        copy.renew()
        return append_attend(self.backend, query, key, value, copy, self.layers.scale)

    def newest(self, layer: int) -> tuple[Tensor, Tensor]:
        copy = self.copies[layer]
        return copy.keys[self.last], copy.values[self.last]


class _Copy:
    """A flat cache that is written anew, one token a sequence longer; the slots of a backend."""

    def __init__(self, keys: Tensor, values: Tensor, source: Tensor, lengths: list[int]) -> None:
        self._old, self._source = (keys, values), source
        self.keys, self.values = (x.new_empty(len(source), x.shape[-1]) for x in self._old)
        self.offsets = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(keys.device)
        self._before = torch.tensor(lengths, dtype=torch.int32, device=keys.device) - 1
        self.lengths, self.longest = self._before.clone(), max(lengths)

    def renew(self) -> None:
        """Copy the cache, a free slot behind each sequence."""
        for old, new in zip(self._old, (self.keys, self.values), strict=True):
            torch.index_select(old, 0, self._source, out=new)
        self.lengths.copy_(self._before)


class Padded(Entry):
    """SDPA over a batch padded to its longest sequence; only the token is written.

    The padding holds tokens of other sequences, which the mask hides.
    """

    name = "padded_sdpa"

    def __init__(self, layers: Layers, count: int) -> None:
        super().__init__(layers, count)
        device, longest = layers.device, _padded(layers.case)
        self.rows = torch.arange(len(layers.lengths), device=device)
        self.place = torch.tensor(layers.lengths, device=device)
        columns = torch.arange(longest, device=device)
        store = layers.stores[0]
        source = (store.offsets[:-1, None] + columns) % len(store.keys)
        self.keys, self.values = (
            [held[source][:, None] for held in every[:count]]
            for every in ([s.keys for s in layers.stores], [s.values for s in layers.stores])
        )
        hidden = columns >= self.place[:, None]
        mask = torch.zeros(hidden.shape, dtype=store.keys.dtype, device=device)
        mask.masked_fill_(hidden, -torch.inf)
        self.masks = [mask[:, None, None].clone() for _ in range(count)]
        self.seen = mask.new_zeros(())  # on the device already: no host value in a graph

    @staticmethod
    def bytes(case: Case) -> int:
        places = len(case.lengths()) * _padded(case)
        return places * (2 * case.layer.head_dim + 1) * case.element_size

    def step(self, layer: int) -> Tensor:
        query, key, value = self.layers.tokens[layer]
        keys, values, mask = self.keys[layer], self.values[layer], self.masks[layer]
        keys[self.rows, 0, self.place] = key
        values[self.rows, 0, self.place] = value
        mask[self.rows, 0, 0, self.place] = self.seen
        every = mask.expand(-1, 1, query.shape[1], -1)
        return F.scaled_dot_product_attention(
            query[:, None], keys, values, attn_mask=every, scale=self.layers.scale
        )[:, 0]

    def newest(self, layer: int) -> tuple[Tensor, Tensor]:
        place = (self.rows, 0, self.place)
        return self.keys[layer][place], self.values[layer][place]


class FlashInfer(Ragged):
    """Append by index, then FlashInfer's paged decoding: pages of one token, heads as requests."""

    name = "flashinfer"
    note = "its plan, made on the host for every token, is not timed"
    GROUPS = (1, 2, 4, 8)  # of its decoding kernels

    def __init__(self, layers: Layers, count: int) -> None:
        super().__init__(layers, count)
        from flashinfer import BatchDecodeWithPagedKVCacheWrapper

        case, sequences = layers.case, len(layers.lengths)
        lengths = [length + 1 for length in layers.lengths]
        starts = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        workspace = torch.empty(128 << 20, dtype=torch.uint8, device=layers.device)
        self.wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD")
        dtype = layers.stores[0].keys.dtype
        self.wrapper.plan(
            starts.to(layers.device), layers.slots(free=1).int(),
            torch.ones(sequences, dtype=torch.int32, device=layers.device),
            case.layer.group_size, 1, case.layer.head_dim, 1,
            q_data_type=dtype, kv_data_type=dtype, sm_scale=layers.scale,
        )  # fmt: skip

    @staticmethod
    def unfit(case: Case, device: torch.device) -> str:
        if device.type != "cuda" or find_spec("flashinfer") is None:
            return "not installed" if device.type == "cuda" else "CUDA only"
        if case.layer.group_size not in FlashInfer.GROUPS:
            return f"its decoding takes groups of {FlashInfer.GROUPS}, not {case.layer.group_size}"
        return ""

    def step(self, layer: int) -> Tensor:
        token: Token = self.layers.tokens[layer]
        store = self.layers.stores[layer]
        append(token.key, token.value, store)
        pages = tuple(x[:, None, None] for x in (store.keys, store.values))
        return self.wrapper.run(token.query, pages)


ENTRIES: dict[str, type[Entry]] = {
    entry.name: entry for entry in (Compiled, Concatenate, Padded, Torch, Varlen, FlashInfer)
}


def _padded(case: Case) -> int:
    """Longest sequence after the token, rounded up to what fused kernels want of a mask."""
    return (max(case.lengths()) + 1 + 15) // 16 * 16


def _refused(backend: str, case: Case, device: torch.device) -> str:
    """Why the cache refuses a backend."""
    layer = case.layer
    try:
        resolve_backend(backend, device, DTYPES[case.dtype], layer.head_dim, layer.group_size)
    except ValueError as error:
        return str(error)
    return ""
