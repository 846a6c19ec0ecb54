"""nvcc takes the CUDA kernels, and keeps all they hold in registers."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "cuda_ext" / "append_attend.cu"
KERNELS = 2 * 2 * 3  # attend and merge, for each element type and head size


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the assembler says of every kernel."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("compiling CUDA kernels needs nvcc")
    cubin = tmp_path_factory.mktemp("cubin") / "append_attend.cubin"
    done = subprocess.run(
        [nvcc, "-std=c++17", "-O3", "-cubin", "-gencode", "arch=compute_90,code=sm_90",
         "-Xptxas", "-v", "-Werror", "all-warnings", "-o", cubin, SOURCE],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert cubin.stat().st_size > 0
    return done.stderr


def test_every_kernel_is_there(report: str) -> None:
    assert len(re.findall("Compiling entry function '.*attend", report)) == KERNELS


def test_nothing_spills_to_memory(report: str) -> None:
    """Neither arrays with an index of run time nor registers too few."""
    pattern = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    found = re.findall(pattern, report)
    assert found == [("0", "0", "0")] * len(found)
    assert len(found) >= KERNELS
