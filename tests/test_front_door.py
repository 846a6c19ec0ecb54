"""run_eval.sh: what it does before any Python of ours runs."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout that is set up already, whose sparsemm-eval says where and how it was called."""
    root = tmp_path / "checkout"
    (root / ".venv/bin").mkdir(parents=True)
    for name in ("run_eval.sh", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, root / name)
    command = root / ".venv/bin/sparsemm-eval"
    command.write_text('#!/usr/bin/env bash\necho "$PWD: $*"\n')
    command.chmod(0o755)
    both = (root / "pyproject.toml").read_bytes() + (root / "requirements.lock").read_bytes()
    stamp = subprocess.run(["cksum"], input=both, capture_output=True, check=True).stdout.decode()
    (root / ".venv/installed").write_text(f"{root} {stamp}gpu\n")
    return root


def call(command: Path, *arguments: str, **options: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(command), *arguments], capture_output=True, text=True, check=False, **options
    )


@pytest.mark.parametrize(
    ("arguments", "passed"),
    [
        ([], "demo"),
        (["--", "--model", "x"], "eval --model x"),
        (["sweep", "mine.yaml", "-o", "out"], "sweep mine.yaml -o out"),
    ],
)
def test_the_callers_folder_stays_the_callers(
    checkout: Path, tmp_path: Path, arguments: list[str], passed: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    link = elsewhere / "link.sh"
    link.symlink_to(checkout / "run_eval.sh")
    for command in (checkout / "run_eval.sh", link):
        done = call(command, *arguments, cwd=elsewhere)
        assert done.stderr == ""
        assert done.stdout == f"{elsewhere}: {passed}\n"


def test_a_changed_lock_is_installed_anew(checkout: Path, tmp_path: Path) -> None:
    """With a python that cannot make an environment, so that nothing is really installed."""
    with (checkout / "requirements.lock").open("a") as lock:
        lock.write("# one more line\n")
    python = tmp_path / "bin/python3"
    python.parent.mkdir()
    python.write_text('#!/usr/bin/env bash\n[ "$1" = -c ]\n')
    python.chmod(0o755)
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    done = call(checkout / "run_eval.sh", "demo", env={**os.environ, "PATH": path})
    assert done.returncode == 1
    assert "apt install python3-venv" in done.stderr
    assert not (checkout / ".venv/installed").exists()


def test_setup_knows_its_options(checkout: Path) -> None:
    done = call(checkout / "run_eval.sh", "setup", "--tpu")
    assert done.returncode == 1
    assert done.stderr == "run_eval.sh: setup knows --cpu [INDEX] and --gpu, not --tpu\n"


def test_help_needs_nothing_installed(tmp_path: Path) -> None:
    shutil.copy(ROOT / "run_eval.sh", tmp_path)
    done = call(tmp_path / "run_eval.sh", "--help")
    assert done.returncode == 0
    assert "./run_eval.sh test" in done.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["run_eval.sh"]
