"""Models through lmms-eval's own tasks: answers alone, or scored, with one results file each."""

from __future__ import annotations

import json
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.task import Task
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager, get_task_dict
from lmms_eval.utils import handle_non_serializable, sanitize_list
from tqdm import tqdm

from sparsemm_eval.engine.answers import SampleFailures
from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.llava import LlavaSparseMM
from sparsemm_eval.engine.qwen2vl import Qwen2VLSparseMM
from sparsemm_eval.engine.requirements import check_tasks
from sparsemm_eval.engine.samples import Memo
from sparsemm_eval.engine.wrapper import SparseMMModel
from sparsemm_eval.errors import UserError, check_int
from sparsemm_eval.paths import tasks_folder, write_whole
from sparsemm_eval.report.provenance import OURS

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
        raise UserError(
            f"pretrained={checkpoint.pretrained} is a {model_type} checkpoint; it must be one of "
            f"{', '.join(_FAMILIES)}"
        )
    family = _FAMILIES[model_type]
    models = [family(checkpoint=checkpoint, **settings, **cell) for cell in cells]
    memo = Memo()
    for model in models:
        model.memo = memo
        model.fellows = tuple(m for m in models if m is not model and m.reads_as(model))
    return models


def answer(
    models: Sequence[SparseMMModel],
    task: str,
    samples: int | None = None,
    shard: int = 0,
    shards: int = 1,
    progress: Callable[[int], None] | None = None,
    manager: TaskManager | None = None,
) -> None:
    """Answer samples of a task under all models, each prompt read once; nothing is scored.

    Ranks that run together (torchrun) take each their own part of the shard.

    Parameters
    ----------
    models : sequence of SparseMMModel
        Of `make_models`.
    task : str
        Known to lmms-eval, or in `tasks/`.
    samples : int, optional
        The first so many of the task; default all.
    shard, shards : int
        Of these samples, those at ``shard``, ``shard + shards``, ….
    progress : callable, optional
        Called whenever answers were computed and are on disk, with how many, those of all models
        counted; answers that were there before are not. It takes the place of the bars.
    manager : TaskManager, optional
        One that knows the task; default lmms-eval's tasks and those of `tasks/`.

    Raises
    ------
    ValueError
        For an unknown task, or one that cannot run here, before any model is loaded.
    SampleFailures
        After all others are answered and safe, if samples failed.
    """
    if samples is not None:
        check_int("samples", samples, least=1)
    check_int("shard", shard, least=0)
    check_int("shards", shards, least=shard + 1)
    manager = manager or task_manager([task])
    check_tasks([task])
    part, parts = shard + shards * models[0].rank, shards * models[0].world_size
    failures: list[SampleFailures] = []
    for name, loaded in _leaves(get_task_dict([task], manager, "chat")):
        requests = _requests(loaded, samples, part, parts)
        for model in models:
            model.task_dict[name] = loaded.dataset
            model.progress = progress
            try:
                model.generate_until(requests)
            except SampleFailures as error:
                failures.append(error)
            finally:
                model.progress = None
    if failures:
        raise failures[0]


def _leaves(tasks: Mapping[Any, Any]) -> Iterator[tuple[str, Task]]:
    """Tasks by name, out of the groups they are in."""
    for name, task in tasks.items():
        if isinstance(task, Mapping):
            yield from _leaves(task)
        else:
            yield name, task


def _requests(task: Task, samples: int | None, part: int, parts: int) -> list[Instance]:
    """Requests for the documents part, part + parts, …, as often as the task repeats them."""
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(limit=samples, rank=part, world_size=parts)
    # An empty part is given another's document to keep ranks in step; that is not its own.
    own = [request for request in task.instances if "__padding_only__" not in request.metadata]
    return [request for request in own for _ in range(request.repeats)]


def evaluate(
    models: Sequence[SparseMMModel],
    cells: Sequence[Mapping[str, Any]],
    tasks: Sequence[str],
    samples: int | None,
    out: Path,
    log_samples: bool = False,
    stated: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
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
    log_samples : bool
        Whether a file of all answers and their scores is to lie beside each results file, in
        lmms-eval's own form: ``<results>_samples_<task>.jsonl``.
    stated : mapping, optional
        Settings that all cells share, such as pretrained, as the results files are to state them.
    about : mapping, optional
        How this was made, for the results files' entry `OURS`.

    Returns
    -------
    list of list of Path
        Of each model a results file a task, as lmms-eval writes them.

    Raises
    ------
    ValueError
        For an unknown task, or one that cannot run here, before any model is loaded.
    """
    manager = task_manager(tasks)
    check_tasks(tasks)
    out.mkdir(parents=True, exist_ok=True)
    paths: list[list[Path]] = [[] for _ in models]
    # lmms-eval draws three bars a cell: they go to a file, one bar for all stays on the screen.
    bar = tqdm(total=len(cells) * len(tasks), desc="cells", file=sys.stderr)
    with bar, (out / "log.txt").open("a", encoding="utf-8") as log, redirect_stderr(log):
        # One task at a time: what is kept is then stated for each.
        for task in tasks:
            for model, cell, files in zip(models, cells, paths, strict=True):
                place = out / "cells"
                files.append(
                    score(model, cell, task, samples, manager, place, log_samples, stated, about)
                )
                bar.update()
    return paths


def task_manager(tasks: Sequence[str], include_path: Sequence[Path] = ()) -> TaskManager:
    """Of our own tasks if they are enough: lmms-eval's thousands take many seconds to read.

    Parameters
    ----------
    tasks : sequence of str
        Those that it must know.
    include_path : sequence of Path
        Folders of the user's own task files.

    Raises
    ------
    UserError
        For a task that there is not.
    """
    folders = [str(folder) for folder in (tasks_folder(), *include_path)]
    for include_defaults in (False, True):
        manager = TaskManager("WARNING", include_path=folders, include_defaults=include_defaults)
        unknown = [task for task in tasks if task not in manager.all_tasks]
        if not unknown:
            return manager
    raise UserError(
        f"tasks: there is no task {unknown[0]}; `python -m lmms_eval --tasks list` lists "
        f"lmms-eval's own, {', '.join(folders)} hold more"
    )


def results_path(folder: Path, task: str, cell: Mapping[str, Any]) -> Path:
    """Where in a folder the results file of a cell on a task lies."""
    name = re.sub(r"[^\w.+-]", "_", "-".join([task, *map(str, cell.values())]))
    return folder / f"{name}_results.json"


def score(
    model: SparseMMModel,
    cell: Mapping[str, Any],
    task: str,
    samples: int | None,
    manager: TaskManager,
    folder: Path,
    log_samples: bool,
    stated: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Score one model on one task through lmms-eval, files on disk whole or not at all.

    Parameters
    ----------
    model, cell, task, samples, log_samples, stated, about
        As for `evaluate`.
    manager : TaskManager
        Of `task_manager`; it knows the task.
    folder : Path
        Of results and samples file, made if it is not there.

    Returns
    -------
    Path
        The results file, named by `results_path`.

    Raises
    ------
    SampleFailures
        If a sample has no answer: then there is no score.
    """
    path = results_path(folder, task, cell)
    name = path.name.removesuffix("_results.json")
    folder.mkdir(parents=True, exist_ok=True)
    settings = {**(stated or {}), **cell}
    # Tasks are loaded anew for each model: what a metric counts in its module starts from zero.
    results = simple_evaluate(
        model=model,
        model_args=",".join(f"{name}={value}" for name, value in settings.items()),
        tasks=[task],
        limit=samples,
        task_manager=manager,
        log_samples=log_samples,
        verbosity="WARNING",
        # As on its command line: metrics see documents without images, which would be decoded
        # again for every cell, and what they write goes where results go.
        cli_args=Namespace(process_with_media=False, output_path=str(folder / name)),
    )
    if results is None:  # the results of several ranks are with the first
        return path
    for of_task, lines in results.pop("samples", {}).items():
        write_whole(folder / f"{name}_samples_{of_task}.jsonl", "".join(map(_sample_line, lines)))
    if about is not None:
        results[OURS] = dict(about)
    write_whole(path, json.dumps(results, indent=1, default=str))
    return path


def _sample_line(sample: Mapping[str, Any]) -> str:
    """One answer as lmms-eval's samples files have it: no document, nothing of an image."""
    left_out = ("doc", "arguments", "input_media", "resps")
    line = {name: value for name, value in sample.items() if name not in left_out}
    said, filtered = (sanitize_list(sample[name]) for name in ("resps", "filtered_resps"))
    # Lists of a request's answers are told apart only where a document has several requests.
    said, filtered = (part[0] if len(part) == 1 else part for part in (said, filtered))
    line |= {
        "target": str(sample["target"]),
        "filtered_resps": filtered,
        "input": sample["arguments"][0],
    }
    if said not in (filtered, [filtered]):
        line["resps"] = said
    return json.dumps(line, default=handle_non_serializable, ensure_ascii=False) + "\n"
