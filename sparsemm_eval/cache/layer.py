"""HeadBudgetCache: a transformers cache that compresses a prompt per KV head."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sparsemm_eval.cache.attention import AttendingLayer, SilencingLayer, usual_scale
from sparsemm_eval.cache.backends import resolve_backend
from sparsemm_eval.cache.ragged import Buffer, CacheBytes, RaggedKV
from sparsemm_eval.cache.sliding import SlidingKV
from sparsemm_eval.choices import BACKENDS
from sparsemm_eval.errors import UserError, check_choice
from sparsemm_eval.methods import (
    AHEAD,
    Checks,
    HeadMask,
    LayerShare,
    Method,
    PromptLayer,
    PromptSelection,
    row_lengths,
)

# What models and `generate` call the cache: transformers 5.24 renamed the argument, and 5.40 takes
# only the new name.
CACHE_ARGUMENT = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)


class ReadPrompt:
    """What the layers of one cache share of the prompt they read; the first finds its lengths."""

    def __init__(self, visual: Tensor | None) -> None:
        self.layers: list[RaggedLayer] = []  # that are compressed
        self.clear()
        self.visual = visual  # [samples, n] bool, where a method looks at it

    def clear(self) -> None:
        """Forget the prompt."""
        self.visual = None
        self.rotation: Tensor | None = None  # [2, samples, n + ahead, D], where a method asks
        self.selections: list[PromptSelection] = []  # of the samples
        self.kept: list[Tensor] = []  # of the layers, while they may still be cut
        self.lengths: list[int] = []  # of the samples as they were read
        self.rows: list[int] = []  # of the rows that are held
        self.checks = Checks()  # of all layers, not yet looked at
        # By window, how many tokens of each sample the next one sees in it.
        self.in_window: dict[int, list[int]] = {}

    def note_rotation(
        self,
        rotary: torch.nn.Module,
        given: tuple[Any, ...],
        named: dict[str, Any],
        turned: tuple[Tensor, Tensor],
    ) -> None:
        """What a model's rotary embedding makes of its positions, and of those that follow."""
        x, positions, *kind = (*given, *named.values())
        if self.rotation is not None or kind not in ([], ["full_attention"]):
            return
        last = positions.amax(-1)
        last = last.amax(0) if positions.ndim == 3 else last  # [samples]
        ahead = last[:, None] + torch.arange(1, AHEAD + 1, device=positions.device)
        ahead = ahead.expand(*positions.shape[:-1], AHEAD)
        # Not by a call of the module, which would come here again.
        turning = rotary.forward(x, ahead, *kind)
        self.rotation = torch.stack(
            [torch.cat(pair, 1) for pair in zip(turned, turning, strict=True)]
        )

    def finish(self) -> None:
        """Cut layers to what they keep in the end, once all are read.

        Only methods that share the budget among layers by what they find in them left more.
        """
        kept, selections = self.kept, self.selections
        self.kept, self.selections, self.visual, self.rotation = [], [], None, None
        if not kept:
            return
        stay = [layer.clone() for layer in kept]
        for sample, (length, selection) in enumerate(zip(self.lengths, selections, strict=True)):
            for layer, final in zip(stay, selection.finish() or [], strict=False):
                layer[sample, :, :, layer.shape[-1] - length :] = final
        for layer, before, after in zip(self.layers, kept, stay, strict=True):
            layer.store = layer.store.cut(before.flatten(0, 1), after.flatten(0, 1))


class RaggedLayer(SilencingLayer):
    """One layer of a HeadBudgetCache: dense while its prompt is read, ragged after."""

    is_compileable = False
    is_croppable = False
    supports_early_init = False
    store_type: ClassVar[type[RaggedKV]] = RaggedKV
    window: int | None = None  # it attends to all tokens that it holds

    def __init__(
        self,
        index: int | None,
        methods: tuple[Method, ...],
        backend: str,
        prompt: ReadPrompt,
        mask: HeadMask | None = None,
        buffer: Buffer | None = None,
    ) -> None:
        super().__init__(index, mask)
        self.methods, self.requested = methods, backend
        self.prompt, self.buffer = prompt, buffer
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

    def _attend(
        self, module: torch.nn.Module, query: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        """The first call reads the prompt with dense attention and compresses it."""
        key, value = self.pending
        self.pending = None
        window = kwargs.get("sliding_window")
        if window != self.window and self.seen > window:
            raise NotImplementedError(
                f"the model attends to the last {window} tokens only (sliding window), and "
                f"{self.seen} were read: HeadBudgetCache has no sliding window"
            )
        if self.store is None:
            out, _ = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
            asked = usual_scale(query, kwargs.get("scaling"))
            self._compress(module, asked, key, value, mask)
            return out
        store = self.filled()
        if query.shape[0] != store.rows:
            raise ValueError(
                f"{query.shape[0]} rows to decode, but the cache holds {store.rows} "
                f"(samples x {len(self.methods)} methods)"
            )
        scale = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return store.append_attend(query, key, value, scale, self.resolved)

    def filled(self) -> RaggedKV:
        """The compressed keys and values; RuntimeError before a prompt was read.

        Whoever reads them first after a prompt learns whether its methods' scores and counts were
        sound: UserError if not. The layers did not wait for the device to know.
        """
        if self.store is None:
            raise RuntimeError("the cache is empty: run the model on a prompt first")
        self.prompt.checks.settle()
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

    def _compress(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
    ) -> None:
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
        prompt = self.prompt
        if self.index == 0:
            prompt.lengths = prompt_lengths_of(mask, samples, n)
            prompt.rows = [length for length in prompt.lengths for _ in self.methods]
            prompt.selections = [
                PromptSelection(self.methods, prompt.checks) for _ in prompt.lengths
            ]
        needs = {need for method in self.methods for need in method.needs}
        if "visual" in needs and (prompt.visual is None or prompt.visual.shape != (samples, n)):
            raise ValueError(
                f"a method needs to know which of {samples} x {n} tokens are visual: give "
                "HeadBudgetCache(visual=…) of this shape"
            )
        if "rotation" in needs and prompt.rotation is None:
            raise ValueError(
                "a method needs to know how RoPE turns the tokens: read the prompt within "
                "HeadBudgetCache.watching(model)"
            )
        output = output_weight(module) if "output" in needs else None
        rows = torch.zeros(
            samples, len(self.methods), heads, n, dtype=torch.bool, device=key.device
        )
        for sample, (length, selection) in enumerate(
            zip(prompt.lengths, prompt.selections, strict=True)
        ):
            start = n - length
            rows[sample, :, :, start:] = selection.layer(
                PromptLayer(
                    self.index,
                    query[sample, :, start:],
                    key[sample, :, start:],
                    value[sample, :, start:] if "value" in needs else None,
                    output,
                    prompt.visual[sample, start:] if "visual" in needs else None,
                    prompt.rotation[:, sample, start:].to(key.device)
                    if "rotation" in needs
                    else None,
                )
            )
        self.store = self.store_type.pack(
            key, value, rows.flatten(0, 1), self._most_kept(), self.buffer
        )
        if any(isinstance(method.layers, LayerShare) for method in self.methods):
            prompt.kept.append(rows)
        if self.index == shape.layers - 1:
            prompt.finish()

    def _most_kept(self) -> int | None:
        """At least what all rows keep of this layer; None where only the device knows."""
        each = [
            method.most_kept(self.index, length) if length else 0
            for length in self.prompt.lengths
            for method in self.methods
        ]
        return None if None in each else sum(each)


class SlidingLayer(RaggedLayer):
    """One layer of a HeadBudgetCache that is not compressed: it holds its window, in every row.

    Parameters
    ----------
    window : int
        Tokens that one attends to, its own included.
    methods, backend, prompt, buffer
        As of a `RaggedLayer`; all methods hold the same.
    """

    def __init__(
        self,
        window: int,
        methods: tuple[Method, ...],
        backend: str,
        prompt: ReadPrompt,
        buffer: Buffer | None = None,
    ) -> None:
        super().__init__(None, methods, backend, prompt, buffer=buffer)
        self.window = window

    def _compress(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
    ) -> None:
        samples, heads, n, dim = key.shape
        group = query.shape[1] // heads
        self.resolved = resolve_backend(self.requested, key.device, key.dtype, dim, group)
        first = n - (self.window - 1)
        seen = (torch.arange(n, device=key.device) >= first).expand(samples, n)
        if mask is not None:
            seen = seen & mask[:, 0, -1]
        held = self.prompt.in_window.get(self.window)
        if held is None:
            held = self.prompt.in_window[self.window] = seen.sum(1).tolist()
        copies = len(self.methods)
        self.store = SlidingKV.pack_last(key, value, seen, held, self.window, copies, self.buffer)


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
    buffers : sequence of Buffer, optional
        Memory for each layer's slots, which no other live cache uses.
    visual : Tensor, optional
        [B, n] bool, which tokens show an image or a video, where a method needs it.

    Raises
    ------
    UserError
        For an unknown backend, or a head to silence that the model does not have.
    ValueError
        For no method, or methods for different models.
    """

    layer_type: ClassVar[type[RaggedLayer]] = RaggedLayer

    def __init__(
        self,
        methods: Method | Sequence[Method],
        backend: str = "auto",
        mask: HeadMask | None = None,
        buffers: Sequence[Buffer] | None = None,
        visual: Tensor | None = None,
    ) -> None:
        methods = (methods,) if isinstance(methods, Method) else tuple(methods)
        if len({method.shape for method in methods}) != 1:
            raise ValueError("methods of one cache must be at least one and of one ModelShape")
        check_choice("backend", backend, BACKENDS)
        if mask is not None:
            mask.check_shape(methods[0].shape)
        # On the CPU, where who asks for the last of them need not wait in every layer.
        prompt = ReadPrompt(None if visual is None else visual.cpu())
        shape = methods[0].shape
        buffers = [None] * len(shape.places) if buffers is None else buffers
        super().__init__(
            layers=[
                SlidingLayer(shape.windows[layer], methods, backend, prompt, buffers[layer])
                if place is None
                else self.layer_type(place, methods, backend, prompt, mask, buffers[layer])
                for layer, place in enumerate(shape.places)
            ]
        )
        self.methods = methods
        self._prompt = prompt
        prompt.layers = [layer for layer in self.layers if layer.index is not None]

    @property
    def stores(self) -> list[RaggedKV]:
        """The keys and values of all layers, those of a sliding window among them."""
        return [layer.filled() for layer in self.layers]

    @property
    def compressed(self) -> list[RaggedKV]:
        """The keys and values of those layers that methods compress."""
        return [layer.filled() for layer in self.layers if layer.index is not None]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[AttendingLayer, AttendingLayer]:
        if layer_idx >= len(self.layers):
            raise ValueError(
                f"the model has a layer {layer_idx}, but the methods are for {len(self.layers)} "
                "layers: make them with the model's own ModelShape"
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    @contextmanager
    def watching(self, model: PreTrainedModel) -> Iterator[None]:
        """Learn how RoPE turns a prompt's tokens while a model reads it, where a method asks.

        Raises
        ------
        UserError
            If a method asks and the model's positions are none that it could use.
        """
        if not any("rotation" in method.needs for method in self.methods):
            yield
            return
        rotary = getattr(model.get_decoder(), "rotary_emb", None)
        if rotary is None or getattr(rotary, "rope_type", "") in ("dynamic", "longrope"):
            raise UserError(
                f"{type(model).__name__} has no RoPE whose angles are fixed, which a method here "
                "needs (expected): take another method"
            )
        hook = rotary.register_forward_hook(self._prompt.note_rotation, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def kept(self) -> Tensor:
        """Tokens of the prompt that are kept, [rows, L, H] int64 on the CPU."""
        stores = self.compressed
        if "kept" not in vars(stores[0]):
            # All layers in one copy: the device is waited for once.
            for store, offsets in zip(stores, torch.stack(self._offsets()).cpu(), strict=True):
                store.kept = store.kept_of(offsets)
        return torch.stack([store.kept for store in stores], 1)

    def _offsets(self) -> list[Tensor]:
        """Offsets of each layer, on the first one's device."""
        device = self.compressed[0].offsets.device
        return [store.offsets.to(device) for store in self.compressed]

    def count_tokens(self, tokens: int) -> None:
        """Note on the host that every row on the device is so many tokens longer."""
        for layer in self.layers:
            layer.seen += tokens
            layer.filled().count_token(tokens)

    def prompt_lengths(self) -> list[int]:
        """Tokens of each row's prompt, padding excluded."""
        return list(self._prompt.rows)

    def kept_bytes(self) -> Tensor:
        """Bytes of the prompt's keys and values that each row kept: [rows] int64 on the CPU.

        What layers with a sliding window held of the prompt is among them.
        """
        shape, keys = self.methods[0].shape, self.stores[0].keys
        tokens = self.kept().sum((1, 2))
        lengths = torch.tensor(self._prompt.rows)
        for window in shape.windows:
            if window is not None:
                tokens = tokens + shape.kv_heads * lengths.clamp(max=window - 1)
        return tokens * 2 * keys.shape[1] * keys.element_size()

    def bytes(self) -> CacheBytes:
        """Bytes really held: keys, values, slack and metadata, all layers."""
        return sum((layer.filled().bytes() for layer in self.layers), CacheBytes())

    def row_bytes(self) -> Tensor:
        """Bytes that each row really holds, in all layers: [rows] int64 on the CPU."""
        return sum(layer.filled().row_bytes() for layer in self.layers)

    def backend(self) -> str:
        """What attends over the ragged rows, once a prompt was read."""
        return self.layers[-1].resolved

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError(
            "HeadBudgetCache cannot take tokens back: assisted decoding needs another cache"
        )

    def reset(self) -> None:
        """Forget the prompt; the next call reads a new one."""
        self._prompt.clear()
        super().reset()


def output_weight(module: torch.nn.Module) -> Tensor:
    """The weight [hidden, Hq * D] by which an attention module mixes its heads' outputs.

    Raises
    ------
    UserError
        If it has none that is dense, as where weights are quantized.
    """
    weight = getattr(getattr(module, "o_proj", None), "weight", None)
    if weight is None or weight.ndim != 2 or not weight.is_floating_point():
        raise UserError(
            f"{type(module).__name__} has no dense o_proj.weight, which a method here needs "
            "(criticalkv): take a model whose weights are not quantized, or another method"
        )
    return weight


def prompt_lengths_of(mask: Tensor | None, samples: int, n: int) -> list[int]:
    """Tokens of each sample, from the attention mask of its prompt.

    Raises
    ------
    NotImplementedError
        For a mask that hides a token from a later one, but for padding. That it shows later ones,
        as Gemma 3's does within an image, is no matter here: the last token sees all that are none.
    """
    if mask is None:
        return [n] * samples
    if mask.dtype != torch.bool or mask.shape != (samples, 1, n, n) or not _shows_past(mask[:, 0]):
        raise NotImplementedError(
            f"attention mask {tuple(mask.shape)} {mask.dtype}: HeadBudgetCache takes a 2-D padding "
            "mask, no attention pattern of one's own that hides earlier tokens"
        )
    return row_lengths(mask[:, 0, -1], samples, n)


def _shows_past(mask: Tensor) -> bool:
    """Whether a mask [B, n, n] shows each query all before it, but for keys that none sees."""
    n = mask.shape[-1]
    causal = torch.ones(n, n, dtype=torch.bool, device=mask.device).tril()
    return all(
        torch.equal(seen | causal & seen[-1], seen) and not (seen & ~seen[-1]).any()
        for seen in mask
    )
