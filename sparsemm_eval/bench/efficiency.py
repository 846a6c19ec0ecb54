"""``bench efficiency``: prefill, decode time, memory and bytes over prompt lengths, and the bounds.

Also ``python -m sparsemm_eval.bench.efficiency`` from a checkout, with the same options.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from sparsemm_eval.bench.decode import (
    Timed,
    decode_concatenated,
    decode_ours,
    decode_plain,
    decode_stock,
    host_share,
)
from sparsemm_eval.bench.machine import (
    BANDWIDTHS,
    code_digest,
    find_device,
    provenance_on,
    read_earlier,
    slug,
    threads,
    write_json,
)
from sparsemm_eval.bench.models import (
    DTYPES,
    SHAPES,
    Subject,
    kept_tokens,
    kv_bytes,
    token_bytes,
    weight_bytes,
)
from sparsemm_eval.bench.options import Benchmark, EfficiencyOptions, main
from sparsemm_eval.bench.pages import Record, efficiency_page, label, markdown_table
from sparsemm_eval.bench.timing import copy_bandwidth, quartiles
from sparsemm_eval.errors import UserError, check_int, one_line
from sparsemm_eval.methods import Method, method_names, method_settings
from sparsemm_eval.report.efficiency import gather_efficiency
from sparsemm_eval.report.figures.efficiency import efficiency_curves
from sparsemm_eval.tiny import EMBEDDED, embedded_checkpoints

# "" in an option takes these.
DEFAULTS = {
    "cuda": {
        "models": "vicuna,mistral,qwen2vl-7b", "lengths": "2048,4096,8192,16384,32768",
        "budgets": "256", "dtype": "float16", "repeats": 1,
    },
    "cpu": {
        "models": "qwen2vl,llava_next", "lengths": "64,256,512,1024,2048", "budgets": "64",
        "dtype": "float32", "repeats": 3,
    },
}  # fmt: skip
QUICK = {
    "models": "vicuna-small,qwen2vl-small", "lengths": "64,128", "budgets": "16", "window": 8,
    "steps": 12, "rows": "3", "repeats": 1,
}  # fmt: skip
ENGINES = ("ours", "ours_plain", "ours_compiled", "hf_generate", "hf_static", "concatenate")
WARM_UP = 10  # steps whose times are left out; a graph is captured in the first
_IDENTITY = ("model", "method", "budget", "input_tokens", "engine", "rows", "dtype", "steps")


def run(options: EfficiencyOptions, command: str) -> Benchmark:
    """Measure, and write ``<out>/<device>.json``, ``.md`` and ``.png``; or print bounds alone.

    The JSON is written after every measurement. A run with the same code, versions and device goes
    on where an earlier one ended, and keeps what that one measured beside.

    Parameters
    ----------
    options : EfficiencyOptions
        What is measured.
    command : str
        That makes the files again.

    Raises
    ------
    UserError
        For options out of range or names that nothing has.
    """
    if options.dry_run:
        return Benchmark(describe_bounds(options, bandwidth_of(options.bandwidth)))
    device = find_device(options.device)
    options = checked(options, device.type)
    with threads(options.threads):
        provenance = {**provenance_on(device, command), "kind": "efficiency"}
        path = options.out / f"{slug(provenance['hardware'])}.json"
        provenance["options"] = asdict(options) | {"out": str(options.out)}
        small = options.quick or device.type == "cpu"
        provenance["copy_bytes_per_second"] = copy_bandwidth(device, 64 << 20 if small else 1 << 30)
        provenance["code"] = code_digest()
        measuring = Measuring(options, device, path, provenance)
        if not options.fresh:
            measuring.go_on()
        for name in options.words("models"):
            measuring.measure_model(name)
        whole = measuring.write()
    text = efficiency_page(whole)
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    files = [path, path.with_suffix(".md")]
    if any(row["decode_ms_per_token"] for row in whole["rows"]):
        figure = efficiency_curves(gather_efficiency([str(path), "paper"]).rows)
        figure.savefig(path.with_suffix(".png"), dpi=160)
        files.append(path.with_suffix(".png"))
    return Benchmark(text, files, measuring.failures)


def checked(options: EfficiencyOptions, kind: str) -> EfficiencyOptions:
    """The same with its defaults for a "cpu" or for "cuda" written out.

    Raises
    ------
    UserError
        For numbers out of range or names that nothing has.
    """
    options = options.filled(DEFAULTS[kind] | (QUICK if options.quick else {}))
    options.words("dtype", DTYPES)
    # No random weights have a sensitivity file.
    options.words("methods", [n for n in method_names() if "sensitivity" not in method_settings(n)])
    options.words("engines", ENGINES)
    for name in ("lengths", "budgets", "rows"):
        options.numbers(name)
    for name, least in (("window", 1), ("steps", 2), ("repeats", 1), ("threads", 0)):
        check_int(name, getattr(options, name), least)
    known = (*SHAPES, *embedded_checkpoints())
    for name in options.words("models"):
        own = name.removeprefix(EMBEDDED)
        if own not in known and "/" not in name and not Path(name).is_dir():
            raise UserError(
                f"models={name!r}: it must be one of {', '.join(known)}, or a checkpoint's folder "
                "or hub repository"
            )
    return options


def bandwidth_of(word: str) -> float:
    """Bytes a second from GB/s or a GPU's name, or UserError for a word that is neither."""
    try:
        value = float(BANDWIDTHS.get(word.lower(), word))
    except ValueError:
        value = -1.0
    if not value > 0:
        raise UserError(
            f"bandwidth={word!r}: it must be GB/s, such as 4200, or one of {', '.join(BANDWIDTHS)}"
        )
    return value * 1e9


def describe_bounds(options: EfficiencyOptions, bandwidth: float) -> str:
    """The bytes a step must read and the time that takes, without a device: a Markdown table.

    Parameters
    ----------
    options : EfficiencyOptions
        Models (`SHAPES` or embedded ones), lengths, methods and budgets.
    bandwidth : float
        Bytes a second.
    """
    options = checked(options, "cuda")
    rows = []
    for name in options.words("models"):
        place = torch.device("meta" if name in SHAPES else "cpu")
        subject = Subject.load(name, place, DTYPES[options.dtype])
        weights = weight_bytes(subject.model)
        for tokens in options.numbers("lengths"):
            for method, count in asked_of(subject, options, tokens):
                read = kv_bytes(subject.model, [method] * count, tokens, options.steps)
                held = kept_tokens([method] * count, tokens) * token_bytes(subject.model)
                rows.append({
                    "model": subject.name,
                    "method": f"{method.name} {method.budget or ''}".strip(),
                    "input tokens": tokens,
                    "rows": count,
                    "weights GiB": f"{weights / 2**30:.2f}",
                    "KV GiB": f"{read / 2**30:.3f}",
                    "bound ms": f"{(weights + read) / bandwidth * 1e3:.2f}",
                    "cache GiB": f"{held / 2**30:.3f}",
                })  # fmt: skip
    table = markdown_table(list(rows[0]), map(dict.values, rows), ("model", "method"))
    speed = f"{bandwidth / 1e9:g} GB/s, {options.dtype}"
    return f"Bytes that a step must read and write, at {speed}:\n\n{table}"


@dataclass
class Measuring:
    """A run that is under way.

    Parameters
    ----------
    options : EfficiencyOptions
        With its defaults written out.
    device : torch.device
        What is measured.
    path : Path
        The JSON file.
    provenance : dict
        What it says of its making, with the memory's bandwidth.
    records : dict
        What was measured, by `identity`: it is not measured again.
    failures : list of str
        A sentence each.
    """

    options: EfficiencyOptions
    device: torch.device
    path: Path
    provenance: Record
    records: dict[tuple, Record] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def go_on(self) -> None:
        """Take over what an earlier run measured, if it is as if measured now."""
        whole = read_earlier(self.path, self.provenance, "hardware") or {
            "rows": [],
            "many_rows": [],
        }
        rows = [*whole["rows"], *whole["many_rows"]]
        self.records |= {identity(row): row for row in rows if row["decode_ms_per_token"]}

    def write(self) -> Record:
        """Write the JSON file; single rows, as the paper's figure shows, apart from many."""
        ordered = sorted(self.records.values(), key=lambda row: (row["model"], row["input_tokens"]))
        whole = {
            **self.provenance,
            "rows": [record for record in ordered if record["rows"] == 1],
            "many_rows": [record for record in ordered if record["rows"] > 1],
        }
        write_json(self.path, whole)
        return whole

    def measure_model(self, name: str) -> None:
        """Every measurement of one model that is not there."""
        # Its weights are made once the first measurement is wanted.
        subject = self._subject(name, torch.device("meta") if name in SHAPES else self.device)
        built: Subject | None = None
        for tokens in self.options.numbers("lengths"):
            wanted: list[tuple[Record, str, list[Method]]] = []
            asked = asked_of(subject, self.options, tokens)
            for engine in self.options.words("engines"):
                for method, rows in _of_engine(engine, asked):
                    record = self._named(subject, engine, method, rows, tokens)
                    known = self.records.get(identity(record))
                    if known is None or (self.options.profile and "host_share" not in known):
                        wanted.append((record, engine, [method] * rows))
            if wanted:
                built = built or self._subject(name, self.device)
                self._measure(built, wanted, tokens)

    def _subject(self, name: str, device: torch.device) -> Subject:
        return Subject.load(name, device, DTYPES[self.options.dtype])

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
                print(label(record), file=sys.stderr, flush=True)
                steps = self.options.steps + WARM_UP
                try:
                    timed.append(_run(subject, engine, methods, tokens, steps))
                except (RuntimeError, ValueError, NotImplementedError) as error:
                    # What does not fit, or is not there on this device: others are measured still.
                    note = f"failed: {one_line(error)}"
                    if not isinstance(error, torch.OutOfMemoryError):
                        self.failures.append(f"{label(record)}: {note}")
                    record |= {"decode_ms_per_token": None, "note": note}
                else:
                    if left:
                        continue
                    record |= self._timed(subject.model, methods, tokens, timed)
                    if self.options.profile:
                        record["host_share"] = host_share(
                            partial(_run, subject, engine, methods, tokens),
                            self.device,
                            record["decode_ms_per_token"],
                        )
                self.records[identity(record)] = record
                self.write()

    def _timed(
        self,
        model: PreTrainedModel,
        methods: Sequence[Method],
        tokens: int,
        passes: Sequence[Timed],
    ) -> Record:
        """What the passes of one measurement took, beside its bound."""
        steps = [ms for timed in passes for ms in timed.step_ms[WARM_UP:]]
        first, median, third = quartiles(steps)
        weights = weight_bytes(model)
        read = kv_bytes(model, methods, tokens, len(passes[0].step_ms))
        bound = (weights + read) / self.provenance["copy_bytes_per_second"] * 1e3
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


def asked_of(subject: Subject, options: EfficiencyOptions, tokens: int) -> list[tuple[Method, int]]:
    """Methods and rows that this project's engine is measured with at one length."""
    asked: list[tuple[Method, int]] = []
    for name in options.words("methods"):
        budgeted = "budget" in method_settings(name)
        for budget in options.numbers("budgets") if budgeted else [None]:
            asked.append((subject.method(name, budget, options.window), 1))
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
    model, prompt = subject.model, subject.prompts(tokens)
    if engine == "ours_compiled" and model.device.type != "cuda":
        raise UserError("engines='ours_compiled': it runs on a GPU only")
    if engine in ("ours", "ours_compiled"):
        way = "auto" if engine == "ours" else "compile"
        return decode_ours(model, prompt, methods, steps, way)
    if engine == "ours_plain":
        return decode_plain(model, prompt, methods[0], steps)
    if engine == "concatenate":
        return decode_concatenated(model, prompt, methods[0], steps)
    held = kept_tokens(methods, tokens) * token_bytes(model)
    return decode_stock(model, prompt, steps, held, static=engine == "hf_static")


def _median(values: Sequence[float | None]) -> float | None:
    return None if None in values else statistics.median(values)


def identity(record: Record) -> tuple:
    """What a measurement is of."""
    return tuple(record[key] for key in _IDENTITY)


if __name__ == "__main__":
    sys.exit(main("efficiency"))
