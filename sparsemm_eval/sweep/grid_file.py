"""Grids out of YAML files; what cannot be is one sentence with file, line, key and value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sparsemm_eval.errors import UserError, one_line, short_repr
from sparsemm_eval.paths import tasks_folder
from sparsemm_eval.stored import NotUnderstood, checked_text, read_text
from sparsemm_eval.sweep.grid import Grid, ModelSpec

_MOST_BYTES = 1 << 20
# Characters of one value of a grid, and values in it.
_LONGEST = 10_000
_MOST_VALUES = 500_000


def read_grid(name_or_path: str | Path) -> Grid:
    """Read a grid of `tasks/grids/` by its name, or any other by its path.

    Raises
    ------
    ValueError
        In one sentence that names file, line, key and value, if it cannot be.
    """
    path = Path(name_or_path)
    if not path.is_file():
        path = grids_folder() / f"{name_or_path}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in grids_folder().glob("*.yaml")))
        raise UserError(
            f"grid {name_or_path}: there is no such file and no grid of that name; give the path "
            f"of a YAML file, or one of {known}"
        )
    try:
        text = checked_text(read_text(path, _MOST_BYTES))
    except NotUnderstood as error:
        raise UserError(f"{path}: {error}") from error
    return parse_grid(text, path)


def parse_grid(text: str, path: Path) -> Grid:
    """Read a grid from YAML; ``path`` is named in errors and gives the grid its name.

    Raises
    ------
    ValueError
        As `read_grid`.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        twice = _repeated_key(root)
        if twice is None:
            _check_bounds(root, path)
        values = None if twice else yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: it is no YAML ({one_line(error.problem)})") from error
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: it is no YAML ({one_line(error)})") from error
    if twice is not None:
        line = twice.start_mark.line + 1
        raise UserError(f"{path}, line {line}: {twice.value} stands there twice: name it once")
    if not isinstance(values, dict):
        raise UserError(f"{path}: it must be a mapping with keys such as models, tasks and methods")
    try:
        return Grid.model_validate({"name": path.stem, **values})
    except ValidationError as error:
        place, words = _sentence(error)
        raise UserError(f"{path}, line {_line(root, place)}: {words}") from None


def make_grid(values: Mapping[str, Any]) -> Grid:
    """Make a grid of values as `parse_grid` reads them from YAML.

    Raises
    ------
    UserError
        As `parse_grid`, without file and line.
    """
    try:
        return Grid.model_validate(values)
    except ValidationError as error:
        raise UserError(_sentence(error)[1]) from None


def grids_folder() -> Path:
    """Where the grids lie that have a name."""
    return tasks_folder() / "grids"


def _check_bounds(root: yaml.Node | None, path: Path) -> None:
    """Refuse what a few bytes of YAML can make endless, before any value is made of them."""
    if root is not None and (size := _size(root, path, {})) > _MOST_VALUES:
        count = "without end" if size == math.inf else f"{size:,} values"
        raise UserError(
            f"{path}: its anchors and aliases, written out, are {count}; a grid has at most "
            f"{_MOST_VALUES:,}"
        )


def _size(node: yaml.Node, path: Path, known: dict[int, float]) -> float:
    """How many values a node holds where what is named twice counts twice."""
    if isinstance(node, yaml.ScalarNode):
        if len(node.value) > _LONGEST:
            raise UserError(
                f"{path}, line {node.start_mark.line + 1}: {short_repr(node.value)} has "
                f"{len(node.value):,} characters; a value of a grid has at most {_LONGEST:,}"
            )
        return 1
    if id(node) not in known:
        known[id(node)] = math.inf  # as long as it is not known: it may hold itself
        parts = node.value
        inner = (
            [one for pair in parts for one in pair] if isinstance(node, yaml.MappingNode) else parts
        )
        known[id(node)] = 1 + sum(_size(one, path, known) for one in inner)
    return known[id(node)]


def _repeated_key(root: yaml.Node | None) -> yaml.Node | None:
    """The first key that stands twice in one mapping: YAML would take the last without a word."""
    todo, seen = [root], set()
    while todo:
        node = todo.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            names = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in names:
                    return key
                names |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
                todo += [key, value]
        elif isinstance(node, yaml.SequenceNode):
            todo += node.value
    return None


_NEEDED = {
    "models": "models with name and pretrained", "tasks": "lmms-eval tasks",
    "methods": "methods, such as [fullkv, sparsemm]", "name": "it a name for tables",
    "pretrained": "a folder, a hub repository or embedded:qwen2vl",
}  # fmt: skip
_KINDS = {
    "int_type": "an integer", "int_from_float": "an integer", "float_type": "a number",
    "string_type": "text", "list_type": "a list", "dict_type": "a mapping",
    "model_type": "a mapping with name, pretrained and settings", "finite_number": "a number",
}  # fmt: skip


def _sentence(error: ValidationError) -> tuple[tuple[str | int, ...], str]:
    """One of pydantic's errors: its place in the grid; key, value and what is allowed."""
    # A key that is misspelt is missing too: the former says more.
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    cause = first.get("ctx", {}).get("error")
    place = (*first["loc"], *getattr(cause, "place", ()))
    kind, value = first["type"], first["input"]
    if kind == "missing":
        words = f"{_spell(place)} is missing; give {_NEEDED[place[-1]]}"
    elif kind == "extra_forbidden":
        known = ModelSpec if place[0] == "models" else Grid
        owner = "a model" if place[0] == "models" else "a grid"
        keys = ", ".join(known.model_fields)
        words = f"{_spell(place)}: {owner} has no such key; it knows {keys}"
    elif cause is not None:
        words = _placed(str(cause), place)
    else:
        if kind == "too_short":
            needed = "it is empty; give at least one"
        elif kind == "too_long":
            needed = f"it must have at most {first['ctx']['max_length']:,} entries"
        elif kind == "greater_than_equal":
            needed = f"it must be at least {first['ctx']['ge']}"
        elif kind == "less_than_equal":
            needed = f"it must be at most {first['ctx']['le']:,}"
        elif kind in _KINDS:
            needed = f"it must be {_KINDS[kind]}"
        else:
            needed = one_line(first["msg"])
        words = f"{_spell(place)}={short_repr(value)}: {needed}"
    more = error.error_count() - 1
    rest = f" (and {more} more)" if more else ""
    return place, f"{words}{rest}"


def _placed(words: str, place: tuple[str | int, ...]) -> str:
    """An error's words behind its place, unless they state that themselves."""
    if not place or words.startswith(f"{_spell(place)}="):
        return words
    if words.startswith(f"{place[-1]}="):
        return f"{_spell(place[:-1])}{'.' * (len(place) > 1)}{words}"
    return f"{_spell(place)}: {words}"


def _spell(place: tuple[str | int, ...]) -> str:
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return "".join(parts).removeprefix(".")


def _line(node: yaml.Node, place: tuple[str | int, ...]) -> int:
    """Line of a key or an item, or of the last thing on the way to it that is there."""
    line = node.start_mark.line + 1
    for part in place:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == str(part)]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            found = [(item, item) for item in node.value[part : part + 1]]
        else:
            found = []
        if not found:
            break
        key, node = found[0]
        line = key.start_mark.line + 1
    return line
