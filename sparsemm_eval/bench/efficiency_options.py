"""What ``bench efficiency`` measures, as a command line gives it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from sparsemm_eval.bench.bounds import bandwidth_of
from sparsemm_eval.bench.options import integers, known_words
from sparsemm_eval.bench.shapes import DTYPES
from sparsemm_eval.errors import check_int
from sparsemm_eval.methods import method_names

# "" in an option takes these.
DEFAULTS = {
    "cuda": {
        "models": "vicuna,mistral,qwen2vl-7b", "lengths": "2048,4096,8192,16384,32768",
        "budgets": "256", "dtype": "float16", "repeats": 1,
    },
    "cpu": {
        "models": "qwen2vl,llava_next", "lengths": "64,256,512,1024,2048", "budgets": "64",
        "dtype": "float32", "repeats": 3,
    },
}  # fmt: skip
QUICK = {
    "models": "vicuna-small,qwen2vl-small", "lengths": "64,128", "budgets": "16", "window": 8,
    "steps": 12, "rows": "3", "repeats": 1,
}  # fmt: skip
ENGINES = ("ours", "ours_plain", "ours_compiled", "hf_generate", "hf_static", "concatenate")


@dataclass(frozen=True)
class EfficiencyOptions:
    """Models, lengths, methods, engines and effort; lists are comma-separated.

    Parameters
    ----------
    models : str
        Shapes of the paper's three 7B models with random weights (vicuna, mistral, qwen2vl-7b), or
        small ones of their kinds (vicuna-small, mistral-small, qwen2vl-small), embedded models
        (qwen2vl, llava_next), or folders and repositories of checkpoints.
    lengths : str
        Tokens of a prompt.
    methods, budgets : str
        Every combination is measured.
    engines : str
        ours: between static buffers and captured on a GPU, under ``generate`` on a CPU;
        ours_compiled: captured after torch.compile; ours_plain: under ``generate`` everywhere;
        hf_generate, hf_static: transformers' own, with a dynamic and with a static cache, full KV;
        concatenate: every token copies the ragged cache, as published code does.
    rows : str
        Rows decoded at once, beside one: at the first length, budgeted methods, our engines.
    window : int
        Of the methods.
    steps : int
        New tokens that are timed, after a warm-up.
    repeats : int
        Of each measurement, all of a length in turn; 0: one on CUDA, three on a CPU.
    dtype : str
        Of weights and cache.
    device : {"", "cpu", "cuda"}
        CUDA where there is one when empty.
    threads : int
        Of torch on a CPU; 0: torch's own choice.
    bandwidth : str
        With ``dry_run``: GB/s, or a GPU's name.
    dry_run : bool
        Print bytes and bounds, and end.
    fresh : bool
        Measure again what is there.
    profile : bool
        Also how much of a step the device works, or torch's operators on a CPU; the rest is the
        host's.
    quick : bool
        Every line in seconds.
    out : Path
        Folder for the JSON, the table and the figure.
    """

    models: str = ""
    lengths: str = ""
    methods: str = "fullkv,sparsemm"
    budgets: str = ""
    engines: str = "ours,hf_generate,hf_static,concatenate"
    rows: str = "31"
    window: int = 32
    steps: int = 100
    repeats: int = 0
    dtype: str = ""
    device: str = ""
    threads: int = 0
    bandwidth: str = "h200"
    dry_run: bool = False
    fresh: bool = False
    profile: bool = False
    quick: bool = False
    out: Path = Path("results/efficiency")

    def checked(self, kind: str) -> EfficiencyOptions:
        """The same with its defaults for a "cpu" or for "cuda" written out.

        Raises
        ------
        ValueError
            For numbers out of range or names that nothing has.
        """
        plain = {field.name: field.default for field in fields(self)}
        defaults = {**DEFAULTS[kind], **(QUICK if self.quick else {})}
        untouched = {n: v for n, v in defaults.items() if getattr(self, n) == plain[n]}
        options = replace(self, **untouched)
        known_words("dtype", options.dtype, DTYPES)
        known_words("methods", options.methods, method_names())
        known_words("engines", options.engines, ENGINES)
        for name in ("models", "lengths", "budgets", "rows"):
            options.words(name)
        for name in ("lengths", "budgets", "rows"):
            options.numbers(name)
        check_int("window", options.window, 1)
        check_int("steps", options.steps, 2)
        check_int("repeats", options.repeats, 1)
        check_int("threads", options.threads, 0)
        return options

    def words(self, name: str) -> list[str]:
        """The parts of a list."""
        return known_words(name, getattr(self, name))

    def numbers(self, name: str) -> list[int]:
        """The parts of a list of numbers, each at least 1."""
        return integers(name, getattr(self, name))

    def memory_bandwidth(self) -> float:
        """Bytes a second that a dry run reckons with."""
        return bandwidth_of(self.bandwidth)


def options_from(arguments: Sequence[str], description: str | None) -> EfficiencyOptions:
    """Read a command line."""
    parser = argparse.ArgumentParser(
        "python -m sparsemm_eval.bench.efficiency", description=description
    )
    for field in fields(EfficiencyOptions):
        kind = {"action": "store_true"}
        if not isinstance(field.default, bool):
            kind = {"type": type(field.default), "default": field.default}
        parser.add_argument(f"--{field.name.replace('_', '-')}", **kind)
    return EfficiencyOptions(**vars(parser.parse_args(arguments)))
