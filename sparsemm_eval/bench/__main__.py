"""``python -m sparsemm_eval.bench``: the acceptance on a GPU, gone on with where it ended.

Parts run as processes of their own, the most telling first, until the time is up; a later call with
the same code runs what is left. Needs torch, transformers, numpy, pandas, matplotlib, pytest and
hypothesis, and a checkout, which need not be installed.
"""

from __future__ import annotations

import argparse
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsemm_eval.bench.machine import (
    code_digest,
    find_device,
    provenance_on,
    read_earlier,
    slug,
    write_json,
)
from sparsemm_eval.bench.pages import bullets, efficiency_aims, markdown_table
from sparsemm_eval.errors import UserError, one_line
from sparsemm_eval.stored import NotUnderstood, read_json

ROOT = Path(__file__).resolve().parents[2]
TESTS = (
    "tests/bench/test_gpu.py", "tests/cache/test_gpu.py", "tests/cuda_ext/test_append_attend.py",
)  # fmt: skip
LEAST_SECONDS = 20  # what is left for a part to be begun
_BUILD = (
    "from sparsemm_eval.cache.extension import load_extension; import sys; "
    "load_extension(sys.argv[1])"
)
# Benchmarks, by the words that name them.
_QUICK = {
    "efficiency": "efficiency --quick",
    "kernels": "kernels --quick --shapes qwen2vl",
    "shared prefill": "shared_prefill --samples 2 --batch-size 2 --repeats 1",
}
_LONG = "efficiency --lengths 32768 --rows 1"
_FULL = {
    "vicuna 32K": f"{_LONG} --models vicuna --engines ours,hf_generate,concatenate",
    "others 32K": f"{_LONG} --models mistral,qwen2vl-7b --engines ours",
    "31 rows, 2K": "efficiency --lengths 2048 --rows 31 --models vicuna,mistral,qwen2vl-7b "
    "--engines ours",
    "shared prefill": "shared_prefill --model vicuna --samples 1 --batch-size 1 --repeats 1",
    "kernels": "kernels --seconds 0.3",
    "vicuna, compiled": f"{_LONG} --models vicuna --engines ours_compiled",
    "vicuna 2K to 16K": "efficiency --lengths 2048,4096,8192,16384 --rows 1 --models vicuna "
    "--engines ours,hf_generate",
    "others 2K to 16K": "efficiency --lengths 4096,8192,16384 --rows 1 "
    "--models mistral,qwen2vl-7b --engines ours",
    "others under HF": "efficiency --lengths 2048,32768 --rows 1 --models mistral,qwen2vl-7b "
    "--engines hf_generate",
    "host's share": f"{_LONG} --models vicuna --engines ours,hf_generate --profile",
    "vicuna, static cache": f"{_LONG} --models vicuna --engines hf_static",
}


@dataclass(frozen=True)
class Part:
    """One process.

    Parameters
    ----------
    name : str
        In the table and of the log.
    arguments : tuple of str
        Of Python.
    """

    name: str
    arguments: tuple[str, ...]


def parts_for(device: str, out: Path, quick: bool) -> list[Part]:
    """What is run, the most telling first.

    Parameters
    ----------
    device : {"cpu", "cuda"}
        On a CPU everything is quick: every line but the graph's.
    out : Path
        Where parts write.
    quick : bool
        Every line in seconds.
    """
    tests = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *TESTS)
    begin = [Part("build the op", ("-c", _BUILD, device)), Part("gpu tests", tests)]
    parts = []
    for name, benchmark in (_QUICK if device == "cpu" or quick else _FULL).items():
        module, *options = benchmark.split()
        file = "shared_prefill.json" if module == "shared_prefill" else module
        where = ("--device", device, "--out", str(out / file))
        parts.append(Part(name, ("-m", f"sparsemm_eval.bench.{module}", *where, *options)))
    return [*begin, *parts]


def run_acceptance(
    parts: Sequence[Part], out: Path, provenance: dict[str, Any], seconds: float
) -> list[dict[str, Any]]:
    """Run the parts that are left, and write ``acceptance.json`` after each.

    Parameters
    ----------
    parts : sequence of Part
        In their order.
    out : Path
        The device's folder.
    provenance : dict
        Provenance, with the code's digest.
    seconds : float
        For all of them: a part that runs longer is stopped, and keeps what it has written.

    Returns
    -------
    list of dict
        A record a part: name, command, state ("passed", "FAILED", "stopped" or "left"), seconds and
        the log's last line.
    """
    path = out / "acceptance.json"
    earlier = read_earlier(path, provenance) or {"parts": []}
    before = {part["name"]: part for part in earlier["parts"]}
    ends = time.monotonic() + seconds
    records: list[dict[str, Any]] = []
    for number, part in enumerate(parts, 1):
        known = before.get(part.name)
        left = ends - time.monotonic()
        if known is not None and known["state"] == "passed":
            record = known
        elif left < min(LEAST_SECONDS, seconds / 2):
            record = {"name": part.name, "state": "left", "seconds": None, "last": ""}
        else:
            print(f"{number} of {len(parts)}: {part.name}", file=sys.stderr, flush=True)
            record = _run(part, out, left)
        records.append(record)
        write_json(path, {**provenance, "parts": records})
    return records


def main(arguments: list[str] | None = None) -> int:
    """Run from a command line; returns 0 only if everything has passed."""
    parser = argparse.ArgumentParser("python -m sparsemm_eval.bench", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8.0, help="for this call")
    parser.add_argument("--quick", action="store_true", help="every line, in seconds")
    parser.add_argument("--device", default="", help="cpu or cuda; default: CUDA where it is")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu")
    given = sys.argv[1:] if arguments is None else arguments
    asked = parser.parse_args(given)
    try:
        if not asked.minutes > 0:
            raise UserError(f"minutes={asked.minutes!r}: it must be above 0")
        device = find_device(asked.device)
        provenance = provenance_on(
            device, shlex.join(["python", "-m", "sparsemm_eval.bench", *given])
        )
        provenance["code"] = code_digest()
        out = asked.out.resolve() / slug(provenance["hardware"])
        out.mkdir(parents=True, exist_ok=True)
        parts = parts_for(device.type, out, asked.quick)
        records = run_acceptance(parts, out, provenance, 60 * asked.minutes)
        text = summary(records, out)
    except (UserError, OSError) as error:
        print(f"sparsemm-eval: {one_line(error)}", file=sys.stderr)
        return 1
    (out / "acceptance.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return int(any(record["state"] != "passed" for record in records))


def summary(records: Sequence[dict[str, Any]], out: Path) -> str:
    """A short table of the parts, then the aims and what was reached of them."""
    rows = [
        (r["name"], r["state"], "" if r["seconds"] is None else f"{r['seconds']:.0f}", r["last"])
        for r in records
    ]
    heads = ("part", "state", "seconds", "last words")
    table = markdown_table(heads, rows, words=("part", "state", "last words"))
    reached: list[str] = []
    for path in sorted((out / "efficiency").glob("*.json")):
        reached += efficiency_aims(_own(path))
    for path in sorted((out / "kernels").glob("*.json")):
        reached += _own(path)["aims"]
    shared = out / "shared_prefill.json"
    if shared.is_file():
        grid = _own(shared)
        bound = grid.get("byte_bound", {}).get("grid_over_bound")
        reached.append(
            f"shared prefill, {grid['cells']} cells of {grid['model']}: "
            f"{grid['grid_over_one_full']} times full KV alone, "
            f"{grid['one_by_one_over_grid']} times as fast as one by one"
            + (f", {bound} times the byte bound" if bound else "")
        )
    left = sum(record["state"] in ("left", "stopped") for record in records)
    if left:
        reached.append(f"{left} parts are left: run the same command again")
    return f"{table}\n\n{bullets(reached)}"


def _own(path: Path) -> dict[str, Any]:
    """What a part of this acceptance wrote."""
    try:
        return read_json(path)
    except NotUnderstood as error:
        raise UserError(f"{path}: {error}; move it away and run again") from error


def _run(part: Part, out: Path, seconds: float) -> dict[str, Any]:
    log = out / "logs" / f"{re.sub(r'[^a-z0-9]+', '-', part.name.lower())}.txt"
    log.parent.mkdir(exist_ok=True)
    begun = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [sys.executable, *part.arguments], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            state = "passed" if process.wait(seconds) == 0 else "FAILED"
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # it ends by itself, and files stay whole
            state = "stopped"
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    written = [line.strip() for line in log.read_text(encoding="utf-8").splitlines()]
    last = next((line for line in reversed(written) if line), "")
    return {
        "name": part.name,
        "command": shlex.join(["python", *part.arguments]),
        "state": state,
        "seconds": round(time.monotonic() - begun, 1),
        "last": last[:100].replace("|", "/"),
    }


if __name__ == "__main__":
    sys.exit(main())
