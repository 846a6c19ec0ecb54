"""What this machine has, which backends really work on it, and what would mend the rest."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from sparsemm_eval.cache import RaggedKV
from sparsemm_eval.cache.backends import resolve_backend
from sparsemm_eval.cache.extension import ExtensionError, build, library
from sparsemm_eval.choices import BACKENDS
from sparsemm_eval.errors import UserError
from sparsemm_eval.libraries import check_libraries, differences, installed_version, mending

_PACKAGES = ("sparsemm-eval", "torch", "transformers", "lmms-eval", "accelerate", "datasets")
_OPTIONAL = ("flash-attn", "flashinfer-python")
# Of outputs up to about 2, over the compiled and the flash kernels alike.
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Parameters
    ----------
    subject : str
        What was looked at.
    found : str
        What it is like.
    remedy : str
        What mends it, where something is missing.
    broken : bool
        Whether it is there and does not work.
    """

    subject: str
    found: str
    remedy: str = ""
    broken: bool = False


def examine() -> Iterator[Finding]:
    """Look at versions, devices, tools and libraries, and try every backend; builds nothing."""
    yield Finding("python", platform.python_version())
    for name in _PACKAGES:
        yield Finding(name, installed_version(name) or "not installed")
    for name in _OPTIONAL:
        yield Finding(name, installed_version(name) or "not installed, and not needed")
    yield _lock()
    yield _libraries()
    yield Finding("CPU", f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}")
    yield from _gpus()
    yield from _tools()
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    for device in devices:
        yield _library(device)
    for device in devices:
        for backend in BACKENDS[1:]:
            yield _backend(backend, torch.device(device))


def build_libraries(arches: Sequence[str]) -> Iterator[Finding]:
    """Build the CPU library, and the CUDA one where there is a GPU or architectures are named.

    Parameters
    ----------
    arches : sequence of str
        Compute capabilities to build for, such as "9.0"; those of the GPUs here when empty.
    """
    for kind in ("cpu", "cuda") if arches or torch.cuda.is_available() else ("cpu",):
        try:
            path = build(library(kind, arches if kind == "cuda" else ()))
        except (ExtensionError, OSError) as error:
            yield Finding(f"compiled op for {kind}", "not built", str(error), broken=True)
        else:
            yield Finding(f"compiled op for {kind}", f"built: {path}")


def _lock() -> Finding:
    off = differences()
    if not off:
        return Finding("lock", "every package has the version that was tested")
    shown = "; ".join(map(str, off[:5])) + (f"; and {len(off) - 5} more" if len(off) > 5 else "")
    return Finding("lock", f"{len(off)} packages are not as tested: {shown}", mending())


def _libraries() -> Finding:
    try:
        check_libraries()
    except UserError as error:
        return Finding("libraries", str(error), broken=True)
    return Finding("libraries", "work together: one question went through lmms-eval")


def _gpus() -> Iterator[Finding]:
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        memory = f"{gpu.total_memory / 2**30:.0f} GiB"
        yield Finding(f"GPU {i}", f"{gpu.name}, {gpu.major}.{gpu.minor}, {memory}")
    if not torch.cuda.is_available():
        yield Finding("GPU", f"none that torch sees (built for CUDA {torch.version.cuda})")


def _tools() -> Iterator[Finding]:
    yield _tool("C++ compiler", "c++", "on Debian: apt install g++")
    if torch.cuda.is_available():
        wanted = f"install the CUDA toolkit {torch.version.cuda} and put its nvcc on the PATH"
        yield _tool("nvcc", "nvcc", wanted)
    yield _tool("java, for TextCaps", "java", "on Debian: apt install default-jre-headless")


def _tool(subject: str, command: str, remedy: str) -> Finding:
    path = shutil.which(command)
    return Finding(subject, path) if path else Finding(subject, "none", remedy)


def _library(kind: str) -> Finding:
    wanted = library(kind)
    if wanted.is_whole():
        return Finding(f"compiled op for {kind}", str(wanted.path))
    remedy = "sparsemm-eval doctor --build, else the first run does it"
    damaged = f"damaged: {wanted.folder} is no longer as it was built"
    found = damaged if wanted.folder.exists() else "not built yet"
    return Finding(f"compiled op for {kind}", found, remedy)


def _backend(name: str, device: torch.device) -> Finding:
    """Try a backend in every precision it takes on a small ragged case, against float64."""
    subject = f"backend={name} on {device.type}"
    if name == "cuda_ext" and not library(device.type).is_whole():
        return Finding(subject, "not tried: it is not built yet, or damaged")
    right, wrong, refusal = [], [], ""
    for dtype, tolerance in _TOLERANCE.items():
        try:
            resolve_backend(name, device, dtype, 64, 2)
        except ValueError as problem:
            refusal = str(problem)
            continue
        error = _error(name, device, dtype)
        shown = f"{str(dtype).removeprefix('torch.')} (off by {error:.0e})"
        (right if error < tolerance else wrong).append(shown)
    if wrong:
        remedy = "use another backend, and report this"
        return Finding(subject, f"WRONG in {', '.join(wrong)}", remedy, broken=True)
    return Finding(subject, f"right in {', '.join(right)}" if right else refusal)


def _error(name: str, device: torch.device, dtype: torch.dtype) -> float:
    """Largest difference to softmax attention in float64, over lengths from 0 to 300 tokens."""
    generator = torch.Generator().manual_seed(0)
    rows, heads, group, n, dim = 2, 4, 2, 300, 64

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    key, value = drawn(rows, heads, n, dim), drawn(rows, heads, n, dim)
    shares = torch.tensor([0, 0.01, 0.5, 1.0]).repeat(rows)[:, None]
    mask = torch.rand(rows * heads, n, generator=generator).lt(shares).view(rows, heads, n)
    kv = RaggedKV.pack(key, value, mask.to(device))
    query, new_key, new_value = (drawn(rows, h, 1, dim) for h in (heads * group, heads, heads))
    out = kv.append_attend(query, new_key, new_value, dim**-0.5, name)
    keys = torch.cat([key, new_key], 2).double()
    values = torch.cat([value, new_value], 2).double()
    seen = torch.nn.functional.pad(mask, (0, 1), value=True).to(device)
    queries = query.double().view(rows, heads, group, dim)
    logits = (queries @ keys.mT * dim**-0.5).masked_fill(~seen[:, :, None], -torch.inf)
    wanted = (logits.softmax(-1) @ values).reshape(rows, 1, heads * group, dim)
    return float((out.double() - wanted).abs().max())
