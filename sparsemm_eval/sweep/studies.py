"""The grids of the demo and of the masking study, refused before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from sparsemm_eval.errors import UserError, check_choice, check_int
from sparsemm_eval.methods import MASK_MODES
from sparsemm_eval.sweep.grid import Grid
from sparsemm_eval.sweep.grid_file import grids_folder, make_grid
from sparsemm_eval.tiny import EMBEDDED

BUDGETS = (64, 32, 16)
SAMPLES = 200
SHARES = (0.01, 0.02, 0.05, 0.1)
SEEDS = 3


def demo_grid(
    samples: int,
    batch_size: int,
    budgets: Sequence[int] = BUDGETS,
    tasks: Sequence[str] = (),
    models: Sequence[str] = (),
    allocation: str = "paper",
    more_methods: Sequence[str] = (),
) -> Grid:
    """The demo's grid, tasks/grids/demo.yaml, or a part of it.

    Parameters
    ----------
    samples : int
        Of each task, 1 to 200.
    batch_size : int
        Samples that are read together; each is then decoded under all methods at once.
    budgets : sequence of int
        Mean tokens per KV head.
    tasks : sequence of str
        Miniature tasks; default all.
    models : sequence of str
        Embedded checkpoints by name, with or without ``embedded:``; default all.
    allocation : {"paper", "exact"}
        How budgets are spent: as published, or to the token.
    more_methods : sequence of str
        Methods of the user's own, beside those of the paper.

    Raises
    ------
    UserError
        For settings that cannot be.
    """
    values = yaml.safe_load((grids_folder() / "demo.yaml").read_text(encoding="utf-8"))
    check_demo_samples("samples", samples, least=1)
    for task in tasks:
        check_choice("task", task, values["tasks"])
    models = [name.removeprefix(EMBEDDED) for name in models]
    for name in models:
        check_choice("model", name, [model["name"] for model in values["models"]])
    values |= {
        "models": [model for model in values["models"] if not models or model["name"] in models],
        "tasks": list(tasks) or values["tasks"],
        "methods": [*values["methods"], *more_methods],
        "budgets": list(budgets),
        "allocation": allocation,
        "samples": samples,
        "batch_size": batch_size,
    }
    return make_grid({"name": "demo", **values})


def check_demo_samples(name: str, count: int, least: int) -> None:
    """Raise UserError unless a miniature benchmark has so many samples."""
    if not least <= count <= SAMPLES:
        raise UserError(
            f"{name}={count}: a miniature benchmark has {SAMPLES} samples; give {least} to "
            f"{SAMPLES}"
        )


@dataclass(frozen=True)
class MaskingStudy:
    """What a masking study measures.

    Parameters
    ----------
    grid : Grid
        One model on full KV, with and without heads.
    studied : mapping
        By value of ``mask_heads``: "visual" or "random", share, and seed of the draw, if any.
    """

    grid: Grid
    studied: Mapping[str, tuple[str, float, int | None]]


def masking_study(
    pretrained: str,
    tasks: Sequence[str] = ("docvqa_mini",),
    shares: Sequence[float] = SHARES,
    seeds: int = SEEDS,
    modes: Sequence[str] = ("query",),
    samples: int = 100,
    batch_size: int = 8,
    settings: Mapping[str, Any] | None = None,
) -> MaskingStudy:
    """A study of what is lost without visual heads, and without as many random others.

    Parameters
    ----------
    pretrained : str
        A model with head scores.
    tasks : sequence of str
        Known to lmms-eval, or in `tasks/`.
    shares : sequence of float
        Shares of all query heads, each between 0 and 1; at least one head is silenced.
    seeds : int
        Random draws a share.
    modes : sequence of {"query", "output"}
        How heads are silenced; see `sparsemm_eval.methods.HeadMask`.
    samples : int
        The first so many of each task.
    batch_size : int
        Samples that are read and decoded together.
    settings : mapping, optional
        Of the model, as a grid has them: dtype, device_map, head_scores, ….

    Raises
    ------
    UserError
        For settings that cannot be.
    """
    for name, value in (("seeds", seeds), ("samples", samples)):
        check_int(name, value, least=1)
    for name, given in (("tasks", tasks), ("shares", shares), ("modes", modes)):
        if not given:
            raise UserError(f"{name} is empty: give at least one")
    for mode in modes:
        check_choice("mode", mode, MASK_MODES)
    studied = {
        f"{kind}:{share:g}" + ("" if seed is None else f":{seed}"): (kind, share, seed)
        for share in shares
        for kind, seed in (("visual", None), *(("random", seed) for seed in range(seeds)))
    }
    model = {"name": "model", "pretrained": pretrained, "settings": dict(settings or {})}
    grid = make_grid(
        {
            "name": "mask",
            "models": [model],
            "tasks": list(tasks),
            "methods": ["fullkv"],
            "mask_heads": ["none", *studied],
            "mask_mode": list(dict.fromkeys(modes)),
            "samples": samples,
            "batch_size": batch_size,
        }
    )
    return MaskingStudy(grid, studied)
