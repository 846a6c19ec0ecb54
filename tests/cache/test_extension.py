"""Building and finding the compiled op: once, by whoever comes first, and said when it cannot."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsemm_eval import doctor
from sparsemm_eval.cache import backends, check_backend, extension
from sparsemm_eval.cache.backends import resolve_backend
from sparsemm_eval.cache.extension import (
    ExtensionError,
    Library,
    build,
    library,
    load_extension,
)
from sparsemm_eval.paths import cuda_ext_folder

ASK = """
import sys, torch
from sparsemm_eval.cache.backends import resolve_backend
for _ in range(2):
    print(resolve_backend(sys.argv[1], torch.device("cpu"), torch.float32, 64, 1))
"""


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources that compile in no time, and a cache of their own."""
    folder = tmp_path / "cuda_ext"
    folder.mkdir()
    shutil.copy(cuda_ext_folder() / "build.py", folder)
    (folder / "ops.cpp").write_text('#include "number.h"\nint number() { return NUMBER; }\n')
    (folder / "cpu.cpp").write_text("int other() { return 2; }\n")
    (folder / "number.h").write_text("#define NUMBER 1\n")
    for name in ("cuda.cpp", "append_attend.cu"):
        (folder / name).write_text("// never compiled here\n")
    monkeypatch.setattr(extension, "cuda_ext_folder", lambda: folder)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch" / "hub"))
    return folder


@pytest.fixture
def nothing_loaded() -> Iterator[None]:
    """Outcomes of this process are forgotten, and what a test leaves as well."""
    for remembered in (extension._attempt, backends._loads):
        remembered.cache_clear()
    yield
    for remembered in (extension._attempt, backends._loads):
        remembered.cache_clear()


def test_the_name_tells_what_went_into_it(sources: Path) -> None:
    before = library("cpu").folder
    assert library("cpu").folder == before
    (sources / "number.h").write_text("#define NUMBER 3\n")
    assert library("cpu").folder != before
    assert library("cuda", ["9.0"]).folder != library("cuda", ["8.0", "9.0"]).folder
    assert library("cuda", ["8.0", "9.0"]).cuda_flags[1:] == (
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    )


def test_it_is_built_once_and_says_so_in_a_line(
    sources: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wanted = library("cpu")
    path = build(wanted)
    assert path.parent == wanted.folder
    torch.ops.load_library(str(path))
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1
    assert str(wanted.folder) in said[0]
    built = path.stat().st_mtime_ns
    assert build(wanted) == path
    assert path.stat().st_mtime_ns == built
    assert capfd.readouterr().err == ""
    left = {entry.suffix for entry in wanted.folder.parent.iterdir()}
    assert left == {"", ".lock"}, "nothing half-built stays behind"


def test_what_a_killed_build_leaves_is_in_nobodys_way(sources: Path) -> None:
    wanted = library("cpu")
    (wanted.folder.parent / "building-0" / "lock").mkdir(parents=True)
    (wanted.folder.parent / f"{wanted.folder.name}.lock").touch()
    assert build(wanted).exists()


def cut_off(wanted: Library) -> None:
    wanted.path.write_bytes(wanted.path.read_bytes()[:5000])


def flipped(wanted: Library) -> None:
    content = bytearray(wanted.path.read_bytes())
    content[len(content) // 2] ^= 1
    wanted.path.write_bytes(content)


DAMAGE = {
    "cut": cut_off,
    "flipped": flipped,
    "empty": lambda wanted: wanted.path.write_bytes(b""),
    "removed": lambda wanted: wanted.path.unlink(),
    "a folder": lambda wanted: (wanted.path.unlink(), wanted.path.mkdir()),
    "digest removed": lambda wanted: wanted.digest_path.unlink(),
    "digest garbled": lambda wanted: wanted.digest_path.write_bytes(b"\xff\x00"),
    "digest empty": lambda wanted: wanted.digest_path.write_bytes(b""),
    "all removed": lambda wanted: [path.unlink() for path in (wanted.path, wanted.digest_path)],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_library_is_built_again_and_never_loaded(
    sources: Path,
    damage: Callable[[Library], Any],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def compile_at_once(wanted: Library, folder: Path) -> None:
        (folder / wanted.path.name).write_bytes(b"a library " * 1000)

    monkeypatch.setattr(extension, "_compile", compile_at_once)
    wanted = library("cpu")
    build(wanted)
    capfd.readouterr()
    damage(wanted)
    assert not wanted.is_whole()
    assert doctor._library("cpu").found.startswith("damaged: ")
    assert "not tried" in doctor._backend("cuda_ext", torch.device("cpu")).found
    assert build(wanted) == wanted.path
    assert wanted.is_whole()
    (line,) = capfd.readouterr().err.splitlines()
    assert "again, as it is no longer as it was built" in line
    assert str(wanted.folder) in line
    assert build(wanted) == wanted.path
    assert capfd.readouterr().err == ""


def test_one_of_many_builds_a_damaged_library_again(tmp_path: Path) -> None:
    """The others wait for it; nobody dies of a library that was cut off."""
    environment = os.environ | {"TORCH_HOME": str(tmp_path)}
    command = [sys.executable, "-c", ASK, "cuda_ext"]
    subprocess.run(command, env=environment, capture_output=True, check=True)
    (path,) = tmp_path.rglob("sparsemm_cpu.so")
    path.write_bytes(path.read_bytes()[:5000])
    children = [
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    said = [child.communicate(timeout=300) for child in children]
    assert [child.returncode for child in children] == [0, 0, 0], said
    assert [out.split() for out, _ in said] == [["cuda_ext"] * 2] * 3
    assert sum("Building the cpu op again" in err for _, err in said) == 1


def test_an_error_of_the_compiler_is_told(sources: Path) -> None:
    (sources / "cpu.cpp").write_text("int other() { return nothing_of_that_name; }\n")
    with pytest.raises(ExtensionError, match=r"nothing_of_that_name.*\.log.*backend=torch") as told:
        build(library("cpu"))
    assert "\n" not in str(told.value)
    assert not library("cpu").folder.exists()


def test_a_gpu_is_needed_to_know_what_to_build_for(sources: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ExtensionError, match=r"no GPU.*doctor --build --arches"):
        library("cuda")
    with pytest.raises(ValueError, match=r"backend=varlen needs a CUDA device"):
        check_backend("varlen", "cpu")


@pytest.mark.usefixtures("nothing_loaded")
def test_a_cache_that_cannot_be_written(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (sources.parent / "torch").write_text("a file where the folder should be")
    with pytest.raises(ExtensionError, match=r"cannot be built or loaded.*doctor --build"):
        load_extension("cpu")
    with pytest.warns(UserWarning, match="slow here"):
        check_backend("auto", "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_backend("auto", torch.device("cpu"), torch.float32, 64, 1) == "torch"
    with pytest.raises(ValueError, match="backend=cuda_ext cannot run here"):
        check_backend("cuda_ext", "cpu")


@pytest.mark.parametrize("backend", ["auto", "cuda_ext"])
def test_without_a_compiler(backend: str, tmp_path: Path) -> None:
    """In a process of its own, whose cache is empty and whose compiler is not there."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, backend],
        env=os.environ | {"CXX": "no-such-compiler", "TORCH_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert "no C++ compiler no-such-compiler was found; install one" in done.stderr
    if backend == "auto":
        assert done.stdout.split() == ["torch", "torch"]
        assert done.stderr.count("UserWarning") == 1
    else:
        assert done.returncode == 1
        assert "UserError: backend=cuda_ext cannot run" in done.stderr.splitlines()[-1]


def test_the_toolkit_is_the_one_behind_a_wrapper_script(tmp_path: Path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f'#!/bin/sh\necho "#$ TOP={tmp_path}/toolkit/bin/.." >&2\n')
    nvcc.chmod(0o755)
    script = f"import sys; sys.path.insert(0, {json.dumps(str(cuda_ext_folder()))}); import build; "
    done = subprocess.run(
        [sys.executable, "-c", script + "print(build.toolkit())"],
        env=os.environ | {"PATH": f"{nvcc.parent}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()) == (tmp_path / "toolkit").resolve()
