"""The compiled op ``torch.ops.sparsemm.append_attend``: found or built, then loaded.

Two libraries: one for the CPU, with the op's schema, and one for CUDA. Each is built on first use
into torch's cache folder, in a place named by what went into it (sources, torch,
compiler flags), so that a changed source, another torch or another kind of machine builds anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from sparsemm_eval.paths import cuda_ext_folder

SOURCES = {"cpu": ("ops.cpp", "cpu.cpp"), "cuda": ("cuda.cpp", "append_attend.cu")}
# at::vec takes its instruction set from these; without them it falls back to plain loops.
CPU_FLAGS = {
    "AVX512": "-DCPU_CAPABILITY=AVX512 -DCPU_CAPABILITY_AVX512 "
    "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c",
    "AVX2": "-DCPU_CAPABILITY=AVX2 -DCPU_CAPABILITY_AVX2 -mavx2 -mfma -mf16c",
}


class ExtensionError(RuntimeError):
    """The library cannot be built or loaded here; says in one sentence why, and what mends it."""


@dataclass(frozen=True)
class Library:
    """One library of ops, built or not.

    Parameters
    ----------
    kind : {"cpu", "cuda"}
        What it runs on.
    folder : Path
        Where it lies once built.
    flags : tuple of str
        For the C++ compiler.
    cuda_flags : tuple of str
        For nvcc.
    """

    kind: str
    folder: Path
    flags: tuple[str, ...]
    cuda_flags: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The file that is loaded."""
        return self.folder / f"sparsemm_{self.kind}.so"

    @property
    def digest_path(self) -> Path:
        """The SHA-256 of that file as it was built, beside it."""
        return self.path.with_suffix(".sha256")

    def is_whole(self) -> bool:
        """Whether it is there as it was built: to load one that was cut off ends the process."""
        try:
            built = self.digest_path.read_text(encoding="ascii", errors="replace")
            return _digest(self.path) == built
        except OSError:
            return False


def load_extension(device: torch.device | str) -> None:
    """Make ``torch.ops.sparsemm.append_attend`` run on a device, building what is missing.

    Parameters
    ----------
    device : torch.device or str
        Where the tensors lie that it will be given.

    Raises
    ------
    ExtensionError
        If a library cannot be built or loaded. Later calls raise the same without trying again.
    """
    for kind in ("cpu", "cuda") if torch.device(device).type == "cuda" else ("cpu",):
        error = _attempt(kind)
        if error is not None:
            raise error


@cache
def _attempt(kind: str) -> ExtensionError | None:
    try:
        path = build(library(kind))
        torch.ops.load_library(str(path))
    except ExtensionError as error:
        return error
    except OSError as error:
        return ExtensionError(
            f"the compiled {kind} op cannot be built or loaded ({error}): remove its folder, if it "
            "is there, and run `sparsemm-eval doctor --build`, or use backend=torch"
        )
    return None


def library(kind: str, arches: Sequence[str] = ()) -> Library:
    """Name the library that fits this machine; nothing is built.

    Parameters
    ----------
    kind : {"cpu", "cuda"}
        What it runs on.
    arches : sequence of str
        Compute capabilities as in "9.0"; those of the GPUs here when empty.

    Raises
    ------
    ExtensionError
        For CUDA, if no architecture is given and there is no GPU.
    """
    if kind == "cpu":
        flags = CPU_FLAGS.get(torch.backends.cpu.get_cpu_capability(), "").split()
        # OpenMP's functions come with torch's own copy: a second one would have its own threads.
        return _library(kind, ("-O3", "-fopenmp", *flags))
    return _library(kind, ("-O3",), ("-O3", *_architecture_flags(arches or _detected())))


def _library(kind: str, flags: tuple[str, ...], cuda_flags: tuple[str, ...] = ()) -> Library:
    digest = hashlib.sha256(
        repr((torch.__version__, platform.machine(), sys.version_info[:2], flags)).encode()
    )
    digest.update(repr(cuda_flags).encode())
    headers = [path.name for path in _folder().glob("*.*h")]
    for name in (*SOURCES[kind], *sorted(headers)):
        digest.update(name.encode() + (_folder() / name).read_bytes())
    root = Path(torch.hub.get_dir()).parent / "sparsemm_eval"
    return Library(kind, root / f"{kind}-{digest.hexdigest()[:12]}", flags, cuda_flags)


def build(wanted: Library) -> Path:
    """Build a library if it is not there, whole; several processes may ask at once.

    Returns
    -------
    Path
        The file to load.

    Raises
    ------
    ExtensionError
        Without a compiler, or if it fails; names the log.
    OSError
        If the cache cannot be written.
    """
    if wanted.is_whole():
        return wanted.path
    root = wanted.folder.parent
    root.mkdir(parents=True, exist_ok=True)
    # The system drops this lock with its process; a file that stays behind locks nobody out.
    with open(root / f"{wanted.folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not wanted.is_whole():
            again = wanted.folder.exists()
            print(
                f"Building the {wanted.kind} op "
                f"{'again, as it is no longer as it was built' if again else 'once'}, into "
                f"{wanted.folder} "
                f"({'a minute or two' if wanted.kind == 'cuda' else 'about 20 seconds'})",
                file=sys.stderr,
            )
            with tempfile.TemporaryDirectory(dir=root, prefix="building-") as name:
                folder = Path(name)
                _compile(wanted, folder)
                built = replace(wanted, folder=folder)
                built.digest_path.write_text(_digest(built.path), encoding="ascii")
                # On disk before it has its name: a machine that stops now leaves no half of it.
                for path in (built.path, built.digest_path, folder):
                    _sync(path)
                if again:
                    shutil.rmtree(wanted.folder)
                folder.rename(wanted.folder)
                folder.mkdir()  # for TemporaryDirectory to remove
            _sync(root)
    return wanted.path


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _compile(wanted: Library, folder: Path) -> None:
    arguments = {
        "name": wanted.path.stem,
        "sources": [str(_folder() / name) for name in SOURCES[wanted.kind]],
        "build_directory": str(folder),
        "extra_cflags": list(wanted.flags),
        "extra_cuda_cflags": list(wanted.cuda_flags),
        "with_cuda": wanted.kind == "cuda",
    }
    done = subprocess.run(
        [sys.executable, str(_folder() / "build.py")],
        input=json.dumps(arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode == 0:
        return
    log = wanted.folder.with_suffix(".log")
    log.write_text(done.stdout)
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode == 3:
        reason = lines[-1]
    else:
        errors = [line for line in lines if re.search(r"error:|Error: ", line, re.IGNORECASE)]
        reason = f"{(errors or lines or ['no reason given'])[0]}; all of it in {log}"
    raise ExtensionError(f"the {wanted.kind} op cannot be built: {reason}, or use backend=torch")


def _detected() -> tuple[str, ...]:
    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    if not capabilities:
        raise ExtensionError(
            "the CUDA op cannot be built: no GPU was found to build for; name architectures with "
            "`sparsemm-eval doctor --build --arches 8.0,9.0`"
        )
    return tuple(f"{major}.{minor}" for major, minor in sorted(capabilities))


def _architecture_flags(arches: Sequence[str]) -> tuple[str, ...]:
    """Machine code for each architecture, and PTX of the newest for those to come."""
    numbers = [arch.replace(".", "") for arch in arches]
    newest = max(numbers, key=int)
    return (
        *(f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers),
        f"-gencode=arch=compute_{newest},code=compute_{newest}",
    )


def _folder() -> Path:
    return cuda_ext_folder()
