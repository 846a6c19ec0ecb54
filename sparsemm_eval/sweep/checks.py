"""What a sweep needs, found before any model is loaded."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import datasets
from accelerate import PartialState
from datasets import load_dataset_builder
from huggingface_hub import constants as hub
from lmms_eval.api.task import _resolve_hf_datasets_cache_dir
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config

from sparsemm_eval.bench.machine import device_name
from sparsemm_eval.engine.cell import CHECKPOINT_SETTINGS
from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.tasks import load_task
from sparsemm_eval.errors import UserError
from sparsemm_eval.sweep.grid import ModelSpec

# An answer's row, its index entries and its line in a samples file; generous.
BYTES_AN_ANSWER = 6_000
# Data sets that a task's code loads by itself.
_MORE_DATA = {"gqa": [("lmms-lab-encoder/GQA", "testdev_balanced_images")]}


def check_space(out: Path, answers: int) -> None:
    """Refuse if the disk is too small for so many more answers and their results.

    Raises
    ------
    ValueError
        Naming both sizes.
    """
    needed, free = answers * BYTES_AN_ANSWER, free_space(out)
    if needed > free:
        raise UserError(
            f"{out}: {answers:,} answers and their results need about {readable_size(needed)}, and "
            f"{readable_size(free)} are free there: make room, or choose another folder"
        )


def free_space(out: Path) -> int:
    """Free bytes where a folder is or will be."""
    folder = out.resolve()
    while not folder.is_dir():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def readable_size(count: float) -> str:
    """So many bytes in words, such as 12.3 kB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def check_data(manager: TaskManager, tasks: Iterable[str]) -> None:
    """Refuse tasks whose data is not here, where nothing may be downloaded.

    Raises
    ------
    ValueError
        Naming tasks, the cache's folder and the command that fills it.
    """
    if not (datasets.config.HF_DATASETS_OFFLINE or hub.HF_HUB_OFFLINE):
        return
    missing = {
        (path, name): task
        for task in tasks
        for path, name in _data_of(manager, task)
        if not _is_cached(path, name)
    }
    if missing:
        loads = "; ".join(
            f"load_dataset({path!r})" if name is None else f"load_dataset({path!r}, {name!r})"
            for path, name in missing
        )
        raise UserError(
            f"the data of {', '.join(dict.fromkeys(missing.values()))} is not in HF_HOME="
            f"{hub.HF_HOME}, and the hub is off (HF_HUB_OFFLINE, HF_DATASETS_OFFLINE): point "
            "HF_HOME to the cache that holds it, or download it where there is a network: "
            f'python -c "from datasets import load_dataset; {loads}"'
        )


def check_models(models: Sequence[ModelSpec]) -> dict[str, Checkpoint]:
    """Find every model's checkpoint, and read all of it but the weights.

    Raises
    ------
    ValueError
        Naming the model, and where nothing may be downloaded the cache's folder and the command.
    """
    return {model.name: _checkpoint(model) for model in models}


def count_documents(manager: TaskManager, tasks: Iterable[str], samples: int | None) -> dict:
    """How many documents of each task a sweep is to answer; loads their data.

    Raises
    ------
    ValueError
        Naming a task whose data cannot be loaded.
    """
    counts = {}
    for task in tasks:
        count = len(load_task(task, manager).eval_docs)
        counts[task] = count if samples is None else min(count, samples)
    return counts


def _checkpoint(model: ModelSpec) -> Checkpoint:
    device = device_name(rank=PartialState().local_process_index)
    chosen = {name: model.settings[name] for name in CHECKPOINT_SETTINGS if name in model.settings}
    try:
        return Checkpoint(model.pretrained, **{"device_map": device} | chosen)
    except ValueError as error:
        words = f"model {model.name}: {error}"
        if hub.HF_HUB_OFFLINE and not Path(model.pretrained).exists():
            words += (
                f"; the hub is off (HF_HUB_OFFLINE) and HF_HOME={hub.HF_HOME} does not hold it: "
                f"`hf download {model.pretrained}` downloads it where there is a network"
            )
        raise UserError(words) from error


def _data_of(manager: TaskManager, task: str) -> list[tuple[str, str | None]]:
    """Data sets of a task on the hub or on disk; one that a function makes is none."""
    config = load_yaml_config(manager.task_index[task]["yaml_path"])
    path = config.get("dataset_path")
    if not isinstance(path, str) or (config.get("dataset_kwargs") or {}).get("load_from_disk"):
        return []
    return [(path, config.get("dataset_name")), *_MORE_DATA.get(task, ())]


def _is_cached(path: str, name: str | None) -> bool:
    try:
        load_dataset_builder(path, name, cache_dir=_resolve_hf_datasets_cache_dir())
    except (OSError, ValueError):
        return False
    return True
