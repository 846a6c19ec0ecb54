"""One step of greedy decoding between static buffers, and its capture as a CUDA graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsemm_eval.cache import CACHE_ARGUMENT, HeadBudgetCache
from sparsemm_eval.cache.static import StaticCache
from sparsemm_eval.families import family_of
from sparsemm_eval.methods import HeadMask


@dataclass(frozen=True)
class StepKey:
    """What a step is made for; rows of an equal key share it.

    Parameters
    ----------
    rows : int
        Rows of its buffers; those that are not there are marked as ended.
    ends : tuple of int
        Tokens that end a row.
    penalty : float
        transformers' repetition_penalty; 1 for none.
    mask : HeadMask or None
        Query heads that are silenced.
    backend : str
        What attends over the ragged rows.
    way : {"graph", "compile", "eager"}
        Captured; captured after torch.compile has fused what lies between products of matrices; or
        neither.
    """

    rows: int
    ends: tuple[int, ...]
    penalty: float
    mask: HeadMask | None
    backend: str
    way: str


@dataclass(frozen=True)
class Start:
    """Rows that have their first new token.

    Parameters
    ----------
    ids : Tensor
        [R, n + 1] tokens that were read, then the new one, which stands for padding too.
    positions : Tensor
        [R] of the new token, as the model counts them for text.
    ended : Tensor
        [R] bool: the new token ends the row, or its logits were not finite.
    not_finite : Tensor
        [R] bool: the logits that it was chosen by were not finite.
    """

    ids: Tensor
    positions: Tensor
    ended: Tensor
    not_finite: Tensor


@dataclass(frozen=True)
class Prompts:
    """Prompts that were read into a cache; row ``b * M + m`` is sample b under method m.

    Parameters
    ----------
    start : Start
        The rows with their first new token.
    tokens : list of int
        Tokens of each row's prompt, padding excluded.
    kept : Tensor
        [rows, L, H] tokens of the prompt that were kept.
    kept_bytes : list of int
        Bytes of keys and values of these tokens, by row.
    width : int
        Tokens of the longest prompt.
    logits : Tensor
        [samples, vocabulary] float32 of the first new token, as the model made them.
    """

    start: Start
    tokens: list[int]
    kept: Tensor
    kept_bytes: list[int]
    width: int
    logits: Tensor


class Step:
    """One step of decoding, from static buffers to static buffers: this is what is captured.

    Nothing in it depends on lengths, waits for the device or asks the host: positions and lengths
    are counted and the next tokens chosen on the device. A row that ends is marked finished in all
    layers and costs no reading from then on.

    Parameters
    ----------
    model : PreTrainedModel
        On `sparsemm_eval.cache.use_head_budget_attention`; given again at every step, not held.
    cache : HeadBudgetCache
        One that its rows come from: layers, KV heads and where they lie.
    key : StepKey
        What it is made for.
    """

    def __init__(self, model: PreTrainedModel, cache: HeadBudgetCache, key: StepKey) -> None:
        device, rows = model.device, key.rows
        self.key, self.family = key, family_of(model.config)
        devices = [store.keys.device for store in cache.stores]
        shape = cache.methods[0].shape
        self.cache = StaticCache(devices, rows, shape, key.backend, key.mask)
        self.ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.ended = torch.ones(rows, dtype=torch.bool, device=device)
        self.not_finite = torch.zeros(rows, dtype=torch.bool, device=device)
        self.ends = torch.tensor(key.ends or (-1,), device=device)
        # A mask that says nothing: 4-D ones are taken as they are, and none is made.
        self.unmasked = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
        self.seen: Tensor | None = None
        if key.penalty != 1:
            words = model.config.get_text_config().vocab_size
            self.seen = torch.zeros(rows, words, dtype=torch.bool, device=device)
        self.logits: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.places: tuple[int, ...] = ()
        self.compiled = torch.compile(_forward, dynamic=False) if key.way == "compile" else None

    def load(self, cache: HeadBudgetCache, start: Start) -> None:
        """Take over rows as they are after their prompts."""
        rows = len(start.ids)
        self.ids[:rows] = start.ids[:, -1:]
        self.positions[:rows, 0] = start.positions
        self.ended.fill_(True)
        self.ended[:rows] = start.ended
        if self.seen is not None:
            self.seen.zero_()
            self.seen[:rows].scatter_(1, start.ids, True)
        self.cache.load(cache.stores, self.ended)

    def take_over(self, other: Step, cache: HeadBudgetCache, rows: Tensor) -> None:
        """Go on with some rows of another step; the cache holds only these by now."""
        self.ids.copy_(other.ids[rows])
        self.positions.copy_(other.positions[rows])
        self.ended.copy_(other.ended[rows])
        if self.seen is not None:
            self.seen.copy_(other.seen[rows])
        self.cache.load(cache.stores, self.ended)

    def __call__(self, model: PreTrainedModel) -> None:
        """Decode one token a row."""
        self.logits = (self.compiled or _forward)(self, model)

    def capture(self, model: PreTrainedModel) -> None:
        """Capture the step as a CUDA graph; buffers are left as they are."""
        # A step that is run for its kernels to be loaded must not count: what it writes into slots
        # is written again, and the rest is put back.
        changed = [self.ids, self.positions, self.ended, *self.cache.offsets, *self.cache.lengths]
        changed += [] if self.seen is None else [self.seen]
        before = [x.clone() for x in changed]
        stream = torch.cuda.Stream(model.device)
        stream.wait_stream(torch.cuda.current_stream(model.device))
        with torch.cuda.stream(stream):
            # Twice where it is compiled: the second time finds all that the first has made.
            for _ in range(2 if self.compiled else 1):
                self(model)
        torch.cuda.current_stream(model.device).wait_stream(stream)
        for x, was in zip(changed, before, strict=True):
            x.copy_(was)
        self.graph, graph = None, torch.cuda.CUDAGraph()
        # Other threads, such as those that pin memory, may go on meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            self(model)
        self.graph, self.places = graph, self.cache.places()

    def run(self, model: PreTrainedModel) -> None:
        """Decode one token a row, by a graph unless eager: captured anew where memory has moved."""
        if self.key.way == "eager":
            self(model)
            return
        if self.graph is None or self.places != self.cache.places():
            self.capture(model)
        self.graph.replay()


def _forward(step: Step, model: PreTrainedModel) -> Tensor:
    """Logits [rows, vocabulary] of the next tokens, which go where the last ones were."""
    logits = step.family.step_logits(
        model,
        step.ids,
        position_ids=step.family.text_positions(model, step.positions),
        attention_mask=step.unmasked,
        **{CACHE_ARGUMENT: step.cache},
        use_cache=True,
    )
    scores = logits.float()
    if step.seen is not None:
        step.seen.scatter_(1, step.ids, True)
        penalty = step.key.penalty
        penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
        scores = torch.where(step.seen, penalised, scores)
    step.ids.copy_(scores.argmax(-1, keepdim=True))
    # NaN is the greatest of all, and -inf only where nothing else is: one number tells of all.
    step.not_finite.copy_(~scores.gather(-1, step.ids).isfinite()[:, 0])
    step.positions.add_(1)
    step.ended.logical_or_((step.ids == step.ends).any(1) | step.not_finite)
    step.cache.finish(step.ended)
    return logits
