"""``bench efficiency``: prefill, decode time, memory and bytes over prompt lengths, and the bounds.

Runs as ``sparsemm-eval bench efficiency`` or, from a checkout, ``python -m
sparsemm_eval.bench.efficiency``, with the same options.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from sparsemm_eval.bench.bounds import kept_tokens, kv_bytes, token_bytes, weight_bytes
from sparsemm_eval.bench.efficiency_measure import (
    Measuring,
    Record,
    Subject,
    asked_of,
    check_models,
    identity,
)
from sparsemm_eval.bench.efficiency_options import EfficiencyOptions, options_from
from sparsemm_eval.bench.efficiency_page import page
from sparsemm_eval.bench.kernels import Benchmark
from sparsemm_eval.bench.machine import code_digest, describe, find_device, slug, threads
from sparsemm_eval.bench.models import SHAPES
from sparsemm_eval.bench.timing import DeviceClock, HostClock
from sparsemm_eval.errors import one_line
from sparsemm_eval.report.efficiency import gather_efficiency
from sparsemm_eval.report.efficiency_figures import efficiency_curves
from sparsemm_eval.report.provenance import provenance


def run_efficiency(options: EfficiencyOptions, command: str) -> Benchmark:
    """Measure, and write ``<out>/<device>.json``, ``.md`` and ``.png``.

    The JSON is written after every measurement. A run with the same code, versions and device goes
    on where an earlier one ended, and keeps what that one measured beside.

    Parameters
    ----------
    options : EfficiencyOptions
        What is measured.
    command : str
        That makes the files again.

    Raises
    ------
    ValueError
        For options out of range or names that nothing has.
    """
    device = find_device(options.device)
    options = options.checked(device.type)
    check_models(options.words("models"))
    with threads(options.threads):
        about = describe(device)
        path = Path(options.out) / f"{slug(about)}.json"
        made = {**provenance(command), "kind": "efficiency"}
        made["hardware"] |= about
        made["options"] = asdict(options) | {"out": str(options.out)}
        made["copy_bytes_per_second"] = _bandwidth(device, options.quick)
        made["code"] = code_digest()
        found = {} if options.fresh else _found(path, made)
        path.parent.mkdir(parents=True, exist_ok=True)
        run = Measuring(
            options, device, made["copy_bytes_per_second"], found,
            lambda records: _write(path, made, found, records),
        )  # fmt: skip
        for name in options.words("models"):
            run.measure_model(name)
    whole = _write(path, made, found, run.records)
    text = page(whole)
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    files = [path, path.with_suffix(".md")]
    if any(row["decode_ms_per_token"] for row in whole["rows"]):
        figure = efficiency_curves(gather_efficiency([str(path), "paper"]).rows)
        figure.savefig(path.with_suffix(".png"), dpi=160)
        files.append(path.with_suffix(".png"))
    return Benchmark(text, files, run.failures)


def describe_bounds(options: EfficiencyOptions, bandwidth: float) -> str:
    """The bytes a step must read and the time that takes, without a device: a Markdown table.

    Parameters
    ----------
    options : EfficiencyOptions
        Models (`SHAPES` or embedded ones), lengths, methods and budgets.
    bandwidth : float
        Bytes a second.
    """
    options = options.checked("cuda")
    check_models(options.words("models"))
    lines = [
        f"Bytes that a step must read and write, at {bandwidth / 1e9:g} GB/s, {options.dtype}:",
        "",
        "| model | method | input tokens | rows | weights GiB | KV GiB | bound ms | cache GiB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in options.words("models"):
        place = torch.device("meta" if name in SHAPES else "cpu")
        subject = Subject(name, place, getattr(torch, options.dtype), options.window)
        weights = weight_bytes(subject.model)
        for tokens in options.numbers("lengths"):
            for method, rows in asked_of(subject, options, tokens):
                read = kv_bytes(subject.model, [method] * rows, tokens, options.steps)
                held = kept_tokens([method] * rows, tokens) * token_bytes(subject.model)
                bound = (weights + read) / bandwidth * 1e3
                label = method.name if method.budget is None else f"{method.name} {method.budget}"
                lines.append(
                    f"| {subject.name} | {label} | {tokens} | {rows} | {weights / 2**30:.2f} | "
                    f"{read / 2**30:.3f} | {bound:.2f} | {held / 2**30:.3f} |"
                )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line, with nothing but torch and transformers; returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "sparsemm_eval.bench.efficiency", *given])
    try:
        options = options_from(given, __doc__)
        if options.dry_run:
            print(describe_bounds(options, options.memory_bandwidth()))
            return 0
        done = run_efficiency(options, command)
    except (ValueError, OSError) as error:
        print(f"sparsemm-eval: {one_line(error)}", file=sys.stderr)
        return 1
    print(done.markdown)
    for path in done.files:
        print(f"wrote {path}")
    for line in done.failures:
        print(f"sparsemm-eval: {line}", file=sys.stderr)
    return 1 if done.failures else 0


def _bandwidth(device: torch.device, quick: bool) -> float:
    """Bytes a second of a large copy, read and written."""
    size = (64 << 20) if quick or device.type == "cpu" else 1 << 30
    clock = DeviceClock(size) if device.type == "cuda" else HostClock(size)
    times = [clock.copy()[0] for _ in range(20)]
    return 2 * clock.buffers[0].nbytes / statistics.median(times) * 1e6


def _found(path: Path, made: Record) -> dict[tuple, Record]:
    """Measurements of an earlier run that are as if made now."""
    if not path.is_file():
        return {}
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    if any(whole.get(key) != made[key] for key in ("schema", "code", "versions", "hardware")):
        return {}
    rows = [*whole["rows"], *whole["many_rows"]]
    return {identity(row): row for row in rows if row["decode_ms_per_token"]}


def _write(
    path: Path, made: Record, found: dict[tuple, Record], records: Sequence[Record]
) -> Record:
    """What was found and what is new; single rows, as the paper's figure shows, apart from many."""
    every = {**found, **{identity(record): record for record in records}}.values()
    ordered = sorted(every, key=lambda record: (record["model"], record["input_tokens"]))
    whole = {
        **made,
        "rows": [record for record in ordered if record["rows"] == 1],
        "many_rows": [record for record in ordered if record["rows"] > 1],
    }
    path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    return whole


if __name__ == "__main__":
    sys.exit(main())
