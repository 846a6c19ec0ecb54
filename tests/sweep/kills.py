"""Kill a sweep at random moments until it is done, and compare with an undisturbed one.

``python tests/sweep/kills.py --kills 20 --out results/sweep/kills.json``
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

from sparsemm_eval.report.provenance import provenance

GRID = """
models:
  - {name: qwen2vl, pretrained: "embedded:qwen2vl", settings: {dtype: float32}}
tasks: [docvqa_mini, vqav2_mini]
methods: [fullkv, sparsemm, snapkv]
budgets: [64, 12]
window: 8
shards: {docvqa_mini: 2}
"""
SWEEP = (sys.executable, "-c", "from sparsemm_eval.cli import app; app()", "sweep")
TABLES = ("table.md", "kept.md")
# Sweeps that a kill may take to end.
PATIENCE = 600


def run_kills(
    folder: Path, kills: int, samples: int = 12, batch_size: int = 3, seed: int = 0
) -> dict[str, Any]:
    """Run sweeps, kill them, run them on; as many as the kills need.

    Parameters
    ----------
    folder : Path
        For grid and sweeps.
    kills : int
        How many SIGKILLs, at moments spread evenly over a sweep from its first file to its end.
    samples, batch_size : int
        Of the grid.
    seed : int
        Of the moments.

    Returns
    -------
    dict
        Of each kill what was on disk then; of each sweep whether its tables are those of the
        undisturbed one, byte for byte, and how many answers were computed and stored twice.
    """
    chance = random.Random(seed)
    grid = folder / "grid.yaml"
    grid.write_text(f"{GRID}samples: {samples}\nbatch_size: {batch_size}\n")
    undisturbed = folder / "undisturbed"
    begin = time.perf_counter()
    with _start(grid, undisturbed) as child:
        seconds = _first_sign(undisturbed, child, begin)
        child.wait(PATIENCE)
    assert child.returncode == 0, child.returncode
    duration = time.perf_counter() - begin - seconds
    moments: list[dict[str, Any]] = []
    sweeps: list[dict[str, Any]] = []
    while len(moments) < kills:
        out = folder / f"killed-{len(sweeps)}"
        of_sweep = 0
        while len(moments) < kills:
            moment = chance.uniform(0, duration)
            if not _killed(grid, out, moment):
                break
            moments.append({"sweep": len(sweeps), "second": round(moment, 3), **on_disk(out)})
            of_sweep += 1
        with _start(grid, out) as child:
            child.wait(PATIENCE)
        assert child.returncode == 0, child.returncode
        sweeps.append({"kills": of_sweep, **compare(out, undisturbed)})
    return {"seed": seed, "seconds": round(duration, 2), "moments": moments, "sweeps": sweeps}


def on_disk(out: Path) -> dict[str, int]:
    """Answers and scored cells in a sweep's folder."""
    return {
        "answers": sum(answers(out).values()),
        "scored": len(list(out.glob("cells/*/*_results.json"))),
        "tables": sum((out / name).is_file() for name in TABLES),
    }


def compare(out: Path, other: Path) -> dict[str, Any]:
    """Tables byte by byte, texts and metrics of two sweeps."""
    mine, theirs = answers(out), answers(other)
    return {
        "tables_identical": all(
            (out / name).read_bytes() == (other / name).read_bytes() for name in TABLES
        ),
        "answers_identical": mine.keys() == theirs.keys(),
        "computed_twice": sum(count - 1 for count in mine.values()),
    }


def answers(out: Path) -> Counter[tuple[str, str]]:
    """How often each (key, text) is stored, read past the code under test."""
    found: Counter[tuple[str, str]] = Counter()
    for path in out.glob("answers/*/*.sqlite"):
        with closing(sqlite3.connect(path)) as file:
            tables = file.execute("SELECT 1 FROM sqlite_master WHERE name = 'answers'").fetchall()
            found.update(file.execute("SELECT key, text FROM answers") if tables else ())
    return found


def _start(grid: Path, out: Path) -> subprocess.Popen:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    with (out.parent / f"{out.name}.txt").open("a") as said:
        return subprocess.Popen(
            [*SWEEP, str(grid), "--out", str(out)], env=environment, stdout=said, stderr=said
        )


def _killed(grid: Path, out: Path, moment: float) -> bool:
    """Start a sweep and kill it so many seconds after its first sign; False if it was done."""
    begin = time.perf_counter()
    with _start(grid, out) as child:
        _first_sign(out, child, begin)
        try:
            child.wait(moment)
        except subprocess.TimeoutExpired:
            child.kill()
            return True
    assert child.returncode == 0, child.returncode
    return False


def _first_sign(out: Path, child: subprocess.Popen, begin: float) -> float:
    """Seconds until this process wrote down its plan, the last thing before it loads a model."""
    begun = time.time()
    plan = out / "plan.json"
    while child.poll() is None and not (plan.is_file() and plan.stat().st_mtime >= begun - 0.1):
        assert time.perf_counter() - begin < PATIENCE
        time.sleep(0.01)
    return time.perf_counter() - begin


def main() -> None:
    """Write the outcome as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--samples", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        done = run_kills(Path(folder), given.kills, given.samples, given.batch_size, given.seed)
    command = shlex.join(["python", *sys.argv])
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({**provenance(command), **done}, indent=1) + "\n")
    bad = [sweep for sweep in done["sweeps"] if not sweep["tables_identical"]]
    print(f"{len(done['moments'])} kills, {len(done['sweeps'])} sweeps, {len(bad)} differ")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
