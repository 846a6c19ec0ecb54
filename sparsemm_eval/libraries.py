"""The libraries this package stands on: whether they work together, and whether they are locked.

Torch, transformers and lmms-eval change every few weeks, and lmms-eval brings about 170 packages
along. What breaks is found here in seconds, before a run, and named with the command that mends it.
"""

from __future__ import annotations

import io
import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.markers import Marker
from packaging.utils import canonicalize_name

from sparsemm_eval.errors import UserError, one_line
from sparsemm_eval.paths import cache_folder, checkout, lock_file, write_whole

# What lmms-eval is asked to do: one question, answered by a model that always says yes.
_TASK = """\
task: sparsemm_smoke
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  max_new_tokens: 1
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
_QUESTION = {"question": "Does it work?", "answer": "yes"}


@dataclass(frozen=True)
class Difference:
    """A package that is not as the lock has it.

    Parameters
    ----------
    package : str
        Its name.
    locked : str
        The version that was tested.
    installed : str or None
        The version that is here; None if there is none.
    """

    package: str
    locked: str
    installed: str | None

    def __str__(self) -> str:
        return f"{self.package} {self.installed or 'missing'}, locked {self.locked}"


def locked_versions() -> dict[str, str]:
    """Version of each package that the lock installs on this Python and platform, by its name."""
    versions = {}
    for line in lock_file().read_text(encoding="utf-8").splitlines():
        if "==" not in line or line[0] in " #":
            continue
        requirement, _, marker = line.rstrip("\\ ").partition(" ; ")
        if not marker or Marker(marker).evaluate():
            name, _, version = requirement.partition("==")
            versions[canonicalize_name(name)] = version
    return versions


def differences() -> list[Difference]:
    """Packages of the lock that are here in another version or not at all."""
    here: dict[str, str] = {}
    for package in metadata.distributions():
        # The first on the path is the one that is imported.
        if name := package.metadata["Name"]:
            here.setdefault(canonicalize_name(name), package.version)
    return [
        Difference(name, version, here.get(name))
        for name, version in locked_versions().items()
        # A build of torch for another device has the same version with a suffix: 2.14.1+cpu.
        if (here.get(name) or "").partition("+")[0] != version
    ]


def check_libraries() -> None:
    """Import what runs stand on and put one question through lmms-eval.

    Raises
    ------
    UserError
        Naming the package at fault, its version, the version known to work, and what mends it.
    OSError
        If a cache cannot be written: no package is at fault then.
    """
    for package, check in _CHECKS.items():
        try:
            check()
        except Exception as error:
            # A library that cannot be loaded is an OSError too, but of no number.
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise UserError(_sentence(package, error)) from error


def mending(package: str | None = None) -> str:
    """The command that puts a locked version back; without a package, all of them."""
    root = checkout()
    if root is not None and Path(sys.prefix) == root / ".venv":
        return "./run_eval.sh setup"
    locked = locked_versions()
    if package in locked:
        return f"{sys.executable} -m pip install {package}=={locked[package]}"
    return f"{sys.executable} -m pip install --require-hashes --no-deps -r {lock_file()}"


def _torch() -> None:
    import torch

    if torch.ones(2, 2).matmul(torch.ones(2, 2)).sum() != 8:
        raise RuntimeError("torch multiplies matrices wrongly")


def _transformers() -> None:
    from transformers import AttentionInterface, AutoModelForImageTextToText, AutoProcessor
    from transformers.cache_utils import Cache, CacheLayerMixin
    from transformers.masking_utils import AttentionMaskInterface

    for registry in (AttentionInterface, AttentionMaskInterface):
        if not callable(registry.register):
            raise TypeError(f"{registry.__name__}.register cannot be called")
    for name in (AutoModelForImageTextToText, AutoProcessor, Cache, CacheLayerMixin):
        if not isinstance(name, type):
            raise TypeError(f"{name!r} is no class")


def _lmms_eval() -> None:
    """Score one question from start to end, as a run does, on a model that answers yes."""
    # Quiet from its first import on: lmms-eval names its optional packages that are missing.
    logging.getLogger("lmms-eval").setLevel(logging.ERROR)
    from lmms_eval.api.model import lmms
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager
    from loguru import logger
    from torch.distributed import is_torchelastic_launched

    if is_torchelastic_launched():
        return  # several ranks would score the question together, each with a part of it

    class Yes(lmms):
        is_simple = True

        def generate_until(self, requests: list) -> list[str]:
            return ["yes"] * len(requests)

        def loglikelihood(self, requests: list) -> list:
            raise NotImplementedError

        def generate_until_multi_round(self, requests: list) -> list:
            raise NotImplementedError

    logger.disable("lmms_eval")
    try:
        with redirect_stderr(io.StringIO()):  # of progress bars
            results = simple_evaluate(
                model=Yes(),
                tasks=["sparsemm_smoke"],
                task_manager=TaskManager(
                    "ERROR", include_path=str(_smoke_folder()), include_defaults=False
                ),
                bootstrap_iters=0,
                log_samples=False,
                verbosity="ERROR",
            )
    finally:
        logger.enable("lmms_eval")
    if results["results"]["sparsemm_smoke"]["exact_match,none"] != 1:
        raise RuntimeError("lmms-eval scored a right answer as wrong")


def _plugin() -> None:
    from lmms_eval.models import get_model

    for name in ("sparsemm", "llava_sparsemm", "qwen2vl_sparsemm"):
        get_model(name)


_CHECKS: dict[str, Callable[[], None]] = {
    "torch": _torch,
    "transformers": _transformers,
    "lmms-eval": _lmms_eval,
    "sparsemm-eval": _plugin,
}


def _smoke_folder() -> Path:
    """Folder of the task; written only where it differs, as its data is cached by its date."""
    folder = cache_folder() / "smoke"
    data = folder / "data.jsonl"
    texts = {data: json.dumps(_QUESTION) + "\n", folder / "smoke.yaml": _TASK.format(data=data)}
    for path, text in texts.items():
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_whole(path, text)
    return folder


def _sentence(package: str, error: Exception) -> str:
    version = installed_version(package)
    if version is None:
        return f"{package} is not installed: {mending(package)}"
    words = f"{package} {version} does not work here ({one_line(error)})"
    off = {d.package: d for d in differences()}
    culprit = next((name for name in _suspects(error) if name in off), None)
    if culprit is not None:
        at_fault = off[culprit]
        return (
            f"{words}: {culprit} {at_fault.installed or '(missing)'} is installed, "
            f"{at_fault.locked} is known to work: {mending(culprit)}"
        )
    if off:
        shown = "; ".join(map(str, list(off.values())[:3]))
        more = f" and {len(off) - 3} more" if len(off) > 3 else ""
        return f"{words}: not as tested are {shown}{more}: {mending()}"
    return f"{words}, though all packages are as locked: please report this, with `--debug`"


def _suspects(error: BaseException | None) -> Iterator[str]:
    """Packages that an error speaks of, the likeliest first: what was missing, then who raised."""
    modules = metadata.packages_distributions()
    while error is not None:
        if isinstance(error, ImportError) and error.name:
            yield from map(canonicalize_name, modules.get(error.name.partition(".")[0], ()))
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            _, found, rest = frame.filename.rpartition("site-packages/")
            if found:
                yield from map(canonicalize_name, modules.get(rest.partition("/")[0], ()))
        error = error.__cause__ or error.__context__


def installed_version(package: str) -> str | None:
    """The version of a package that is installed here; None if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
