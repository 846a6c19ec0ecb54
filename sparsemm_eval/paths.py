"""Where things lie, in a checkout and in an installed wheel alike, and how files get there."""

import os
import socket
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def tasks_folder() -> Path:
    """lmms-eval task files and grids: `tasks/` of a checkout, or data inside the package."""
    return _data("tasks")


def cuda_ext_folder() -> Path:
    """C++ and CUDA sources: `cuda_ext/` of a checkout, or data inside the package."""
    return _data("cuda_ext")


def lock_file() -> Path:
    """Every package that this was tested with, in pip's form; in a checkout a link to the root."""
    return _PACKAGE / "requirements.lock"


def checkout() -> Path | None:
    """Root of the checkout this package runs from; None where it was installed from a wheel."""
    return _PACKAGE.parent if (_PACKAGE.parent / "run_eval.sh").is_file() else None


def cache_folder() -> Path:
    """This user's cache: drawn benchmarks and chased head scores."""
    from platformdirs import user_cache_path  # not on machines that only run kernels

    return user_cache_path("sparsemm-eval")


def write_whole(path: Path, text: str) -> None:
    """Write a file so that no reader, and no kill, ever finds half of it; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: jobs that begin at once, on several machines, write the same files.
    unfinished = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def _data(name: str) -> Path:
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name
