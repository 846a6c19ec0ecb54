"""Methods by name: how each is registered, the settings it reads, and how one is made."""

import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

import numpy as np

from sparsemm_eval.errors import UserError, check_choice, check_int
from sparsemm_eval.methods.allocation import (
    Adaptive,
    Allocation,
    ByHeadScore,
    ByRandomScore,
    KeepAll,
    LayerAllocation,
    Pyramid,
    Uniform,
)
from sparsemm_eval.methods.head_scores import HeadScores, ModelShape
from sparsemm_eval.methods.method import Method
from sparsemm_eval.methods.plugins import is_ours, load_installed, note_registered, source_digest
from sparsemm_eval.methods.scoring import (
    ObservationWindow,
    Recency,
    SinksAndRecent,
)
from sparsemm_eval.methods.sensitivity import ByRules, BySensitivity, Sensitivity


@dataclass(frozen=True)
class Setting:
    """A setting of a method, as ``--model_args`` and a grid give it.

    Parameters
    ----------
    name : str
        Of the field, or ``budget`` or ``allocation``.
    kind : str
        Name of its type, such as ``float``.
    default : object
        `dataclasses.MISSING` for one that must be given.
    """

    name: str
    kind: str
    default: Any


@dataclass(frozen=True)
class _Entry:
    allocation: type
    scorer: type
    budgeted: bool
    label: str
    # Modules of its classes that are not this package's, and their source as it was imported.
    modules: tuple[str, ...]
    digests: tuple[str | None, ...]

    def parts(self) -> tuple[type, type]:
        return self.scorer, self.allocation

    def known(self) -> list[str]:
        if not self.budgeted:
            return []
        return sorted(setting.name for setting in self.settings())

    def settings(self) -> tuple[Setting, ...]:
        if not self.budgeted:
            return ()
        scorer, allocation = ([_setting(field) for field in fields(p)] for p in self.parts())
        rounding = Setting("allocation", "str", "paper")
        every = (Setting("budget", "int", MISSING), *scorer, rounding, *allocation)
        return tuple(dict.fromkeys(every))

    def source(self) -> str:
        """Where its classes are from: equal for classes that are defined anew by the same code."""
        return " and ".join(f"{part.__module__}.{part.__qualname__}" for part in self.parts())


# Settings that are read from files of a checkpoint.
FROM_FILES = {"head_scores": HeadScores, "sensitivity": Sensitivity}

_registry: dict[str, _Entry] = {}


def register_method(
    name: str,
    allocation: type,
    scorer: type = ObservationWindow,
    budgeted: bool = True,
    label: str = "",
) -> None:
    """Make ``make_method(name, …)`` and ``--model_args method=name`` known.

    Parameters
    ----------
    name : str
        Letters, digits, ``_``, ``-`` and ``.``; of no other method.
    allocation : type
        Frozen dataclass deriving from `Allocation` or `LayerAllocation`; its fields are settings.
    scorer : type
        Frozen dataclass with the face of `Scorer`; its fields are settings too.
    budgeted : bool
        False for a method that keeps everything.
    label : str
        How tables and figures show it; its name when empty.

    Raises
    ------
    UserError
        If the name is none or another method's, a class is no such dataclass, or both have a field
        of the same name. The same class may be registered again, such as by a notebook's cell.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"method {name!r}: a name is made of letters, digits, _, - and .")
    _check_part(name, "allocation", allocation, (Allocation, LayerAllocation))
    _check_part(name, "scorer", scorer)
    modules = sorted({part.__module__ for part in (allocation, scorer)})
    outside = tuple(module for module in modules if not is_ours(module))
    entry = _Entry(allocation, scorer, budgeted, label, outside, tuple(map(source_digest, outside)))
    names = ["budget", "allocation", *(field.name for p in entry.parts() for field in fields(p))]
    # One file may say both how heads score and what they are given.
    twice = sorted({name for name in names if names.count(name) > 1} - set(FROM_FILES))
    if name in _registry and _registry[name].source() != entry.source():
        raise UserError(
            f"method {name!r} is registered already, by {_registry[name].source()}; choose another "
            "name"
        )
    if twice:
        raise UserError(f"method {name!r} has two settings named {', '.join(twice)}")
    _registry[name] = entry
    note_registered(name)


def _check_part(name: str, role: str, part: object, bases: tuple[type, ...] = ()) -> None:
    """Raise UserError unless a class can be a method's allocation or scorer."""
    given = f"method {name!r}: {role} {getattr(part, '__qualname__', repr(part))}"
    if not isinstance(part, type) or (bases and not issubclass(part, bases)):
        derived = " deriving from Allocation or LayerAllocation" if bases else ""
        raise UserError(f"{given} must be a class{derived}")
    # A class inherits the fields of a dataclass, but not its own annotations as fields.
    if "__dataclass_fields__" not in vars(part) or not part.__dataclass_params__.frozen:
        raise UserError(f"{given} must be a frozen dataclass: put @dataclass(frozen=True) above it")
    known = {field.name for field in fields(part)}
    scores = "of_layer" if hasattr(part, "of_layer") else "__call__"
    wanted = () if bases else ("window", "least_budget", scores)
    missing = [want for want in wanted if want not in known and not hasattr(part, want)]
    missing += sorted(getattr(part, "__abstractmethods__", ()))
    if missing:
        raise UserError(f"{given} has no {' and no '.join(missing)}")


def shown_name(name: str) -> str:
    """How tables and figures show a method: its label, or its name; UserError if it is unknown."""
    check_method(name)
    return _registry[name].label or name


def method_names() -> list[str]:
    """Names of all registered methods, those of installed packages among them."""
    load_installed()
    return list(_registry)


def check_method(name: object) -> None:
    """Raise UserError unless there is a method of this name."""
    if name not in (known := method_names()):
        raise UserError(
            f"method={name!r}: it must be one of {', '.join(known)}, or of a plugin that registers "
            "it (--plugin FILE, or plugin=FILE in --model_args)"
        )


def settings_of(name: str) -> tuple[Setting, ...]:
    """Settings that a method reads, with their types and defaults, in the order of a cell's."""
    check_method(name)
    return _registry[name].settings()


def method_digest(name: str) -> str | None:
    """SHA-256 of the source of a method that is not this package's; None for one that is.

    Raises
    ------
    UserError
        If its source is in no file: answers of two versions of it could not be told apart.
    """
    check_method(name)
    entry = _registry[name]
    if None in entry.digests:
        raise UserError(
            f"method {name} was registered outside a file, so that its answers cannot be told "
            "from those of another version of it: put it into a file and give plugin=FILE"
        )
    return ":".join(entry.digests) or None


def method_settings(name: str) -> list[str]:
    """Settings that a method reads; UserError for an unknown method."""
    check_method(name)
    return _registry[name].known()


def canonical_settings(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Drop settings that only other methods read, so that one cell has one name.

    Raises
    ------
    UserError
        For a setting that no registered method knows.
    """
    known = method_settings(name)
    anywhere = {setting for other in _registry.values() for setting in other.known()}
    _refuse_unknown(name, settings, sorted(anywhere))
    return {setting: value for setting, value in settings.items() if setting in known}


def make_method(name: str, shape: ModelShape, **settings: Any) -> Method:
    """Make a method from its name and settings.

    Parameters
    ----------
    name : str
        One of `method_names`.
    shape : ModelShape
        The decoder it will run on.
    **settings
        ``budget`` (mean tokens per KV head, window included), ``allocation`` ("paper" or
        "exact") and the fields of the method's scorer and allocation: ``window``,
        ``kernel_size``, ``pooling``, ``group_reduction``, ``ratio``, ``floor``, ``seed``,
        ``head_scores``, ``sensitivity``, ``sinks``.

    Raises
    ------
    UserError
        Naming the setting, its value and what is allowed.
    """
    _refuse_unknown(name, settings, method_settings(name))
    # A budget out of an array or a data frame is a number like any other.
    settings = {k: v.item() if isinstance(v, np.generic) else v for k, v in settings.items()}
    entry = _registry[name]
    if not entry.budgeted:
        return Method(name, shape, None, entry.scorer(), entry.allocation())
    if settings.get("budget") is None:
        raise UserError(f"method {name} needs a budget: the mean tokens kept per KV head")
    rounding = settings.get("allocation", "paper")
    check_choice("allocation", rounding, ("paper", "exact"))
    scorer = _build(name, entry.scorer, settings)
    allocation = _build(name, entry.allocation, settings)
    allocation.check(shape)
    budget, least = settings["budget"], max(scorer.least_budget, scorer.window + 1)
    if isinstance(budget, int) and budget < least:
        reserved = f"window={scorer.window}" if scorer.window else repr(scorer)
        raise UserError(
            f"budget={budget} is too small for {reserved}: {name} needs at least {least}"
        )
    check_int("budget", budget, least=least)
    exact = rounding == "exact" and allocation.rounds
    return Method(name, shape, budget, scorer, allocation, exact)


def _setting(field: Field) -> Setting:
    kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
    default = field.default
    if default is MISSING and field.default_factory is not MISSING:
        default = field.default_factory()
    return Setting(field.name, kind, default)


def _build(name: str, part: type, settings: Mapping[str, Any]) -> Any:
    given = {field.name: settings[field.name] for field in fields(part) if field.name in settings}
    for field in fields(part):
        required = field.default is MISSING and field.default_factory is MISSING
        if required and given.get(field.name) is None:
            raise UserError(f"method {name} needs {field.name}")
    if not is_ours(part.__module__):  # ours check their own
        given = {
            field.name: _of_kind(_setting(field), given[field.name])
            for field in fields(part)
            if field.name in given
        }
    made = part(**given)
    try:
        hash(made)  # prompts of one length share its counts, and methods with equal scorers theirs
    except TypeError as error:
        raise UserError(
            f"method {name}: {part.__qualname__} cannot be hashed ({error}); its settings must be "
            "numbers, text or tuples of them"
        ) from error
    return made


_KINDS = {
    "int": (int, "an integer"),
    "float": (int | float, "a number"),
    "str": (str, "text"),
    "bool": (bool, "true or false"),
}


def _of_kind(setting: Setting, value: Any) -> Any:
    """A value of a setting's own type: 1 and 1.0 are one cell."""
    if setting.kind not in _KINDS:
        return value
    kind, words = _KINDS[setting.kind]
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise UserError(f"{setting.name}={value!r}: it must be {words}")
    return float(value) if setting.kind == "float" else value


def _refuse_unknown(name: str, settings: Mapping[str, Any], known: list[str]) -> None:
    unknown = sorted(set(settings) - set(known))
    if unknown:
        allowed = ", ".join(known) or "no settings"
        raise UserError(f"{unknown[0]}={settings[unknown[0]]!r}: method {name} knows {allowed}")


register_method("fullkv", KeepAll, scorer=Recency, budgeted=False)
register_method("sparsemm", ByHeadScore)
register_method("snapkv", Uniform)
register_method("pyramidkv", Pyramid)
register_method("adakv", Adaptive)
register_method("random", ByRandomScore)
register_method("local", Uniform, scorer=Recency)
register_method("streaming", Uniform, scorer=SinksAndRecent)
register_method("sensitivity", BySensitivity, scorer=ByRules)
