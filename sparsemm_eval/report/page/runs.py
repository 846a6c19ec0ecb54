"""Every results file, and what made it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd


@dataclass(frozen=True)
class Maker:
    """What made one or more results files.

    Parameters
    ----------
    command : str
        Empty where no file says it.
    facts : tuple
        (name, value) of commit, Python, versions and hardware.
    """

    command: str
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Run:
    """One results file; files and makers are numbered from 1."""

    number: int
    path: str
    tool: str
    settings: str
    date: str
    commit: str
    changed: bool
    made_by: int


@dataclass(frozen=True)
class Runs:
    """All results files, and their makers, each once."""

    rows: tuple[Run, ...]
    makers: tuple[Maker, ...]


def runs(files: pd.DataFrame) -> Runs:
    """Number results files as the leaderboard does.

    Parameters
    ----------
    files : DataFrame
        Of `sparsemm_eval.report.results.load`.
    """
    makers: dict[Maker, int] = {}
    rows = []
    for number, file in files.iterrows():
        maker = Maker(_text(file["command"]), tuple(_facts(file)))
        place = makers.setdefault(maker, len(makers) + 1)
        rows.append(
            Run(
                number=int(number) + 1,
                path=str(file["path"]),
                tool=_text(file["kind"]),
                settings=_text(file["model_args"]).replace(",", ", "),
                date=_text(file["date"]),
                commit=_text(file["commit"]),
                changed=bool(file["changed"]),
                made_by=place,
            )
        )
    return Runs(tuple(rows), tuple(makers))


def _facts(file: pd.Series) -> list[tuple[str, str]]:
    facts = [(name, _text(file[name])) for name in ("commit", "python")]
    for name in ("versions", "hardware"):
        if isinstance(file[name], Mapping):
            facts += [(key, _text(value)) for key, value in file[name].items()]
    facts.append(("schema", _text(file["schema"])))
    return [(name.replace("_", " "), value) for name, value in facts if value]


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_text(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return "" if value is None or pd.isna(value) else str(value)
