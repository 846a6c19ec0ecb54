"""HeadBudgetCache: a transformers cache that compresses a prompt per KV head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sparsemm_eval.cache.kernels import BACKENDS, resolve_backend
from sparsemm_eval.cache.ragged import CacheBytes, RaggedKV
from sparsemm_eval.methods import HeadMask, Method, Scorer, row_lengths
from sparsemm_eval.methods.checks import check_choice


class HeadBudgetCache(Cache):
    """One prompt a row, kept as its method says, then grown token by token.

    The prompt runs dense, layer by layer: a layer's keys and values are compressed as soon as
    its attention is done, so that no more than one layer is dense at a time. The model must run
    on `sparsemm_eval.cache.attention`; on another attention it fails at the first layer.

    Parameters
    ----------
    methods : Method or sequence of Method
        With M methods a batch of B samples becomes B * M rows, sample by sample, once the prompt
        is read: row ``b * M + m`` is sample b under method m.
    backend : {"auto", "cuda_ext", "varlen", "torch"}
        What attends over the ragged rows.
    mask : HeadMask, optional
        Query heads that are silenced in every row.

    Raises
    ------
    ValueError
        For an unknown backend, no method, methods for different models, or a head to silence
        that the model does not have.
    """

    def __init__(
        self,
        methods: Method | Sequence[Method],
        backend: str = "auto",
        mask: HeadMask | None = None,
    ) -> None:
        methods = (methods,) if isinstance(methods, Method) else tuple(methods)
        if len({method.shape for method in methods}) != 1:
            raise ValueError("methods of one cache must be at least one and of one ModelShape")
        check_choice("backend", backend, BACKENDS)
        if mask is not None:
            mask.check_shape(methods[0].shape)
        prompt = _Prompt()
        layers = range(methods[0].shape.layers)
        super().__init__(
            layers=[RaggedLayer(layer, methods, backend, prompt, mask) for layer in layers]
        )
        self.methods = methods
        self._prompt = prompt

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[AttendingLayer, AttendingLayer]:
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"the model has a layer {layer_idx}, but the methods are for {len(self.layers)} "
                "layers: make them with the model's own ModelShape"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def kept(self) -> Tensor:
        """Tokens of the prompt that are kept, [rows, L, H] int64 on the CPU."""
        return torch.stack([layer.filled().kept for layer in self.layers], 1)

    def prompt_lengths(self) -> list[int]:
        """Tokens of each row's prompt, padding excluded."""
        return list(self._prompt.rows)

    def bytes(self) -> CacheBytes:
        """Bytes really held: keys, values, slack and metadata, all layers."""
        return sum((layer.filled().bytes() for layer in self.layers), CacheBytes())

    def row_bytes(self) -> Tensor:
        """Bytes that each row really holds, in all layers: [rows] int64 on the CPU."""
        return sum(layer.filled().row_bytes() for layer in self.layers)

    def backend(self) -> str:
        """What attends over the ragged rows, once a prompt was read."""
        return self.layers[0].resolved

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError(
            "HeadBudgetCache cannot take tokens back: assisted decoding needs another cache"
        )

    def reset(self) -> None:
        """Forget the prompt; the next call reads a new one."""
        self._prompt.lengths, self._prompt.rows = [], []
        super().reset()


class AttendingLayer(CacheLayerMixin):
    """A cache layer that does the attention itself.

    ``update`` returns the layer in place of keys and values; the attention function, which the
    model calls next, finds it there. Tensors are never passed on, so a model left on another
    attention fails instead of silently doing something else.
    """

    @abstractmethod
    def attend(
        self, module: torch.nn.Module, query: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        """Attention of the tokens just given to ``update``; [B, Hq, m, D] to [B, m, Hq, D]."""


class RaggedLayer(AttendingLayer):
    """One layer of a HeadBudgetCache: dense while its prompt is read, ragged after."""

    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(
        self,
        index: int,
        methods: tuple[Method, ...],
        backend: str,
        prompt: _Prompt,
        mask: HeadMask | None = None,
    ) -> None:
        super().__init__()
        self.index, self.methods, self.requested = index, methods, backend
        self.prompt = prompt
        silent = [] if mask is None else mask.of_layer(index)
        self.silent = torch.tensor(silent) if silent else None
        self.silence = mask.mode if silent else None
        self.reset()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[RaggedLayer, RaggedLayer]:
        length = key_states.shape[-2]
        if self.store is not None and length > 1:
            raise NotImplementedError(
                f"HeadBudgetCache holds a prompt already and got {length} tokens more: a prompt in "
                "chunks or a second turn is not supported; read the whole prompt with a new cache"
            )
        self.lazy_initialization(key_states, value_states)
        self.pending = (key_states, value_states)
        self.seen += length
        return self, self

    def attend(
        self, module: torch.nn.Module, query: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        """The first call reads the prompt with dense attention and compresses it."""
        if self.silence is None:
            return self._attend(module, query, mask, **kwargs)
        self.silent = self.silent.to(query.device)  # once: later steps find them there
        if self.silence == "query":
            return self._attend(module, query.index_fill(1, self.silent, 0), mask, **kwargs)
        return self._attend(module, query, mask, **kwargs).index_fill(2, self.silent, 0)

    def _attend(
        self, module: torch.nn.Module, query: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        key, value = self.pending
        self.pending = None
        window = kwargs.get("sliding_window")
        if window is not None and self.seen > window:
            raise NotImplementedError(
                f"the model attends to the last {window} tokens only (sliding window), and "
                f"{self.seen} were read: HeadBudgetCache has no sliding window"
            )
        if self.store is None:
            out, _ = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
            self._compress(query, key, value, mask)
            return out
        if query.shape[0] != self.store.rows:
            raise ValueError(
                f"{query.shape[0]} rows to decode, but the cache holds {self.store.rows} "
                f"(samples x {len(self.methods)} methods)"
            )
        scale = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return self.store.append_attend(query, key, value, scale, self.resolved)

    def filled(self) -> RaggedKV:
        """The compressed keys and values; RuntimeError before a prompt was read."""
        if self.store is None:
            raise RuntimeError("the cache is empty: run the model on a prompt first")
        return self.store

    def get_seq_length(self) -> int:
        """Tokens read, kept or not: what positions are counted by."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """The name of `get_max_length` in transformers 5.17."""
        return -1

    @property
    def batch_size(self) -> int:
        """Rows held, or -1 while there are none."""
        return -1 if self.store is None else self.store.rows

    def reset(self) -> None:
        self.seen = 0
        self.store: RaggedKV | None = None
        self.pending: tuple[Tensor, Tensor] | None = None
        self.resolved = self.requested
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.store is not None:
            self.store = self.store.select_rows(beam_idx)
            if self.index == 0:
                self.prompt.rows = [self.prompt.rows[row] for row in beam_idx.tolist()]

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.store is not None:
            self.reorder_cache(torch.arange(self.store.rows).repeat_interleave(repeats))

    def offload(self) -> None:
        raise NotImplementedError("HeadBudgetCache cannot be offloaded; it stays on the device")

    def prefetch(self) -> None:
        self.offload()

    def _compress(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        samples, heads, n, dim = key.shape
        shape = self.methods[0].shape
        if (query.shape[1], heads) != (shape.query_heads, shape.kv_heads):
            raise ValueError(
                f"a layer of this model has {query.shape[1]} query heads and {heads} KV heads, "
                f"but the methods are made for {shape}"
            )
        self.resolved = resolve_backend(
            self.requested, key.device, key.dtype, dim, query.shape[1] // heads
        )
        if self.index == 0:
            self.prompt.lengths = _prompt_lengths(mask, samples, n)
            self.prompt.rows = [length for length in self.prompt.lengths for _ in self.methods]
        rows = torch.zeros(
            samples, len(self.methods), heads, n, dtype=torch.bool, device=key.device
        )
        for sample, length in enumerate(self.prompt.lengths):
            kept = self._keep(query[sample], key[sample, :, n - length :])
            for m, chosen in enumerate(kept):
                rows[sample, m, :, n - length :] = chosen
        self.store = RaggedKV.pack(key, value, rows.flatten(0, 1))

    def _keep(self, query: Tensor, key: Tensor) -> list[Tensor]:
        """What each method keeps of one prompt; equal scorers score once."""
        heads, n, _ = key.shape
        scores: dict[Scorer, Tensor] = {}
        kept = []
        for method in self.methods:
            if n == 0 or method.keeps_all(n):
                kept.append(torch.ones(heads, n, dtype=torch.bool, device=key.device))
                continue
            if method.scorer not in scores:
                scores[method.scorer] = method.scorer(query, key)
            kept.append(method.select(scores[method.scorer], self.index, n))
        return kept


class _Prompt:
    """What the layers of one cache share: the first finds the lengths for all."""

    def __init__(self) -> None:
        self.lengths: list[int] = []  # of the samples as they were read
        self.rows: list[int] = []  # of the rows that are held


def _prompt_lengths(mask: Tensor | None, samples: int, n: int) -> list[int]:
    if mask is None:
        return [n] * samples
    if mask.dtype != torch.bool or mask.shape != (samples, 1, n, n) or not _only_pads(mask[:, 0]):
        raise NotImplementedError(
            f"attention mask {tuple(mask.shape)} {mask.dtype}: HeadBudgetCache takes a 2-D padding "
            "mask, no attention pattern of one's own"
        )
    return row_lengths(mask[:, 0, -1], samples, n)


def _only_pads(mask: Tensor) -> bool:
    """Whether a mask [B, n, n] is causal but for keys that no query sees."""
    n = mask.shape[-1]
    causal = torch.ones(n, n, dtype=torch.bool, device=mask.device).tril()
    return all(torch.equal(seen, causal & seen[-1]) for seen in mask)
