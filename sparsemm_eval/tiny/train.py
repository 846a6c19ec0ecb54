"""``python -m sparsemm_eval.tiny.train FAMILY --out DIR``: the trainer of a checkout."""

import runpy
import sys
from importlib.util import find_spec

TRAINER = "sparsemm_eval.tiny.training"

if __name__ == "__main__":
    if find_spec(TRAINER) is None:
        sys.exit(
            "sparsemm-eval: this is an installed package, and the tiny models are trained in a "
            "checkout: clone the repository and run the same command there"
        )
    runpy.run_module(f"{TRAINER}.train", run_name="__main__", alter_sys=True)
