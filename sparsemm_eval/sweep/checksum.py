"""Results files that say which answers they were made of, and show when they were changed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from loguru import logger

from sparsemm_eval.engine.answers import Answer
from sparsemm_eval.errors import UserError
from sparsemm_eval.paths import write_whole
from sparsemm_eval.report.provenance import OURS, content_hash, file_hash
from sparsemm_eval.stored import NoFile, NotUnderstood, checked, read_json, with_checksum

_HASHES = ("answers", "samples", "results")


class Broken(ValueError):
    """A results or samples file that is not as it was written."""


def answers_hash(answers: Mapping[str, Answer]) -> str:
    """SHA-256 of a cell's answers: their keys and texts."""
    pairs = sorted((key, answer.text) for key, answer in answers.items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def write_checksums(results: Path, samples: Path, answers: str) -> None:
    """Add to a results file which answers and samples file belong to it.

    Parameters
    ----------
    results, samples : Path
        As lmms-eval makes them.
    answers : str
        The hash of the answers that were scored, by `answers_hash`.
    """
    try:
        content = read_json(results)
    except NotUnderstood as error:
        raise UserError(f"{results}: what lmms-eval wrote here cannot be used: {error}") from error
    content[OURS] = with_checksum(
        {
            **content.get(OURS, {}),
            "answers": answers,
            "samples": file_hash(samples),
            "results": content_hash(content),
        }
    )
    write_whole(results, json.dumps(content, indent=1))


def scored_answers(results: Path, samples: Path) -> str | None:
    """The hash of the answers a results file was made of; None if it was never finished.

    Raises
    ------
    Broken
        If it, or its samples file, is not as its checksums say.
    """
    try:
        content = read_json(results)
    except NoFile:
        return None
    except NotUnderstood as error:
        raise Broken(f"{results}: not a readable results file ({error})") from error
    if not isinstance(content, dict):
        raise Broken(f"{results}: not a results file")
    checksums = content.get(OURS)
    if not isinstance(checksums, dict) or not any(name in checksums for name in _HASHES):
        return None  # its process was killed before they were written
    try:
        checked(checksums)
    except NotUnderstood as error:
        raise Broken(f"{results}: {error}") from error
    if checksums.get("results") != content_hash(content):
        raise Broken(f"{results}: this results file was changed")
    try:
        if checksums.get("samples") != file_hash(samples):
            raise Broken(f"{samples}: this samples file was cut off or changed")
    except NoFile:
        return None
    except NotUnderstood as error:
        raise Broken(f"{samples}: {error}") from error
    return checksums.get("answers")


def set_aside(results: Path, samples: Path, error: Broken) -> None:
    """Rename a broken results file and its samples file."""
    for path in (results, samples):
        if path.exists():
            os.replace(path, path.with_name(f"{path.name}.broken"))
    logger.warning(f"{error}; set aside as *.broken, the cell is scored again")
