"""The budget of each KV head: of a checkpoint, or of a score file alone; no weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from sparsemm_eval.errors import UserError, check_int, one_line
from sparsemm_eval.methods import (
    HeadScores,
    ModelShape,
    canonical_settings,
    make_method,
    method_settings,
    tokens_per_head,
)
from sparsemm_eval.models.checkpoint import Checkpoint
from sparsemm_eval.report.budget_maps import HeadBudgets, budget_maps
from sparsemm_eval.report.figure_files import DrawnFiles
from sparsemm_eval.report.names import method_label
from sparsemm_eval.report.styles import check_formats, save
from sparsemm_eval.tiny import default_checkpoint, embedded_checkpoints

_EMBEDDED = "embedded:"


def draw_budgets(
    out: Path,
    formats: Sequence[str],
    model: str | None,
    head_scores: Path | None,
    kv_heads: int | None,
    methods: Sequence[str],
    budgets: Sequence[int],
    tokens: int,
    settings: Mapping[str, Any],
) -> DrawnFiles:
    """Draw the budget of each KV head as ``OUT/budget_per_head``, a panel a method and budget.

    Parameters
    ----------
    out : Path
        The folder.
    formats : sequence of str
        Of "svg" and "png".
    model, head_scores, kv_heads, methods, budgets, tokens, settings
        As of `head_budgets`.

    Raises
    ------
    FileNotFoundError, ValueError
        As `head_budgets`, and for a format that is none.
    """
    check_formats(formats)
    name, panels = head_budgets(model, head_scores, kv_heads, methods, budgets, tokens, settings)
    figure = budget_maps(panels, f"{name}, prompt of {tokens} tokens")
    return DrawnFiles((*save(figure, out / "budget_per_head", formats),))


def head_budgets(
    model: str | None,
    head_scores: Path | None,
    kv_heads: int | None,
    methods: Sequence[str],
    budgets: Sequence[int],
    tokens: int,
    settings: Mapping[str, Any],
) -> tuple[str, list[HeadBudgets]]:
    """What each method keeps of a prompt at each budget, and what the model is called.

    Parameters
    ----------
    model : str or None
        A folder, a hub repository (only its config is read) or ``embedded:qwen2vl``. None: as many
        layers and heads as the score file has, or the embedded default.
    head_scores : Path or None
        Score file; None: the checkpoint's own.
    kv_heads : int or None
        KV heads a layer, where there is a score file and no model; None: as many as query heads.
    methods : sequence of str
        As registered.
    budgets : sequence of int
        Mean tokens per KV head, window included.
    tokens : int
        Of the prompt.
    settings : mapping
        Others of the methods, such as ratio; each method takes those it reads.

    Raises
    ------
    FileNotFoundError, ValueError
        In one sentence, if the model, a method, a budget or a setting cannot be.
    """
    if kv_heads is not None and (model is not None or head_scores is None):
        raise UserError(
            f"kv_heads={kv_heads}: it goes with a score file alone; a model states its own"
        )
    known = {name: _read_by(name, settings) for name in methods}
    name, shape, scores = _subject(model, head_scores, kv_heads)
    wanted = any("head_scores" in method_settings(method) for method in methods)
    if wanted and scores is None:
        scores = _own_scores(model, shape)
    found = []
    for method, of_method in known.items():
        given = {"head_scores": scores} if "head_scores" in method_settings(method) else {}
        for budget in budgets if "budget" in method_settings(method) else [None]:
            nominal = {} if budget is None else {"budget": budget}
            made = make_method(method, shape, **nominal, **of_method, **given)
            kept = tokens_per_head(made, tokens)
            label = method_label(method, of_method)
            found.append(HeadBudgets(label, tokens if budget is None else budget, kept))
    return name, found


def _read_by(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    for name in ("budget", "head_scores"):
        if name in settings:
            raise UserError(f"settings: {name} has an option of its own")
    return canonical_settings(method, settings)


def _subject(
    model: str | None, head_scores: Path | None, kv_heads: int | None
) -> tuple[str, ModelShape, HeadScores | None]:
    if model is None and head_scores is not None:
        scores = HeadScores.read(head_scores)
        layers, query_heads = scores.values.shape
        if kv_heads is not None:
            check_int("kv_heads", kv_heads, least=1)
        return head_scores.name, ModelShape(layers, query_heads, kv_heads or query_heads), scores
    source = _source(model)
    shape = _shape(source)
    scores = None if head_scores is None else HeadScores.read(head_scores, shape)
    return Path(source).name if model is None else model.removeprefix(_EMBEDDED), shape, scores


def _source(model: str | None) -> str:
    """Folder or hub repository."""
    if model is None:
        return str(default_checkpoint())
    if not model.startswith(_EMBEDDED):
        return model
    known = {f"{_EMBEDDED}{name}": str(path) for name, path in embedded_checkpoints().items()}
    if model not in known:
        raise UserError(f"model={model}: it must be one of {', '.join(known)}")
    return known[model]


def _shape(source: str) -> ModelShape:
    """From the config alone: a hub repository's weights need not be here."""
    try:
        text = AutoConfig.from_pretrained(source).get_text_config()
        kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        return ModelShape(text.num_hidden_layers, text.num_attention_heads, kv_heads)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"model={source}: its config.json cannot be read ({one_line(error)}); give a folder, "
            "a repository that is reachable or cached, or a score file alone"
        ) from error


def _own_scores(model: str | None, shape: ModelShape) -> HeadScores:
    source = _source(model)
    if not Path(source).is_dir():
        raise UserError(f"model={model} is a hub repository: give its head_scores=FILE, too")
    return Checkpoint(source).head_scores()
