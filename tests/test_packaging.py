"""As a wheel: data travels inside the package, and nothing else becomes importable."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRAINING = "sparsemm_eval/tiny/training"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the files git knows, in a folder of its own, with no network."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
         "--wheel-dir", out, source],
        check=True, capture_output=True,
    )  # fmt: skip
    return next(out.glob("*.whl"))


def test_only_the_package_is_importable(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"sparsemm_eval"}


def test_the_trainer_stays_in_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """Nothing of it is in the wheel, nothing there needs it, and its command says so."""
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.startswith(TRAINING)]
        archive.extractall(tmp_path)
    for path in (tmp_path / "sparsemm_eval").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not any((module or "").startswith(TRAINING.replace("/", ".")) for module in modules)
    done = subprocess.run(
        [sys.executable, "-m", "sparsemm_eval.tiny.train", "qwen2vl", "--out", "out"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("sparsemm-eval: this is an installed package, and the tiny")
    assert done.stderr.count("\n") == 1


def test_tasks_sources_and_checkpoint_are_found_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "from sparsemm_eval.paths import cuda_ext_folder, tasks_folder\n"
        "from sparsemm_eval.tiny import default_checkpoint\n"
        "from sparsemm_eval.report.paper import paper_cells\n"
        "import sparsemm_eval\n"
        "print(sparsemm_eval.__file__)\n"
        "assert (tasks_folder() / 'docvqa_mini.yaml').is_file()\n"
        "assert (tasks_folder() / 'mini.py').is_file()\n"
        "assert (cuda_ext_folder() / 'README.md').is_file()\n"
        "assert (default_checkpoint() / 'model.safetensors').is_file()\n"
        "assert (default_checkpoint() / 'head_scores.json').is_file()\n"
        "assert len(paper_cells()) > 500\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))


def test_the_entry_points_are_declared(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        text = archive.read(name).decode()
    assert "sparsemm-eval = sparsemm_eval.cli:app" in text
    assert "[lmms_eval.models]" in text
