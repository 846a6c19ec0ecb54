"""One case: which entries run, whether they are right, and how long they take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsemm_eval.bench.entries import Entry
from sparsemm_eval.bench.layers import Layers
from sparsemm_eval.bench.shapes import Case, bytes_moved
from sparsemm_eval.bench.timing import (
    DISTURBED,
    DeviceClock,
    Disturbance,
    HostClock,
    Measure,
    Samples,
    capture,
    in_turn,
)
from sparsemm_eval.errors import one_line

# ||out - wanted|| / ||wanted|| of the worst sequence. Half precision rounds outputs, and kernels
# round the weights before they multiply.
TOLERANCES = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 4e-2}
GRAPH_LAYERS = 32  # of a model, in one CUDA graph
BOUND = "bound"
TRIES = 3


def measure_case(
    case: Case,
    entries: Sequence[type[Entry]],
    clock: HostClock | DeviceClock,
    *,
    repeats: int,
    seconds: float,
    memory: int,
    cold: int,
) -> list[dict[str, Any]]:
    """Check and time entries in turn, and say of each what came of it.

    Parameters
    ----------
    case : Case
        What is attended to.
    entries : sequence of Entry classes
        What attends.
    clock : HostClock or DeviceClock
        Of the device that is measured.
    repeats : int
        Measurements of each entry; on a CPU of one step, on a GPU of a step in each layer.
    seconds : float
        When an entry is left alone though it has fewer, three rounds being the least.
    memory : int
        Bytes that all keys and values may take.
    cold : int
        Bytes that an entry's layers should exceed together, so that no cache holds them.

    Returns
    -------
    list of dict
        A record an entry, the bound first; entries without a time say why in their note.
    """
    device = clock.buffers[0].device
    wanted = GRAPH_LAYERS if device.type == "cuda" else max(1, -(-cold // Layers.bytes(case)))
    unfit = {entry.name: entry.unfit(case, device) for entry in entries}
    fit = [entry for entry in entries if not unfit[entry.name]]
    sizes = {"": Layers.bytes(case), **{entry.name: entry.bytes(case) for entry in fit}}
    counts = share_memory(memory, sizes, wanted)
    found: dict[str, dict[str, Any]] = {name: {"note": why} for name, why in unfit.items() if why}
    right: list[Entry] = []
    if counts[""]:
        layers = Layers(case, counts[""], device)
        for entry in fit:
            found[entry.name], made = _prepare(entry, layers, counts[entry.name], memory)
            right += made
            if "layers" in found[entry.name]:
                held = counts[entry.name] * max(sizes[""], sizes[entry.name])
                found[entry.name]["cold"] = device.type == "cuda" or held >= cold > 0
    else:
        found |= {entry.name: {"note": _too_large(sizes[""], memory)} for entry in fit}
    if not right:
        return _records(case, entries, found, {}, clock)
    measures = _measures(right, found, clock)
    samples, taken = _undisturbed(lambda: in_turn(measures, repeats, seconds), device.type)
    calm = {"taken_per_s": taken, "disturbed": device.type == "cpu" and taken > DISTURBED}
    return [record | calm for record in _records(case, entries, found, samples, clock)]


def share_memory(limit: int, sizes: Mapping[str, int], wanted: int) -> dict[str, int]:
    """How many layers each layout gets: one each while they fit, then more in turn.

    Parameters
    ----------
    limit : int
        Bytes for all.
    sizes : mapping
        Bytes of a layer in each layout; the first is the one that all others need, and none gets
        more layers than it.
    wanted : int
        Layers that are enough.
    """
    counts, left = dict.fromkeys(sizes, 0), limit
    base = next(iter(sizes))
    for _ in range(wanted):
        for name, size in sizes.items():
            if size <= left and (name == base or counts[name] < counts[base]):
                counts[name] += 1
                left -= size
    return counts


def worst_error(out: Tensor, reference: Tensor) -> float:
    """Largest relative error of a sequence; infinite where a number is not one."""
    difference = (out.double() - reference).flatten(1).norm(dim=1)
    worst = (difference / reference.flatten(1).norm(dim=1)).max().item()
    return worst if worst == worst else float("inf")


def _prepare(
    made_by: type[Entry], layers: Layers, count: int, memory: int
) -> tuple[dict[str, Any], list[Entry]]:
    """Make an entry and hold it against float64; it comes back only if it is right."""
    if not count:
        return {"note": _too_large(made_by.bytes(layers.case), memory)}, []
    layers.rewind()
    try:
        entry = made_by(layers, count)
        out = entry.step(0)
        error = worst_error(out, layers.wanted)
        newest = entry.newest(0)
    except (RuntimeError, ValueError, TypeError, AttributeError, ImportError) as failure:
        return {"note": f"failed: {one_line(failure)}", "failed": True}, []
    graph = made_by.graph_note if layers.device.type == "cuda" else ""
    note = "; ".join(filter(None, (made_by.note, graph)))
    record = {"layers": count, "error": error, "note": note}
    token = layers.tokens[0]
    if error > TOLERANCES[layers.case.dtype]:
        record |= {"note": f"wrong: off by {error:.1e} from float64; not timed", "failed": True}
        return record, []
    if not (torch.equal(newest[0], token.key) and torch.equal(newest[1], token.value)):
        record |= {"note": "wrong: did not write the token; not timed", "failed": True}
        return record, []
    return record, [entry]


def _measures(
    entries: Sequence[Entry], found: dict[str, dict[str, Any]], clock: HostClock | DeviceClock
) -> dict[str, Measure]:
    measures: dict[str, Measure] = {BOUND: clock.copy}
    for entry in entries:
        measures[entry.name] = lambda entry=entry: clock.sweep(entry)
        if isinstance(clock, DeviceClock) and entry.capturable:
            _add_replay(measures, entry, found[entry.name], clock)
    return measures


def _undisturbed(
    measure: Callable[[], dict[str, Samples]], device: str
) -> tuple[dict[str, Samples], float]:
    """The calmest of a few tries, and how often a second its cores were taken; the first on CUDA.

    An operation shared by threads waits for the last of them: where another process has a core,
    times are the scheduler's.
    """
    tries = []
    while len(tries) < (TRIES if device == "cpu" else 1):
        others = Disturbance()
        tries.append((measure(), others.per_second()))
        if tries[-1][1] <= DISTURBED:
            break
    return min(tries, key=lambda one: one[1])


def _add_replay(
    measures: dict[str, Measure], entry: Entry, record: dict[str, Any], clock: DeviceClock
) -> None:
    """Measure a captured entry's graph, if it can be captured and still is right."""
    try:
        graph, out = capture(entry)
    except RuntimeError as failure:
        why = f"not captured: {one_line(failure)}"
        record["note"] = "; ".join(filter(None, (record["note"], why)))
        return
    out.fill_(torch.nan)
    graph.replay()
    error = worst_error(out, entry.layers.wanted)
    if error > TOLERANCES[entry.layers.case.dtype]:
        record["note"] = f"wrong in a graph: off by {error:.1e} from float64; timed without"
        record["failed"] = True
        return
    record["captured"] = True
    measures[f"{entry.name} in a graph"] = lambda: clock.replay(entry, graph)


def _records(
    case: Case,
    entries: Sequence[type[Entry]],
    found: dict[str, dict[str, Any]],
    samples: dict[str, Samples],
    clock: HostClock | DeviceClock,
) -> list[dict[str, Any]]:
    moved = bytes_moved(case.lengths(), case.layer, case.element_size)
    about = {**vars(case), "bytes": moved}
    bound = None
    records = []
    if samples:
        copied = 2 * clock.buffers[0].nbytes  # read and written
        quarters = [us * moved / copied for us in samples[BOUND].quartiles()]
        bound = quarters[1]
        speed = copied / samples[BOUND].quartiles()[1] / 1e3
        record = _timed(quarters, len(samples[BOUND].us), bound)
        record |= {"copy_gb_s": speed, "note": "bytes / bandwidth of a large copy"}
        records.append({**about, "entry": BOUND, **record})
    for entry in entries:
        record = dict(found[entry.name])
        launched = samples.get(entry.name)
        best = samples.get(f"{entry.name} in a graph", launched)
        if best is not None:
            record |= _timed(best.quartiles(), len(best.us), bound)
            record["captured"] = record.get("captured", False)
            if best is not launched:
                record["eager_us"] = launched.quartiles()[1]
        else:
            record["median_us"] = None
        records.append({**about, "entry": entry.name, **record})
    ours = next((r["median_us"] for r in records if r["entry"] == "cuda_ext"), None)
    for record in records:
        both = ours and record["median_us"]
        record["ratio_to_cuda_ext"] = record["median_us"] / ours if both else None
    return records


def _timed(quartiles: Sequence[float], repeats: int, bound: float) -> dict[str, Any]:
    first, median, third = quartiles
    return {
        "median_us": median,
        "q1_us": first,
        "q3_us": third,
        "repeats": repeats,
        "bound_us": bound,
        "share_of_bound": bound / median,
    }


def _too_large(size: int, memory: int) -> str:
    return f"too large: a layer takes {size / 2**30:.1f} GiB of the {memory / 2**30:.1f} allowed"
