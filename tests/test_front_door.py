"""run_eval.sh: what it does before any Python of ours runs."""

import os
import re
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


@pytest.mark.parametrize(
    ("arguments", "paths"),
    [
        ([], ["{root}/tests"]),
        (["-x", "-k", "mine"], ["-x", "-k", "mine", "{root}/tests"]),
        (["mine"], ["mine"]),
        (["mine/test_it.py::test_one", "-x"], ["mine/test_it.py::test_one", "-x"]),
        (["--maxfail", "1", "mine"], ["--maxfail", "1", "mine"]),
    ],
)
def test_the_paths_of_tests_are_the_callers(
    checkout: Path, tmp_path: Path, arguments: list[str], paths: list[str]
) -> None:
    python = checkout / ".venv/bin/python"
    python.write_text('#!/usr/bin/env bash\necho "$PWD: $*"\n')
    python.chmod(0o755)
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "mine").mkdir(parents=True)
    (elsewhere / "mine/test_it.py").touch()
    link = elsewhere / "link.sh"
    link.symlink_to(checkout / "run_eval.sh")
    done = call(link, "test", *arguments, cwd=elsewhere)
    assert done.stderr == ""
    doctor, pytest_ = done.stdout.splitlines()
    assert doctor == f"{elsewhere}: doctor --libraries"
    assert pytest_.startswith(f"{elsewhere}: -m pytest -c {checkout}/pyproject.toml ")
    words = " ".join(paths).format(root=checkout)
    assert pytest_.endswith(f" --no-loadscope-reorder {words}")


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


@pytest.fixture
def recorded(checkout: Path) -> Path:
    """A log of what pip is called with; an environment whose pip does nothing else."""
    log = checkout.parent / "pip.log"
    fake = f"""#!/usr/bin/env bash
if [ "$1" = -c ]; then exit 0; fi
if [ "$2" = venv ]; then
  mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "$0" "$3/bin/pip"
  exit
fi
echo "$*" >> {log}
! grep -qs broken {log.parent}/mood
"""
    for place in (
        checkout / ".venv/bin/python",
        checkout / ".venv/bin/pip",
        log.parent / "python3",
    ):
        place.write_text(fake)
        place.chmod(0o755)
    return log


def test_the_cpu_build_comes_from_its_index_and_nothing_for_a_gpu_with_it(
    checkout: Path, recorded: Path
) -> None:
    """It is kept to over an installation that broke off, and left only when the GPU's is asked."""
    path = f"{recorded.parent}{os.pathsep}{os.environ['PATH']}"
    options = {"env": {**os.environ, "PATH": path}}
    (recorded.parent / "mood").write_text("broken")
    done = call(checkout / "run_eval.sh", "setup", "--cpu", "https://mirror.example", **options)
    assert done.returncode == 1
    assert "run this again to go on" in done.stderr
    assert not (checkout / ".venv/installed").exists()
    (recorded.parent / "mood").unlink()
    recorded.unlink()
    done = call(checkout / "run_eval.sh", "setup", **options)
    assert done.returncode == 0, done.stderr
    first, second, third = recorded.read_text().splitlines()
    assert "--index-url https://mirror.example torch==" in first
    assert "torchvision==" in first
    assert "--require-hashes" in second
    lock = (checkout / ".venv/cpu.lock").read_text()
    assert "transformers==" in lock
    assert not re.search("^(torch|torchvision|triton|nvidia-.*|cuda-.*)==", lock, re.MULTILINE)
    assert third.endswith(f"--editable {checkout}")
    recorded.unlink()
    done = call(checkout / "run_eval.sh", "setup", "--gpu", **options)
    assert "making .venv anew" in done.stderr
    assert "requirements.lock" in recorded.read_text().splitlines()[0]


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
