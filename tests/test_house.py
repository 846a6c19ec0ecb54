"""The house: imports run one way, and rooms meant to be light stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sparsemm_eval"
# A room may import from rooms of a lower floor, and from itself.
FLOORS = {
    "errors": -1, "choices": 0, "paths": 0, "stored": 0,
    "libraries": 1, "methods": 1, "report": 1, "tiny": 1, "cache": 2,
    "families": 3, "engine": 4, "doctor": 5, "heads": 5, "bench": 5,
    "sweep": 6, "cli": 7, "__main__": 8,
}  # fmt: skip
STDLIB = set(sys.stdlib_module_names) | {"__future__"}
TENSORS = {"torch", "transformers", "numpy", "pandas", "matplotlib", "flash_attn"}
ALLOWED = {
    "methods": {"torch", "numpy"},
    "cache": TENSORS,
    "families": TENSORS | {"PIL"},
    **{f"engine/{name}.py": TENSORS for name in ("decode", "decoder", "step")},
    "bench": TENSORS | {"flashinfer"},
    "report": {
        "pandas",
        "matplotlib",
        "numpy",
        "scipy",
        "jinja2",
        "PIL",
        "lmms_eval",
        "pycocoevalcap",
    },
}


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Modules a file imports, wherever in it, as absolute names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            found.add(f"sparsemm_eval.{room(path)}")
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downward(path: Path) -> None:
    own = room(path)
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "sparsemm_eval" and len(parts) > 1 and parts[1] != own:
            assert FLOORS[parts[1]] < FLOORS[own], f"{own} imports {name}"


@pytest.mark.parametrize("place", ALLOWED)
def test_light_rooms_import_only_what_they_may(place: str) -> None:
    for path in FILES:
        if str(path.relative_to(PACKAGE)).startswith(place):
            outside = {name.split(".")[0] for name in imports(path)} - STDLIB - {"sparsemm_eval"}
            assert outside <= ALLOWED[place], path


def test_no_setting_travels_through_the_environment() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert "os.environ" not in text, path
        assert "getenv" not in text, path


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_ruff_is_content(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
