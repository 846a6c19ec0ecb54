"""Ways to decode a prompt's answer, timed step by step; and how much of a step is the host's."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel, StoppingCriteria

from sparsemm_eval.bench.timing import elapsed_ms, moment
from sparsemm_eval.cache import CACHE_ARGUMENT, HeadBudgetCache, RaggedKV, use_head_budget_attention
from sparsemm_eval.cache.layer import RaggedLayer
from sparsemm_eval.engine.decode import prefill
from sparsemm_eval.engine.decoder import decoder_of, release
from sparsemm_eval.methods import Method

Inputs = Mapping[str, Tensor]
_PROFILED_STEPS = (5, 45)  # of two runs: their difference leaves the prompt out


@dataclass(frozen=True)
class Timed:
    """What one way took.

    Parameters
    ----------
    prefill_seconds : float
        Until the first token is there.
    step_ms : list of float
        Each later token, warm-up included.
    peak_bytes : int or None
        Of the device's memory, weights included; None on a CPU.
    cache_bytes : int
        At the end.
    compress_seconds : float or None
        Part of the prefill: scoring, selecting and packing.
    tokens : Tensor
        [rows, steps + 1] on the CPU.
    backend : str
        What attended; empty for transformers' own.
    """

    prefill_seconds: float
    step_ms: list[float]
    peak_bytes: int | None
    cache_bytes: int
    compress_seconds: float | None
    tokens: Tensor
    backend: str = ""


@torch.inference_mode()
def decode_ours(
    model: PreTrainedModel,
    inputs: Inputs,
    methods: Sequence[Method],
    steps: int,
    cuda_graph: str = "auto",
) -> Timed:
    """This project's cache between static buffers, as answers are decoded.

    Parameters
    ----------
    model : PreTrainedModel
        Whose answers do not end by themselves.
    inputs : mapping
        One prompt.
    methods : sequence of Method
        Each is a row.
    steps : int
        New tokens after the first.
    cuda_graph : str
        As `sparsemm_eval.engine.decode.decode` takes it.
    """
    options = {"max_new_tokens": steps + 1, "do_sample": False}
    release(model)
    decoder, ticks = decoder_of(model), Ticks(model.device)
    cache = _WatchedCache(methods, buffers=decoder.buffers)
    ticks()
    prompts = prefill(model, inputs, options, cache)
    ticks()
    rows = decoder.decode(model, cache, prompts, options, None, cuda_graph, ticks)
    timed = ticks.timed(torch.stack(rows.tokens), cache.bytes().total)
    compressing = sum(layer.compress_ms() for layer in cache.layers) / 1e3
    return replace(timed, compress_seconds=compressing, backend=cache.backend())


def decode_plain(model: PreTrainedModel, inputs: Inputs, method: Method, steps: int) -> Timed:
    """This project's cache under transformers' ``generate``."""
    cache = _WatchedCache(method)
    tokens, ticks = _generate(model, inputs, steps, **{CACHE_ARGUMENT: cache})
    timed = ticks.timed(tokens, cache.bytes().total)
    compressing = sum(layer.compress_ms() for layer in cache.layers) / 1e3
    return replace(timed, compress_seconds=compressing, backend=cache.backend())


def decode_concatenated(
    model: PreTrainedModel, inputs: Inputs, method: Method, steps: int
) -> Timed:
    """As published code decodes: every token copies each layer's flat cache, one slot larger."""
    half = model.dtype in (torch.float16, torch.bfloat16)
    backend = "varlen" if model.device.type == "cuda" and half else "torch"
    cache = _ConcatenatedCache(method, backend)
    tokens, ticks = _generate(model, inputs, steps, **{CACHE_ARGUMENT: cache})
    timed = ticks.timed(tokens, cache.bytes().total)
    return replace(timed, backend=cache.backend())


def decode_stock(
    model: PreTrainedModel, inputs: Inputs, steps: int, kv_bytes: int, static: bool = False
) -> Timed:
    """Full KV under transformers' ``generate``, its own attention and caches.

    Parameters
    ----------
    model, inputs, steps
        As for `decode_ours`.
    kv_bytes : int
        Of the prompt's keys and values.
    static : bool
        A static cache, which ``generate`` compiles for on a GPU, not a dynamic one.
    """
    more = {"cache_implementation": "static"} if static else {}
    with _stock_attention(model):
        tokens, ticks = _generate(model, inputs, steps, **more)
    return ticks.timed(tokens, kv_bytes)


class Ticks:
    """When tokens were there: called once before the prompt and after every token."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[Any] = []
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)

    def __call__(self) -> None:
        self.marks.append(moment(self.device))

    def timed(self, tokens: Tensor, cache_bytes: int) -> Timed:
        """What was seen."""
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.synchronize(self.device)
        spans = [elapsed_ms(a, b) for a, b in zip(self.marks, self.marks[1:], strict=False)]
        peak = torch.cuda.max_memory_allocated(self.device) if on_gpu else None
        return Timed(spans[0] / 1e3, spans[1:], peak, cache_bytes, None, tokens)


class _Ticking(StoppingCriteria):
    """Stops nothing."""

    def __init__(self, tick: Callable[[], None]) -> None:
        self.tick = tick

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.tick()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _WatchedLayer(RaggedLayer):
    """Notes how long compressing took; read when all is over, so that nothing waits."""

    span: tuple[Any, Any] | None = None

    def _compress(self, module: torch.nn.Module, query: Tensor, key: Tensor, *rest: Any) -> None:
        begun = moment(key.device)
        super()._compress(module, query, key, *rest)
        self.span = (begun, moment(key.device))

    def compress_ms(self) -> float:
        """Milliseconds."""
        return elapsed_ms(*self.span)


class _WatchedCache(HeadBudgetCache):
    layer_type = _WatchedLayer


class _ConcatenatedKV(RaggedKV):
    """A layer without free slots: every token makes a new one."""

    def append_attend(self, *args: Any) -> Tensor:
        device, count = self.keys.device, len(self.lengths)
        before = int(self.kept.sum()) + count * self.steps
        sequences = torch.arange(count, device=device)
        sequence = torch.repeat_interleave(sequences, self.lengths, output_size=before)
        packed = torch.arange(before, device=device)
        starts = self.lengths.cumsum(0) - self.lengths
        source = torch.zeros(before + count, dtype=torch.long, device=device)
        source[packed + sequence] = self.offsets[sequence] + packed - starts[sequence]
        self.keys, self.values = self.keys[source], self.values[source]
        ends = (self.lengths + 1).cumsum(0, dtype=torch.int32)
        self.offsets, self.slack = functional.pad(ends, (1, 0)), 1
        return super().append_attend(*args)


class _ConcatenatedLayer(RaggedLayer):
    store_type = _ConcatenatedKV


class _ConcatenatedCache(HeadBudgetCache):
    layer_type = _ConcatenatedLayer


def _generate(
    model: PreTrainedModel, inputs: Inputs, steps: int, **more: Any
) -> tuple[Tensor, Ticks]:
    release(model)
    ticks = Ticks(model.device)
    ticks()
    ids = model.generate(
        **inputs, max_new_tokens=steps + 1, do_sample=False,
        stopping_criteria=[_Ticking(ticks)], **more,
    )  # fmt: skip
    return ids[:, inputs["input_ids"].shape[1] :].cpu(), ticks


@contextmanager
def _stock_attention(model: PreTrainedModel) -> Iterator[None]:
    model.set_attn_implementation({"text_config": "sdpa"})
    try:
        yield
    finally:
        use_head_budget_attention(model)


def host_share(run: Callable[[int], object], device: torch.device, step_ms: float) -> float | None:
    """The part of a step in which the device, or torch's operators on a CPU, do nothing.

    A profiler counts. On a CPU it slows all down, operators more than what lies between them: the
    share is of the time under the profiler, and rather too low.

    Parameters
    ----------
    run : callable
        Decodes so many steps.
    device : torch.device
        What works.
    step_ms : float
        A step's time without a profiler.

    Returns
    -------
    float or None
        None where nothing can be told.
    """
    _profiled(run, device, 2)  # the profiler's own start
    tries = 1 if device.type == "cuda" else 3  # a CPU's other work is in a difference too
    shares = [_share(run, device, step_ms) for _ in range(tries)]
    told = sorted(share for share in shares if share is not None)
    return told[len(told) // 2] if told else None


def _share(run: Callable[[int], object], device: torch.device, step_ms: float) -> float | None:
    short, long = (_profiled(run, device, steps) for steps in _PROFILED_STEPS)
    steps = _PROFILED_STEPS[1] - _PROFILED_STEPS[0]
    busy, wall = ((b - a) / steps for a, b in zip(short, long, strict=True))
    if device.type == "cuda":
        wall = step_ms
    return max(0.0, 1 - busy / wall) if busy > 0 and wall > 0 else None


def _profiled(
    run: Callable[[int], object], device: torch.device, steps: int
) -> tuple[float, float]:
    """Milliseconds that the device, or operators, worked; and in all."""
    on_gpu = device.type == "cuda"
    kinds = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    begun = time.perf_counter()
    with profile(activities=kinds, acc_events=True) as watched:
        run(steps)
        wall = time.perf_counter() - begun
    events = watched.events()
    if on_gpu:
        kernels = [event for event in events if event.device_type == DeviceType.CUDA]
        busy = sum(event.self_device_time_total for event in kernels)
    else:
        busy = sum(event.self_cpu_time_total for event in events if "::" in event.name)
    return busy / 1e3, 1e3 * wall
