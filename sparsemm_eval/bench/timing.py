"""Clocks for the host and for a GPU: cold caches, measures in turn, quartiles, bandwidth."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from sparsemm_eval.bench.entries import Entry

T = TypeVar("T")
LEAST_ROUNDS = 3
# Times a second that a core is taken: 30 to 50 on an idle machine, over 150 where one other process
# wants a core of two.
DISTURBED = 90
Measure = Callable[[], list[float]]


def in_turn(measures: dict[str, Measure], repeats: int, seconds: float) -> dict[str, list[float]]:
    """Take measures round by round, each once a round, so that noise hits all alike.

    Parameters
    ----------
    measures : mapping
        Each gives one or more times in microseconds.
    repeats : int
        Times wanted of each.
    seconds : float
        After which a measure is left alone, three rounds being the least.

    Returns
    -------
    dict
        All times of each measure, in microseconds.
    """
    times: dict[str, list[float]] = {name: [] for name in measures}
    spent = dict.fromkeys(measures, 0.0)
    least = min(LEAST_ROUNDS, repeats)
    open_ones, rounds = list(measures), 0
    while open_ones:
        rounds += 1
        for name in open_ones:
            began = time.perf_counter()
            times[name] += measures[name]()
            spent[name] += time.perf_counter() - began
        open_ones = [
            name
            for name in open_ones
            if rounds < least or (len(times[name]) < repeats and spent[name] < seconds)
        ]
    return times


def quartiles(times: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    first, median, third = np.percentile(times, (25, 50, 75)).tolist()
    return first, median, third


def clocked(work: Callable[[], T], device: torch.device) -> tuple[T, float]:
    """What work gives, and the seconds it took on the host and the device together."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    result = work()
    if on_gpu:
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - began


def moment(device: torch.device) -> Any:
    """A moment on the device's clock, without waiting for it."""
    if device.type != "cuda":
        return time.perf_counter_ns()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed_ms(began: Any, ended: Any) -> float:
    """Milliseconds between two moments, which a device must have reached."""
    return (ended - began) / 1e6 if isinstance(began, int) else began.elapsed_time(ended)


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes a second of copies of so many bytes, read and written: the median of 20."""
    clock = DeviceClock(size) if device.type == "cuda" else HostClock(size)
    _, median, _ = quartiles([clock.copy()[0] for _ in range(20)])
    return 2 * clock.buffers[0].nbytes / median * 1e6


class Disturbance:
    """Counts how often other processes took the cores from this one."""

    def __init__(self) -> None:
        self._count, self._began = self._preempted(), time.perf_counter()

    def per_second(self) -> float:
        """Involuntary switches a second since it was made."""
        seconds = time.perf_counter() - self._began
        return (self._preempted() - self._count) / max(seconds, 1e-9)

    @staticmethod
    def _preempted() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


class HostClock:
    """Times each call; an entry goes through all its layers before the next one's turn.

    Parameters
    ----------
    copied : int
        Bytes of the buffer that is copied to measure bandwidth.
    """

    def __init__(self, copied: int) -> None:
        self.buffers = _pair(copied, torch.device("cpu"))

    def copy(self) -> list[float]:
        """Times of one large copy."""
        began = time.perf_counter_ns()
        self.buffers[1].copy_(self.buffers[0])
        return [(time.perf_counter_ns() - began) / 1e3]

    def sweep(self, entry: Entry) -> list[float]:
        """Times of one step in each layer."""
        entry.layers.rewind()
        times = []
        for layer in range(entry.count):
            began = time.perf_counter_ns()
            entry.step(layer)
            times.append((time.perf_counter_ns() - began) / 1e3)
        return times


class DeviceClock:
    """Times all layers of an entry between two events, and gives the mean a layer.

    Before each, a buffer of several times the L2 cache is read: the cache then holds none of the
    layers, and the host is done launching before the device begins.

    Parameters
    ----------
    copied : int
        Bytes of the buffer that is copied to measure bandwidth; read as said, too.
    """

    def __init__(self, copied: int) -> None:
        self.buffers = _pair(copied, torch.device("cuda"))

    def copy(self) -> list[float]:
        """Times of one large copy."""
        return [self._timed(lambda: self.buffers[1].copy_(self.buffers[0]))]

    def sweep(self, entry: Entry) -> list[float]:
        """Time of a step, the host launching each."""
        entry.layers.rewind()
        return [self._timed(lambda: _steps(entry)) / entry.count]

    def replay(self, entry: Entry, graph: torch.cuda.CUDAGraph) -> list[float]:
        """Time of a step, out of a graph of all layers."""
        entry.layers.rewind()
        return [self._timed(graph.replay) / entry.count]

    def _timed(self, work: Callable[[], object]) -> float:
        device = self.buffers[0].device
        self.buffers[0].sum()
        began = moment(device)
        work()
        ended = moment(device)
        ended.synchronize()
        return 1e3 * elapsed_ms(began, ended)


def capture(entry: Entry) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """One step in each layer as a graph, and the first layer's output."""
    entry.layers.rewind()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        entry.step(0)  # handles and workspaces are made outside the graph
    torch.cuda.current_stream().wait_stream(stream)
    entry.layers.rewind()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = _steps(entry)
    entry.layers.rewind()
    return graph, outs[0]


def _steps(entry: Entry) -> Sequence[Tensor]:
    return [entry.step(layer) for layer in range(entry.count)]


def _pair(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    source = torch.randn(size // 4, device=device)
    return source, torch.empty_like(source).copy_(source)
