"""Compile one library of torch ops; `sparsemm_eval.cache.extension` runs this in a process apart.

Reads arguments of `torch.utils.cpp_extension.load` as JSON from standard input. A process apart
because torch finds compilers and the CUDA toolkit through the environment, once, on import. Exit
code 3: something is missing, and the last line says what and how to mend it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NoReturn


def main() -> None:
    """Build what standard input asks for."""
    arguments = json.load(sys.stdin)
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        missing(f"no C++ compiler {compiler} was found; install one (on Debian: apt install g++)")
    if arguments["with_cuda"]:
        os.environ["CUDA_HOME"] = toolkit()
    # ninja lies beside this Python, which need not be on the PATH.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    from torch.utils.cpp_extension import load

    load(**arguments, is_python_module=False, verbose=True)


def toolkit() -> str:
    """Ask nvcc for its toolkit's folder: the one on the PATH may be a wrapper script elsewhere."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    nvcc = shutil.which("nvcc") or shutil.which(home / "bin" / "nvcc")
    if nvcc is None:
        missing("nvcc was not found; install the CUDA toolkit and put its nvcc on the PATH")
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
    printed = subprocess.run(command, capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", printed, re.MULTILINE)
    if top is None:
        missing(f"{nvcc} names no toolkit folder; put the nvcc of a CUDA toolkit on the PATH")
    return str(Path(top[1]).resolve())


def missing(what: str) -> NoReturn:
    """Leave with one sentence."""
    print(what)
    sys.exit(3)


if __name__ == "__main__":
    main()
