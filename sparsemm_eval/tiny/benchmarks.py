"""Public benchmarks in miniature: drawn images in a benchmark's own schema, built on first use.

A folder of this kind stands in for the download: lmms-eval's task reads the same columns from it,
and its metric scores the same fields.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import datasets
import numpy as np
from loguru import logger
from PIL import Image
from tqdm import tqdm

from sparsemm_eval.errors import UserError
from sparsemm_eval.stored import NotUnderstood, read_bytes, read_json

from . import samples as drawn
from .documents import Split, stream
from .samples import Row

DEFAULT_SAMPLES = 200
DEFAULT_SEED = 0
# Numbers of a stream that a benchmark has to itself.
MOST_SAMPLES = 1_000_000
# In each folder: SHA-256 of its other files, as they were written.
_DIGESTS = "digests.json"


@dataclass(frozen=True)
class Table:
    """One table of a benchmark.

    Attributes
    ----------
    config, split : str
        Names under which ``datasets.load_dataset`` finds it; ``default`` needs no name.
    features : datasets.Features
        Its columns.
    """

    config: str
    split: str
    features: datasets.Features


@dataclass(frozen=True)
class Benchmark:
    """How one benchmark is made in miniature.

    Attributes
    ----------
    name : str
        Its name here, also the beginning of its folder's name.
    title : str
        Its name in prose.
    place : int
        Which part of the stream of random numbers is its own.
    tables : tuple of Table
        Where its rows go.
    sample : callable
        Makes of a generator and a number one row a table.
    version : int
        Raised whenever other samples come out of the same settings.
    """

    name: str
    title: str
    place: int
    tables: tuple[Table, ...]
    sample: Callable[[np.random.Generator, int], tuple[Row, ...]]
    version: int = 1


_ALL = (
    Benchmark(
        "docvqa", "DocVQA", 0, (Table("DocVQA", "validation", drawn.DOCVQA),), drawn.docvqa, 2
    ),
    Benchmark(
        "ocrbench", "OCRBench", 1, (Table("default", "test", drawn.OCRBENCH),), drawn.ocrbench
    ),
    Benchmark(
        "textvqa", "TextVQA", 2, (Table("default", "validation", drawn.TEXTVQA),), drawn.textvqa
    ),
    Benchmark("chartqa", "ChartQA", 3, (Table("default", "test", drawn.CHARTQA),), drawn.chartqa),
    Benchmark(
        "textcaps", "TextCaps", 4, (Table("default", "val", drawn.TEXTCAPS),), drawn.textcaps
    ),
    Benchmark("mmbench", "MMBench", 5, (Table("en", "dev", drawn.MMBENCH),), drawn.mmbench, 2),
    Benchmark(
        "gqa",
        "GQA",
        6,
        (
            Table("testdev_balanced_instructions", "testdev", drawn.GQA_INSTRUCTIONS),
            Table("testdev_balanced_images", "testdev", drawn.GQA_IMAGES),
        ),
        drawn.gqa,
        2,
    ),
    Benchmark("vqav2", "VQAv2", 7, (Table("default", "validation", drawn.VQAV2),), drawn.vqav2, 2),
)
BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}

_CONFIG = """- config_name: {config}
  data_files:
  - split: {split}
    path: {config}/{split}-*.parquet
"""
_CARD = """---
configs:
{configs}---

# {title} in miniature

{samples} drawn images, one question each, in the columns of {title}. Made by
`sparsemm_eval.tiny.benchmarks`, version {version}, seed {seed}; hash of the content: `{content}`.
The images come from a stream of random numbers that no training run uses. Scores on them say
nothing about {title} itself.
"""


def settings_key(benchmark: Benchmark, samples: int, seed: int) -> str:
    """Return the key of a dataset: a hash of all that decides what is in it.

    Parameters
    ----------
    benchmark : Benchmark
        Which one.
    samples : int
        Number of samples.
    seed : int
        Seed of the images.

    Returns
    -------
    str
        12 hexadecimal digits.
    """
    settings = {
        "benchmark": benchmark.name,
        "version": benchmark.version,
        "samples": samples,
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def draw(benchmark: Benchmark, seed: int, number: int) -> tuple[Row, ...]:
    """Draw one sample.

    Parameters
    ----------
    benchmark : Benchmark
        Of which benchmark.
    seed : int
        Non-negative seed of the benchmark.
    number : int
        Which sample, below ``MOST_SAMPLES``.

    Returns
    -------
    tuple of dict
        One row a table.
    """
    place = benchmark.place * MOST_SAMPLES + number
    return benchmark.sample(stream(Split.BENCHMARK, seed, place), number)


def content_hash(samples: Iterable[tuple[Row, ...]]) -> str:
    """Return a hash of samples: of their texts and of every pixel.

    Parameters
    ----------
    samples : iterable of tuple of dict
        As :func:`draw` gives them.

    Returns
    -------
    str
        12 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for sample in samples:
        for row in sample:
            texts = {name: value for name, value in row.items() if name != "image"}
            digest.update(json.dumps(texts, sort_keys=True).encode())
            if "image" in row:
                image: Image.Image = row["image"]
                digest.update(f"{image.mode} {image.size} ".encode() + image.tobytes())
    return digest.hexdigest()[:12]


def build(
    name: str, folder: Path, samples: int = DEFAULT_SAMPLES, seed: int = DEFAULT_SEED
) -> Path:
    """Return the folder of a benchmark in miniature, making it if it is not there yet.

    Parameters
    ----------
    name : str
        A key of ``BENCHMARKS``.
    folder : pathlib.Path
        Folder that holds all of them, made if missing.
    samples : int
        Number of samples, 1 to ``MOST_SAMPLES``.
    seed : int
        Non-negative seed of the images.

    Returns
    -------
    pathlib.Path
        A dataset folder for ``datasets.load_dataset``. It appears complete or not at all; one whose
        files are not as they were written is drawn again.

    Raises
    ------
    ValueError
        If the name is unknown, or ``samples`` or ``seed`` is out of range.
    """
    if name not in BENCHMARKS:
        raise UserError(f"no benchmark {name!r}; there is: {', '.join(BENCHMARKS)}")
    if not 1 <= samples <= MOST_SAMPLES or seed < 0:
        raise UserError(
            f"samples={samples}, seed={seed}: samples must lie between 1 and {MOST_SAMPLES},"
            " and seed must not be negative"
        )
    benchmark = BENCHMARKS[name]
    target = folder / f"{name}-{settings_key(benchmark, samples, seed)}"
    if target.exists() and _is_whole(target):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}-") as parent:
        if target.exists():
            logger.warning(f"{target}: not as it was written; it is drawn again")
            _take_away(target, Path(parent) / "broken")
        unfinished = Path(parent) / "dataset"
        _write(benchmark, unfinished, samples, seed)
        _move(unfinished, target)
    return target


def _digests(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _DIGESTS)
    return {
        str(path.relative_to(folder)): hashlib.sha256(read_bytes(path)).hexdigest()
        for path in paths
    }


@cache  # tasks are loaded anew for every cell
def _is_whole(target: Path) -> bool:
    """Whether a folder's files are as they were written."""
    try:
        return read_json(target / _DIGESTS) == _digests(target)
    except NotUnderstood:
        return False


def _take_away(target: Path, aside: Path) -> None:
    try:
        os.replace(target, aside)
    except FileNotFoundError:
        return  # another process was first
    _is_whole.cache_clear()
    shutil.rmtree(aside)


def _write(benchmark: Benchmark, folder: Path, samples: int, seed: int) -> None:
    numbers = tqdm(range(samples), desc=f"drawing {benchmark.name}", leave=False)
    rows = [draw(benchmark, seed, number) for number in numbers]
    for table, own in zip(benchmark.tables, zip(*rows, strict=True), strict=True):
        (folder / table.config).mkdir(parents=True)
        data = datasets.Dataset.from_list([_encoded(row) for row in own], table.features)
        data.to_parquet(folder / table.config / f"{table.split}-00000-of-00001.parquet")
    card = _CARD.format(
        configs="".join(_CONFIG.format(config=t.config, split=t.split) for t in benchmark.tables),
        title=benchmark.title,
        samples=samples,
        version=benchmark.version,
        seed=seed,
        content=content_hash(rows),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / _DIGESTS).write_text(json.dumps(_digests(folder), indent=1), encoding="utf-8")


def _encoded(row: Row) -> Row:
    """The row with its image as PNG; noise hardly shrinks, so the fastest level is enough."""
    if "image" not in row:
        return row
    file = io.BytesIO()
    row["image"].save(file, "PNG", compress_level=1)
    return {**row, "image": {"bytes": file.getvalue(), "path": None}}


def _move(unfinished: Path, target: Path) -> None:
    try:
        os.replace(unfinished, target)
    except OSError:
        # Another process was first, with the same content; anything else is a real failure.
        if not target.is_dir():
            raise
