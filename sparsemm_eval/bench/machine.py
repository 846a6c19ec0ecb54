"""The device that is measured: its name, its caches, its memory, and what a file says of it."""

from __future__ import annotations

import gc
import hashlib
import json
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from sparsemm_eval.errors import check_choice
from sparsemm_eval.paths import cuda_ext_folder, write_whole
from sparsemm_eval.report.provenance import provenance
from sparsemm_eval.stored import NotUnderstood, read_json

# Datasheets' memory bandwidth in GB/s; a large copy reaches about 0.9 of it.
BANDWIDTHS = {"a100-40gb": 1555, "a100-80gb": 2039, "h100": 3350, "h200": 4800, "b200": 8000}
UNKNOWN_CACHE = 64 << 20
UNKNOWN_MEMORY = 4 << 30


def device_name(name: str = "", *others: str, rank: int | None = None) -> str:
    """A device that is there: cpu, cuda or cuda:N, as ``device_map`` takes it.

    Parameters
    ----------
    name : str
        As it was asked for; "" is CUDA where there is one, else the CPU.
    others : str
        More that may be asked for, such as "auto".
    rank : int, optional
        Of several processes on this machine: each has its own GPU.

    Raises
    ------
    UserError
        If it is not there.
    """
    count = torch.cuda.device_count()
    known = [*others, "cpu", *(["cuda"] if count else []), *(f"cuda:{n}" for n in range(count))]
    own = "cuda" if rank is None else f"cuda:{rank}"
    name = name or (own if count else "cpu")
    check_choice("device", name, known)
    return name


def find_device(name: str = "") -> torch.device:
    """What is measured: "cpu", or the current GPU as "cuda"; "" as in `device_name`."""
    check_choice("device", name, ("", "cpu", "cuda"))
    return torch.device(device_name(name))


def describe(device: torch.device) -> dict[str, Any]:
    """Name, kind, threads and size of the last cache."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "name": name,
        "kind": device.type,
        "threads": torch.get_num_threads(),
        "cache_bytes": cache_bytes(device),
    }


def provenance_on(device: torch.device, command: str) -> dict[str, Any]:
    """What a file says of its making, the device that was measured beside the machine."""
    whole = provenance(command)
    return whole | {"hardware": whole["hardware"] | describe(device)}


def write_json(path: Path, whole: Mapping[str, Any]) -> None:
    """Write a file of results."""
    write_whole(path, json.dumps(whole, indent=1) + "\n")


def read_earlier(path: Path, now: Mapping[str, Any], *alike: str) -> dict[str, Any] | None:
    """Read what an earlier run wrote, if it is as if measured now.

    Parameters
    ----------
    path : Path
        Its file, which need not be there.
    now : mapping
        Provenance of this run, with its "code".
    alike : str
        Entries that must be equal, beside schema, code and versions.
    """
    try:
        whole = read_json(path)
    except NotUnderstood:
        return None
    if not isinstance(whole, dict):
        return None
    differ = any(whole.get(key) != now[key] for key in ("schema", "code", "versions", *alike))
    return None if differ else whole


def code_digest() -> str:
    """Digest of what is measured: this package's Python and the op's sources, as they lie here."""
    rooms = ("bench", "cache", "engine", "families", "methods")
    package = Path(__file__).resolve().parents[1]
    files = [path for room in rooms for path in (package / room).glob("*.py")]
    digest = hashlib.sha256()
    for path in sorted([*files, *cuda_ext_folder().glob("*.*")], key=lambda path: path.name):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def slug(about: dict[str, Any]) -> str:
    """A device's name as a file's."""
    return re.sub(r"[^a-z0-9]+", "-", about["name"].lower()).strip("-") or about["kind"]


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory; 64 MiB where nothing says it."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [
        int(text[:-1]) << {"K": 10, "M": 20}[text[-1]]
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if re.fullmatch(r"\d+[KM]", text := path.read_text().strip())
    ]
    return max(sizes, default=UNKNOWN_CACHE)


def free_memory(device: torch.device) -> int:
    """Bytes that are free, after what nobody holds any more is given back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    available = _look_up("/proc/meminfo", r"^MemAvailable:\s*(\d+) kB$")
    return int(available) << 10 if available else UNKNOWN_MEMORY


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use so many threads for a while; 0: as many as it did."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cpu_name() -> str:
    model = _look_up("/proc/cpuinfo", r"^model name\s*:\s*(.+)$")
    return model or platform.processor() or platform.machine()


def _look_up(path: str, pattern: str) -> str:
    file = Path(path)
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    match = re.search(pattern, text, re.MULTILINE)
    return match[1].strip() if match else ""
