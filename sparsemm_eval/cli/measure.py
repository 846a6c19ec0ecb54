"""What this machine can do and how fast: doctor and benchmarks."""

from __future__ import annotations

import shlex
import sys
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer

from sparsemm_eval.cli.common import one_sentence, words
from sparsemm_eval.errors import UserError
from sparsemm_eval.libraries import check_libraries

app = typer.Typer()
bench_app = typer.Typer(help="Measure how fast it is.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")


@app.command()
def doctor(
    build: Annotated[
        bool, typer.Option("--build", help="Compile the attention op now, not on first use.")
    ] = False,
    arches: Annotated[
        str, typer.Option(help="With --build: GPU architectures, such as 8.0,9.0; default: found.")
    ] = "",
    libraries: Annotated[
        bool,
        typer.Option("--libraries", help="Only whether what runs stand on works."),
    ] = False,
) -> None:
    """What this machine has, which backends work on it, and what would mend the rest."""
    with one_sentence():
        if libraries:
            check_libraries()
            return
        from sparsemm_eval import doctor as doctors

        if arches and not build:
            raise UserError(f"arches={arches!r}: it needs --build, which it is for")
        built = doctors.build_libraries(words(arches)) if build else ()
        broken = False
        for finding in chain(built, doctors.examine()):
            typer.echo(f"{finding.subject:24} {finding.found}")
            if finding.remedy:
                typer.echo(f"{'':24} {finding.remedy}")
            broken |= finding.broken
    raise typer.Exit(int(broken))


@bench_app.command()
def kernels(
    shapes: Annotated[str, typer.Option(help="Layers, comma-separated.")] = (
        "vicuna,mistral,qwen2vl"
    ),
    means: Annotated[str, typer.Option(help="Mean tokens per KV head, comma-separated.")] = (
        "64,256,1024,4096"
    ),
    distributions: Annotated[str, typer.Option(help="How heads differ in length.")] = (
        "heavy,uniform"
    ),
    rows: Annotated[str, typer.Option(help="Samples decoded together, comma-separated.")] = (
        "1,4,31"
    ),
    entries: Annotated[str, typer.Option(help="What is timed, comma-separated.")] = (
        "cuda_ext,concatenate,padded_sdpa,torch,varlen,flashinfer"
    ),
    dtype: Annotated[
        str, typer.Option(help="Comma-separated; default: float16 on CUDA, float32 on the CPU.")
    ] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda; default: CUDA where it is.")] = "",
    threads: Annotated[int, typer.Option(help="On the CPU; 0: torch's choice.")] = 0,
    repeats: Annotated[int, typer.Option(help="Measurements of each entry.")] = 30,
    seconds: Annotated[float, typer.Option(help="At most about so long an entry and case.")] = 1.0,
    memory: Annotated[float, typer.Option(help="GiB for caches; 0: 70% of what is free.")] = 0.0,
    quick: Annotated[bool, typer.Option("--quick", help="Every line, in seconds.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for JSON, table and figure.")] = Path(
        "results/kernels"
    ),
) -> None:
    """Append and attend in one layer: this project's op beside other ways, and the bound."""
    given = dict(locals())
    with one_sentence():
        from sparsemm_eval.bench.kernels import run_kernels
        from sparsemm_eval.bench.options import Options

        done = run_kernels(Options(**given), shlex.join(["sparsemm-eval", *sys.argv[1:]]))
        typer.echo(done.markdown)
        for path in done.files:
            typer.echo(f"wrote {path}")
        for line in done.failures:
            typer.echo(f"sparsemm-eval: {line}", err=True)
    raise typer.Exit(1 if done.failures else 0)


@bench_app.command()
def efficiency(
    models: Annotated[
        str,
        typer.Option(
            help="vicuna, mistral, qwen2vl-7b (7B shapes, random weights), qwen2vl, llava_next "
            "(embedded), or checkpoints; default: the first three on CUDA, else the embedded."
        ),
    ] = "",
    lengths: Annotated[
        str, typer.Option(help="Tokens of a prompt; default: 2K to 32K, on a CPU 64 to 2K.")
    ] = "",
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = "fullkv,sparsemm",
    budgets: Annotated[str, typer.Option(help="Default: 256, on a CPU 64.")] = "",
    engines: Annotated[
        str, typer.Option(help="Also ours_plain and ours_compiled; see the README.")
    ] = "ours,hf_generate,hf_static,concatenate",
    rows: Annotated[str, typer.Option(help="Decoded at once, beside one.")] = "31",
    window: Annotated[int, typer.Option(help="Of the methods.")] = 32,
    steps: Annotated[int, typer.Option(help="New tokens that are timed.")] = 100,
    repeats: Annotated[int, typer.Option(help="0: one on CUDA, three on the CPU.")] = 0,
    dtype: Annotated[str, typer.Option(help="Default: float16 on CUDA, float32 on the CPU.")] = "",
    device: Annotated[str, typer.Option(help="cpu or cuda; default: CUDA where it is.")] = "",
    threads: Annotated[int, typer.Option(help="On the CPU; 0: torch's choice.")] = 0,
    bandwidth: Annotated[
        str, typer.Option(help="With --dry-run: GB/s, or a GPU such as h100 or a100-80gb.")
    ] = "h200",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print bytes and bounds, and end.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is there.")] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also the host's share of a step.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Every line, in seconds.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for JSON, table and figure.")] = Path(
        "results/efficiency"
    ),
) -> None:
    """Prefill, decode time, memory and cache over prompt lengths, beside the byte bound."""
    given = dict(locals())
    with one_sentence():
        from sparsemm_eval.bench.efficiency import describe_bounds, run_efficiency
        from sparsemm_eval.bench.efficiency_options import EfficiencyOptions

        options = EfficiencyOptions(**given)
        if dry_run:
            typer.echo(describe_bounds(options, options.memory_bandwidth()))
            return
        done = run_efficiency(options, shlex.join(["sparsemm-eval", *sys.argv[1:]]))
        typer.echo(done.markdown)
        for path in done.files:
            typer.echo(f"wrote {path}")
        for line in done.failures:
            typer.echo(f"sparsemm-eval: {line}", err=True)
    raise typer.Exit(1 if done.failures else 0)


@bench_app.command("shared-prefill")
def shared_prefill(
    model: Annotated[
        str,
        typer.Option(
            help="qwen2vl or llava_next (embedded); vicuna, mistral or qwen2vl-7b (random weights)."
        ),
    ] = "qwen2vl",
    device: Annotated[str, typer.Option(help="cpu or cuda; default: CUDA where it is.")] = "",
    samples: Annotated[int, typer.Option(help="Prompts in all.")] = 40,
    batch_size: Annotated[int, typer.Option(help="Prompts read together.")] = 8,
    repeats: Annotated[int, typer.Option(help="Of each way, in turn.")] = 3,
    threads: Annotated[int, typer.Option(help="On the CPU; 0: torch's choice.")] = 0,
    out: Annotated[Path, typer.Option(help="The file.")] = Path(
        "results/sweep/shared_prefill.json"
    ),
) -> None:
    """A grid of 31 cells in one pass, the same cells one by one, and full KV alone."""
    with one_sentence():
        from sparsemm_eval.bench.shared_prefill import run_shared_prefill

        command = shlex.join(["sparsemm-eval", *sys.argv[1:]])
        found = run_shared_prefill(
            out, model, device, samples, batch_size, repeats, threads, command
        )
        for name in ("seconds", "grid_over_one_full", "one_by_one_over_grid", "answers_unlike"):
            typer.echo(f"{name}: {found[name]}")
        if "byte_bound" in found:
            typer.echo(f"byte bound: {found['byte_bound']}")
        typer.echo(f"wrote {out}")


@bench_app.command()
def selection(
    shape: Annotated[str, typer.Option(help="A layer of vicuna, mistral or qwen2vl.")] = "vicuna",
    tokens: Annotated[int, typer.Option(help="Of the prompt, more than 2048.")] = 2900,
    device: Annotated[str, typer.Option(help="cpu or cuda; default: CUDA where it is.")] = "",
    dtype: Annotated[str, typer.Option(help="Default: float16 on CUDA, float32 on the CPU.")] = "",
    threads: Annotated[int, typer.Option(help="On the CPU; 0: torch's choice.")] = 1,
    repeats: Annotated[int, typer.Option(help="Of each measure, in turn.")] = 20,
    out: Annotated[Path, typer.Option(help="Folder for the JSON file.")] = Path("results/kernels"),
) -> None:
    """Selecting and packing a layer under all 31 cells of a grid, beside scoring it once."""
    with one_sentence():
        from sparsemm_eval.bench.selection import describe_selection, run_selection

        command = shlex.join(["sparsemm-eval", *sys.argv[1:]])
        made, path = run_selection(out, shape, tokens, device, dtype, threads, repeats, command)
        typer.echo(describe_selection(made))
        typer.echo(f"wrote {path}")
