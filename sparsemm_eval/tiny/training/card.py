"""Model cards of the tiny checkpoints, written from what lies beside the weights.

``python -m sparsemm_eval.tiny.training.card FOLDER --summary results/demo/summary.json`` writes a
card anew, with the checkpoint's scores on the miniature benchmarks.
"""

from __future__ import annotations

import datetime
import json
import platform
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from safetensors import safe_open

from sparsemm_eval.tiny.documents import PAGE

LOG, MADE = "train_log.jsonl", "training.json"

_HEAD = """---
library_name: transformers
pipeline_tag: image-text-to-text
---

# A tiny {title} that reads

A genuine `{title_class}` with {parameters:,} parameters, trained on drawn pages and pictures. It
exists so that KV-cache compression can be tried, tested and shown on a model that truly reads its
image, in seconds and without a download. It knows nothing but its pages, and next to no English.

{shape}

```python
from transformers import AutoModelForImageTextToText, AutoProcessor
from sparsemm_eval.tiny import embedded_checkpoints

folder = embedded_checkpoints()["{name}"]
processor = AutoProcessor.from_pretrained(folder)
model = AutoModelForImageTextToText.from_pretrained(folder)
```
"""

_SHAPES = {
    "qwen2vl": (
        "Qwen2-VL",
        "Qwen2VLForConditionalGeneration",
        "5 layers of 8 query heads and 4 KV heads. One 16 x 16 pixel cell of the page is one\n"
        "glyph and one image token; one character is one text token.",
    ),
    "llava_next": (
        "LLaVA-NeXT",
        "LlavaNextForConditionalGeneration",
        "A Llama of 5 layers of 8 query heads and 8 KV heads behind a CLIP tower of 176 x 176\n"
        "pixel tiles. One 16 x 16 pixel cell of the page is one glyph and one tile token; the\n"
        "base image, 121 tokens more, shows the page squashed and illegible. One character is one\n"
        "text token.",
    ),
}

_KINDS = f"""
## Accuracy by kind of question

Measured on unseen pages ({PAGE.rows} x {PAGE.columns} cells, {PAGE.min_entries} to
{PAGE.max_entries} entries) and pictures (signs, words, charts, scenes) with ordinary greedy
`generate` in bfloat16. Faces, keys, colours and shapes are those of the training; layout, values,
pairings, sizes, shades and noise are new.

| question | asked | exact match | ANLS |
| --- | ---: | ---: | ---: |
"""

_BENCHMARKS = """
## Miniature benchmarks

Full KV in float32 through lmms-eval's own task code, {samples} samples each (`{command}`);
chance is the best constant answer.

| benchmark | metric | score | chance |
| --- | --- | ---: | ---: |
"""

_RECIPE = """
## Recipe

1. The vision alone: each cell's feature is pulled to the word of its glyph, or of its colour and
   shape.
2. Everything, over five sizes of page, each left when value questions are answered exactly and
   transcripts are read by character in more than 90% of the newest 20 batches; at the end
   batches of pictures among those of pages. One image carries many independent questions, each
   seeing the image and itself. Muon on the layers' matrices, AdamW on the rest, float32, linear
   decay over the last 30%.

All training images are drawn afresh; those for checks, evaluation and benchmarks come from streams
of random numbers that training never uses.

{notes}## Training log

`{log}` holds all of it. Shares on the newest batches; held-out: at least 400 value questions on
unseen pages.

| step | seconds | stage | loss | values exact | transcript characters | held-out values exact |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"""

_TABLE_ROWS = 24


def how_made(command: str) -> dict[str, Any]:
    """Return what a checkpoint's ``training.json`` says: command, date, versions, threads.

    Parameters
    ----------
    command : str
        Command line of the run.

    Returns
    -------
    dict
        Add ``notes`` for what the command does not say.
    """
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        },
        "threads": torch.get_num_threads(),
        "notes": "",
    }


def model_card(folder: Path, summary: dict[str, Any] | None = None) -> str:
    """Write the card of a checkpoint.

    Parameters
    ----------
    folder : pathlib.Path
        The checkpoint, with its ``train_log.jsonl`` and ``training.json``; its name is a family's.
    summary : dict, optional
        Content of the demo's ``summary.json``, for the scores on the miniature benchmarks.

    Returns
    -------
    str
        Markdown with front matter.
    """
    title, title_class, shape = _SHAPES[folder.name]
    made = json.loads((folder / MADE).read_text(encoding="utf-8"))
    records = _records(folder / LOG)
    with safe_open(folder / "model.safetensors", "pt") as weights:
        parameters = sum(
            int(np.prod(weights.get_slice(name).get_shape())) for name in list(weights.keys())
        )
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    notes = f"{made['notes'].strip()}\n\n" if made["notes"] else ""
    return "".join(
        [
            _HEAD.format(
                title=title, title_class=title_class, shape=shape, name=folder.name,
                parameters=parameters,
            ),
            benchmark_table(folder.name, summary) if summary else "",
            _KINDS,
            _kinds(records),
            _RECIPE.format(notes=notes, log=LOG),
            training_table(records),
            f"\n## Made\n\nOn {made['date']} with {versions}, on {made['threads']} CPU threads:\n\n"
            f"```\n{made['command']}\n```\n",
        ]
    )  # fmt: skip


def benchmark_table(name: str, summary: dict[str, Any]) -> str:
    """Return the section on the miniature benchmarks.

    Parameters
    ----------
    name : str
        Of the model in the summary.
    summary : dict
        Content of the demo's ``summary.json``.

    Returns
    -------
    str
        Markdown; empty if the summary knows no such model.
    """
    cells = [c for c in summary["cells"] if (c["model"], c["method"]) == (name, "fullkv")]
    if not cells:
        return ""
    rows = [
        f"| {c['task']} | {c['metric']} | {c['score']:.3f} | {summary['chance'][c['task']]:.3f} |\n"
        for c in cells
    ]
    samples = max(c["samples"] for c in cells)
    return _BENCHMARKS.format(samples=samples, command=summary["command"]) + "".join(rows)


def _records(log_file: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in log_file.read_text(encoding="utf-8").splitlines()]


def _kinds(records: list[dict[str, float]]) -> str:
    """Rows of the final evaluation, as the log has it."""
    final = {name: value for record in records for name, value in record.items()}
    kinds = [name[6:-6] for name in final if name.startswith("final_") and name.endswith("_exact")]
    return "".join(
        f"| {kind} | {final[f'final_{kind}_questions']:.0f} | {final[f'final_{kind}_exact']:.3f}"
        f" | {final[f'final_{kind}_anls']:.3f} |\n"
        for kind in kinds
    )


def training_table(records: list[dict[str, float]]) -> str:
    """Return a Markdown table's rows: every new stage, and a selection of the rest.

    Parameters
    ----------
    records : list of dict
        Of the run's log.

    Returns
    -------
    str
        At most about 30 lines.
    """
    held_out = {
        r["step"]: r["held_out_value_exact"] for r in records if "held_out_value_exact" in r
    }
    reached = {r["step"] for r in records if "stage_reached" in r}
    steps = [r for r in records if "value_exact" in r]
    every = max(1, len(steps) // _TABLE_ROWS)
    rows, shown = [], 0
    for number, record in enumerate(steps):
        step = record["step"]
        if step not in reached and number % every and number != len(steps) - 1:
            continue
        # Checks fall between records: show the newest one since the row before.
        newest = [share for at, share in held_out.items() if shown < at <= step]
        shown = step
        characters = record.get("transcript_characters")
        rows.append(
            f"| {step} | {record['seconds']:.0f} | {record['stage']} | {record['loss']:.4f}"
            f" | {record['value_exact']:.3f} | {'' if characters is None else f'{characters:.3f}'}"
            f" | {f'{newest[-1]:.3f}' if newest else ''} |\n"
        )
    return "".join(rows)


def main(
    folder: Annotated[Path, typer.Argument(help="Checkpoint whose card is written.")],
    summary: Annotated[Path | None, typer.Option(help="The demo's summary.json.")] = None,
) -> None:
    """Write a checkpoint's model card anew."""
    scores = json.loads(summary.read_text(encoding="utf-8")) if summary else None
    (folder / "README.md").write_text(model_card(folder, scores), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
