"""``bench selection``: what a grid of cells costs a layer beside the scores that all cells share.

Scoring reads the prompt once for all cells. What the cells add to it is measured apart: selection
(ranks, counts, masks) and packing, whose floor is moving the kept tokens alone. Each method by
itself, scores and all, is told as a share of what the layer costs to read the prompt.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from sparsemm_eval.bench.layers import LAYERS, layer_shape
from sparsemm_eval.bench.machine import find_device, provenance_on, slug, threads, write_json
from sparsemm_eval.bench.models import DTYPES, grid_methods, heavy_scores, shape_config
from sparsemm_eval.bench.options import Benchmark, SelectionOptions, main
from sparsemm_eval.bench.timing import Measure, clocked, in_turn, quartiles
from sparsemm_eval.cache import RaggedKV
from sparsemm_eval.cache.ragged import Buffer
from sparsemm_eval.errors import check_choice, check_int
from sparsemm_eval.methods import (
    AHEAD,
    Checks,
    Method,
    ModelShape,
    PromptLayer,
    Sensitivity,
    keep_prompt,
    keep_rows,
    make_method,
    method_names,
    settings_of,
)

# Of a prompt in which each method is measured by itself; as many tokens of text stand behind the
# image as a question with its instruction has.
BUDGET, WINDOW, QUESTION = 256, 32, 64
# Reading takes long, and swings little.
_READINGS = 3
GRIDS = {"demo": False, "paper": True}  # budgets 256 to 12 and window 8; 2048 to 64 and window 32


@dataclass(frozen=True, eq=False)
class _Scored:
    """A scorer whose scores are known, so that what comes after them is timed alone."""

    scores: Tensor
    window: int
    least_budget: int = 1

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        return self.scores


def run(options: SelectionOptions, command: str) -> Benchmark:
    """Measure both grids in one layer and write ``OUT/selection-DEVICE.json``.

    Parameters
    ----------
    options : SelectionOptions
        What is measured; a prompt has more tokens than the largest budget, 2048.
    command : str
        That makes the file again.

    Raises
    ------
    UserError
        For settings that cannot be.
    """
    device = find_device(options.device)
    dtype = options.dtype or ("float16" if device.type == "cuda" else "float32")
    check_choice("shape", options.shape, LAYERS)
    check_choice("dtype", dtype, list(DTYPES))
    check_int("tokens", options.tokens, least=2049)
    check_int("repeats", options.repeats, least=1)
    model = layer_shape(options.shape)
    with threads(options.threads), torch.inference_mode():
        inputs = _inputs(model, options.tokens, device, DTYPES[dtype])
        whole = {
            **provenance_on(device, command),
            "shape": options.shape,
            "tokens": options.tokens,
            "dtype": dtype,
            "repeats": options.repeats,
            "grids": {
                name: _measure(inputs, model, large, options.repeats)
                for name, large in GRIDS.items()
            },
            "methods": _measure_methods(inputs, model, options),
        }
    path = options.out / f"selection-{slug(whole['hardware'])}.json"
    write_json(path, whole)
    return Benchmark(_text(whole), [path])


def _inputs(
    model: ModelShape, tokens: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Random query [1, Hq, n, D], key and value [1, H, n, D], laid out as models lay them."""
    generator = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(
            1, tokens, heads, model.head_dim, generator=generator, device=device, dtype=dtype
        ).transpose(1, 2)
        for heads in (model.query_heads, model.kv_heads, model.kv_heads)
    )
    return query, key, value


def _measure(
    inputs: tuple[Tensor, Tensor, Tensor], model: ModelShape, large: bool, repeats: int
) -> dict[str, Any]:
    query, key, value = inputs
    tokens, layer = key.shape[2], model.layers // 2
    methods = grid_methods(model, heavy_scores(model.layers, model.query_heads), large)
    scorer = next(method.scorer for method in methods if method.budget is not None)
    scored = _with_scores(methods, scorer(query[0], key[0]))
    whole = PromptLayer(layer, query[0], key[0])
    rows = keep_rows(scored, whole)
    most = sum(method.most_kept(layer, tokens) for method in methods)
    moved, token = _ready(key, most)
    buffer = Buffer()

    def select(cells: Sequence[Method]) -> Tensor:
        # As in a cache, which looks at all layers' checks at once.
        return keep_rows(cells, whole, Checks())

    work: dict[str, Callable[[], Any]] = {
        "scoring": lambda: scorer(query[0], key[0]),
        "selection": lambda: select(scored),
        "selection_cell_by_cell": lambda: [select((method,)) for method in scored],
        "packing": lambda: RaggedKV.pack(key, value, rows, most, buffer),
        "moving_kept_tokens": lambda: [
            torch.index_select(x, 0, token, out=moved) for x in _flat(key, value)
        ],
    }
    measures: dict[str, Measure] = {
        name: lambda do=do: [1e6 * clocked(do, key.device)[1]] for name, do in work.items()
    }
    times = in_turn(measures, repeats + 1, float("inf"))
    # The first round loads kernels and touches memory.
    spent = {name: quartiles([us / 1e3 for us in all_[1:]]) for name, all_ in times.items()}
    medians = {name: median for name, (_, median, _) in spent.items()}
    return {
        "cells": len(methods),
        "budgets": sorted({method.budget for method in methods if method.budget}, reverse=True),
        "window": scorer.window,
        "kept_tokens": int(rows.sum()),
        "milliseconds": {name: round(median, 3) for name, median in medians.items()},
        "quartiles": {
            name: [round(first, 3), round(third, 3)] for name, (first, _, third) in spent.items()
        },
        "share_of_scoring": {
            name: round(medians[name] / medians["scoring"], 3)
            for name in medians
            if name != "scoring"
        },
    }


def _measure_methods(
    inputs: tuple[Tensor, Tensor, Tensor], model: ModelShape, options: SelectionOptions
) -> dict[str, Any]:
    """Milliseconds of choosing one layer's tokens by each method, and of reading the layer."""
    query, key, value = (x[0] for x in inputs)
    tokens, shape = key.shape[1], replace(model, layers=1)
    decoder = _one_layer(options.shape).to(key.device, key.dtype)
    visual = torch.arange(tokens, device=key.device) < tokens - QUESTION
    turned = decoder.rotary_emb(key, torch.arange(tokens + AHEAD, device=key.device)[None])
    layer = PromptLayer(
        0, query, key, value, decoder.layers[0].self_attn.o_proj.weight, visual,
        torch.stack(turned)[:, 0],
    )  # fmt: skip
    hidden = torch.randn(1, tokens, decoder.config.hidden_size, device=key.device, dtype=key.dtype)
    files = {
        "head_scores": heavy_scores(1, model.query_heads), "sensitivity": Sensitivity.alike(shape)
    }  # fmt: skip
    work: dict[str, Callable[[], Any]] = {}
    for name in method_names():
        known = {setting.name for setting in settings_of(name)}
        if "budget" not in known:
            continue
        given = {"budget": BUDGET, "window": WINDOW, **files}
        method = make_method(name, shape, **{k: v for k, v in given.items() if k in known})
        work[name] = lambda method=method: keep_prompt([method], [layer])
    measures: dict[str, Measure] = {
        name: lambda do=do: [1e3 * clocked(do, key.device)[1]] for name, do in work.items()
    }
    times = in_turn(measures, options.repeats + 1, float("inf"))
    read = [
        1e3 * clocked(lambda: decoder(inputs_embeds=hidden, use_cache=False), key.device)[1]
        for _ in range(min(options.repeats, _READINGS) + 1)
    ]
    reading = quartiles(read[1:])[1]
    spent = {name: quartiles(all_[1:])[1] for name, all_ in times.items()}
    return {
        "budget": BUDGET,
        "reading_milliseconds": round(reading, 3),
        "milliseconds": {name: round(median, 3) for name, median in spent.items()},
        "share_of_reading": {name: round(median / reading, 4) for name, median in spent.items()},
    }


def _one_layer(shape: str) -> PreTrainedModel:
    """The language model of a shape, with one layer and next to no words."""
    config = shape_config(shape).get_text_config()
    config.num_hidden_layers, config.vocab_size, config.pad_token_id = 1, 8, None
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    return AutoModel.from_config(config, attn_implementation="sdpa").eval()


def _with_scores(methods: Sequence[Method], scores: Tensor) -> list[Method]:
    """The methods, which share their scorer's scores without computing them."""
    budgeted = next(method for method in methods if method.budget is not None)
    scored = _Scored(scores, budgeted.scorer.window)
    return [m if m.budget is None else replace(m, scorer=scored) for m in methods]


def _ready(key: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Memory for so many tokens, and which of the layer's to move: all of them, over and over."""
    (flat,) = _flat(key)
    return flat.new_zeros(count, key.shape[-1]), torch.arange(count, device=key.device) % len(flat)


def _flat(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2).reshape(-1, x.shape[-1]) for x in tensors]


def _text(whole: Mapping[str, Any]) -> str:
    """The measured milliseconds as lines to read."""
    lines = []
    for name, grid in whole["grids"].items():
        lines.append(f"{name}: {grid['cells']} cells of budgets {grid['budgets']}")
        for part, median in grid["milliseconds"].items():
            share = grid["share_of_scoring"].get(part, 1)
            lines.append(f"  {part.replace('_', ' '):24} {median:9.2f} ms {share:8.1%} of scoring")
    methods = whole["methods"]
    lines.append(
        f"each method by itself; reading a layer takes {methods['reading_milliseconds']:.1f} ms"
    )
    for name, share in methods["share_of_reading"].items():
        lines.append(f"  {name:24} {methods['milliseconds'][name]:9.2f} ms {share:8.2%} of reading")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main("selection"))
