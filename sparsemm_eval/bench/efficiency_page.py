"""What efficiency measurements say: a table beside the paper's figure, and the aims."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sparsemm_eval.report.paper import paper_efficiency

Record = dict[str, Any]
_HEADS = (
    "input tokens", "method", "engine", "rows", "ms a step", "bound ms", "share", "host",
    "paper ms", "peak GiB", "paper GiB", "prefill s", "compressing", "cache MiB",
)  # fmt: skip
# At 32K tokens and budget 256 on one H200: milliseconds a token.
_DECODE_AIMS = {
    "LLaVA-NeXT-Vicuna-7B": 4.15, "LLaVA-NeXT-Mistral-7B": 4.45, "Qwen2-VL-7B-Instruct": 4.4,
}  # fmt: skip
_VICUNA, _LONG = "LLaVA-NeXT-Vicuna-7B", 32768


def page(whole: Record) -> str:
    """Everything as Markdown."""
    records = [*whole["rows"], *whole["many_rows"]]
    parts = [
        f"# Decoding a prompt's answer: {whole['hardware']['name']}",
        f"`{whole['command']}` · {whole['date']} · commit {whole['commit']} · "
        f"torch {torch.__version__}",
        _method(whole),
    ]
    for model in dict.fromkeys(record["model"] for record in records):
        parts += [f"## {model}", table([r for r in records if r["model"] == model])]
    parts.append("\n".join(f"- {line}" for line in aims(whole)))
    notes = dict.fromkeys(f"{_label(r)}: {r['note']}" for r in records if r.get("note"))
    parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(part for part in parts if part)


def table(records: Sequence[Record]) -> str:
    """A row a measurement of one model, the paper's number beside where it has one."""
    lines = [_line(_HEADS), _line(["---:"] + ["---"] * 2 + ["---:"] * (len(_HEADS) - 3))]
    printed = paper_efficiency()
    for record in records:
        budget = "" if record["budget"] is None else f" {record['budget']}"
        of = printed[
            (printed["model"] == record["model"])
            & (printed["method"] == record["method"])
            & (printed["input_tokens"] == record["input_tokens"])
            & (printed["budget"].fillna(0) == (record["budget"] or 0))
        ]
        beside = of.iloc[0] if len(of) and record["rows"] == 1 else None
        compress, prefill = record.get("compress_seconds"), record.get("prefill_seconds")
        lines.append(_line([
            record["input_tokens"],
            record["method"] + budget,
            record["engine"] or "ours",
            record["rows"],
            _number(record["decode_ms_per_token"], 2),
            _number(record.get("bound_ms_per_token"), 2),
            _percent(record.get("share_of_bound"), 0),
            _percent(record.get("host_share"), 0),
            "" if beside is None else _number(beside["decode_ms_per_token"], 1),
            _number(record.get("peak_memory_gb"), 1),
            "" if beside is None else _number(beside["peak_memory_gb"], 1),
            _number(prefill, 3),
            _percent(compress / prefill if compress and prefill else None, 1),
            _number(record["cache_bytes"] / 2**20 if "cache_bytes" in record else None, 1),
        ]))  # fmt: skip
    return "\n".join(lines)


def aims(whole: Record) -> list[str]:
    """Each aim of the device's kind, what was reached, and whether that is enough."""
    rows = whole["rows"]
    if whole["hardware"]["kind"] == "cpu":
        return _cpu_aims(rows)
    lines = []
    ours = {
        (r["model"], r["method"]): r for r in rows if _is(r, _LONG) and r["budget"] in (None, 256)
    }
    for model, most in _DECODE_AIMS.items():
        reached = _value(ours.get((model, "sparsemm")), "decode_ms_per_token")
        lines.append(_aim(f"{model}, 32K, sparsemm 256: at most {most} ms a token", reached, most))
    fast = _value(ours.get((_VICUNA, "sparsemm")), "decode_ms_per_token")
    for engine, least, what in (("hf_generate", 4.0, "HF generate"), (None, 1.9, "our engine")):
        full = next(
            (r for r in rows if r["model"] == _VICUNA and r["input_tokens"] == _LONG
             and r["method"] == "fullkv" and r["engine"] == engine), None,
        )  # fmt: skip
        slow = _value(full, "decode_ms_per_token")
        ratio = slow / fast if slow and fast else None
        words = f"Vicuna, 32K: at least {least} times as fast as full KV under {what}"
        lines.append(_aim(words, ratio, least, at_least=True))
    peak = _value(ours.get((_VICUNA, "sparsemm")), "peak_memory_gb")
    lines.append(_aim("Vicuna, 32K, sparsemm 256: peak memory of at most 15.9 GiB", peak, 15.9))
    for (model, method), record in ours.items():
        if method == "sparsemm" and record.get("compress_seconds"):
            share = record["compress_seconds"] / record["prefill_seconds"]
            words = f"{model}, 32K: compressing at most 0.02 of the prefill"
            lines.append(_aim(words, share, 0.02))
    for record in whole["many_rows"]:
        if record["engine"] is None and record.get("share_of_bound"):
            words = f"{_label(record)}: at most 1.25 times the byte bound"
            lines.append(_aim(words, 1 / record["share_of_bound"], 1.25))
    return lines


def _cpu_aims(rows: Sequence[Record]) -> list[str]:
    lines = []
    for model in dict.fromkeys(r["model"] for r in rows):
        of_model = [r for r in rows if r["model"] == model and r["decode_ms_per_token"]]
        stock = {r["input_tokens"]: r for r in of_model if r["engine"] == "hf_generate"}
        for record in of_model:
            beside = stock.get(record["input_tokens"])
            if record["engine"] is not None or beside is None:
                continue
            ratio = beside["decode_ms_per_token"] / record["decode_ms_per_token"]
            words = f"{_label(record)}: no slower than full KV under HF generate (ratio above 1)"
            lines.append(_aim(words, ratio, 1.0, at_least=True))
    return lines


def _is(record: Record, tokens: int) -> bool:
    return record["input_tokens"] == tokens and record["engine"] is None


def _value(record: Record | None, key: str) -> float | None:
    return None if record is None else record.get(key)


def _aim(words: str, reached: float | None, limit: float, at_least: bool = False) -> str:
    if reached is None:
        return f"aim: {words}; not measured"
    met = reached >= limit if at_least else reached <= limit
    return f"aim: {words}; reached: {reached:.3g}; {'met' if met else 'MISSED'}"


def _method(whole: Record) -> str:
    speed = whole["copy_bytes_per_second"] / 1e9
    steps = whole["options"]["steps"]
    return (
        f"Random prompts, one sample. A step's time is the median of {steps} new tokens after a "
        "warm-up. Bound: bytes of weights, keys and values that a step must read and write, over "
        f"the bandwidth of a large copy measured in the same run ({speed:.0f} GB/s, bytes read and "
        "written). Share: bound over time. Host: the part of a step in which the device, or "
        "torch's operators on a CPU, do nothing. Compressing: scoring, selecting and packing, as a "
        "share of the prefill. Engines: ours; ours_plain, under transformers' generate; "
        "ours_compiled, with torch.compile; hf_generate and hf_static, transformers' own with a "
        "dynamic and a static cache; concatenate, every token copies the ragged cache. The paper's "
        "numbers are read off its figure; its hardware differs."
    )


def _label(record: Record) -> str:
    budget = "" if record["budget"] is None else f" {record['budget']}"
    rows = f", {record['rows']} rows" if record["rows"] > 1 else ""
    engine = "" if record["engine"] is None else f", {record['engine']}"
    return (
        f"{record['model']}, {record['input_tokens']} tokens{rows}, {record['method']}{budget}"
        f"{engine}"
    )


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _percent(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}%}"


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
