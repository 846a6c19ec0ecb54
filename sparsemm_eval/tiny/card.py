"""The model card of the tiny checkpoint, written from what its training run measured."""

from __future__ import annotations

import datetime
import json
import platform
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import Qwen2VLForConditionalGeneration

from .documents import PAGE

_HEAD = """---
library_name: transformers
pipeline_tag: image-text-to-text
---

# A tiny Qwen2-VL that reads

A genuine `Qwen2VLForConditionalGeneration` with {parameters:,} parameters, trained from nothing on
drawn pages of `KEY:VALUE` entries. It exists so that KV-cache compression can be tried, tested and
shown on a model that truly reads its image, in seconds and without a download. It knows nothing
but its pages, and no English.

One 16 x 16 pixel cell of the page is one glyph and one image token; one character is one text
token. A page has {rows} x {columns} cells and {least} to {most} entries. It answers three prompts:
`?KEY:` with the value, `>KEY:` with the value and the two entries after it, `*\\n` with the whole
page.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor
from sparsemm_eval.tiny import default_checkpoint

processor = AutoProcessor.from_pretrained(default_checkpoint())
model = AutoModelForImageTextToText.from_pretrained(default_checkpoint())
```

## Accuracy

Measured on unseen pages with ordinary greedy `generate` in bfloat16. Fonts and keys are those of
the training; layout, values, pairings, sizes, contrast and noise are new.

| question | asked | exact match | ANLS |
| --- | ---: | ---: | ---: |
"""

_RECIPE = """
## Recipe

1. The vision tower alone: each cell's feature is pulled to the text embedding of its glyph.
2. Everything, over five sizes of page, each left when value questions are answered exactly and
   transcripts are read by character in more than 90% of the newest 20 batches. One image carries
   many independent questions, each seeing the image and itself. Muon on the layers' matrices,
   AdamW on the rest, float32, learning rate 2e-3, linear decay over the last 30%.

All training pages are drawn afresh; pages for checks, evaluation and benchmarks come from
streams of random numbers that training never uses.

## Training log

Shares on the newest batches; held-out: at least 400 value questions on unseen pages.

| step | seconds | stage | loss | values exact | transcript characters | held-out values exact |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"""

_TABLE_ROWS = 24


def model_card(
    model: Qwen2VLForConditionalGeneration,
    log_file: Path,
    readings: dict[str, dict[str, float]],
    command: str,
) -> str:
    """Write the model card.

    Parameters
    ----------
    model : Qwen2VLForConditionalGeneration
        The trained model.
    log_file : pathlib.Path
        JSONL log of the run.
    readings : dict
        Result of :func:`~sparsemm_eval.tiny.evaluate.evaluate`.
    command : str
        Command line that makes the checkpoint again.

    Returns
    -------
    str
        Markdown with front matter.
    """
    head = _HEAD.format(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        rows=PAGE.rows,
        columns=PAGE.columns,
        least=PAGE.min_entries,
        most=PAGE.max_entries,
    )
    accuracy = "".join(
        f"| {kind} | {score['questions']} | {score['exact']:.3f} | {score['anls']:.3f} |\n"
        for kind, score in readings.items()
    )
    made = (
        f"\n## Made\n\nOn {datetime.date.today().isoformat()} with Python"
        f" {platform.python_version()}, torch {torch.__version__}, transformers"
        f" {transformers.__version__}, numpy {np.__version__}, on {torch.get_num_threads()} CPU"
        f" threads:\n\n```\n{command}\n```\n"
    )
    return head + accuracy + _RECIPE + training_table(log_file) + made


def training_table(log_file: Path) -> str:
    """Return a Markdown table's rows: every new stage, and a selection of the rest.

    Parameters
    ----------
    log_file : pathlib.Path
        JSONL log of the run.

    Returns
    -------
    str
        At most about 30 lines.
    """
    lines = log_file.read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
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
        rows.append(
            f"| {step} | {record['seconds']:.0f} | {record['stage']} | {record['loss']:.4f}"
            f" | {record['value_exact']:.3f} | {record['transcript_characters']:.3f}"
            f" | {f'{newest[-1]:.3f}' if newest else ''} |\n"
        )
    return "".join(rows)
