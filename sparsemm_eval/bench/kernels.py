"""``bench kernels``: ways to append one token and attend, timed side by side on one device.

Runs as ``sparsemm-eval bench kernels`` or, from a checkout, ``python -m
sparsemm_eval.bench.kernels``, with the same options.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from sparsemm_eval.bench.machine import describe, find_device, free_memory, slug, threads
from sparsemm_eval.bench.measure import GRAPH_LAYERS, measure_case
from sparsemm_eval.bench.options import Options
from sparsemm_eval.bench.shapes import Case
from sparsemm_eval.bench.summary import aims, draw, failures, notes, table
from sparsemm_eval.bench.timing import DeviceClock, HostClock
from sparsemm_eval.errors import one_line
from sparsemm_eval.report.provenance import provenance


@dataclass(frozen=True)
class Benchmark:
    """What was written, what a reader wants to see of it, and what went wrong."""

    markdown: str
    files: list[Path]
    failures: list[str]


def run_kernels(options: Options, command: str) -> Benchmark:
    """Measure, and write ``<out>/<device>.json``, ``.md`` and ``.png``.

    The JSON is written after every case: a run that is cut off leaves what it has.

    Parameters
    ----------
    options : Options
        What is measured.
    command : str
        That makes the files again.

    Raises
    ------
    ValueError
        For options out of range or names that nothing has.
    """
    options = options.checked()
    device = find_device(options.device)
    cases, entries = options.cases(device.type), options.chosen_entries()
    options.out.mkdir(parents=True, exist_ok=True)
    made = provenance(command)
    records: list[dict[str, Any]] = []
    with threads(options.threads):
        about = describe(device)
        made["hardware"] |= about
        path = options.out / f"{slug(about)}.json"
        cache = about["cache_bytes"]
        if device.type == "cuda":
            clock = DeviceClock(4 * cache if options.quick else max(16 * cache, 1 << 30))
        else:
            clock = HostClock(8 << 20 if options.quick else max(4 * cache, 128 << 20))
        for number, case in enumerate(cases, 1):
            print(f"{number} of {len(cases)}: {_words(case)}", file=sys.stderr, flush=True)
            records += measure_case(
                case, entries, clock,
                repeats=options.repeats, seconds=options.seconds,
                memory=int(options.memory * 2**30) or int(0.7 * free_memory(device)),
                cold=0 if options.quick else 2 * cache,
            )  # fmt: skip
            reached = aims(records, about["kind"])
            whole = {**made, "method": _method(options, about), "aims": reached, "records": records}
            path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    markdown = _page(whole)
    path.with_suffix(".md").write_text(markdown + "\n", encoding="utf-8")
    files = [path, path.with_suffix(".md")]
    if any(record["median_us"] for record in records):
        files.append(path.with_suffix(".png"))
        draw(records, f"Append and attend, heavy-tailed heads: {about['name']}", files[-1])
    return Benchmark(markdown, files, failures(records))


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line, with nothing but torch at hand; returns the exit code."""
    parser = argparse.ArgumentParser("python -m sparsemm_eval.bench.kernels", description=__doc__)
    for field in fields(Options):
        kind = {"action": "store_true"}
        if field.name != "quick":
            kind = {"type": type(field.default), "default": field.default}
        parser.add_argument(f"--{field.name}", **kind)
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "sparsemm_eval.bench.kernels", *given])
    try:
        done = run_kernels(Options(**vars(parser.parse_args(given))), command)
    except (ValueError, OSError) as error:
        print(f"sparsemm-eval: {one_line(error)}", file=sys.stderr)
        return 1
    print(done.markdown)
    for path in done.files:
        print(f"wrote {path}")
    for line in done.failures:
        print(f"sparsemm-eval: {line}", file=sys.stderr)
    return 1 if done.failures else 0


def _page(whole: dict[str, Any]) -> str:
    records, name = whole["records"], whole["hardware"]["name"]
    parts = [
        f"# Append and attend, one layer: {name}",
        f"`{whole['command']}` · {whole['date']} · commit {whole['commit']} · "
        f"torch {torch.__version__}",
        whole["method"],
        table(records),
        "\n".join(f"- {line}" for line in notes(records)),
        "\n".join(f"- {line}" for line in whole["aims"]),
    ]
    return "\n\n".join(part for part in parts if part)


def _method(options: Options, about: dict[str, Any]) -> str:
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


def _words(case: Case) -> str:
    return f"{case.shape}, {case.dtype}, {case.distribution}, rows {case.rows}, mean {case.mean}"


if __name__ == "__main__":
    sys.exit(main())
