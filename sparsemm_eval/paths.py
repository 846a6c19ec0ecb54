"""Where things lie, in a checkout and in an installed wheel alike."""

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def tasks_folder() -> Path:
    """lmms-eval task files and grids: `tasks/` of a checkout, or data inside the package."""
    return _data("tasks")


def cuda_ext_folder() -> Path:
    """C++ and CUDA sources: `cuda_ext/` of a checkout, or data inside the package."""
    return _data("cuda_ext")


def cache_folder() -> Path:
    """This user's cache: drawn benchmarks and chased head scores."""
    from platformdirs import user_cache_path  # not on machines that only run kernels

    return user_cache_path("sparsemm-eval")


def _data(name: str) -> Path:
    inside = _PACKAGE / name
    return inside if inside.is_dir() else _PACKAGE.parent / name
