"""How long the command line takes to refuse what it can refuse without a tensor, and to help.

    python tests/reliability/refusals.py [-o results/reliability/refusals.json] [--times 5]

Each command is a process of its own; its best time of several is kept, as other processes of the
machine only ever add to it. Where they are many, the seconds of a CPU say more: about what an idle
machine would take.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from sparsemm_eval.paths import write_whole
from sparsemm_eval.report.provenance import provenance
from sparsemm_eval.sweep.plan import Plan, PlannedCell, PlannedJob

COMMANDS = (
    "demo", "sweep", "eval", "submit", "cancel", "merge", "status", "table", "figure", "report",
    "chase", "sensitivity", "draw", "mask", "doctor", "bench", "bench kernels", "bench efficiency",
)  # fmt: skip
GRID = """\
models: [{name: reader, pretrained: "embedded:qwen2vl"}]
tasks: [docvqa_mini]
methods: [fullkv, snapkv]
budgets: [64]
window: 8
"""
# Grids that `prepare` writes, each with one fault.
GRIDS = {
    "good": GRID,
    "key": GRID + "colour: red\n",
    "method": GRID.replace("snapkv", "snapvk"),
    "budget": GRID.replace("64", "4"),
    "embedded": GRID.replace("embedded:qwen2vl", "embedded:gpt"),
    "yaml": "models: [",
}


class Case(NamedTuple):
    """A command, words that it says, its exit code, and what it may import of what is heavy."""

    command: str
    says: str
    code: int = 1
    may: tuple[str, ...] = ()


# Run in a folder that `prepare` has filled.
CASES = [
    Case("--help", "Evaluate head-budgeted", 0),
    Case("-h", "Evaluate head-budgeted", 0),
    Case("--version", "sparsemm-eval", 0),
    *(Case(f"{command} --help", "Usage", 0) for command in COMMANDS if command != "eval"),
    Case("swep", "No such command", 2),
    Case("sweep", "Missing argument", 2),
    Case("status sweep_folder", "answers 0 of 12", 0),
    Case("status nowhere", "no sweep was begun here"),
    Case("cancel nowhere", "no sweep was begun here"),
    Case("cancel sweep_folder", "nothing was submitted here"),
    Case("merge nowhere -o merged", "no sweep was begun here"),
    Case("merge sweep_folder -o sweep_folder", "it is not empty"),
    Case("sweep paper_orc", "there is no such file and no grid of that name"),
    Case("sweep key.yaml", "a grid has no such key"),
    Case("sweep method.yaml", "it must be one of fullkv"),
    Case("sweep budget.yaml", "budget=4 is too small"),
    Case("sweep embedded.yaml", "it must be one of embedded:qwen2vl"),
    Case("sweep yaml.yaml", "it is no YAML"),
    Case("sweep good.yaml --dry-run --plugin none.py", "there is no such file"),
    Case("sweep good.yaml --job none", "it must be one of reader@docvqa_mini"),
    Case("sweep good.yaml -o sweep_folder", "it holds the sweep of another grid"),
    Case("submit paper_orc", "there is no such file and no grid of that name"),
    Case("submit good.yaml --retries -1", "retries=-1"),
    Case("submit good.yaml --shards 0", "shards=0"),
    Case("submit good.yaml --time 9", "it is Slurm's, and executor is local"),
    Case("submit good.yaml -o sweep_folder", "it holds the sweep of another grid"),
    Case("demo --budgets many", "it must be integers"),
    Case("demo --budgets 8", "budget=8 is too small"),
    Case("demo --samples 0", "a miniature benchmark has 200 samples"),
    Case("demo --tasks docvqa", "it must be one of docvqa_mini"),
    Case("demo --models gpt", "it must be one of qwen2vl"),
    Case("table nowhere", "there is no such file or folder", may=("pandas",)),
    Case("table empty", "there are no results here", may=("pandas",)),
    Case("table paper --like table9", "it must be one of table1", may=("pandas",)),
    Case("table paper --format pdf", "it must be one of markdown", may=("pandas",)),
    Case("figure nowhere -o out", "there is no such file or folder"),
    Case("figure paper -o out --kind heat", "it must be one of budget"),
    Case("figure paper -o out --format pdf2", "it must be one or more of svg"),
    Case("report nowhere -o out", "there is no such file or folder"),
    Case("chase --data books", "it must be drawn"),
    Case("chase --model ./nowhere", "pretrained=./nowhere"),
    Case("chase --model embedded:gpt", "it must be one of embedded:qwen2vl"),
    Case("chase --dtype int8", "dtype='int8'"),
    Case("sensitivity", "Missing option", 2),
    Case("sensitivity --data nowhere/photos", "there is no such file or folder"),
    Case("sensitivity --data photos.jsonl", "there is no such file or folder"),
    Case("sensitivity --data empty", "it holds no images"),
    Case("sensitivity --data asked.jsonl", "asked.jsonl:2: image none.png: it cannot be read"),
    Case("sensitivity --data docvqa_mini --budgets many", "it must be integers"),
    Case("sensitivity --data docvqa_mini --budgets 1", "budget=1: it must be an integer of at"),
    Case("sensitivity --data docvqa_mini --window 0", "window=0"),
    Case("sensitivity --data docvqa_mini --max-new-tokens 0", "max_new_tokens=0"),
    Case("sensitivity --data docvqa_mini --question Why", "bring their own questions"),
    Case("sensitivity --data docvqa_mini -o empty", "output=empty: it is a folder"),
    Case("sensitivity --data docvqa_mini --include_path nowhere", "there is no such folder"),
    Case("sensitivity --data docvqa_mini --model ./nowhere", "pretrained=./nowhere"),
    Case("sensitivity --data docvqa_mini --model embedded:gpt", "it must be one of embedded:"),
    Case("sensitivity --data docvqa_mini --dtype int8", "dtype='int8'"),
    Case("draw --question What", "a question or box without its image"),
    Case("draw --image nowhere.png --question What", "nowhere.png"),
    Case("mask -o m --shares few", "it must be numbers"),
    Case("mask -o m --mode key", "it must be one of query, output"),
    Case("mask -o m --model embedded:gpt", "it must be one of embedded:qwen2vl"),
    Case("doctor --arches 9.0", "it needs --build"),
    Case("eval", "--tasks is missing"),
    Case("eval --tasks docvqa_mini", "--model is missing"),
]


def prepare(folder: Path) -> None:
    """Write what `CASES` name: grids, a sweep that was begun, and an empty folder."""
    for name, text in GRIDS.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    (folder / "empty").mkdir()
    lines = '{"question": "What is it?"}\n{"question": "And this?", "image": "none.png"}\n'
    (folder / "asked.jsonl").write_text(lines, encoding="utf-8")
    jobs = tuple(PlannedJob(f"m@t@{n + 1}of3", "m", "t", n, 3, 2) for n in range(3))
    cells = tuple(
        PlannedCell("m", "t", f"t {name}", name, {"method": name}, 6, f"cells/{name}_results.json")
        for name in ("fullkv", "snapkv")
    )
    Plan(jobs, cells).write(folder / "sweep_folder")
    other = GRID.replace("64", "32")
    (folder / "sweep_folder/grid.yaml").write_text(other, encoding="utf-8")


def measure(case: Case, program: list[str], folder: Path, times: int) -> dict:
    """The best time of a command, and what it ended with."""
    seconds, cpu_seconds = [], []
    for _ in range(times):
        start, before = time.perf_counter(), _children_seconds()
        done = subprocess.run(
            [*program, *case.command.split()], cwd=folder, capture_output=True, text=True,
            env={**os.environ, "COLUMNS": "200"},
        )  # fmt: skip
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(_children_seconds() - before)
    words = " ".join((done.stdout + done.stderr).split()).replace(f"{folder}/", "")
    return {
        "command": case.command,
        "seconds": round(min(seconds), 2),
        "cpu_seconds": round(min(cpu_seconds), 2),
        "exit": done.returncode,
        "as_expected": done.returncode == case.code and case.says in words,
        "sentence": words[-200:] if case.code else "",
    }


def _children_seconds() -> float:
    """Of a CPU, that processes have used which this one began and saw end."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Measure all cases, print a table, and write it with how it was made."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, help="JSON file; default: none.")
    parser.add_argument("--times", type=int, default=5, help="Runs of each command.")
    given = parser.parse_args()
    program = [sys.executable, "-m", "sparsemm_eval"]
    rows = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder)
        for case in CASES:
            rows.append(measure(case, program, folder, given.times))
            row = rows[-1]
            times = f"{row['seconds']:6.2f} s, CPU {row['cpu_seconds']:5.2f} s"
            wrong = "" if row["as_expected"] else f"  UNEXPECTED {row['sentence']}"
            print(f"{times}  {row['command']}{wrong}", flush=True)
    about = provenance(f"python tests/reliability/refusals.py --times {given.times}")
    made = {
        **about,
        "load": os.getloadavg(),
        "slowest_seconds": max(row["seconds"] for row in rows),
        "slowest_cpu_seconds": max(row["cpu_seconds"] for row in rows),
    }
    print(
        f"slowest {made['slowest_seconds']} s, CPU {made['slowest_cpu_seconds']} s, load "
        f"{made['load'][0]:.1f} on {os.cpu_count()} cores"
    )
    if given.output is not None:
        write_whole(given.output, json.dumps({**made, "commands": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
