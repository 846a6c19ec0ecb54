"""A grid: models x tasks x cells, from a YAML file, checked before anything is loaded."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from itertools import product
from typing import Annotated, Any

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from sparsemm_eval.choices import BACKENDS, CUDA_GRAPH, DTYPES
from sparsemm_eval.engine.cell import MASK_SETTINGS, budget_bytes, model_settings
from sparsemm_eval.errors import UserError, check_choice, check_int, short_repr
from sparsemm_eval.families import families, protocols
from sparsemm_eval.methods import (
    FROM_FILES,
    MASK_MODES,
    Method,
    ModelShape,
    Setting,
    check_method,
    make_method,
    method_names,
    method_settings,
    settings_of,
)
from sparsemm_eval.tiny import find_checkpoint

# Keys of a grid that are not their setting's own name.
_KEYS = {"budget": "budgets", "seed": "seeds"}
_SETTINGS = {key: setting for setting, key in _KEYS.items()}
_NO_MASK = "none"
_NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,99}", re.ASCII)
# Cells and jobs of a grid, entries of a list in it, and jobs of a task. More are a slip.
_MOST, _MOST_ENTRIES, MOST_SHARDS = 100_000, 1000, 1000


class _Misplaced(ValueError):
    """A value that cannot be, and where in the grid it stands."""

    def __init__(self, words: str, *place: str | int) -> None:
        super().__init__(words)
        self.place = place


def _check_name(value: Any) -> Any:
    if isinstance(value, str) and not _NAME.fullmatch(value):
        raise UserError(
            f"{short_repr(value)} names files: it must be letters, digits and any of . _ + -, at "
            "most 100"
        )
    return value


def _check_each(shards: Any) -> Any:
    """A number for all tasks, or one a task."""
    if isinstance(shards, Mapping):
        for task, number in shards.items():
            _at((task,), check_int, f"shards of {task}", number, 1, MOST_SHARDS)
    else:
        check_int("shards", shards, least=1, most=MOST_SHARDS)
    return shards


_Name = Annotated[str, BeforeValidator(_check_name)]
_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ModelSpec(BaseModel):
    """A model of a grid.

    Parameters
    ----------
    name : str
        Shown in tables, and the name of its folder.
    pretrained : str
        A folder, a hub repository, or ``embedded:qwen2vl``, ``embedded:llava_next``.
    settings : dict
        Model-side settings of ``--model_args``: those of `model_settings`.
    """

    model_config = _STRICT

    name: _Name
    pretrained: str = Field(min_length=1)
    settings: dict[str, Any] = {}

    def __hash__(self) -> int:
        return hash((self.name, self.pretrained))

    @field_validator("pretrained")
    @classmethod
    def _embedded(cls, pretrained: str) -> str:
        find_checkpoint(pretrained)  # refuses an embedded one that there is not
        return pretrained

    @field_validator("settings")
    @classmethod
    def _known(cls, settings: dict[str, Any]) -> dict[str, Any]:
        for name, value in settings.items():
            # How many samples may fail is asked of a run (--allow-failed), not of a model.
            known = [one for one in model_settings() if one != "allow_failed"]
            _at((name,), check_choice, "setting", name, known)
            if not isinstance(value, str | int | float):
                raise _Misplaced(f"{short_repr(value)}: it must be text or a number", name)
        choices = {
            "dtype": DTYPES, "backend": BACKENDS, "mask_mode": MASK_MODES, "cuda_graph": CUDA_GRAPH,
            "protocol": protocols(),
        }  # fmt: skip
        for name, value in settings.items():
            if name in choices:
                _at((name,), check_choice, name, value, choices[name])
            for family in families().values():
                if name in family.setting_names():
                    _at((name,), lambda of, given: of(**given), family, {name: value})
        return settings


@dataclass(frozen=True)
class Job:
    """All cells of one model on one task, or on one shard of its samples.

    Parameters
    ----------
    model : ModelSpec
        The model.
    task : str
        An lmms-eval task.
    shard, shards : int
        Documents shard, shard + shards, … of the task.
    """

    model: ModelSpec
    task: str
    shard: int = 0
    shards: int = 1

    @property
    def name(self) -> str:
        """One word, fit for a file name: no two jobs of a grid share it."""
        part = f"@{self.shard + 1}of{self.shards}" if self.shards > 1 else ""
        return f"{self.model.name}@{self.task}{part}"


class Grid(BaseModel):
    """Models, tasks, and the cells that all of them are measured in.

    Made by `sparsemm_eval.sweep.grid_file`. Every setting of its methods is a key, with one value
    or a list of them; ``budgets`` and ``seeds`` are those of budget and seed. Every combination of
    these values that a method can tell apart is a cell.

    Parameters
    ----------
    name : str
        The file's name without its suffix, unless the file says another.
    models : list of ModelSpec
        Their names differ.
    tasks : list of str
        lmms-eval tasks, not groups.
    methods : list of str
        Of `sparsemm_eval.methods.method_names`.
    axes : dict of str to list
        Values by setting of the methods, and of ``mask_heads`` and ``mask_mode``; in YAML each
        stands under its own key.
    samples : int or None
        The first so many of each task; None takes all.
    batch_size : int
        Samples read together; each is then decoded under all cells at once.
    shards : int or dict of str to int
        Into how many jobs a task's samples are split; by task, those not named into one.
    notes : list of str
        In what the runs differ from the paper's; ``--dry-run`` shows them.
    """

    model_config = _STRICT

    name: _Name
    models: list[ModelSpec] = Field(min_length=1, max_length=_MOST_ENTRIES)
    tasks: list[_Name] = Field(min_length=1, max_length=_MOST_ENTRIES)
    methods: list[str] = Field(min_length=1, max_length=_MOST_ENTRIES)
    axes: dict[str, list[Any]] = {}
    samples: int | None = Field(default=None, ge=1, le=10**9)
    batch_size: int = Field(default=1, ge=1, le=10**6)
    shards: Annotated[int | dict, BeforeValidator(_check_each)] = 1
    notes: list[str] = []

    def cells(self) -> list[dict[str, Any]]:
        """Settings of each cell of a model, method first.

        What a method does not read and what is its default anyway is left out, so that a cell is
        named as a plain run names it; cells that are equal appear once; fullkv comes first.
        """
        found: dict[tuple, dict[str, Any]] = {}
        for name, settings in self._combinations():
            made = dict(_make(name, settings).settings)
            # What is in a file is known with a checkpoint; here it is told apart by its name.
            made |= {file: settings[file] for file in FROM_FILES if file in settings}
            defaults = {setting.name: setting.default for setting in settings_of(name)}
            cell = {
                key: value
                for key, value in settings.items()
                if key in made and (key == "budget" or made[key] != defaults[key])
            }
            for mask in self._masks():
                found.setdefault(
                    (name, *made.items(), *mask.items()), {"method": name, **cell, **mask}
                )
        return list(found.values())

    def varied(self) -> list[str]:
        """Settings that differ from cell to cell, but for the budget."""
        return [name for name, axis in self.axes.items() if name != "budget" and len(axis) > 1]

    def jobs(self) -> list[Job]:
        """Every model on every shard of every task."""
        return [
            Job(model, task, shard, self.shards_of(task))
            for model in self.models
            for task in self.tasks
            for shard in range(self.shards_of(task))
        ]

    def shards_of(self, task: str) -> int:
        """Into how many jobs a task's samples are split."""
        return self.shards.get(task, 1) if isinstance(self.shards, dict) else self.shards

    def resolved(self) -> str:
        """YAML with every value filled in; an equal grid is read from it."""
        before, after = ("name", "models", "tasks", "methods"), ("samples", "batch_size", "shards")
        values = self.model_dump(include={*before, *after, "notes"})
        axes = {_KEYS.get(name, name): _short_axis(name, axis) for name, axis in self.axes.items()}
        ordered = {key: values[key] for key in before} | axes
        ordered |= {key: values[key] for key in (*after, "notes")}
        return yaml.safe_dump(ordered, sort_keys=False, width=100)

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, values: Any) -> Any:
        """Put every key that is a setting's into `axes`."""
        if not isinstance(values, dict):
            return values
        known = {_KEYS.get(name, name) for name in (*_all_settings(), *MASK_SETTINGS)}
        rest = {key: value for key, value in values.items() if key not in known}
        if "axes" in rest:
            raise _Misplaced("a grid has no such key; give each setting a key of its own", "axes")
        for key in rest:
            if key not in cls.model_fields:
                keys = [name for name in cls.model_fields if name != "axes"]
                known_keys = ", ".join((*keys, *sorted(known)))
                raise _Misplaced(
                    f"a grid has no such key; it knows {known_keys}, and what a plugin's methods "
                    "read (--plugin FILE)",
                    key,
                )
        given = {
            _SETTINGS.get(key, key): value if isinstance(value, list) else [value]
            for key, value in values.items()
            if key in known
        }
        for name, axis in given.items():
            if not axis:
                key = _KEYS.get(name, name)
                raise _Misplaced(f"{key}=[]: it is empty; give at least one", key)
        return rest | {"axes": given}

    @model_validator(mode="after")
    def _check(self) -> Grid:
        for name in self.methods:
            _at(("methods", self.methods.index(name)), check_method, name)
        self._check_count()
        self._check_twice("models", [model.name for model in self.models])
        for key in ("tasks", "methods"):
            self._check_twice(key, getattr(self, key))
        self._check_same_models()
        self._check_axes()
        if isinstance(self.shards, dict):
            for task in self.shards:
                _at(("shards", task), check_choice, "shards of task", task, self.tasks)
        self._check_cells()
        return self

    def _check_count(self) -> None:
        """Count cells and jobs before any is made."""
        cells = sum(
            math.prod(len(self.axes.get(one.name, [None])) for one in settings_of(name))
            for name in self.methods
        )
        cells *= math.prod(len(self.axes.get(name, [None])) for name in MASK_SETTINGS)
        cells *= len(self.models) * len(self.tasks)
        jobs = len(self.models) * sum(map(self.shards_of, self.tasks))
        for name, count in (("cells", cells), ("jobs", jobs)):
            if count > _MOST:
                raise _Misplaced(
                    f"its models, tasks and values make {count:,} {name}: a sweep has at most "
                    f"{_MOST:,}; leave some out"
                )

    def _check_axes(self) -> None:
        """Read every axis, and fill in those that are not given."""
        for name, axis in self.axes.items():
            key = _KEYS.get(name, name)
            if name in MASK_SETTINGS:
                self._check_masks(name, axis)
                continue
            readers = self._readers(name)
            if not readers:
                can = [other for other in method_names() if name in method_settings(other)]
                raise _Misplaced(
                    f"none of the methods here reads {name} ({', '.join(self.methods)}); leave "
                    f"it out or add one that does: {', '.join(can)}",
                    key,
                )
            kind = _setting(readers[0], name).kind
            axis[:] = [_of_kind(kind, value, key, place) for place, value in enumerate(axis)]
            self._check_twice(key, axis)
        if self._readers("budget") and "budget" not in self.axes:
            raise _Misplaced(
                f"budgets is missing: {self._readers('budget')[0]} needs mean tokens per KV head, "
                "such as [256, 128]"
            )
        for name in self.methods:
            for setting in settings_of(name):
                defaults = [
                    _setting(other, setting.name).default for other in self._readers(setting.name)
                ]
                if all(default == setting.default is not MISSING for default in defaults):
                    self.axes.setdefault(setting.name, [setting.default])

    def _check_twice(self, key: str, values: list) -> None:
        for value, count in Counter(values).items():
            if count > 1:
                second = values.index(value, values.index(value) + 1)
                raise _Misplaced(f"{value} stands there twice: name it once", key, second)

    def _check_same_models(self) -> None:
        for place, model in enumerate(self.models):
            for earlier in self.models[:place]:
                same = (earlier.pretrained, earlier.settings) == (model.pretrained, model.settings)
                if same:
                    raise _Misplaced(
                        f"{model.name} is {earlier.name} again, the same checkpoint with the same "
                        "settings: leave one out, or set them apart",
                        "models",
                        place,
                    )

    def _check_masks(self, name: str, axis: list[Any]) -> None:
        for place, value in enumerate(axis):
            if name == "mask_mode":
                _at((name, place), check_choice, f"{name}[{place}]", value, MASK_MODES)
            elif not isinstance(value, str):
                raise _Misplaced(f"{short_repr(value)}: it must be text, or none", name, place)
        self._check_twice(name, axis)
        for place, model in enumerate(self.models):
            if name in model.settings:
                raise _Misplaced(
                    f"it stands in the settings of model {model.name} too: name it once",
                    "models", place, "settings", name,
                )  # fmt: skip

    def _check_cells(self) -> None:
        """Make every cell's method, of which each checks its own settings."""
        for name, settings in self._combinations():
            try:
                _make(name, settings)
            except UserError as error:
                named = re.match(r"\w+", str(error))
                setting = named.group() if named else ""
                if setting not in settings:
                    raise
                place = self.axes[setting].index(settings[setting])
                raise _Misplaced(str(error), _KEYS.get(setting, setting), place) from error

    def _combinations(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Methods with all values of the settings that they read, fullkv first."""
        for name in sorted(self.methods, key=lambda name: name != "fullkv"):
            reads = [one.name for one in settings_of(name) if one.name in self.axes]
            for values in product(*(self.axes[setting] for setting in reads)):
                yield name, dict(zip(reads, values, strict=True))

    def _masks(self) -> Iterator[dict[str, str]]:
        """Settings of silenced heads that each method is measured with."""
        for heads in self.axes.get("mask_heads", [_NO_MASK]):
            if heads == _NO_MASK:
                yield {}
                continue
            for mode in self.axes.get("mask_mode", [MASK_MODES[0]]):
                yield {"mask_heads": heads} | ({} if mode == MASK_MODES[0] else {"mask_mode": mode})

    def _readers(self, setting: str) -> list[str]:
        return [name for name in self.methods if setting in method_settings(name)]


# No setting of a method depends on a model's shape.
_SHAPE = ModelShape(32, 32, 8)


def _make(name: str, settings: Mapping[str, Any]) -> Method:
    # Files are read with the checkpoint that they are of.
    known = method_settings(name)
    made = {file: kind.alike(_SHAPE) for file, kind in FROM_FILES.items() if file in known}
    if isinstance(budget := settings.get("budget"), str):
        made["budget"] = budget_bytes(budget)  # how many tokens that is, its checkpoint tells
    return make_method(name, _SHAPE, **{**settings, **made})


def _setting(method: str, name: str) -> Setting:
    return next(setting for setting in settings_of(method) if setting.name == name)


def _all_settings() -> list[str]:
    """Every setting of any method that a grid can give."""
    every = (setting.name for method in method_names() for setting in settings_of(method))
    return list(dict.fromkeys(every))


_TYPES = {
    "int": (int, "an integer"),
    "float": (int | float, "a number"),
    "budget": (int | float | str, "tokens, a share of the prompt such as 0.1, or bytes as 2MiB"),
}


def _of_kind(kind: str, value: Any, key: str, place: int) -> Any:
    """A value of an axis as its setting has it; what else it must be, its method checks."""
    known, words = _TYPES.get(kind, (str | int | float | bool, "text or a number"))
    wrong = not isinstance(value, known) or (kind in _TYPES and isinstance(value, bool))
    if wrong or (isinstance(value, float) and not math.isfinite(value)):
        raise _Misplaced(f"{key}[{place}]={short_repr(value)}: it must be {words}", key, place)
    return float(value) if kind == "float" else value


def _short_axis(name: str, axis: list[Any]) -> Any:
    """An axis as it is written: one value alone where its key does not say that it is a list."""
    return axis if name in _KEYS or len(axis) > 1 else axis[0]


def _at(place: tuple[str | int, ...], check: Any, *arguments: Any) -> None:
    try:
        check(*arguments)
    except ValueError as error:
        raise _Misplaced(str(error), *place) from error
