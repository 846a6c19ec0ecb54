"""One measurement after another: a model, its prompts, methods and engines."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from sparsemm_eval.bench.bounds import kept_tokens, kv_bytes, token_bytes, weight_bytes
from sparsemm_eval.bench.decode import (
    Timed,
    decode_concatenated,
    decode_ours,
    decode_stock,
)
from sparsemm_eval.bench.efficiency_options import EfficiencyOptions
from sparsemm_eval.bench.host import host_share
from sparsemm_eval.bench.models import (
    PAPER_NAMES,
    SHAPES,
    endless,
    heavy_scores,
    large_model,
    random_prompts,
)
from sparsemm_eval.errors import UserError, one_line
from sparsemm_eval.methods import HeadScores, Method, ModelShape, make_method, method_settings
from sparsemm_eval.tiny import embedded_checkpoints

WARM_UP = 10  # steps whose times are left out; a graph is captured in the first
_IDENTITY = ("model", "method", "budget", "input_tokens", "engine", "rows", "dtype", "steps")

Record = dict[str, Any]


class Subject:
    """A model that is measured, with its methods.

    Parameters
    ----------
    name : str
        One of `SHAPES`, an embedded model, or a checkpoint's folder or repository.
    device : torch.device
        Where it lies; "meta" for its sizes alone.
    dtype : torch.dtype
        Of its weights.
    window : int
        Of the methods.
    """

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype, window: int) -> None:
        self.name, self.window = PAPER_NAMES.get(name, name), window
        scores: HeadScores | None = None
        if name in SHAPES:
            self.model = large_model(name, device, dtype)
        else:
            folder = embedded_checkpoints().get(name, name)
            loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
            self.model = endless(loaded.to(device))
            found = Path(folder) / "head_scores.json"
            scores = HeadScores.read(found) if found.is_file() else None
        self.shape = ModelShape.from_config(self.model.config)
        self.scores = scores or heavy_scores(self.shape.layers, self.shape.query_heads)

    def method(self, name: str, budget: int | None) -> Method:
        """A method for the model."""
        known = method_settings(name)
        given = {"budget": budget, "window": self.window, "head_scores": self.scores}
        return make_method(name, self.shape, **{k: v for k, v in given.items() if k in known})

    def prompt(self, tokens: int) -> dict[str, Tensor]:
        """Random text."""
        ids = random_prompts(self.model, 1, tokens)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def check_models(names: Sequence[str]) -> None:
    """Raise ValueError for a name that is no shape, no embedded model and no checkpoint's."""
    known = (*SHAPES, *embedded_checkpoints())
    for name in names:
        if name not in known and "/" not in name and not Path(name).is_dir():
            raise UserError(
                f"models={name!r}: it must be one of {', '.join(known)}, or a checkpoint's folder "
                "or hub repository"
            )


@dataclass
class Measuring:
    """A run that is under way.

    Parameters
    ----------
    options : EfficiencyOptions
        With its defaults written out.
    device : torch.device
        What is measured.
    bandwidth : float
        Of its memory, bytes a second.
    found : mapping
        Records of an earlier run, by `identity`: they are not measured again.
    keep : callable
        Given all records so far, each time there is a new one.
    records : list
        What was found and measured.
    failures : list of str
        A sentence each.
    """

    options: EfficiencyOptions
    device: torch.device
    bandwidth: float
    found: dict[tuple, Record]
    keep: Callable[[list[Record]], None]
    records: list[Record] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def measure_model(self, name: str) -> None:
        """Every measurement of one model, those that were found left out."""
        # Its weights are made once the first measurement is wanted.
        subject = self._subject(name, torch.device("meta") if name in SHAPES else self.device)
        built: Subject | None = None
        for tokens in self.options.numbers("lengths"):
            wanted: list[tuple[Record, str, list[Method]]] = []
            asked = asked_of(subject, self.options, tokens)
            for engine in self.options.words("engines"):
                for method, rows in _of_engine(engine, asked):
                    record = self._named(subject, engine, method, rows, tokens)
                    known = self.found.get(identity(record))
                    if known is None or (self.options.profile and "host_share" not in known):
                        wanted.append((record, engine, [method] * rows))
                    else:
                        self.records.append(known)
            if wanted:
                built = built or self._subject(name, self.device)
                self._measure(built, wanted, tokens)

    def _subject(self, name: str, device: torch.device) -> Subject:
        return Subject(name, device, getattr(torch, self.options.dtype), self.options.window)

    def _named(
        self, subject: Subject, engine: str, method: Method, rows: int, tokens: int
    ) -> Record:
        return {
            "model": subject.name,
            "method": method.name,
            "budget": method.budget,
            "input_tokens": tokens,
            "engine": None if engine == "ours" else engine,
            "rows": rows,
            "dtype": self.options.dtype,
            "steps": self.options.steps,
        }

    def _measure(
        self, subject: Subject, wanted: list[tuple[Record, str, list[Method]]], tokens: int
    ) -> None:
        """In turn, as often as asked, so that what disturbs hits all alike; kept one by one."""
        seen: list[list[Timed]] = [[] for _ in wanted]
        for left in reversed(range(self.options.repeats)):
            for (record, engine, methods), timed in zip(wanted, seen, strict=True):
                if "note" in record:
                    continue
                print(_words(record), file=sys.stderr, flush=True)
                steps = self.options.steps + WARM_UP
                try:
                    timed.append(_run(subject, engine, methods, tokens, steps))
                except (RuntimeError, ValueError, NotImplementedError) as error:
                    # What does not fit, or is not there on this device: others are measured still.
                    note = f"failed: {one_line(error)}"
                    if not isinstance(error, torch.OutOfMemoryError):
                        self.failures.append(f"{_words(record)}: {note}")
                    record |= {"decode_ms_per_token": None, "note": note}
                else:
                    if left:
                        continue
                    record |= _record(subject.model, methods, tokens, timed, self.bandwidth)
                    if self.options.profile:
                        record["host_share"] = host_share(
                            partial(_run, subject, engine, methods, tokens),
                            self.device,
                            record["decode_ms_per_token"],
                        )
                self.records.append(record)
                self.keep(self.records)


def asked_of(subject: Subject, options: EfficiencyOptions, tokens: int) -> list[tuple[Method, int]]:
    """Methods and rows that this project's engine is measured with at one length."""
    asked: list[tuple[Method, int]] = []
    for name in options.words("methods"):
        budgeted = "budget" in method_settings(name)
        for budget in options.numbers("budgets") if budgeted else [None]:
            asked.append((subject.method(name, budget), 1))
    if tokens == options.numbers("lengths")[0]:
        budgeted = [method for method, _ in asked if method.budget is not None]
        many = [rows for rows in options.numbers("rows") if rows > 1]
        asked += [(method, rows) for method in budgeted for rows in many]
    return asked


def _of_engine(engine: str, asked: Sequence[tuple[Method, int]]) -> list[tuple[Method, int]]:
    """What an engine is measured with: ours with all, transformers' with full KV and one row."""
    if engine in ("ours", "ours_compiled"):
        return list(asked)
    single = [one for one in asked if one[1] == 1]
    if engine == "ours_plain":
        return single
    return [one for one in single if (one[0].budget is None) == engine.startswith("hf")]


def _run(
    subject: Subject, engine: str, methods: Sequence[Method], tokens: int, steps: int
) -> Timed:
    model, prompt = subject.model, subject.prompt(tokens)
    if engine == "ours_compiled" and model.device.type != "cuda":
        raise UserError("engines='ours_compiled': it runs on a GPU only")
    if engine.startswith("ours"):
        way = {"ours": "auto", "ours_compiled": "compile", "ours_plain": "off"}[engine]
        return decode_ours(model, prompt, methods, steps, way)
    if engine == "concatenate":
        return decode_concatenated(model, prompt, methods[0], steps)
    held = kept_tokens(methods, tokens) * token_bytes(model)
    return decode_stock(model, prompt, steps, held, static=engine == "hf_static")


def _record(
    model: PreTrainedModel,
    methods: Sequence[Method],
    tokens: int,
    passes: Sequence[Timed],
    bandwidth: float,
) -> Record:
    steps = [ms for timed in passes for ms in timed.step_ms[WARM_UP:]]
    first, median, third = statistics.quantiles(steps, n=4, method="inclusive")
    weights = weight_bytes(model)
    read = kv_bytes(model, methods, tokens, len(passes[0].step_ms))
    bound = (weights + read) / bandwidth * 1e3
    peak = _median([timed.peak_bytes for timed in passes])
    return {
        "decode_ms_per_token": median,
        "decode_ms_q1": first,
        "decode_ms_q3": third,
        "decode_ms_mean": statistics.fmean(steps),  # re-packing, between steps, is in it
        "bound_ms_per_token": bound,
        "share_of_bound": bound / median,
        "prefill_seconds": statistics.median(timed.prefill_seconds for timed in passes),
        "compress_seconds": _median([timed.compress_seconds for timed in passes]),
        "peak_memory_gb": None if peak is None else peak / 2**30,
        "cache_bytes": passes[0].cache_bytes,
        "weight_bytes": weights,
        "kv_bytes_a_step": read,
        "kept_per_head": kept_tokens(methods, tokens)
        / (len(methods) * methods[0].shape.layers * methods[0].shape.kv_heads),
        "backend": passes[0].backend,
    }


def _median(values: Sequence[float | None]) -> float | None:
    return None if None in values else statistics.median(values)


def identity(record: Record) -> tuple:
    """What a measurement is of."""
    return tuple(record[key] for key in _IDENTITY)


def _words(record: Record) -> str:
    budget = "" if record["budget"] is None else f" {record['budget']}"
    rows = f", {record['rows']} rows" if record["rows"] > 1 else ""
    return (
        f"{record['model']}, {record['input_tokens']} tokens{rows}, {record['method']}{budget}, "
        f"{record['engine'] or 'ours'}"
    )
