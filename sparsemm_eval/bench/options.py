"""What each benchmark takes, declared once: ``sparsemm-eval bench`` and ``python -m`` read it here.

Imports nothing that is heavy, or that a machine which only measures lacks.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, get_type_hints

from sparsemm_eval.errors import UserError, check_choice, check_int, one_line

_Options = TypeVar("_Options", bound="Options")
# The text of an annotation is what a command line's help says of the field.
Device = Annotated[str, "cpu or cuda; default: CUDA where it is."]
Dtype = Annotated[str, "Default: float16 on CUDA, float32 on the CPU."]
Folder = Annotated[Path, "Folder for JSON, table and figure."]
Quick = Annotated[bool, "Every line, in seconds."]
Threads = Annotated[int, "On the CPU; 0: torch's choice."]


class Option(NamedTuple):
    """A field of `Options` as a command line has it."""

    name: str
    flag: str
    kind: type
    default: Any
    help: str


@dataclass(frozen=True)
class Options:
    """What a benchmark measures; the first line of a class tells its command's help.

    A command line has an option for each field: strings that are lists are comma-separated, and a
    field that is False by default is a flag.
    """

    @classmethod
    def declared(cls) -> list[Option]:
        """All fields, in their order."""
        hints = get_type_hints(cls, include_extras=True)
        return [
            Option(one.name, f"--{one.name.replace('_', '-')}", hints[one.name].__origin__,
                   one.default, hints[one.name].__metadata__[0])
            for one in fields(cls)
        ]  # fmt: skip

    def words(self, name: str, known: Collection[str] | None = None) -> list[str]:
        """The parts of a list.

        Raises
        ------
        UserError
            If there is none, or one that is not known.
        """
        text: str = getattr(self, name)
        words = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
        if not words:
            raise UserError(f"{name}={text!r}: it must name at least one")
        for word in words if known is not None else ():
            check_choice(name, word, list(known))
        return words

    def numbers(self, name: str) -> list[int]:
        """The parts of a list of integers, each at least 1, or UserError."""
        words = self.words(name)
        for word in words:
            check_int(name, int(word) if word.isdecimal() else word, 1)
        return [int(word) for word in words]

    def filled(self: _Options, values: Mapping[str, Any]) -> _Options:
        """The same with other values for the fields that are left at their defaults."""
        plain = {one.name: one.default for one in fields(self)}
        return replace(self, **{n: v for n, v in values.items() if getattr(self, n) == plain[n]})


@dataclass(frozen=True)
class KernelOptions(Options):
    """Append and attend in one layer: this project's op beside other ways, and the bound."""

    shapes: Annotated[str, "Layers, comma-separated."] = "vicuna,mistral,qwen2vl"
    means: Annotated[str, "Mean tokens per KV head, comma-separated."] = "64,256,1024,4096"
    distributions: Annotated[str, "How heads differ in length."] = "heavy,uniform"
    rows: Annotated[str, "Samples decoded together, comma-separated."] = "1,4,31"
    entries: Annotated[
        str,
        "What is timed, comma-separated.",
    ] = "cuda_ext,concatenate,padded_sdpa,torch,varlen,flashinfer"
    dtype: Annotated[str, "Comma-separated; default: float16 on CUDA, float32 on the CPU."] = ""
    device: Device = ""
    threads: Threads = 0
    repeats: Annotated[int, "Measurements of each entry."] = 30
    seconds: Annotated[float, "At most about so long an entry and case."] = 1.0
    memory: Annotated[float, "GiB for caches; 0: 70% of what is free."] = 0.0
    quick: Quick = False
    out: Folder = Path("results/kernels")


@dataclass(frozen=True)
class EfficiencyOptions(Options):
    """Prefill, decode time, memory and cache over prompt lengths, beside the byte bound."""

    models: Annotated[
        str,
        "vicuna, mistral, qwen2vl-7b (7B shapes, random weights; with -small behind it a few "
        "narrow layers), qwen2vl, llava_next (embedded), or checkpoints; default: the first three "
        "on CUDA, else the embedded.",
    ] = ""
    lengths: Annotated[str, "Tokens of a prompt; default: 2K to 32K, on a CPU 64 to 2K."] = ""
    methods: Annotated[str, "Comma-separated."] = "fullkv,sparsemm"
    budgets: Annotated[str, "Default: 256, on a CPU 64."] = ""
    engines: Annotated[
        str,
        "ours: between static buffers, captured on a GPU; also ours_compiled: captured after "
        "torch.compile; ours_plain: under generate. hf_generate, hf_static: transformers' own, "
        "full KV in a dynamic or a static cache. concatenate: every token copies the ragged "
        "cache, as published code does.",
    ] = "ours,hf_generate,hf_static,concatenate"
    rows: Annotated[str, "Decoded at once, beside one: first length, budgets, our engines."] = "31"
    window: Annotated[int, "Of the methods."] = 32
    steps: Annotated[int, "New tokens that are timed."] = 100
    repeats: Annotated[int, "0: one on CUDA, three on the CPU."] = 0
    dtype: Dtype = ""
    device: Device = ""
    threads: Threads = 0
    bandwidth: Annotated[str, "With --dry-run: GB/s, or a GPU such as h100 or a100-80gb."] = "h200"
    dry_run: Annotated[bool, "Print bytes and bounds, and end."] = False
    fresh: Annotated[bool, "Measure again what is there."] = False
    profile: Annotated[bool, "Also the host's share of a step."] = False
    quick: Quick = False
    out: Folder = Path("results/efficiency")


@dataclass(frozen=True)
class SharedPrefillOptions(Options):
    """A grid of 31 cells in one pass, the same cells one by one, and full KV alone."""

    model: Annotated[
        str,
        "qwen2vl or llava_next (embedded); vicuna, mistral or qwen2vl-7b (random weights).",
    ] = "qwen2vl"
    device: Device = ""
    samples: Annotated[int, "Prompts in all."] = 40
    batch_size: Annotated[int, "Prompts read together."] = 8
    repeats: Annotated[int, "Of each way, in turn."] = 3
    threads: Threads = 0
    out: Annotated[Path, "The file."] = Path("results/sweep/shared_prefill.json")


@dataclass(frozen=True)
class SelectionOptions(Options):
    """Selecting and packing a layer under all 31 cells of a grid, beside scoring it once."""

    shape: Annotated[str, "A layer of vicuna, mistral or qwen2vl."] = "vicuna"
    tokens: Annotated[int, "Of the prompt, more than 2048."] = 2900
    device: Device = ""
    dtype: Dtype = ""
    threads: Threads = 1
    repeats: Annotated[int, "Of each measure, in turn."] = 20
    out: Annotated[Path, "Folder for the JSON file."] = Path("results/kernels")


# By the name of its command; a module of that name in this room has its ``run(options, command)``.
BENCHMARKS: dict[str, type[Options]] = {
    "kernels": KernelOptions,
    "efficiency": EfficiencyOptions,
    "shared-prefill": SharedPrefillOptions,
    "selection": SelectionOptions,
}


@dataclass(frozen=True)
class Benchmark:
    """What a reader wants to see, what was written, and what went wrong."""

    text: str
    files: Sequence[Path] = ()
    failures: Sequence[str] = ()

    def show(self) -> int:
        """Print all of it; returns the exit code."""
        print(self.text)
        for path in self.files:
            print(f"wrote {path}")
        for line in self.failures:
            print(f"sparsemm-eval: {line}", file=sys.stderr)
        return int(bool(self.failures))


def run_benchmark(name: str, options: Options, command: str) -> Benchmark:
    """Measure, and write what was measured.

    Parameters
    ----------
    name : str
        Of a command in `BENCHMARKS`.
    options : Options
        Of its kind.
    command : str
        That makes the files again.

    Raises
    ------
    UserError
        For options out of range or names that nothing has.
    """
    return import_module(_module(name)).run(options, command)


def main(name: str, arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark from a plain command line, as ``python -m``; returns the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    program = ["python", "-m", _module(name)]
    kind = BENCHMARKS[name]
    parser = argparse.ArgumentParser(
        shlex.join(program),
        description=kind.__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for one in kind.declared():
        more: dict[str, Any] = {"action": "store_true"}
        if one.default is not False:
            more = {"type": one.kind, "default": one.default}
        parser.add_argument(one.flag, help=one.help.replace("%", "%%"), **more)
    options = kind(**vars(parser.parse_args(given)))
    try:
        return run_benchmark(name, options, shlex.join([*program, *given])).show()
    except (UserError, OSError) as error:
        print(f"sparsemm-eval: {one_line(error)}", file=sys.stderr)
        return 1


def _module(name: str) -> str:
    return f"sparsemm_eval.bench.{name.replace('-', '_')}"
