"""Which heads matter: find, silence and draw them."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparsemm_eval.cli.common import (
    ANSWERS_SAFE,
    IncludePath,
    PluginNames,
    folders,
    integers,
    load_plugins,
    numbers,
    one_sentence,
    quiet,
    words,
)
from sparsemm_eval.errors import UserError, check_choice, check_int

if TYPE_CHECKING:
    from sparsemm_eval.engine.checkpoint import Checkpoint

app = typer.Typer()

Model = Annotated[
    str | None,
    typer.Option(help="Checkpoint: a folder, a hub repository or embedded:qwen2vl (default)."),
]
Scores = Annotated[
    Path | None,
    typer.Option(
        help="Score or sensitivity file, or visual or sensitivity: the checkpoint's own; default: "
        "visual."
    ),
]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[
    str, typer.Option(help="Where the model lies, such as cuda:1; default: CUDA where it is.")
]


# Short enough for a line of a terminal of 80 columns, so that nothing wraps it.
_LINE = '{"image": "page.png", "chunks": [{"text": "Total", "box": [8, 4, 96, 20]}]}'


@app.command(epilog=f"A line of a JSONL file for --data:\n\n{_LINE}")
def chase(
    model: Model = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Score file; default: where its runs will find it."),
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            help="What is read: drawn, synthdog, coco, synthdog:FOLDER, coco:FOLDER, or a JSONL "
            "file of lines as below; paths are from its folder, boxes in pixels."
        ),
    ] = "drawn",
    count: Annotated[int, typer.Option("-n", min=1, help="Images.")] = 200,
    image_tokens: Annotated[
        str, typer.Option(help="Where a box is looked for: all, or tiles only as published code.")
    ] = "all",
    batch_size: Annotated[int, typer.Option(help="Images read together.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Where a generated answer ends.")] = 1024,
    dtype: Dtype = "float32",
    device: Device = "",
    plugin: PluginNames = None,
) -> None:
    """Find the heads that look at what is being read, and write their visual scores.

    A run that was cut off goes on from OUTPUT.pages.jsonl; so does one with more images.
    """
    with one_sentence("every finished page is safe, run it again to go on"):
        from sparsemm_eval.families import IMAGE_TOKENS
        from sparsemm_eval.heads.pages import check_data, pages_for

        load_plugins(plugin)
        check_data(data)
        check_choice("image_tokens", image_tokens, IMAGE_TOKENS)
        checkpoint = _checkpoint(model, dtype, device)
        from sparsemm_eval.heads.chase import chase as run_chase

        path = output or checkpoint.scores_cache()
        scores = run_chase(
            checkpoint,
            pages_for(checkpoint, data, count),
            count,
            image_tokens=image_tokens,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            records=path.with_name(f"{path.stem}.pages.jsonl"),
        )
        command = shlex.join(["sparsemm-eval", *sys.argv[1:]])
        scores.write(path, checkpoint, data, image_tokens, command)
        typer.echo(scores.summary())
        typer.echo(f"wrote {path}")
        for warning in scores.warnings():
            typer.echo(f"warning: {warning}", err=True)


# Likewise.
_ASKED = '{"question": "What is it?", "image": "photo.png", "kind": "photos"}'


@app.command(epilog=f"A line of a JSONL file for --data:\n\n{_ASKED}")
def sensitivity(
    data: Annotated[
        str,
        typer.Option(
            help="What is read: lmms-eval tasks, comma-separated; a folder of images; or a JSONL "
            "file of lines as below, with or without an image, whose path is from its folder."
        ),
    ],
    model: Model = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Its file; default: where runs will find it."),
    ] = None,
    count: Annotated[int, typer.Option("-n", min=1, help="Prompts of each kind at most.")] = 32,
    budgets: Annotated[
        str,
        typer.Option(
            help="For which tables are searched, comma-separated; '' leaves it at the scores."
        ),
    ] = "64,32,16",
    window: Annotated[
        int, typer.Option(help="Newest tokens that a starved head keeps, and that observe.")
    ] = 32,
    question: Annotated[
        str | None, typer.Option(help='Of a folder\'s images; default: "Describe this image."')
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Where an answer ends, where its task ends it no earlier.")
    ] = 64,
    dtype: Dtype = "float32",
    device: Device = "",
    include_path: IncludePath = None,
    plugin: PluginNames = None,
) -> None:
    """Find what each KV head is worth to any kind of prompts: no labels, no boxes, any family.

    A run that was cut off goes on from OUTPUT.records.jsonl; so does one with more prompts. A
    task's documents are others than those that it is scored on, as far as it has such.
    """
    with one_sentence("everything that was computed is safe, run it again to go on"):
        from sparsemm_eval.heads.calibration import (
            check_calibration,
            read_calibration,
            summary,
            warnings_of,
            write_sensitivity,
        )

        load_plugins(plugin)
        tables = integers("budgets", budgets) if budgets.strip() else []
        for budget in tables:
            check_int("budget", budget, least=2)
        check_int("window", window, least=1)
        check_int("max_new_tokens", max_new_tokens, least=1)
        check_calibration(data, count, question)
        own_tasks = folders(include_path)
        if missing := [folder for folder in own_tasks if not folder.is_dir()]:
            raise UserError(f"include_path={missing[0]}: there is no such folder")
        if output is not None and output.is_dir():
            raise UserError(f"output={output}: it is a folder; give the name of a file")
        checkpoint = _checkpoint(model, dtype, device)
        quiet()
        from sparsemm_eval.heads.sensitivity import measure

        family = checkpoint.family()
        calibration = read_calibration(data, count, own_tasks, question)
        path = output or checkpoint.sensitivity_cache()
        found = measure(
            checkpoint,
            calibration.prompts(checkpoint, family, max_new_tokens),
            calibration.total,
            window=window,
            budgets=tables,
            records=path.with_name(f"{path.stem}.records.jsonl"),
        )
        command = shlex.join(["sparsemm-eval", *sys.argv[1:]])
        write_sensitivity(found, path, checkpoint, calibration, max_new_tokens, command)
        typer.echo(summary(found, calibration))
        typer.echo(f"wrote {path}")
        for warning in warnings_of(calibration):
            typer.echo(f"warning: {warning}", err=True)


@app.command()
def draw(
    model: Model = None,
    image: Annotated[
        Path | None, typer.Option(help="What is looked at; default: a drawn document.")
    ] = None,
    video: Annotated[
        Path | None, typer.Option(help="A video in place of the image, drawn frame by frame.")
    ] = None,
    frames: Annotated[
        int | None, typer.Option(help="Frames of the video; default: the family's.")
    ] = None,
    question: Annotated[str | None, typer.Option(help="What is asked about it.")] = None,
    box: Annotated[
        str | None, typer.Option(help="Where the answer stands: x0,y0,x1,y1 in its pixels.")
    ] = None,
    heads: Annotated[
        str | None, typer.Option(help="Heads to draw, such as 3-1,4-0, not the best and worst.")
    ] = None,
    best: Annotated[int, typer.Option(help="Heads of the highest scores.")] = 3,
    worst: Annotated[int, typer.Option(help="Heads of the lowest scores.")] = 3,
    head_scores: Scores = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the pictures.")] = Path(
        "results/heads"
    ),
    max_new_tokens: Annotated[int, typer.Option(help="Where the answer ends.")] = 64,
    dtype: Dtype = "float32",
    device: Device = "",
    plugin: PluginNames = None,
) -> None:
    """Draw what the heads look at while a question is answered: over the image, and all at once.

    Where a sensitivity file is found or given, also which heads serve which kind of prompts.
    """
    with one_sentence():
        from sparsemm_eval.engine.cell import make_family
        from sparsemm_eval.heads.scene import read_film, read_scene

        load_plugins(plugin)
        if video is None and frames is None:
            scene = read_scene(image, question, box)
        elif video is None:
            raise UserError(f"frames={frames}: they are of a video: give video=FILE too")
        elif image is not None or box is not None:
            raise UserError(f"video={video}: it is drawn alone, without image= or box=")
        checkpoint = _checkpoint(model, dtype, device)
        if video is not None:
            given = {} if frames is None else {"frames": frames}
            scene = read_film(video, question, make_family(checkpoint.family, given))
        from sparsemm_eval.heads.draw import draw as draw_heads

        drawn = draw_heads(checkpoint, scene, out, heads, best, worst, head_scores, max_new_tokens)
        typer.echo(f"answer: {drawn.answer}")
        for line in (*drawn.lines, *(f"wrote {path}" for path in drawn.files)):
            typer.echo(line)


@app.command()
def mask(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for answers, table and curve.")],
    model: Model = None,
    tasks: Annotated[str, typer.Option(help="Benchmarks, comma-separated.")] = "docvqa_mini",
    shares: Annotated[
        str, typer.Option(help="Shares of the query heads to silence, comma-separated.")
    ] = "0.01,0.02,0.05,0.1",
    seeds: Annotated[int, typer.Option(help="Draws of random heads a share.")] = 3,
    mode: Annotated[str, typer.Option(help="How heads are silenced: query, output or both.")] = (
        "query"
    ),
    samples: Annotated[int, typer.Option(help="The first so many of each benchmark.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples read together.")] = 8,
    head_scores: Scores = None,
    dtype: Dtype = "float32",
    device: Device = "",
    plugin: PluginNames = None,
) -> None:
    """What benchmarks lose without the visual heads, and without as many random others."""
    with one_sentence(ANSWERS_SAFE):
        from sparsemm_eval.libraries import check_libraries
        from sparsemm_eval.methods import MASK_MODES
        from sparsemm_eval.sweep.studies import masking_study
        from sparsemm_eval.tiny import EMBEDDED

        plugins = load_plugins(plugin)
        study_on = partial(
            masking_study,
            model or f"{EMBEDDED}qwen2vl",
            tasks=words(tasks),
            shares=numbers("shares", shares, "0.01,0.05"),
            seeds=seeds,
            modes=MASK_MODES if mode == "both" else (mode,),
            samples=samples,
            batch_size=batch_size,
        )
        settings = {"dtype": dtype}
        if head_scores is not None:
            settings["head_scores"] = str(head_scores)
        # Refused before torch is imported, which alone knows the devices.
        study_on(settings=settings)
        check_libraries()
        quiet()
        from sparsemm_eval.bench.machine import device_name
        from sparsemm_eval.sweep.mask import run_masking

        study = study_on(settings=settings | {"device_map": device_name(device, "auto")})
        command = shlex.join(["sparsemm-eval", *sys.argv[1:]])
        done = run_masking(study, out, plugins, command)
        typer.echo(done.markdown)
        for path in done.files:
            typer.echo(f"wrote {path}")


def _checkpoint(model: str | None, dtype: str, device: str) -> Checkpoint:
    """A checkpoint that will lie on a device."""
    from sparsemm_eval.choices import DTYPES
    from sparsemm_eval.engine.hub import find_folder
    from sparsemm_eval.tiny import EMBEDDED

    name = model or f"{EMBEDDED}qwen2vl"
    check_choice("dtype", dtype, DTYPES)
    find_folder(name)  # refused before torch is imported
    from sparsemm_eval.bench.machine import device_name
    from sparsemm_eval.engine.checkpoint import Checkpoint

    return Checkpoint(name, dtype=dtype, device_map=device_name(device, "auto"))
