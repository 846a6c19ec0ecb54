"""Public benchmarks in miniature: drawn pages in a benchmark's own schema, built on first use.

A folder of this kind stands in for the download: lmms-eval's task reads the same columns from it,
and its metric scores the same fields.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
from tqdm import tqdm

from .documents import PAGE, Layout, Split, draw_document, stream, value_question

DEFAULT_SAMPLES = 200
DEFAULT_SEED = 0


@dataclass(frozen=True)
class Benchmark:
    """How one benchmark is made in miniature.

    Attributes
    ----------
    name : str
        Its name here, also the beginning of its folder's name.
    title : str
        Its name in prose.
    config, split : str
        Names under which ``datasets.load_dataset`` finds it.
    features : datasets.Features
        Its columns.
    sample : callable
        Makes the sample of a seed and a number.
    version : int
        Raised whenever other samples come out of the same settings.
    layout : Layout
        Shape of the pages.
    """

    name: str
    title: str
    config: str
    split: str
    features: datasets.Features
    sample: Callable[[int, int, Layout], dict[str, Any]]
    version: int
    layout: Layout = PAGE


def _docvqa_sample(seed: int, number: int, layout: Layout) -> dict[str, Any]:
    rng = stream(Split.BENCHMARK, seed, number)
    document = draw_document(rng, layout)
    question = value_question(document, int(rng.integers(len(document.entries))))
    return {
        "questionId": str(number),
        "question": question.prompt,
        "question_types": ["form"],
        # Grey holds all there is, in a third of the space.
        "image": document.image.convert("L"),
        "docId": number,
        "ucsf_document_id": f"drawn-{seed}-{number}",
        "ucsf_document_page_no": "1",
        "answers": [question.answer],
        "data_split": "val",
    }


_DOCVQA = Benchmark(
    name="docvqa",
    title="DocVQA",
    config="DocVQA",
    split="validation",
    features=datasets.Features(
        {
            "questionId": datasets.Value("string"),
            "question": datasets.Value("string"),
            "question_types": datasets.List(datasets.Value("string")),
            "image": datasets.Image(),
            "docId": datasets.Value("int64"),
            "ucsf_document_id": datasets.Value("string"),
            "ucsf_document_page_no": datasets.Value("string"),
            "answers": datasets.List(datasets.Value("string")),
            "data_split": datasets.Value("string"),
        }
    ),
    sample=_docvqa_sample,
    version=1,
)

BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in (_DOCVQA,)}

_CARD = """---
configs:
- config_name: {config}
  data_files:
  - split: {split}
    path: data/{split}-*.parquet
---

# {title} in miniature

{samples} drawn pages of `KEY:VALUE` entries, one question each, in the columns of {title}. Made by
`sparsemm_eval.tiny.benchmarks`, version {version}, seed {seed}. The pages come from a stream of
random numbers that no training run uses. Scores on them say nothing about {title} itself.
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
        Seed of the pages.

    Returns
    -------
    str
        12 hexadecimal digits.
    """
    settings = {
        "benchmark": benchmark.name,
        "version": benchmark.version,
        "layout": asdict(benchmark.layout),
        "samples": samples,
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


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
        Number of samples, at least 1.
    seed : int
        Non-negative seed of the pages.

    Returns
    -------
    pathlib.Path
        A dataset folder for ``datasets.load_dataset``. It appears complete or not at all.

    Raises
    ------
    ValueError
        If the name is unknown, or ``samples`` or ``seed`` is out of range.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"no benchmark {name!r}; there is: {', '.join(BENCHMARKS)}")
    if samples < 1 or seed < 0:
        raise ValueError(f"samples must be positive and seed not negative: {samples}, {seed}")
    benchmark = BENCHMARKS[name]
    target = folder / f"{name}-{settings_key(benchmark, samples, seed)}"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}-") as parent:
        unfinished = Path(parent) / "dataset"
        _write(benchmark, unfinished, samples, seed)
        _move(unfinished, target)
    return target


def _write(benchmark: Benchmark, folder: Path, samples: int, seed: int) -> None:
    data = folder / "data"
    data.mkdir(parents=True)
    numbers = tqdm(range(samples), desc=f"drawing {benchmark.name}", leave=False)
    drawn = [benchmark.sample(seed, number, benchmark.layout) for number in numbers]
    table = datasets.Dataset.from_list(drawn, features=benchmark.features)
    table.to_parquet(data / f"{benchmark.split}-00000-of-00001.parquet")
    card = _CARD.format(
        config=benchmark.config,
        split=benchmark.split,
        title=benchmark.title,
        samples=samples,
        version=benchmark.version,
        seed=seed,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _move(unfinished: Path, target: Path) -> None:
    try:
        os.replace(unfinished, target)
    except OSError:
        # Another process was first, with the same content; anything else is a real failure.
        if not target.is_dir():
            raise


def docvqa(folder: Path, samples: int = DEFAULT_SAMPLES, seed: int = DEFAULT_SEED) -> Path:
    """Return DocVQA in miniature: pages asked for one value each; see :func:`build`.

    Parameters
    ----------
    folder : pathlib.Path
        Folder that holds the datasets.
    samples : int
        Number of pages.
    seed : int
        Seed of the pages.

    Returns
    -------
    pathlib.Path
        Dataset folder: ``load_dataset(path, name="DocVQA", split="validation")``.
    """
    return build("docvqa", folder, samples, seed)
