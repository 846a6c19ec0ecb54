"""Models through lmms-eval's own evaluation, with one results file each."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from tqdm import tqdm

from sparsemm_eval.models.checkpoint import Checkpoint
from sparsemm_eval.models.llava import LlavaSparseMM
from sparsemm_eval.models.qwen2vl import Qwen2VLSparseMM
from sparsemm_eval.models.requirements import check_tasks
from sparsemm_eval.models.wrapper import SparseMMModel
from sparsemm_eval.paths import tasks_folder

_FAMILIES = {family.model_type: family for family in (LlavaSparseMM, Qwen2VLSparseMM)}


def make_models(
    checkpoint: Checkpoint, cells: Sequence[Mapping[str, Any]], **settings: Any
) -> list[SparseMMModel]:
    """One model a cell, all on one checkpoint; no weights are loaded.

    Models that differ in nothing but their method read each prompt once for all of them.

    Parameters
    ----------
    checkpoint : Checkpoint
        Of either family.
    cells : sequence of mapping
        Settings that differ from model to model, such as method and budget.
    **settings
        Settings of all of them, such as batch_size and answers.

    Raises
    ------
    ValueError, FileNotFoundError
        For another family, or settings that cannot be.
    """
    model_type = checkpoint.config.model_type
    if model_type not in _FAMILIES:
        raise ValueError(
            f"pretrained={checkpoint.pretrained} is a {model_type} checkpoint; it must be one of "
            f"{', '.join(_FAMILIES)}"
        )
    family = _FAMILIES[model_type]
    models = [family(checkpoint=checkpoint, **settings, **cell) for cell in cells]
    for model in models:
        model.fellows = tuple(m for m in models if m is not model and m.reads_as(model))
    return models


def evaluate(
    models: Sequence[SparseMMModel],
    cells: Sequence[Mapping[str, Any]],
    tasks: Sequence[str],
    samples: int | None,
    out: Path,
) -> list[list[Path]]:
    """Score models on tasks, one after the other.

    Parameters
    ----------
    models : sequence of SparseMMModel
        Of `make_models`.
    cells : sequence of mapping
        Their settings, as the results files are to state them.
    tasks : sequence of str
        Known to lmms-eval, or in `tasks/`.
    samples : int or None
        The first so many of each task; None takes all.
    out : Path
        Results go to its ``cells/``, what lmms-eval says on the way to its ``log.txt``.

    Returns
    -------
    list of list of Path
        Of each model a results file a task, as lmms-eval writes them.

    Raises
    ------
    ValueError
        For an unknown task, or one that cannot run here, before any model is loaded.
    """
    manager = _task_manager(tasks)
    check_tasks(tasks)
    out.mkdir(parents=True, exist_ok=True)
    paths: list[list[Path]] = [[] for _ in models]
    # lmms-eval draws three bars a cell: they go to a file, one bar for all stays on the screen.
    bar = tqdm(total=len(cells) * len(tasks), desc="cells", file=sys.stderr)
    with bar, (out / "log.txt").open("a", encoding="utf-8") as log, redirect_stderr(log):
        # One task at a time: what is kept is then stated for each.
        for task in tasks:
            for model, cell, files in zip(models, cells, paths, strict=True):
                files.append(_evaluate(model, cell, task, samples, manager, out / "cells"))
                bar.update()
    return paths


def _task_manager(tasks: Sequence[str]) -> TaskManager:
    """Of our own tasks if they are enough: lmms-eval's thousands take many seconds to read."""
    for include_defaults in (False, True):
        manager = TaskManager(
            "WARNING", include_path=str(tasks_folder()), include_defaults=include_defaults
        )
        unknown = [task for task in tasks if task not in manager.all_tasks]
        if not unknown:
            return manager
    raise ValueError(
        f"tasks: there is no task {unknown[0]}; `python -m lmms_eval --tasks list` lists "
        f"lmms-eval's own, {tasks_folder()} holds ours"
    )


def _evaluate(
    model: SparseMMModel,
    cell: Mapping[str, Any],
    task: str,
    samples: int | None,
    manager: TaskManager,
    folder: Path,
) -> Path:
    """One model on one task through lmms-eval, its results on disk whole or not at all."""
    results = simple_evaluate(
        model=model,
        model_args=",".join(f"{name}={value}" for name, value in cell.items()),
        tasks=[task],
        limit=samples,
        task_manager=manager,
        log_samples=False,
        verbosity="WARNING",
    )
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^\w.+-]", "_", "-".join([task, *map(str, cell.values())]))
    path = folder / f"{name}_results.json"
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(results, indent=1, default=str), encoding="utf-8")
    os.replace(unfinished, path)
    return path
