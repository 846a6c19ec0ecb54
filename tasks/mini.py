"""Data of the miniature benchmarks: the folder of one, drawn on first use.

A task file names it as ``dataset_path: !function mini.docvqa``.
"""

from sparsemm_eval.paths import cache_folder
from sparsemm_eval.tiny.benchmarks import BENCHMARKS, build


def __getattr__(name: str) -> str:
    if name not in BENCHMARKS:
        raise AttributeError(f"no benchmark {name}; there is: {', '.join(BENCHMARKS)}")
    return str(build(name, cache_folder() / "benchmarks"))
