"""How much of a step of decoding is the host's: Python, launches, waiting."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_STEPS = (5, 45)  # of two runs: their difference leaves the prompt out


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
    found = [_share(run, device, step_ms) for _ in range(tries)]
    told = sorted(share for share in found if share is not None)
    return told[len(told) // 2] if told else None


def _share(run: Callable[[int], object], device: torch.device, step_ms: float) -> float | None:
    short, long = (_profiled(run, device, steps) for steps in _STEPS)
    steps = _STEPS[1] - _STEPS[0]
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
