"""What the kernels' records say: a table, the aims and what is reached of them, a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

Record = dict[str, Any]
OURS = "cuda_ext"
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


def table(records: Sequence[Record]) -> str:
    """A row a case, a column an entry: microseconds a layer; notes below."""
    names = [n for n in dict.fromkeys(r["entry"] for r in records) if n in _STYLES]
    names = [n for n in names if any(r["median_us"] for r in records if r["entry"] == n)]
    heads = [*_CASE, *(f"{name} µs" for name in names), "bound µs", "share of bound"]
    ratios = [name for name in names if name != OURS] if OURS in names else []
    heads += [f"{name} / {OURS}" for name in ratios]
    lines = [_line(heads), _line(["---"] * len(_CASE) + ["---:"] * (len(heads) - len(_CASE)))]
    for case, of_case in _by_case(records).items():
        share = of_case.get(OURS, {}).get("share_of_bound")
        cells = [str(value) for value in case]
        cells[-1] += "*" * _disturbed(of_case)
        cells += [_us(of_case.get(name)) for name in names]
        cells += [_us(of_case.get("bound")), f"{share:.0%}" if share else ""]
        for name in ratios:
            ratio = of_case.get(name, {}).get("ratio_to_cuda_ext")
            cells.append(f"{ratio:.1f}" if ratio else "")
        lines.append(_line(cells))
    return "\n".join(lines)


def notes(records: Sequence[Record]) -> list[str]:
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


def failures(records: Sequence[Record]) -> list[str]:
    """Entries that are wrong or broke, a sentence each."""
    return [
        f"{r['entry']} on {' '.join(str(r[key]) for key in _CASE)}: {r['note']}"
        for r in records
        if r.get("failed")
    ]


def aims(records: Sequence[Record], device: str) -> list[str]:
    """Each aim, what was reached, and whether that is enough in every case."""
    heavy = [r for r in records if r["distribution"] == "heavy"]
    ours = [r for r in records if r["entry"] == OURS]
    lines = []
    if device == "cpu":
        at_256 = [r for r in heavy if r["mean"] == 256]
        for name, least in (("padded_sdpa", 3.0), ("concatenate", 5.0)):
            ratios = _values(at_256, name, "ratio_to_cuda_ext")
            aim = f"heavy heads at mean 256, {name} / {OURS} at least {least:g} (on 2 cores)"
            lines.append(_reached(aim, ratios, lambda x, least=least: x >= least))
    else:
        shares = _values([r for r in ours if r["mean"] == 4096], OURS, "share_of_bound")
        aim = "mean 4096, at least 0.7 of copy bandwidth"
        lines.append(_reached(aim, shares, lambda x: x >= 0.7))
        small = [r for r in ours if r["mean"] == 256 and r["rows"] == 1 and r.get("captured")]
        aim = "mean 256, rows 1, at most 6 µs a layer in a graph"
        lines.append(_reached(aim, _values(small, OURS, "median_us"), lambda x: x <= 6))
    others = [
        min(ratios)
        for of_case in _by_case(heavy).values()
        if (ratios := [
            r["ratio_to_cuda_ext"]
            for name, r in of_case.items()
            if name not in (OURS, "bound") and r["ratio_to_cuda_ext"]
        ])
    ]  # fmt: skip
    aim = f"heavy heads, ahead of every other entry (fastest other / {OURS} above 1)"
    lines.append(_reached(aim, others, lambda x: x > 1))
    return lines


def draw(records: Sequence[Record], title: str, path: Path) -> None:
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


def _values(records: Sequence[Record], entry: str, key: str) -> list[float]:
    return [r[key] for r in records if r["entry"] == entry and r.get(key)]


def _reached(aim: str, values: Sequence[float], enough: Any) -> str:
    if not values:
        return f"aim: {aim}; not measured"
    met, count = sum(map(enough, values)), len(values)
    verdict = f"met in all {count}" if met == count else f"MISSED in {count - met} of {count}"
    span = f"{min(values):.2f} to {max(values):.2f}" if count > 1 else f"{values[0]:.2f}"
    return f"aim: {aim}; reached: {span}; {verdict} case{'s' * (count > 1)}"


def _us(record: Record | None) -> str:
    if record is None or record["median_us"] is None:
        return ""
    us = record["median_us"]
    return f"{us:.0f}" if us >= 100 else f"{us:.1f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
