"""lmms-eval's tasks: found by name, what each needs here, and the requests it makes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
from lmms_eval.api.instance import Instance
from lmms_eval.api.task import Task
from lmms_eval.llm_judge import get_server
from lmms_eval.tasks import TaskManager, get_task_dict
from lmms_eval.utils import load_yaml_config
from openai import OpenAIError
from PIL import Image
from tenacity import RetryError

from sparsemm_eval.engine.generation import check_generation
from sparsemm_eval.engine.requests import Request, check_reads_videos, with_candidates
from sparsemm_eval.engine.videos import check_decoder, read_video
from sparsemm_eval.errors import UserError, check_int, one_line
from sparsemm_eval.families import Family
from sparsemm_eval.paths import tasks_folder

# Tasks of lmms-eval whose metrics tokenize with a java program; without it lmms-eval fails after
# generation, and the scores of all other tasks of the run are lost.
_NEEDS_JAVA = re.compile(
    r"coco2014_cap_val|coco2017_cap_val(_lite)?|coco_karpathy_(test|val)"
    r"|flickr30k_test(_lite)?|nocaps_val(_lite)?|refcoco(\+|g)?_(bbox|seg)_(?!rec).+"
    r"|screenspot_reg_test|textcaps_(train|val|val_lite)|vatex_(test|val_zh)"
)
# What a metric's code reaches when it asks another model, or runs a java program.
_JUDGES = ("lmms_eval.llm_judge", "lmms_eval.verifiers.openai", "openai", "anthropic", "requests")
_JAVA = ("pycocoevalcap.tokenizer", "pycocoevalcap.meteor", "pycocoevalcap.spice")
# Output types whose candidates are scored, and those that put an answer into a further turn.
_SCORED = ("multiple_choice", "loglikelihood")
_ROUNDS = ("generate_until_multi_round", "generate_until_agentic")
WITHOUT_PROMPT = (
    "its metric acc_mutual_info asks for candidates without a prompt, and what is measured here is "
    "what is kept of a prompt: leave the metric out"
)


def task_manager(tasks: Sequence[str], include_path: Sequence[Path] = ()) -> TaskManager:
    """Find tasks, among ours alone if they are enough: lmms-eval's take many seconds to read.

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
        f"lmms-eval's own, and {', '.join(folders)} more; --include_path FOLDER adds one of yours"
    )


def requests_of(
    task: str,
    manager: TaskManager,
    samples: int | None = None,
    shard: int = 0,
    shards: int = 1,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Request]:
    """What a task asks of its documents shard, shard + shards, …; loads its data.

    Parameters
    ----------
    task : str
        Known to the manager.
    manager : TaskManager
        Of `task_manager`.
    samples : int, optional
        The first so many of the task; default all.
    shard, shards : int
        Of these samples, those at ``shard``, ``shard + shards``, ….
    rank, world_size : int
        Ranks that run together take each their own part of the shard.

    Raises
    ------
    UserError
        For a shard that there cannot be, or a task that cannot run here.
    """
    if samples is not None:
        check_int("samples", samples, least=1)
    check_int("shard", shard, least=0)
    check_int("shards", shards, least=shard + 1)
    check_tasks([task])
    part, parts = shard + shards * rank, shards * world_size
    scored = is_scored(manager, task)
    return (
        request
        for name, loaded in _leaves(get_task_dict([task], manager, "simple" if scored else "chat"))
        for request in _requests(
            _instances(loaded, samples, part, parts), {name: loaded.dataset}, scored
        )
    )


def load_task(task: str, manager: TaskManager) -> Task:
    """A task with its data, as a run has it.

    Raises
    ------
    UserError
        Naming the task, if its data cannot be loaded.
    """
    try:
        return get_task_dict([task], manager, "chat")[task]
    except Exception as error:  # whatever the task's code or its data set raises
        cause = error.last_attempt.exception() if isinstance(error, RetryError) else error
        words = f"{type(cause).__name__}: {one_line(cause)}"
        raise UserError(f"{task}: its data cannot be loaded ({words})") from error


def is_scored(manager: TaskManager, task: str) -> bool:
    """Whether a task gives candidates to be scored, which lmms-eval gives to simple models alone.

    Its chat models are asked for what they generate.
    """
    return _kind(manager, task) in _SCORED


def _requests(
    instances: Sequence[Instance], datasets: Mapping[str, Any], scored: bool
) -> Iterable[Request]:
    if scored:
        return (request for request, _ in with_candidates(instances, datasets))
    return (Request.of(instance, datasets) for instance in instances)


def _leaves(tasks: Mapping[Any, Any]) -> Iterator[tuple[str, Task]]:
    """Tasks by name, out of the groups they are in."""
    for name, task in tasks.items():
        if isinstance(task, Mapping):
            yield from _leaves(task)
        else:
            yield name, task


def _instances(task: Task, samples: int | None, part: int, parts: int) -> list[Instance]:
    """Instances of the documents part, part + parts, …, as often as the task repeats them."""
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(limit=samples, rank=part, world_size=parts)
    # An empty part is given another's document to keep ranks in step; that is not its own.
    own = [request for request in task.instances if "__padding_only__" not in request.metadata]
    return [request for request in own for _ in range(request.repeats)]


def visuals(task: str, doc_ids: Iterable[int]) -> dict[int, list[Image.Image]]:
    """Load images of documents.

    The data is loaded as for a run: from the cache where it is there, else from the hub where
    there is one.

    Parameters
    ----------
    task : str
        Known to lmms-eval, or in `tasks/`.
    doc_ids : iterable of int
        Numbers of documents, as samples files have them.

    Returns
    -------
    dict
        Images by number of document, and the frame in the middle of each video's file; what cannot
        be seen, such as a sound, is left out.

    Raises
    ------
    ValueError
        For an unknown task, one whose data cannot be loaded, or a document it does not have.
    """
    try:
        loaded = get_task_dict([task], task_manager([task]))[task]
    except RetryError as error:
        cause = error.last_attempt.exception()
        raise UserError(f"its data cannot be loaded ({one_line(cause)})") from error
    documents = loaded.eval_docs
    images = {}
    for doc_id in doc_ids:
        if not 0 <= doc_id < len(documents):
            raise UserError(
                f"{task} has {len(documents)} documents, and none is number {doc_id}: its data is "
                "not that of the run"
            )
        try:
            shown = loaded.doc_to_visual(documents[doc_id]) or []
        except Exception as error:  # the task's own code, whatever it raises
            words = f"{type(error).__name__}: {one_line(error)}"
            raise UserError(f"document {doc_id} cannot be shown ({words})") from error
        images[doc_id] = [still for visual in shown if (still := _still(visual)) is not None]
    return images


def _still(visual: Any) -> Image.Image | None:
    """An image as it is, one frame of a video's file, and nothing of anything else."""
    if isinstance(visual, Image.Image):
        return visual
    if not isinstance(visual, str):
        return None
    try:
        video = read_video(Path(visual), lambda count: np.array([count // 2]))
    except (OSError, ValueError):  # a sound, or a file that is not here any more
        return None
    return Image.fromarray(video.frames[0])


def check_tasks(tasks: Iterable[str]) -> None:
    """Refuse tasks whose metrics cannot run here.

    Parameters
    ----------
    tasks : iterable of str
        Names of lmms-eval tasks; groups are not resolved.

    Raises
    ------
    ValueError
        If one needs java and there is none.
    """
    needy = sorted({task for task in tasks if _NEEDS_JAVA.fullmatch(task)})
    if needy and shutil.which("java") is None:
        verb, it = ("needs", "it") if len(needy) == 1 else ("need", "them")
        raise UserError(
            f"{', '.join(needy)} {verb} java for the metrics, and there is none: install a Java "
            f"runtime (Debian: apt install default-jre-headless) or leave {it} out"
        )


@dataclass(frozen=True)
class LeftOut:
    """A task that cannot run here, and why."""

    task: str
    cause: str


def find_tasks(tasks: Sequence[str], include_path: Sequence[Path] = ()) -> TaskManager:
    """Find tasks among ours, in folders of the user's, and in lmms-eval.

    Parameters
    ----------
    tasks : sequence of str
        Their names.
    include_path : sequence of Path
        Folders that hold task files of one's own.

    Raises
    ------
    UserError
        For a task that there is not, a group of tasks, or a folder that there is not.
    """
    for folder in include_path:
        if not folder.is_dir():
            raise UserError(f"include_path={folder}: there is no such folder")
    manager = task_manager(tasks, include_path)
    for task in tasks:
        if task in manager.all_subtasks:
            continue
        members = manager.task_index[task].get("task")  # a tag's list; -1 for a group with a file
        if not isinstance(members, list):
            members = _config(manager, task).get("task") or []
        names = [one if isinstance(one, str) else str(one.get("task")) for one in members]
        raise UserError(
            f"tasks: {task} is a group of tasks; name those of it that are wanted, of "
            f"{', '.join(names)}"
        )
    return manager


def runnable(
    manager: TaskManager, tasks: Sequence[str], skip: bool
) -> tuple[list[str], list[LeftOut]]:
    """Part tasks into those that can be answered and scored here, and those that are left out.

    Parameters
    ----------
    manager : TaskManager
        Of `find_tasks`.
    tasks : sequence of str
        Their names.
    skip : bool
        Leave out those that cannot, instead of refusing all.

    Raises
    ------
    UserError
        If one cannot and is not to be skipped, or if none is left.
    """
    left = [LeftOut(task, cause) for task in tasks if (cause := obstacle(manager, task))]
    rest = [task for task in tasks if task not in {lost.task for lost in left}]
    if left and not (skip and rest):
        raise UserError(left[0].cause)
    return rest, left


def obstacle(manager: TaskManager, task: str) -> str | None:
    """Why a task cannot be answered and scored here, in one sentence; None if it can."""
    try:
        check_tasks([task])
        config = check_answerable(manager, task)
    except UserError as error:
        return str(error)
    return _unscorable(task, config)


def check_answerable(manager: TaskManager, task: str) -> dict[str, Any]:
    """Refuse a task whose documents cannot be read and answered here, scored or not.

    Returns
    -------
    dict
        The task's configuration.

    Raises
    ------
    UserError
        In one sentence.
    """
    check_kind(task, _kind(manager, task))
    config = _config(manager, task)
    check_generation(task, config.get("generation_kwargs"))
    if _shows_videos(config):
        check_decoder()
    return config


def check_family(manager: TaskManager, task: str, family: type[Family]) -> None:
    """Refuse a task of lmms-eval's that shows videos if a family reads none.

    Raises
    ------
    UserError
        In one sentence.
    """
    if _shows_videos(_config(manager, task)):
        try:
            check_reads_videos(family)
        except UserError as error:
            raise UserError(f"{task}: {error}") from error


def check_kind(task: str, kind: str) -> None:
    """Refuse a task of an output type that cannot be answered on a compressed cache.

    Raises
    ------
    UserError
        In one sentence.
    """
    if kind in _ROUNDS:
        raise UserError(
            f"{task} is of output_type {kind}, which asks again with the model's own answer, and a "
            "cache that was compressed for a prompt takes no second turn: choose tasks of one turn "
            f"(output_type generate_until, {' or '.join(_SCORED)})"
        )
    if kind not in ("generate_until", *_SCORED):
        raise UserError(
            f"{task} is of output_type {kind}, which is not measured here: choose tasks of "
            f"output_type generate_until, {' or '.join(_SCORED)}"
        )


def check_kinds(tasks: Collection[str], include_path: Sequence[str] = ()) -> None:
    """`check_kind` of tasks by name alone: of those in the folders, or where none is given, of
    those that lmms-eval or this package brings.
    """
    if not tasks:
        return
    folders = list(include_path) or [str(tasks_folder())]
    manager = TaskManager("WARNING", include_path=folders, include_defaults=not include_path)
    for task in sorted(set(tasks) & set(manager.all_subtasks)):
        check_kind(task, _kind(manager, task))


def _kind(manager: TaskManager, task: str) -> str:
    """A task's output type; its code is not loaded."""
    path = manager.task_index[task]["yaml_path"]
    config = {} if path == -1 else load_yaml_config(path, mode="simple")
    return config.get("output_type") or "generate_until"


def _unscorable(task: str, config: Mapping[str, Any]) -> str | None:
    """What lacks here for a task's metrics, in one sentence; None if nothing does."""
    metrics = [metric for metric in config.get("metric_list") or () if isinstance(metric, Mapping)]
    names = [str(metric.get("metric")) for metric in metrics]
    if names and all("submission" in name for name in names):
        return (
            f"{task} has no score here, only a file to submit elsewhere ({', '.join(names)}): "
            "choose a split whose answers are public"
        )
    if "acc_mutual_info" in names:
        return f"{task}: {WITHOUT_PROMPT}"
    if config.get("output_type") == "loglikelihood" and config.get("process_results") is None:
        return (
            f"{task} is of output_type loglikelihood, for which lmms-eval's own metrics fail: give "
            "it process_results, or choose tasks of output_type multiple_choice"
        )
    code = [config.get("process_results"), *(metric.get("aggregation") for metric in metrics)]
    reached = _reached([one for one in code if isinstance(one, FunctionType)])
    if _among(reached, _JAVA) and shutil.which("java") is None:
        return (
            f"{task} needs java for its metrics, and there is none: install a Java runtime "
            "(Debian: apt install default-jre-headless) or leave it out"
        )
    if _among(reached, _JUDGES) and not _has_judge():
        return (
            f"{task} is scored by a judge, another model that is asked through an API, and there "
            "is no key for one: set OPENAI_API_KEY as lmms-eval wants it, or leave it out"
        )
    return None


def _shows_videos(config: Mapping[str, Any]) -> bool:
    """Whether a task has lmms-eval unpack videos, and its code for images speaks of them."""
    unpacks = config.get("dataset_kwargs") or {}
    if not (isinstance(unpacks, Mapping) and unpacks.get("video") is True):
        return False
    code = [config.get("doc_to_visual"), config.get("doc_to_messages")]
    words: set[str] = set()
    for function in (one for one in code if isinstance(one, FunctionType)):
        names, texts = _used(function.__code__)
        words |= {function.__name__, *names, *texts}
    return any("video" in word.lower() or "mp4" in word for word in words)


def _config(manager: TaskManager, task: str) -> dict[str, Any]:
    path = manager.task_index[task]["yaml_path"]
    if path == -1:
        return {}
    try:
        return load_yaml_config(path)
    except Exception as error:  # whatever a task's own module raises while it is imported
        raise UserError(
            f"{task}: its code cannot be loaded ({type(error).__name__}: {one_line(error)}); "
            "install or set what it asks for, or leave it out"
        ) from error


def _has_judge() -> bool:
    """Whether lmms-eval's own client of judges finds a key."""
    try:
        return get_server("openai").is_available()
    except (OpenAIError, ImportError, ValueError):
        return False


def _among(modules: set[str], packages: Sequence[str]) -> bool:
    return any(f"{module}.".startswith(f"{name}.") for module in modules for name in packages)


def _reached(functions: Sequence[FunctionType]) -> set[str]:
    """Modules of what a task's functions use, followed through functions of tasks' own modules."""
    todo, seen, found = list(functions), set(), set()
    while todo:
        function = todo.pop()
        if function in seen:
            continue
        seen.add(function)
        names, words = _used(function.__code__)
        if "openai" in words:  # the name of a judge that is given to an evaluator
            found.add("openai")
        for name in names & set(function.__globals__):
            value = function.__globals__[name]
            home = value.__name__ if isinstance(value, ModuleType) else _home(value)
            found.add(home)
            of_task = home == function.__module__ or home.startswith("lmms_eval.tasks.")
            if of_task and isinstance(value, FunctionType):
                todo.append(value)
    return found


def _home(value: object) -> str:
    module = getattr(value, "__module__", None)
    return module if isinstance(module, str) else type(value).__module__


def _used(code: CodeType) -> tuple[set[str], set[str]]:
    """Names and texts in a function, and in those that are defined in it."""
    names, words = set(code.co_names), {one for one in code.co_consts if isinstance(one, str)}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            more = _used(constant)
            names |= more[0]
            words |= more[1]
    return names, words
