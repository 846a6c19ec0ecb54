"""Families by model_type: those of this folder, of plugins and of installed packages."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsemm_eval.errors import UserError
from sparsemm_eval.families.base import PLAIN, Family, VideoFamily
from sparsemm_eval.methods.plugins import is_ours, load_installed, note_registered, source_digest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_registry: dict[str, type[Family]] = {}
# The source that families from outside of this package had as they were imported.
_digests: dict[str, str | None] = {}


def register_family(family: type[Family]) -> type[Family]:
    """Make a family known, wherever a checkpoint is read; above the class, as a decorator.

    Parameters
    ----------
    family : type
        Frozen dataclass that derives from `Family` and states model_type and lmms_name.

    Raises
    ------
    UserError
        If the class is none such, or the model_type is another family's. The same class may be
        registered again, such as by a notebook's cell.
    """
    name = getattr(family, "__qualname__", repr(family))
    if not (isinstance(family, type) and issubclass(family, Family)):
        raise UserError(f"family {name} must be a class deriving from Family")
    # A class inherits the fields of a dataclass, but not its own annotations as fields.
    if "__dataclass_fields__" not in vars(family) or not family.__dataclass_params__.frozen:
        raise UserError(
            f"family {name} must be a frozen dataclass: put @dataclass(frozen=True) above it"
        )
    for stated in ("model_type", "lmms_name"):
        if not isinstance(getattr(family, stated, None), str):
            raise UserError(f"family {name} states no {stated}: put it into the class as text")
    known = _registry.get(family.model_type)
    if known is not None and _source(known) != _source(family):
        raise UserError(
            f"model_type {family.model_type!r} is registered already, by {_source(known)}; only "
            "one family can read its checkpoints"
        )
    _registry[family.model_type] = family
    note_registered(family.model_type)
    if not is_ours(family.__module__):
        _digests[family.model_type] = source_digest(family.__module__)
    return family


def families() -> dict[str, type[Family]]:
    """All families by model_type, those of installed packages among them."""
    load_installed()
    return dict(_registry)


def find_family(model_type: str) -> type[Family]:
    """The family of a model_type.

    Raises
    ------
    UserError
        If there is none.
    """
    known = families()
    if model_type not in known:
        raise UserError(
            f"no family is known for model_type={model_type}: it must be one of "
            f"{', '.join(sorted(known))}, or of a plugin that registers it (plugin=FILE)"
        )
    return known[model_type]


def family_of(config: PreTrainedConfig) -> type[Family]:
    """The family of a model, by its config; as `find_family`."""
    return find_family(config.model_type)


def family_settings() -> set[str]:
    """Settings of any family."""
    return {name for family in families().values() for name in family.setting_names()}


def video_families() -> list[str]:
    """The model_type of every family that reads videos, sorted."""
    return sorted(name for name, one in families().items() if issubclass(one, VideoFamily))


def protocols() -> list[str]:
    """Protocols of any family, plain first."""
    named = (name for family in families().values() for name in family.protocols)
    return list(dict.fromkeys((PLAIN, *named)))


def family_digest(family: type[Family]) -> str | None:
    """SHA-256 of the source of a family that is not this package's; None for one that is.

    Raises
    ------
    UserError
        If its source is in no file: answers of two versions of it could not be told apart.
    """
    if is_ours(family.__module__):
        return None
    digest = _digests[family.model_type]
    if digest is None:
        raise UserError(
            f"family {family.model_type} was registered outside a file, so that its answers cannot "
            "be told from those of another version of it: put it into a file and give plugin=FILE"
        )
    return digest


def _source(family: type[Family]) -> str:
    return f"{family.__module__}.{family.__qualname__}"
