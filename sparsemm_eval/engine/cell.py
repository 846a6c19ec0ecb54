"""A cell: one method on one checkpoint, and the settings of ``--model_args`` that say which."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sparsemm_eval.errors import UserError, check_choice, short_repr
from sparsemm_eval.families import PLAIN, Family, family_settings
from sparsemm_eval.methods import (
    FROM_FILES,
    MASK_MODES,
    HeadMask,
    Method,
    canonical_settings,
    make_method,
    method_names,
    method_settings,
    read_head_mask,
)

if TYPE_CHECKING:
    from sparsemm_eval.engine.checkpoint import Checkpoint

CHECKPOINT_SETTINGS = ("revision", "dtype", "device_map", "attn_implementation")
RUN_SETTINGS = ("backend", "cuda_graph", "truncated_images", "allow_failed")
MASK_SETTINGS = ("mask_heads", "mask_mode")
_BYTES = re.compile(r"(\d{1,9}(?:\.\d{1,6})?)([KMG])iB")


@dataclass(frozen=True)
class Cell:
    """Whose answers they are, beside the checkpoint and the family's settings: a value.

    Parameters
    ----------
    method : Method
        What is kept of a prompt.
    mask : HeadMask, optional
        Query heads that are silenced; cells of equal masks read a prompt alike.
    """

    method: Method
    mask: HeadMask | None = None

    def __str__(self) -> str:
        return str(self.method) if self.mask is None else f"{self.method} {self.mask}"


def budget_bytes(budget: str) -> int:
    """Bytes of a budget that names them, such as ``2MiB``.

    Raises
    ------
    UserError
        If it does not.
    """
    found = _BYTES.fullmatch(budget)
    if found is None:
        raise UserError(
            f"budget={short_repr(budget)}: it must be an integer, mean tokens per KV head; a share "
            "of each prompt's tokens, such as 0.1; or bytes of keys and values a prompt, such as "
            "512KiB, 2MiB or 1.5GiB"
        )
    return int(float(found[1]) * 2 ** {"K": 10, "M": 20, "G": 30}[found[2]])


def _budget_tokens(budget: str, checkpoint: Checkpoint) -> int:
    """Tokens per KV head whose keys and values are at most so many bytes, in the model's dtype."""
    size = budget_bytes(budget)
    shape = checkpoint.shape
    tokens = size // (2 * shape.layers * shape.kv_heads * shape.head_dim * checkpoint.number_bytes)
    if tokens < 1:
        raise UserError(f"budget={budget} is less than one token per KV head of {shape}")
    return tokens


def make_cell(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Cell:
    """Make a cell from its settings; those that its method does not read are dropped.

    Parameters
    ----------
    checkpoint : Checkpoint
        Whose shape and head scores it is for.
    settings : mapping
        ``method``, what it reads, its budget perhaps as `budget_bytes` takes it, ``head_scores``
        and ``sensitivity`` as names of files,
        ``mask_heads`` and ``mask_mode``.

    Raises
    ------
    UserError
        For a setting that cannot be, or head scores that are not there.
    """
    settings = dict(settings)
    name = settings.pop("method", None)
    if name is None:
        raise UserError(f"method is missing: give one of {', '.join(method_names())}")
    heads, mode = settings.pop("mask_heads", None), settings.pop("mask_mode", MASK_MODES[0])
    check_choice("mask_mode", mode, MASK_MODES)
    path = settings.get("head_scores")
    chosen = canonical_settings(name, settings)
    if isinstance(budget := chosen.get("budget"), str):
        chosen["budget"] = _budget_tokens(budget, checkpoint)
    readers = {"head_scores": checkpoint.head_scores, "sensitivity": checkpoint.sensitivity}
    for setting in readers.keys() & set(method_settings(name)):
        chosen[setting] = readers[setting](settings.get(setting))
    method = make_method(name, checkpoint.shape, **chosen)
    if heads is None:
        return Cell(method)
    read_scores = lambda: checkpoint.head_scores(path)  # noqa: E731
    return Cell(method, read_head_mask(heads, mode, checkpoint.shape, read_scores))


def make_family(family: type[Family], settings: Mapping[str, Any]) -> Family:
    """A family with its settings out of all that were given, and those of ``protocol``.

    Raises
    ------
    UserError
        For a setting or a protocol that only other families have, or a value that cannot be.
    """
    own = set(family.setting_names())
    given = {name: value for name, value in settings.items() if name in family_settings()}
    if foreign := sorted(set(given) - own):
        raise UserError(
            f"{foreign[0]}={given[foreign[0]]!r}: a {family.model_type} checkpoint has no such "
            f"setting; it has {', '.join(sorted(own))}"
        )
    return family.under(settings.get("protocol", PLAIN), **given)


def model_settings() -> list[str]:
    """Settings of a model that no method reads: checkpoint, run, mask, families' own."""
    return [
        *CHECKPOINT_SETTINGS, *RUN_SETTINGS, *FROM_FILES, *MASK_SETTINGS, "protocol",
        *sorted(family_settings()),
    ]  # fmt: skip


def refuse_unknown(settings: Mapping[str, Any], also: set[str], whose: str) -> None:
    """Raise UserError for a setting that no method, no family and nothing of ``also`` reads."""
    methods = {setting for name in method_names() for setting in method_settings(name)}
    known = also | set(model_settings()) | methods | {"method"}
    if unknown := sorted(set(settings) - known):
        name = unknown[0]
        raise UserError(
            f"{name}={settings[name]!r}: {whose} has no such setting; it knows "
            f"{', '.join(sorted(known))}"
        )
