"""What the command line refuses or tells without a tensor, it does before anything heavy is there.

Not by the clock, which other processes of a machine disturb: by what was imported. How long it
takes is measured by tests/reliability/refusals.py.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from reliability.refusals import CASES, COMMANDS, Case, prepare

HEAVY = {
    "accelerate", "datasets", "lmms_eval", "matplotlib", "pandas", "scipy", "torch", "transformers",
}  # fmt: skip
# As the command itself, and at its end what was imported on the way.
PROGRAM = """
import atexit, json, sys
atexit.register(lambda: print("\\n" + json.dumps(sorted(sys.modules))))
from sparsemm_eval.cli import app
app(prog_name="sparsemm-eval")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("refusals")
    prepare(made)
    return made


def run(
    words: list[str], folder: Path, program: tuple[str, ...] = ("-c", PROGRAM)
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *program, *words], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "COLUMNS": "200", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.command)
def test_nothing_heavy_is_imported(case: Case, folder: Path) -> None:
    done = run(case.command.split(), folder)
    said, _, modules = done.stdout.rstrip().rpartition("\n")
    assert (done.returncode, case.says in " ".join((said + done.stderr).split())) == (
        case.code, True
    ), said + done.stderr  # fmt: skip
    assert HEAVY & set(json.loads(modules)) <= set(case.may)
    if case.code == 1:
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("sparsemm-eval: ")


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "eval"])
def test_every_command_knows_h(command: str, folder: Path) -> None:
    short = run([*command.split(), "-h"], folder)
    assert short.returncode == 0
    assert f"Usage: sparsemm-eval {command}" in short.stdout


# What each of them imports first is told to end this very process, as Ctrl-C or a scheduler does.
LONG = {
    "demo": "every finished answer is safe, run it again to go on",
    "sweep good.yaml": "every finished answer is safe, run it again to go on",
    "submit good.yaml": "every finished answer is safe, submit it again to go on",
    "mask -o masked": "every finished answer is safe, run it again to go on",
    "chase": "every finished page is safe, run it again to go on",
    "sensitivity --data docvqa_mini": (
        "everything that was computed is safe, run it again to go on"
    ),
    "draw": "",
    "merge sweep_folder -o merged": "nothing is finished, run it again into a new folder",
    "figure paper -o out": "",
}


@pytest.mark.parametrize("command", LONG)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_who_is_asked_to_end_says_so(
    command: str, number: signal.Signals, code: int, folder: Path, tmp_path: Path
) -> None:
    plugin = tmp_path / "ends.py"
    plugin.write_text(f"import os\nos.kill(os.getpid(), {int(number)})\n")
    done = run([*command.split(), "--plugin", str(plugin)], folder, ("-m", "sparsemm_eval"))
    safe = LONG[command] and f"; {LONG[command]}"
    assert done.stderr == f"sparsemm-eval: stopped by {number.name}{safe}\n"
    assert done.returncode == code


def test_a_signal_that_was_swallowed_is_not_the_last(tmp_path: Path) -> None:
    """Some libraries go on after whatever an import of theirs raises."""
    script = """
import os, signal, time
from sparsemm_eval.sweep import process
process._AGAIN = 0.2
try:
    with process.leaving():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except:
            os.kill(os.getpid(), signal.SIGTERM)  # at once: the same request
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)
        print("it goes on")
except process.Stopped as stopped:
    os.kill(os.getpid(), signal.SIGTERM)
    print(stopped)
"""
    done = run([], tmp_path, ("-c", script))
    assert (done.stdout, done.stderr, done.returncode) == ("stopped by SIGTERM\n", "", 0)
