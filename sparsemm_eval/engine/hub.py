"""Where a checkpoint lies: inside the package, on this disk, or in the hub's cache."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from sparsemm_eval.errors import UserError, one_line
from sparsemm_eval.tiny import find_checkpoint

# What of a repository is downloaded, and all that decides a checkpoint's answers.
FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"]


def find_folder(pretrained: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint; one on the hub is downloaded once, and found offline afterwards.

    Parameters
    ----------
    pretrained : str
        A folder, a repository on the hub, or ``embedded:NAME``.
    revision : str, optional
        Of a hub repository.

    Raises
    ------
    UserError
        If it is none of these.
    """
    pretrained = find_checkpoint(pretrained)
    if Path(pretrained).is_dir():
        return Path(pretrained).resolve()
    # lmms-eval makes a number of a revision such as 2.
    revision = None if revision is None else str(revision)
    # The hub first, then what is cached: not every huggingface_hub does the second by itself.
    causes: list[Exception] = []
    for cached in (False, True):
        try:
            found = snapshot_download(
                pretrained, revision=revision, allow_patterns=FILES, local_files_only=cached
            )
            return Path(found)
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            causes.append(error)
    raise UserError(
        f"pretrained={pretrained} is no folder and cannot be had from the hub "
        f"({one_line(causes[0])}): give a folder, or a repository that is reachable or cached"
    ) from causes[0]
