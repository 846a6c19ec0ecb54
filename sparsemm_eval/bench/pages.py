"""What measurements say in Markdown and in a figure: tables, aims and what was reached of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from sparsemm_eval.bench.entries import Compiled
from sparsemm_eval.report.paper import paper_efficiency

Record = dict[str, Any]


def write_page(title: str, whole: Record, *parts: str) -> str:
    """A page of Markdown: how its numbers were made, then the parts that hold something."""
    command = (
        f"`{whole['command']}` · {whole['date']} · commit {whole['commit']} · "
        f"torch {torch.__version__}"
    )
    shown = (f"# {title}: {whole['hardware']['name']}", command, *parts)
    return "\n\n".join(part for part in shown if part)


def bullets(lines: Iterable[str]) -> str:
    """A list in Markdown."""
    return "\n".join(f"- {line}" for line in lines)


def markdown_table(
    heads: Sequence[str], rows: Iterable[Sequence[object]], words: Sequence[str]
) -> str:
    """A table in Markdown; the columns of words are aligned to the left, numbers to the right."""
    ruler = ["---" if head in words else "---:" for head in heads]
    lines = (f"| {' | '.join(map(str, row))} |" for row in (heads, ruler, *rows))
    return "\n".join(lines)


def aim(words: str, reached: Iterable[float | None], limit: float, least: bool = False) -> str:
    """Tell an aim, what was reached of it, and whether that is enough in every case.

    Parameters
    ----------
    words : str
        The aim.
    reached : iterable of float or None
        A value a case; None where nothing was measured.
    limit : float
        That no value may exceed, or fall short of if it is the least.
    """
    values = [value for value in reached if value is not None]
    if not values:
        return f"aim: {words}; not measured"
    missed = sum(value < limit if least else value > limit for value in values)
    if len(values) == 1:
        return f"aim: {words}; reached: {values[0]:.3g}; {'MISSED' if missed else 'met'}"
    verdict = f"MISSED in {missed} of {len(values)}" if missed else f"met in all {len(values)}"
    span = f"{min(values):.3g} to {max(values):.3g}"
    return f"aim: {words}; reached: {span}; {verdict} cases"


OURS = Compiled.name
_CASE = ("shape", "dtype", "distribution", "rows", "mean")
# Okabe and Ito's colours: told apart by colour-blind readers too.
_STYLES = {
    OURS: ("#D55E00", "o"),
    "concatenate": ("#0072B2", "s"),
    "padded_sdpa": ("#009E73", "^"),
    "torch": ("#777777", "x"),
    "varlen": ("#CC79A7", "D"),
    "flashinfer": ("#56B4E9", "v"),
}


def kernels_table(records: Sequence[Record]) -> str:
    """A row a case, a column an entry: microseconds a layer; notes below."""
    timed = {record["entry"] for record in records if record["median_us"]}
    names = [n for n in dict.fromkeys(r["entry"] for r in records) if n in timed and n in _STYLES]
    others = [name for name in names if name != OURS] if OURS in names else []
    rows = []
    for case, of_case in _by_case(records).items():
        ours = of_case.get(OURS, {})
        rows.append([
            *case[:-1],
            f"{case[-1]}{'*' * _disturbed(of_case)}",
            *(_us(of_case.get(name)) for name in (*names, "bound")),
            _percent(ours.get("share_of_bound"), 0),
            *(_number(of_case.get(name, {}).get("ratio_to_cuda_ext"), 1) for name in others),
        ])  # fmt: skip
    heads = [
        *_CASE, *(f"{name} µs" for name in (*names, "bound")), "share of bound",
        *(f"{name} / {OURS}" for name in others),
    ]  # fmt: skip
    return markdown_table(heads, rows, _CASE)


def kernels_notes(records: Sequence[Record]) -> list[str]:
    """What was left out, failed or timed in another way, each once with how often."""
    counts: dict[str, int] = {}
    for record in records:
        why = record.get("note")
        if why and record["entry"] != "bound":
            state = "" if record["median_us"] else "not timed: "
            sentence = f"{record['entry']}: {state}{why}"
            counts[sentence] = counts.get(sentence, 0) + 1
    lines = [f"{sentence} ({n} case{'s' * (n > 1)})" for sentence, n in counts.items()]
    disturbed = sum(map(_disturbed, _by_case(records).values()))
    if disturbed:
        lines.append(
            "\\*: disturbed, other processes wanted the cores throughout; measure again on an idle "
            f"machine ({disturbed} case{'s' * (disturbed > 1)})"
        )
    return lines


def kernels_aims(records: Sequence[Record], device: str) -> list[str]:
    """Each aim of a "cpu" or of "cuda", what was reached, and whether that is enough."""
    heavy = [r for r in records if r["distribution"] == "heavy"]
    lines = []
    if device == "cpu":
        at_256 = [r for r in heavy if r["mean"] == 256]
        for name, least in (("padded_sdpa", 3.0), ("concatenate", 5.0)):
            words = f"heavy heads at mean 256, {name} / {OURS} at least {least:g} (on 2 cores)"
            ratios = (r.get("ratio_to_cuda_ext") for r in at_256 if r["entry"] == name)
            lines.append(aim(words, ratios, least, least=True))
    else:
        ours = [r for r in records if r["entry"] == OURS]
        shares = (r.get("share_of_bound") for r in ours if r["mean"] == 4096)
        lines.append(aim("mean 4096, at least 0.7 of copy bandwidth", shares, 0.7, least=True))
        small = (
            r["median_us"]
            for r in ours
            if r["mean"] == 256 and r["rows"] == 1 and r.get("captured")
        )
        lines.append(aim("mean 256, rows 1, at most 6 µs a layer in a graph", small, 6))
    fastest = []
    for of_case in _by_case(heavy).values():
        others = [r for name, r in of_case.items() if name not in (OURS, "bound")]
        fastest += sorted(r["ratio_to_cuda_ext"] for r in others if r["ratio_to_cuda_ext"])[:1]
    words = f"heavy heads, ahead of every other entry (fastest other / {OURS} above 1)"
    return [*lines, aim(words, fastest, 1, least=True)]


def draw_kernels(records: Sequence[Record], title: str, path: Path) -> None:
    """Draw bytes that must move over time, by mean tokens kept: heavy heads, a panel a case."""
    heavy = [r for r in records if r["distribution"] == "heavy"] or list(records)
    shapes, rows = (list(dict.fromkeys(r[key] for r in heavy)) for key in ("shape", "rows"))
    dtypes = list(dict.fromkeys(r["dtype"] for r in heavy))
    lines = [(shape, dtype) for shape in shapes for dtype in dtypes]
    size = (3.2 * len(rows) + 0.6, 2.5 * len(lines) + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(lines), len(rows), squeeze=False, sharex=True, sharey=True)
    for (shape, dtype), of_shape in zip(lines, grid, strict=True):
        for count, axes in zip(rows, of_shape, strict=True):
            wanted = (shape, dtype, count)
            _panel(axes, [r for r in heavy if (r["shape"], r["dtype"], r["rows"]) == wanted])
            plural = "s" if count > 1 else ""
            axes.set_title(f"{shape}, {dtype}, {count} row{plural}", fontsize=9)
    named = dict(
        pair[::-1] for axes in grid.flat for pair in zip(*axes.get_legend_handles_labels(),
                                                         strict=True)
    )  # fmt: skip
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=len(named),
                  fontsize=8.5, frameon=False)  # fmt: skip
    figure.supxlabel("mean tokens kept per KV head, log scale", fontsize=9)
    figure.supylabel("GB/s: bytes that must move / time, log scale", fontsize=9)
    figure.suptitle(title, fontsize=10.5)
    figure.savefig(path, dpi=160)


def _panel(axes: Any, records: Sequence[Record]) -> None:
    for name, (colour, marker) in _STYLES.items():
        timed = [r for r in records if r["entry"] == name and r["median_us"]]
        if timed:
            timed.sort(key=lambda r: r["mean"])
            speeds = [r["bytes"] / r["median_us"] / 1e3 for r in timed]
            means = [r["mean"] for r in timed]
            axes.plot(means, speeds, color=colour, marker=marker, label=name, markersize=4, lw=1.5)
    copies = sorted((r["mean"], r["copy_gb_s"]) for r in records if "copy_gb_s" in r)
    if copies:
        axes.plot(*zip(*copies, strict=True), color="black", ls="--", lw=1, label="copy bandwidth")
    means = sorted({r["mean"] for r in records})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(means, [str(mean) for mean in means])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)


def _by_case(records: Sequence[Record]) -> dict[tuple, dict[str, Record]]:
    cases: dict[tuple, dict[str, Record]] = {}
    for record in records:
        cases.setdefault(tuple(record[key] for key in _CASE), {})[record["entry"]] = record
    return cases


def _disturbed(of_case: dict[str, Record]) -> bool:
    return any(record.get("disturbed") for record in of_case.values())


# At 32K tokens and budget 256 on one H200: milliseconds a token.
_DECODE_AIMS = {
    "LLaVA-NeXT-Vicuna-7B": 4.15, "LLaVA-NeXT-Mistral-7B": 4.45, "Qwen2-VL-7B-Instruct": 4.4,
}  # fmt: skip
_VICUNA, _LONG = "LLaVA-NeXT-Vicuna-7B", 32768


def efficiency_page(whole: Record) -> str:
    """Everything as Markdown."""
    records = [*whole["rows"], *whole["many_rows"]]
    parts = []
    for model in dict.fromkeys(record["model"] for record in records):
        of_model = [record for record in records if record["model"] == model]
        parts += [f"## {model}", efficiency_table(of_model)]
    notes = dict.fromkeys(f"{label(r)}: {r['note']}" for r in records if r.get("note"))
    return write_page(
        "Decoding a prompt's answer", whole, _method(whole), *parts,
        bullets(efficiency_aims(whole)), bullets(notes),
    )  # fmt: skip


def efficiency_table(records: Sequence[Record]) -> str:
    """A row a measurement of one model, the paper's number beside where it has one."""
    printed, rows = paper_efficiency(), []
    for record in records:
        of = printed[
            (printed["model"] == record["model"])
            & (printed["method"] == record["method"])
            & (printed["input_tokens"] == record["input_tokens"])
            & (printed["budget"].fillna(0) == (record["budget"] or 0))
        ]
        beside = of.iloc[0] if len(of) and record["rows"] == 1 else {}
        compress, prefill = record.get("compress_seconds"), record.get("prefill_seconds")
        rows.append({
            "input tokens": record["input_tokens"],
            "method": _method_words(record),
            "engine": record["engine"] or "ours",
            "rows": record["rows"],
            "ms a step": _number(record["decode_ms_per_token"], 2),
            "bound ms": _number(record.get("bound_ms_per_token"), 2),
            "share": _percent(record.get("share_of_bound"), 0),
            "host": _percent(record.get("host_share"), 0),
            "paper ms": _number(beside.get("decode_ms_per_token"), 1),
            "peak GiB": _number(record.get("peak_memory_gb"), 1),
            "paper GiB": _number(beside.get("peak_memory_gb"), 1),
            "prefill s": _number(prefill, 3),
            "compressing": _percent(compress / prefill if compress and prefill else None, 1),
            "cache MiB": _number(record.get("cache_bytes"), 1, 2**20),
        })  # fmt: skip
    return markdown_table(list(rows[0]), map(dict.values, rows), ("method", "engine"))


def efficiency_aims(whole: Record) -> list[str]:
    """Each aim of the device's kind, what was reached, and whether that is enough."""
    rows = whole["rows"]
    if whole["hardware"]["kind"] == "cpu":
        return _cpu_aims(rows)
    lines = []
    long = [r for r in rows if r["input_tokens"] == _LONG]
    ours = {
        (r["model"], r["method"]): r
        for r in long
        if r["engine"] is None and r["budget"] in (None, 256)
    }
    for model, most in _DECODE_AIMS.items():
        fast = ours.get((model, "sparsemm"), {})
        words = f"{model}, 32K, sparsemm 256: at most {most} ms a token"
        lines.append(aim(words, [fast.get("decode_ms_per_token")], most))
    fast = ours.get((_VICUNA, "sparsemm"), {})
    for engine, least, what in (("hf_generate", 4.0, "HF generate"), (None, 1.9, "our engine")):
        full = [r for r in long if (r["model"], r["method"]) == (_VICUNA, "fullkv")]
        slow = [r["decode_ms_per_token"] for r in full if r["engine"] == engine]
        times = [fast.get("decode_ms_per_token"), *slow]
        ratios = [times[1] / times[0]] if len(times) == 2 and all(times) else []
        words = f"Vicuna, 32K: at least {least} times as fast as full KV under {what}"
        lines.append(aim(words, ratios, least, least=True))
    words = "Vicuna, 32K, sparsemm 256: peak memory of at most 15.9 GiB"
    lines.append(aim(words, [fast.get("peak_memory_gb")], 15.9))
    for (model, method), record in ours.items():
        if method == "sparsemm" and record.get("compress_seconds"):
            share = record["compress_seconds"] / record["prefill_seconds"]
            words = f"{model}, 32K: compressing at most 0.02 of the prefill"
            lines.append(aim(words, [share], 0.02))
    for record in whole["many_rows"]:
        if record["engine"] is None and record.get("share_of_bound"):
            words = f"{label(record)}: at most 1.25 times the byte bound"
            lines.append(aim(words, [1 / record["share_of_bound"]], 1.25))
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
            words = f"{label(record)}: no slower than full KV under HF generate (ratio above 1)"
            lines.append(aim(words, [ratio], 1.0, least=True))
    return lines


def label(record: Record) -> str:
    """What a measurement of efficiency is of, in words."""
    rows = f", {record['rows']} rows" if record["rows"] > 1 else ""
    engine = "" if record["engine"] is None else f", {record['engine']}"
    return (
        f"{record['model']}, {record['input_tokens']} tokens{rows}, {_method_words(record)}{engine}"
    )


def _method_words(record: Record) -> str:
    return record["method"] + ("" if record["budget"] is None else f" {record['budget']}")


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


def _number(value: float | None, digits: int, unit: float = 1) -> str:
    return "" if value is None else f"{value / unit:.{digits}f}"


def _percent(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}%}"


def _us(record: Record | None) -> str:
    """Microseconds, with a decimal where they are few."""
    us = None if record is None else record["median_us"]
    return _number(us, 0 if us and us >= 100 else 1)
