"""Methods by name: how each is registered, the settings it reads, and how one is made.

Names joined by + are one method: each brings what it has of its own, see `register_method`.
"""

import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields, replace
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
from sparsemm_eval.methods.cake import ByDispersion, MeanAndVariance
from sparsemm_eval.methods.criticalkv import TwoStages
from sparsemm_eval.methods.expected import ExpectedAttention
from sparsemm_eval.methods.head_scores import HeadScores, ModelShape
from sparsemm_eval.methods.keydiff import UnlikeKeys
from sparsemm_eval.methods.knorm import SmallKeys
from sparsemm_eval.methods.lava import BestOfLayer, ByEntropy, ByValue
from sparsemm_eval.methods.layers import LayerShare
from sparsemm_eval.methods.method import Method
from sparsemm_eval.methods.mixkv import Mixed
from sparsemm_eval.methods.picks import Pick
from sparsemm_eval.methods.plugins import is_ours, load_installed, note_registered, source_digest
from sparsemm_eval.methods.scoring import (
    ObservationWindow,
    Recency,
    SinksAndRecent,
)
from sparsemm_eval.methods.sensitivity import ByRules, BySensitivity, Sensitivity
from sparsemm_eval.methods.tgvkv import ByVision, TextToVision
from sparsemm_eval.methods.tova import LastQuery
from sparsemm_eval.methods.vlcache import ByDensity, PostVision, RecentAndBest

QUESTION = ("seen", "hidden")


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
    scorer: type
    allocation: type
    layers: type | None
    picks: type | None
    budgeted: bool
    label: str
    # Modules of its classes that are not this package's, and their source as it was imported.
    modules: tuple[str, ...]
    digests: tuple[str | None, ...]

    def parts(self) -> tuple[type, ...]:
        parts = (self.scorer, self.allocation, self.layers, self.picks)
        return tuple(part for part in parts if part is not None)

    def own(self) -> dict[str, type]:
        """Parts that it brings to a method that is made of several."""
        scorer = {} if self.scorer is ObservationWindow else {"scorer": self.scorer}
        picks = {} if self.picks is None else {"picks": self.picks}
        layers = {} if self.layers is None else {"layers": self.layers}
        if self.allocation is Uniform:
            return scorer | layers | picks
        # What gives the heads of a layer alike leaves it to others how they share.
        if self.allocation is Pyramid:
            return scorer | {"layers": self.allocation} | picks
        return scorer | layers | {"allocation": self.allocation} | picks

    def known(self) -> list[str]:
        if not self.budgeted:
            return []
        return sorted(setting.name for setting in self.settings())

    def settings(self) -> tuple[Setting, ...]:
        if not self.budgeted:
            return ()
        scorer, *others = ([_setting(field) for field in fields(part)] for part in self.parts())
        every = (
            Setting("budget", "budget", MISSING),
            *scorer,
            Setting("allocation", "str", "paper"),
            *(setting for part in others for setting in part),
            Setting("question", "str", QUESTION[0]),
        )
        return tuple(dict.fromkeys(every))

    def source(self) -> str:
        """Where its classes are from: equal for classes that are defined anew by the same code."""
        return " and ".join(f"{part.__module__}.{part.__qualname__}" for part in self.parts())


# Settings that are read from files of a checkpoint.
FROM_FILES = {"head_scores": HeadScores, "sensitivity": Sensitivity}

_registry: dict[str, _Entry] = {}


def register_method(
    name: str,
    allocation: type = Uniform,
    scorer: type = ObservationWindow,
    budgeted: bool = True,
    label: str = "",
    layers: type | None = None,
    picks: type | None = None,
) -> None:
    """Make ``make_method(name, …)`` and ``--model_args method=name`` known.

    Methods whose names are joined by +, such as ``mixkv+adakv``, are one that has all parts that
    each has of its own: a scorer, a pick, rules that share the budget among layers and heads.

    Parameters
    ----------
    name : str
        Letters, digits, ``_``, ``-`` and ``.``; of no other method.
    allocation : type
        Frozen dataclass deriving from `Allocation` or `LayerAllocation`; its fields are settings.
    scorer : type
        Frozen dataclass with the face of `Scorer`; its fields are settings too.
    layers : type, optional
        Frozen dataclass deriving from `LayerShare`; the allocation is then `Uniform` or derives
        from `LayerAllocation`.
    picks : type, optional
        Frozen dataclass deriving from `Pick`.
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
    if layers is not None:
        _check_part(name, "layers", layers, (LayerShare,))
        if allocation is not Uniform and not issubclass(allocation, LayerAllocation):
            raise UserError(
                f"method {name!r}: layers {layers.__qualname__} and allocation "
                f"{allocation.__qualname__} both share the budget among layers; take an allocation "
                "that derives from LayerAllocation"
            )
    if picks is not None:
        _check_part(name, "picks", picks, (Pick,))
    entry = _entry_of(scorer, allocation, layers, picks, budgeted, label)
    # One file may say both how heads score and what they are given.
    if twice := _twice(entry):
        raise UserError(f"method {name!r} has two settings named {', '.join(twice)}")
    if name in _registry and _registry[name].source() != entry.source():
        raise UserError(
            f"method {name!r} is registered already, by {_registry[name].source()}; choose another "
            "name"
        )
    _registry[name] = entry
    note_registered(name)


def _entry_of(
    scorer: type,
    allocation: type,
    layers: type | None,
    picks: type | None,
    budgeted: bool,
    label: str,
) -> _Entry:
    parts = [part for part in (scorer, allocation, layers, picks) if part is not None]
    outside = tuple(sorted({one.__module__ for one in parts if not is_ours(one.__module__)}))
    digests = tuple(map(source_digest, outside))
    return _Entry(scorer, allocation, layers, picks, budgeted, label, outside, digests)


def _twice(entry: _Entry) -> list[str]:
    """Settings that two parts have, unless they are read from a file, which may say both."""
    names = ["budget", "allocation", "question"]
    names += [field.name for part in entry.parts() for field in fields(part)]
    return sorted({name for name in names if names.count(name) > 1} - set(FROM_FILES))


# Words for parts, in the order in which names are joined.
_ROLES = {
    "picks": "choose a head's tokens",
    "scorer": "score tokens",
    "layers": "share the budget among layers",
    "allocation": "share the budget among heads",
}


def _find(name: object) -> _Entry:
    """What a name is of, or names joined by +.

    Raises
    ------
    UserError
        If a name is no method's, or what they bring does not fit together.
    """
    known = method_names()
    joined = name.split("+") if isinstance(name, str) else [name]
    for one in joined:
        if one not in known:
            of = f" in {name!r}" if len(joined) > 1 else ""
            raise UserError(
                f"method={one!r}{of}: it must be one of {', '.join(known)}, or several of them "
                "joined by +, or of a plugin that registers it (--plugin FILE, or plugin=FILE in "
                "--model_args)"
            )
    return _registry[name] if len(joined) == 1 else _joined(name, joined)


def _joined(name: str, names: list[str]) -> _Entry:
    parts: dict[str, type] = {}
    brought: dict[str, str] = {}
    for one in names:
        entry = _registry[one]
        own = entry.own()
        if not own or not entry.budgeted:
            raise UserError(
                f"method={name}: {one} brings nothing to a method that is made of several; leave "
                "it out"
            )
        for role, part in own.items():
            if role in parts:
                raise UserError(
                    f"method={name}: {brought[role]} and {one} both {_ROLES[role]}; take one of "
                    "them"
                )
            parts[role], brought[role] = part, one
    shares, allocation = parts.get("layers"), parts.get("allocation", Uniform)
    if shares is not None and issubclass(allocation, Allocation) and allocation is not Uniform:
        raise UserError(
            f"method={name}: {brought['layers']} and {brought['allocation']} both share the budget "
            "among layers; take one of them"
        )
    places = [min(list(_ROLES).index(role) for role in _registry[one].own()) for one in names]
    ordered = [one for _, one in sorted(zip(places, names, strict=True), key=lambda at: at[0])]
    if ordered != names:
        raise UserError(f"method={name}: it is written {'+'.join(ordered)}")
    scorer, picks = parts.get("scorer", ObservationWindow), parts.get("picks")
    if allocation is Uniform and shares is Pyramid:
        allocation, shares = shares, None
    entry = _entry_of(scorer, allocation, shares, picks, True, "")
    if twice := _twice(entry):
        raise UserError(f"method={name}: two of its parts have a setting {', '.join(twice)}")
    return entry


def _check_part(name: str, role: str, part: object, bases: tuple[type, ...] = ()) -> None:
    """Raise UserError unless a class can be a method's allocation or scorer."""
    given = f"method {name!r}: {role} {getattr(part, '__qualname__', repr(part))}"
    if not isinstance(part, type) or (bases and not issubclass(part, bases)):
        names = " or ".join(base.__name__ for base in bases)
        derived = f" deriving from {names}" if bases else ""
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
    return _find(name).label or name


def method_names() -> list[str]:
    """Names of all registered methods, those of installed packages among them."""
    load_installed()
    return list(_registry)


def check_method(name: object) -> None:
    """Raise UserError unless there is a method of this name, or of these joined by +."""
    _find(name)


def settings_of(name: str) -> tuple[Setting, ...]:
    """Settings that a method reads, with their types and defaults, in the order of a cell's."""
    return _find(name).settings()


def method_digest(name: str) -> str | None:
    """SHA-256 of the source of a method that is not this package's; None for one that is.

    Raises
    ------
    UserError
        If its source is in no file: answers of two versions of it could not be told apart.
    """
    entry = _find(name)
    if None in entry.digests:
        raise UserError(
            f"method {name} was registered outside a file, so that its answers cannot be told "
            "from those of another version of it: put it into a file and give plugin=FILE"
        )
    return ":".join(entry.digests) or None


def method_settings(name: str) -> list[str]:
    """Settings that a method reads; UserError for an unknown method."""
    return _find(name).known()


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
        ``budget`` (mean tokens per KV head, window included; below 1 a share of each prompt's),
        ``allocation`` ("paper" or "exact"), ``question`` ("seen" or "hidden") and the fields of
        the method's parts, such as ``window``, ``kernel_size``, ``ratio``, ``head_scores``.

    Raises
    ------
    UserError
        Naming the setting, its value and what is allowed.
    """
    _refuse_unknown(name, settings, method_settings(name))
    # A budget out of an array or a data frame is a number like any other.
    settings = {k: v.item() if isinstance(v, np.generic) else v for k, v in settings.items()}
    entry = _find(name)
    if not entry.budgeted:
        return Method(name, shape, None, entry.scorer(), entry.allocation())
    budget = settings.get("budget")
    if budget is None:
        raise UserError(f"method {name} needs a budget: the mean tokens kept per KV head")
    rounding, question = settings.get("allocation", "paper"), settings.get("question", QUESTION[0])
    check_choice("allocation", rounding, ("paper", "exact"))
    check_choice("question", question, QUESTION)
    scorer, allocation, layers, picks = (
        None if part is None else _build(name, part, settings)
        for part in (entry.scorer, entry.allocation, entry.layers, entry.picks)
    )
    for part in (allocation, layers):
        if isinstance(part, Allocation | LayerAllocation):
            part.check(shape)
    method = Method(name, shape, budget, scorer, allocation, False, layers, picks, question)
    if isinstance(budget, int) and budget < method.least:
        reserved = f"window={scorer.window}" if scorer.window else repr(scorer)
        raise UserError(
            f"budget={budget} is too small for {reserved}: {name} needs at least {method.least}"
        )
    check_budget(budget)
    return replace(method, exact=rounding == "exact" and method.rounds)


def check_budget(budget: object) -> None:
    """Raise UserError unless a budget is whole tokens, or the share of a prompt's.

    It is an integer of at least 1, or a number between 0 and 1.
    """
    if isinstance(budget, float) and 0 < budget < 1:
        return
    if isinstance(budget, float):
        raise UserError(
            f"budget={budget!r}: it must be an integer, mean tokens per KV head, or a share of "
            "each prompt's tokens between 0 and 1, such as 0.1"
        )
    check_int("budget", budget, least=1)


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
register_method("mixkv", scorer=Mixed)
register_method("criticalkv", picks=TwoStages)
register_method("lava", BestOfLayer, scorer=ByValue, layers=ByEntropy)
register_method("vlcache", scorer=PostVision, layers=ByDensity, picks=RecentAndBest)
register_method("cake", scorer=MeanAndVariance, layers=ByDispersion)
register_method("keydiff", scorer=UnlikeKeys)
register_method("tova", scorer=LastQuery)
register_method("knorm", scorer=SmallKeys)
register_method("expected", scorer=ExpectedAttention)
register_method("tgvkv", scorer=TextToVision, layers=ByVision)
