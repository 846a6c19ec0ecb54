"""The tasks of a sweep: where they are found, and what they need beyond a score by sample."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from lmms_eval.llm_judge import get_server
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config
from openai import OpenAIError

from sparsemm_eval.engine.evaluate import task_manager
from sparsemm_eval.engine.requirements import check_tasks
from sparsemm_eval.errors import UserError, one_line

# What a metric's code reaches when it asks another model, or runs a java program.
_JUDGES = ("lmms_eval.llm_judge", "lmms_eval.verifiers.openai", "openai", "anthropic", "requests")
_JAVA = ("pycocoevalcap.tokenizer", "pycocoevalcap.meteor", "pycocoevalcap.spice")


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
        config = _config(manager, task)
    except UserError as error:
        return str(error)
    kind = config.get("output_type") or "generate_until"
    if kind != "generate_until":
        return (
            f"{task} is of output_type {kind}, and a compressed cache is measured by what is "
            "generated on it: choose tasks of output_type generate_until"
        )
    metrics = [metric for metric in config.get("metric_list") or () if isinstance(metric, Mapping)]
    names = [str(metric.get("metric")) for metric in metrics]
    if names and all("submission" in name for name in names):
        return (
            f"{task} has no score here, only a file to submit elsewhere ({', '.join(names)}): "
            "choose a split whose answers are public"
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
