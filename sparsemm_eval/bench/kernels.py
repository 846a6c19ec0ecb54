"""``bench kernels``: ways to append one token and attend, timed side by side on one device.

Also ``python -m sparsemm_eval.bench.kernels`` from a checkout, with the same options.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsemm_eval.bench.entries import ENTRIES, Entry
from sparsemm_eval.bench.layers import DISTRIBUTIONS, LAYERS, Case, Layers, bytes_moved
from sparsemm_eval.bench.machine import (
    find_device,
    free_memory,
    provenance_on,
    slug,
    threads,
    write_json,
)
from sparsemm_eval.bench.models import DTYPES
from sparsemm_eval.bench.options import Benchmark, KernelOptions, main
from sparsemm_eval.bench.pages import (
    Record,
    bullets,
    draw_kernels,
    kernels_aims,
    kernels_notes,
    kernels_table,
    write_page,
)
from sparsemm_eval.bench.timing import (
    DISTURBED,
    DeviceClock,
    Disturbance,
    HostClock,
    Measure,
    capture,
    in_turn,
    quartiles,
)
from sparsemm_eval.errors import UserError, check_int, one_line

QUICK = {"means": "64", "rows": "1", "repeats": 3}
# ||out - wanted|| / ||wanted|| of the worst sequence. Half precision rounds outputs, and kernels
# round the weights before they multiply.
TOLERANCES = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 4e-2}
GRAPH_LAYERS = 32  # of a model, in one CUDA graph
BOUND = "bound"
TRIES = 3


def run(options: KernelOptions, command: str) -> Benchmark:
    """Measure, and write ``<out>/<device>.json``, ``.md`` and ``.png``.

    The JSON is written after every case: a run that is cut off leaves what it has.

    Parameters
    ----------
    options : KernelOptions
        What is measured.
    command : str
        That makes the files again.

    Raises
    ------
    UserError
        For options out of range or names that nothing has.
    """
    options = checked(options)
    device = find_device(options.device)
    cases = cases_of(options, device.type)
    entries = [ENTRIES[name] for name in options.words("entries", ENTRIES)]
    records: list[Record] = []
    with threads(options.threads):
        provenance = provenance_on(device, command)
        about = provenance["hardware"]
        path = options.out / f"{slug(about)}.json"
        cache = about["cache_bytes"]
        if device.type == "cuda":
            clock = DeviceClock(4 * cache if options.quick else max(16 * cache, 1 << 30))
        else:
            clock = HostClock(8 << 20 if options.quick else max(4 * cache, 128 << 20))
        for number, case in enumerate(cases, 1):
            words = f"{case.shape}, {case.dtype}, {case.distribution}, rows {case.rows}"
            print(
                f"{number} of {len(cases)}: {words}, mean {case.mean}", file=sys.stderr, flush=True
            )
            records += measure_case(
                case, entries, clock,
                repeats=options.repeats, seconds=options.seconds,
                memory=int(options.memory * 2**30) or int(0.7 * free_memory(device)),
                cold=0 if options.quick else 2 * cache,
            )  # fmt: skip
            reached = kernels_aims(records, about["kind"])
            whole = {
                **provenance,
                "method": _method(options, about),
                "aims": reached,
                "records": records,
            }
            write_json(path, whole)
    text = write_page(
        "Append and attend, one layer", whole, whole["method"], kernels_table(records),
        bullets(kernels_notes(records)), bullets(reached),
    )  # fmt: skip
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    files = [path, path.with_suffix(".md")]
    if any(record["median_us"] for record in records):
        files.append(path.with_suffix(".png"))
        title = f"Append and attend, heavy-tailed heads: {about['name']}"
        draw_kernels(records, title, files[-1])
    return Benchmark(text, files, failures(records))


def checked(options: KernelOptions) -> KernelOptions:
    """The same with what `quick` means written out.

    Raises
    ------
    UserError
        For numbers out of range; names are checked where they are used.
    """
    check_int("threads", options.threads, 0)
    check_int("repeats", options.repeats, 1)
    for name in ("seconds", "memory"):
        if not getattr(options, name) >= 0:
            raise UserError(f"{name}={getattr(options, name)!r}: it must be at least 0")
    return options.filled(QUICK) if options.quick else options


def cases_of(options: KernelOptions, kind: str) -> list[Case]:
    """Every combination that is named, on a "cpu" or on "cuda"."""
    dtypes = options.filled({"dtype": "float16" if kind == "cuda" else "float32"})
    return [
        Case(shape, mean, distribution, rows, dtype)
        for shape, dtype, distribution, rows, mean in itertools.product(
            options.words("shapes", LAYERS),
            dtypes.words("dtype", DTYPES),
            options.words("distributions", DISTRIBUTIONS),
            options.numbers("rows"),
            options.numbers("means"),
        )
    ]


def failures(records: Sequence[Record]) -> list[str]:
    """Entries that are wrong or broke, a sentence each."""
    return [
        f"{r['entry']} on {r['shape']} {r['dtype']} {r['distribution']} {r['rows']} {r['mean']}: "
        f"{r['note']}"
        for r in records
        if r.get("failed")
    ]


def _method(options: KernelOptions, about: dict[str, Any]) -> str:
    """How times were taken, in words."""
    if about["kind"] == "cuda":
        how = (
            f"Times are medians of a step in one layer, out of a CUDA graph of up to "
            f"{GRAPH_LAYERS} layers with buffers of their own where the entry can be captured, "
            "between two events; before each, a buffer of several times the L2 cache is read, so "
            "that L2 is cold."
        )
    else:
        count = about["threads"]
        how = f"Times are medians of one call on {count} thread{'s' * (count > 1)}, "
        how += "torch's dispatch included; "
        if options.quick:
            how += "few layers, which caches may hold (quick)."
        else:
            size = about["cache_bytes"] >> 20
            how += f"layers rotate through twice the last cache ({size} MiB), so that it is cold."
    return how + (
        " Entries are timed in turn, each after its output agreed with float64 attention. "
        "Heavy: the top 5% of all rows' heads (at least one) hold 55% of the tokens. Bound: bytes "
        "that must move (keys, values, query, output, new token) at the bandwidth of a large copy, "
        "bytes read plus written, timed in the same turns; reading alone can be faster or slower. "
        "Ratios: how many times as long as cuda_ext."
    )


def measure_case(
    case: Case,
    entries: Sequence[type[Entry]],
    clock: HostClock | DeviceClock,
    *,
    repeats: int,
    seconds: float,
    memory: int,
    cold: int,
) -> list[Record]:
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
    outcomes: dict[str, Record] = {name: {"note": why} for name, why in unfit.items() if why}
    right: list[Entry] = []
    if counts[""]:
        layers = Layers(case, counts[""], device)
        for kind in fit:
            record, entry = _prepare(kind, layers, counts[kind.name], memory)
            outcomes[kind.name] = record
            if entry is not None:
                right.append(entry)
            if "layers" in record:
                held = counts[kind.name] * max(sizes[""], sizes[kind.name])
                record["cold"] = device.type == "cuda" or held >= cold > 0
    else:
        outcomes |= {entry.name: {"note": _too_large(sizes[""], memory)} for entry in fit}
    if not right:
        return _records(case, entries, outcomes, {}, clock)
    measures = _measures(right, outcomes, clock)
    samples, taken = _undisturbed(lambda: in_turn(measures, repeats, seconds), device.type)
    calm = {"taken_per_s": taken, "disturbed": device.type == "cpu" and taken > DISTURBED}
    return [record | calm for record in _records(case, entries, outcomes, samples, clock)]


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
    kind: type[Entry], layers: Layers, count: int, memory: int
) -> tuple[Record, Entry | None]:
    """Make an entry and hold it against float64; it comes back only if it is right."""
    if not count:
        return {"note": _too_large(kind.bytes(layers.case), memory)}, None
    layers.rewind()
    try:
        entry = kind(layers, count)
        out = entry.step(0)
        error = worst_error(out, layers.wanted)
        newest = entry.newest(0)
    except (RuntimeError, ValueError, TypeError, AttributeError, ImportError) as failure:
        return {"note": f"failed: {one_line(failure)}", "failed": True}, None
    graph = kind.graph_note if layers.device.type == "cuda" else ""
    note = "; ".join(filter(None, (kind.note, graph)))
    record = {"layers": count, "error": error, "note": note}
    token = layers.tokens[0]
    if error > TOLERANCES[layers.case.dtype]:
        record |= {"note": f"wrong: off by {error:.1e} from float64; not timed", "failed": True}
        return record, None
    if not (torch.equal(newest[0], token.key) and torch.equal(newest[1], token.value)):
        record |= {"note": "wrong: did not write the token; not timed", "failed": True}
        return record, None
    return record, entry


def _measures(
    entries: Sequence[Entry], outcomes: dict[str, Record], clock: HostClock | DeviceClock
) -> dict[str, Measure]:
    measures: dict[str, Measure] = {BOUND: clock.copy}
    for entry in entries:
        measures[entry.name] = lambda entry=entry: clock.sweep(entry)
        if isinstance(clock, DeviceClock) and entry.capturable:
            _add_replay(measures, entry, outcomes[entry.name], clock)
    return measures


def _undisturbed(
    measure: Callable[[], dict[str, list[float]]], device: str
) -> tuple[dict[str, list[float]], float]:
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
    measures: dict[str, Measure], entry: Entry, record: Record, clock: DeviceClock
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
    outcomes: dict[str, Record],
    samples: dict[str, list[float]],
    clock: HostClock | DeviceClock,
) -> list[Record]:
    moved = bytes_moved(case.lengths(), case.layer, case.element_size)
    about = {**vars(case), "bytes": moved}
    bound = None
    records = []
    if samples:
        copied = 2 * clock.buffers[0].nbytes  # read and written
        bounds = [us * moved / copied for us in samples[BOUND]]
        bound = quartiles(bounds)[1]
        speed = moved / bound / 1e3
        record = _timed(bounds, bound)
        record |= {"copy_gb_s": speed, "note": "bytes / bandwidth of a large copy"}
        records.append({**about, "entry": BOUND, **record})
    for entry in entries:
        record = dict(outcomes[entry.name])
        launched = samples.get(entry.name)
        best = samples.get(f"{entry.name} in a graph", launched)
        if best is not None:
            record |= _timed(best, bound)
            record["captured"] = record.get("captured", False)
            if best is not launched:
                record["eager_us"] = quartiles(launched)[1]
        else:
            record["median_us"] = None
        records.append({**about, "entry": entry.name, **record})
    ours = next((r["median_us"] for r in records if r["entry"] == "cuda_ext"), None)
    for record in records:
        both = ours and record["median_us"]
        record["ratio_to_cuda_ext"] = record["median_us"] / ours if both else None
    return records


def _timed(times: Sequence[float], bound: float) -> Record:
    first, median, third = quartiles(times)
    return {
        "median_us": median,
        "q1_us": first,
        "q3_us": third,
        "repeats": len(times),
        "bound_us": bound,
        "share_of_bound": bound / median,
    }


def _too_large(size: int, memory: int) -> str:
    return f"too large: a layer takes {size / 2**30:.1f} GiB of the {memory / 2**30:.1f} allowed"


if __name__ == "__main__":
    sys.exit(main("kernels"))
