"""What breaks between the libraries is one sentence that names the package and what mends it."""

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import filelock
import pytest
from packaging.version import Version

from sparsemm_eval import libraries
from sparsemm_eval.errors import UserError
from sparsemm_eval.paths import lock_file

ROOT = Path(__file__).parent.parent


def run(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess:
    """`sparsemm-eval` in a process of its own, with a folder ahead of all installed packages."""
    folders = [str(folder) for folder in (path, ROOT) if folder is not None]
    return subprocess.run(
        [sys.executable, "-m", "sparsemm_eval", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def newer_filelock(tmp_path: Path) -> Path:
    """A folder with filelock as it is from 4.3 on: without the module `_api`."""
    package = tmp_path / "filelock"
    shutil.copytree(Path(filelock.__file__).parent, package)
    for file in package.rglob("*.py"):
        file.write_text(file.read_text("utf-8").replace("_api", "_interface"), "utf-8")
    (package / "_api.py").rename(package / "_interface.py")
    about = tmp_path / "filelock-4.3.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: filelock\nVersion: 4.3.1\n")
    (about / "top_level.txt").write_text("filelock\n")
    return tmp_path


def test_the_lock_names_every_package_that_pyproject_asks_for() -> None:
    locked = libraries.locked_versions()
    required = metadata.requires("sparsemm-eval") or []
    names = [name for line in required if "extra ==" not in line for name in [_name(line)]]
    assert {"torch", "lmms-eval", "filelock"} < set(names) <= set(locked)
    assert Version(locked["filelock"]) < Version("4.3")


def _name(requirement: str) -> str:
    from packaging.requirements import Requirement

    return libraries.canonicalize_name(Requirement(requirement).name)


def test_every_package_of_the_lock_has_hashes_and_nothing_of_a_machine() -> None:
    text = lock_file().read_text(encoding="utf-8")
    blocks = text.split("\n")
    for place, line in enumerate(blocks):
        if "==" in line:
            assert blocks[place + 1].strip().startswith("--hash=sha256:"), line
    assert "://" not in text
    assert "/" not in text.replace("' /", "")


def test_markers_choose_one_version_of_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    found = set()
    for python in ("3.10", "3.11", "3.12", "3.13", "3.14"):
        environment = {"python_version": python, "python_full_version": f"{python}.1"}
        monkeypatch.setattr(
            libraries.Marker,
            "evaluate",
            lambda self, env=environment, real=libraries.Marker.evaluate: real(self, env),
        )
        locked = libraries.locked_versions()
        monkeypatch.undo()
        assert {"torch", "transformers", "numpy"} <= set(locked)
        found.add(locked["numpy"])
    assert len(found) > 1


def test_all_is_well_here() -> None:
    done = run("doctor", "--libraries")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_cache_that_cannot_be_written_is_laid_to_no_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(libraries, "cache_folder", lambda: tmp_path / "file")
    with pytest.raises(OSError, match="file"):
        libraries.check_libraries()


def test_a_package_that_broke_lmms_eval_is_named_in_one_sentence(newer_filelock: Path) -> None:
    words = ("--model", "qwen2vl_sparsemm", "--tasks", "docvqa_mini")
    done = run("eval", *words, path=newer_filelock)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    known = libraries.locked_versions()["filelock"]
    assert f"filelock 4.3.1 is installed, {known} is known to work" in line
    assert "No module named 'filelock._api'" in line
    assert line.endswith((f"-m pip install filelock=={known}", "./run_eval.sh setup"))


def test_debug_shows_where_it_broke(newer_filelock: Path) -> None:
    done = run("--debug", "doctor", "--libraries", path=newer_filelock)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "filelock._api" in done.stderr


def test_differences_from_the_lock_are_found(newer_filelock: Path) -> None:
    code = "from sparsemm_eval.libraries import differences; print(*differences(), sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(newer_filelock), str(ROOT)])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "filelock 4.3.1, locked " in done.stdout


def test_who_is_at_fault_is_read_from_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that names no module is laid to the package whose code raised it."""

    def broken() -> None:
        metadata.packages_distributions()
        import yaml

        yaml.safe_load("[")

    monkeypatch.setattr(libraries, "_CHECKS", {"lmms-eval": broken})
    monkeypatch.setattr(
        libraries, "differences", lambda: [libraries.Difference("pyyaml", "6.0.0", "99")]
    )
    with pytest.raises(UserError, match=r"pyyaml 99 is installed, 6\.0\.0 is known to work"):
        libraries.check_libraries()


def test_where_all_is_as_locked_a_report_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("scored wrongly")

    monkeypatch.setattr(libraries, "_CHECKS", {"lmms-eval": broken})
    monkeypatch.setattr(libraries, "differences", list)
    with pytest.raises(UserError, match=r"scored wrongly.*please report"):
        libraries.check_libraries()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--model qwen2vl_sparsemm", "--tasks is missing"),
        (
            "--model qwen2vl_sparsemm --tasks docvqa_mini --model_args method=snapkv",
            "pretrained is missing",
        ),
    ],
)
def test_eval_ends_with_the_failures_sentence(arguments: str, words: str) -> None:
    """lmms-eval itself would end both with exit code 0."""
    done = run("eval", *arguments.split())
    assert done.returncode == 1
    assert words in done.stderr.splitlines()[-1]


def test_an_error_that_a_task_logs_is_no_failed_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """lmms-eval's tasks log errors of single answers, and the run goes on to its scores."""
    from lmms_eval import __main__ as lmms_main
    from loguru import logger
    from typer.testing import CliRunner

    from sparsemm_eval.cli import app

    monkeypatch.setattr(libraries, "_CHECKS", {})
    monkeypatch.setattr(lmms_main, "cli_evaluate", lambda args: logger.error("no letter in it"))
    assert CliRunner().invoke(app, ["eval", "--model", "sparsemm", "--tasks", "x"]).exit_code == 0
