"""Prompts that heads are measured on without labels: of tasks, of a folder of images, of a file.

A task's documents are apart from those that it is scored on, as far as it has such. What each was
is kept by its hash, which evaluation computes alike: `sparsemm_eval.engine.requests.Reading`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparsemm_eval.engine.generation import generation_options
from sparsemm_eval.engine.requests import (
    Request,
    Visual,
    check_template,
    open_image,
    truncated_images,
)
from sparsemm_eval.errors import UserError, check_int, one_line, printable, short_repr
from sparsemm_eval.heads.pages import read_image
from sparsemm_eval.methods.head_scores import provenance_file
from sparsemm_eval.paths import tasks_folder, write_whole
from sparsemm_eval.report.provenance import file_hash, provenance
from sparsemm_eval.stored import NotUnderstood, read_json_lines

if TYPE_CHECKING:
    from lmms_eval.tasks import TaskManager

    from sparsemm_eval.engine.checkpoint import Checkpoint
    from sparsemm_eval.families import Family
    from sparsemm_eval.methods import Sensitivity

DEFAULT_QUESTION = "Describe this image."
# Where an answer ends at the latest: what a head is needed for shows in its first words.
ANSWER_TOKENS = 64
# Of miniature benchmarks that are read and not scored; those that are scored are drawn with 0.
CALIBRATION_SEED = 1
_LONGEST_KIND = 100


@dataclass(frozen=True, eq=False)
class CalibrationPrompt:
    """One prompt, ready for the model.

    Parameters
    ----------
    kind : str
        Name of its task or its folder, or what its line says.
    prompt : str
        Through the chat template, placeholders of visuals included.
    visuals : tuple of Image or Video
        In the order of their placeholders; none of a prompt of text alone.
    options : mapping
        Of transformers' ``generate``: greedy, max_new_tokens, and pad_token_id where there is one.
    digest : str
        SHA-256 of what the document shows and asks, as evaluation computes it too.
    """

    kind: str
    prompt: str
    visuals: tuple[Visual, ...]
    options: Mapping[str, Any]
    digest: str


@dataclass(frozen=True, eq=False)
class Source:
    """The documents of one kind, not read yet.

    Parameters
    ----------
    kind : str
        Its name.
    requests : tuple of Request
        What is asked of each.
    where : str
        Which documents these are, for the record.
    apart : int, optional
        A run of so many of the task's first samples shares none of them; None where all of its
        samples are others.
    """

    kind: str
    requests: tuple[Request, ...]
    where: str
    apart: int | None = None


@dataclass(frozen=True, eq=False)
class Calibration:
    """All that is to be read.

    Parameters
    ----------
    data : str
        As it was named.
    sources : tuple of Source
        One a kind.
    """

    data: str
    sources: tuple[Source, ...]

    @property
    def total(self) -> int:
        """How many prompts there are."""
        return sum(len(source.requests) for source in self.sources)

    def prompts(
        self,
        checkpoint: Checkpoint,
        family: Family | None = None,
        max_new_tokens: int = ANSWER_TOKENS,
    ) -> Iterator[CalibrationPrompt]:
        """Prompts for a checkpoint, each kind in turn, so that one that stops has seen every kind.

        Parameters
        ----------
        checkpoint : Checkpoint
            Whose chat template goes around the questions.
        family : Family, optional
            The checkpoint's with its settings; default its plain one.
        max_new_tokens : int
            Where an answer ends at the latest; where a task's own limit is lower, there.

        Raises
        ------
        UserError
            For a chat template that fails, at once; for a document that cannot be read, when it is
            its turn.
        """
        check_int("max_new_tokens", max_new_tokens, least=1)
        family = checkpoint.family() if family is None else family
        processor = family.configure(checkpoint.processor)
        check_template(processor, checkpoint.pretrained, family)
        pad = processor.tokenizer.pad_token_id
        padding = {} if pad is None else {"pad_token_id": pad}
        in_turn = zip_longest(*(source.requests for source in self.sources))
        requests = (request for turn in in_turn for request in turn if request is not None)

        def read(request: Request) -> CalibrationPrompt:
            try:
                with truncated_images(False):
                    found = request.read(processor, family)
            except UserError as error:
                raise UserError(f"{request.task}, {request.document}: {error}") from error
            except Exception as error:  # a task's code on its data raises what it likes
                words = f"{type(error).__name__}: {one_line(error)}"
                raise UserError(
                    f"{request.task}, {request.document}: it cannot be read ({words}); calibrate "
                    "on other data"
                ) from error
            own, _ = generation_options(request.generation, max_new_tokens)
            least = min(dict(own)["max_new_tokens"], max_new_tokens)
            # Nothing of a task's sampling: the greedy answer is what a head's loss is measured on.
            options, _ = generation_options({"max_new_tokens": least})
            options = dict(options) | padding
            return CalibrationPrompt(
                request.task, found.prompt, found.visuals, options, found.digest
            )

        return map(read, requests)


def calibration_prompts(
    checkpoint: Checkpoint,
    data: str,
    count: int,
    *,
    family: Family | None = None,
    include_path: Sequence[Path] = (),
    question: str | None = None,
    max_new_tokens: int = ANSWER_TOKENS,
) -> Iterator[CalibrationPrompt]:
    """As `read_calibration` and `Calibration.prompts` in one."""
    calibration = read_calibration(data, count, include_path, question)
    return calibration.prompts(checkpoint, family, max_new_tokens)


def check_calibration(data: str, count: int, question: str | None = None) -> None:
    """Refuse what cannot be read, as far as it shows without lmms-eval and its tasks.

    Parameters
    ----------
    data, count, question
        As for `read_calibration`.

    Raises
    ------
    UserError
        In one sentence.
    """
    _own_data(data, count, question)


def _own_data(data: str, count: int, question: str | None) -> Calibration | None:
    """What is read of a folder or a file; None for names of tasks."""
    check_int("n", count, least=1)
    path = Path(data)
    # Names of many tasks may be longer than a path can be.
    is_folder = bool(data.strip()) and os.path.isdir(data)
    if question is not None and not is_folder:
        raise UserError(
            f"question={short_repr(question)}: it is put to each image of a folder, and data="
            f"{short_repr(data)} is none; tasks and JSONL files bring their own questions"
        )
    if question is not None and not question.strip():
        raise UserError(f"question={short_repr(question)}: it must have a word in it")
    if is_folder:
        return Calibration(data, (_folder(path, count, question or DEFAULT_QUESTION),))
    if data.strip() and os.path.exists(data):
        return Calibration(data, _file(path, count))
    if not _words(data) or "/" in data or path.suffix in (".json", ".jsonl"):
        raise UserError(
            f"data={data!r}: there is no such file or folder; give lmms-eval tasks, a folder of "
            "images or a JSONL file"
        )
    return None


def read_calibration(
    data: str, count: int, include_path: Sequence[Path] = (), question: str | None = None
) -> Calibration:
    """Find the documents of a data set; their images are not decoded yet.

    Parameters
    ----------
    data : str
        A folder of images, the path of a JSONL file, or names of lmms-eval tasks, comma-separated.
    count : int
        Documents of each kind at most.
    include_path : sequence of Path
        Folders of the user's own task files.
    question : str, optional
        What each image of a folder is asked; default `DEFAULT_QUESTION`.

    Raises
    ------
    UserError
        In one sentence: no such data, nothing in it, a line or an image that cannot be read, a task
        that is unknown or cannot be answered here.
    """
    if (own := _own_data(data, count, question)) is not None:
        return own
    from sparsemm_eval.engine.tasks import check_answerable, find_tasks

    tasks = _words(data)
    manager = find_tasks(tasks, include_path)
    for task in tasks:
        check_answerable(manager, task)
    return Calibration(data, tuple(_unscored(task, manager, count) for task in tasks))


def documents_hash(documents: Mapping[str, Iterable[str]]) -> str:
    """SHA-256 over the digests of all documents, kind by kind."""
    lines = [f"{kind} {digest}" for kind, digests in documents.items() for digest in digests]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def write_sensitivity(
    found: Sensitivity,
    path: Path,
    checkpoint: Checkpoint,
    calibration: Calibration,
    max_new_tokens: int,
    command: str,
) -> None:
    """Write a sensitivity file, and beside it how it was made.

    Parameters
    ----------
    found : Sensitivity
        What was measured on some or all of the prompts.
    path : Path
        Its file; provenance goes to ``<stem>.provenance.json``.
    checkpoint : Checkpoint
        The model.
    calibration : Calibration
        What there was to read.
    max_new_tokens : int
        Where answers ended at the latest.
    command : str
        What makes the file again.
    """
    found.write(path)
    offered = {source.kind: source for source in calibration.sources}
    beside = {
        "scores": path.name,
        "scores_sha256": file_hash(path),
        "checkpoint_hash": checkpoint.hash,
        "model_type": checkpoint.config.model_type,
        "dtype": checkpoint.dtype,
        "window": found.window,
        "budgets": sorted(found.tables),
        "max_new_tokens": max_new_tokens,
        "data": calibration.data,
        "data_sha256": documents_hash(found.documents),
        "kinds": {
            name: {
                "documents": len(set(kind.documents)),
                "of": len(offered[name].requests),
                "which": offered[name].where,
                "answer_tokens": kind.answer_tokens,
            }
            for name, kind in found.kinds.items()
        },
        **provenance(command),
    }
    write_whole(provenance_file(path), json.dumps(beside, indent=2) + "\n")


def warnings_of(calibration: Calibration) -> list[str]:
    """What evaluation must heed so that it shares no document, a sentence each kind."""
    sentences = []
    for source in calibration.sources:
        if source.apart is None:
            continue
        apart = (
            f"score its first {source.apart} samples at most (--limit {source.apart}, or "
            f"samples: {source.apart} in a grid)"
            if source.apart
            else "calibrate on fewer (-n), and score those that come before them"
        )
        sentences.append(
            f"{source.kind}: it was calibrated on {source.where}; {apart}, or tables will say how "
            "many are shared"
        )
    return sentences


def summary(found: Sensitivity, calibration: Calibration) -> str:
    """What was read, and how few heads hold most of what can be lost."""
    offered = {source.kind: len(source.requests) for source in calibration.sources}
    read = [f"{kind.prompts} of {offered[name]} of {name}" for name, kind in found.kinds.items()]
    share = np.sort(found.share(), axis=None)[::-1]
    few = [str(1 + int((np.cumsum(share) < part - 1e-9).sum())) for part in (0.5, 0.8, 0.95)]
    return (
        f"prompts: {', '.join(read)}; {', '.join(few)} of {share.size} KV heads hold 50, 80, 95% "
        "of the sensitivity"
    )


def _words(data: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in data.split(",") if part.strip()))


# --- tasks ---------------------------------------------------------------------------------------


def _unscored(task: str, manager: TaskManager, count: int) -> Source:
    """Documents of a task apart from those that it is scored on, as far as there are any.

    Of a miniature of ours they are drawn with `CALIBRATION_SEED`. Any other task's are of its
    training split; where it names none, they are the last of the split that is scored, as a run of
    some samples takes the first.
    """
    from sparsemm_eval.engine.tasks import load_task
    from sparsemm_eval.tiny.benchmarks import BENCHMARKS, DEFAULT_SEED

    loaded = load_task(task, manager)
    config, name = loaded.config, task.removesuffix("_mini")
    scored, training = config.test_split or config.validation_split, config.training_split
    apart = None
    if name in BENCHMARKS and Path(manager.task_index[task]["yaml_path"]).parent == tasks_folder():
        split, documents, numbers = "drawn", _Drawn(name), range(count)
        where = f"{count} drawn with seed {CALIBRATION_SEED}; the benchmark's is {DEFAULT_SEED}"
    elif training not in (None, scored) and training in loaded.dataset:
        split, documents = training, loaded.training_docs()
        numbers = range(min(count, len(documents)))
        where = f"the first {len(numbers)} of {len(documents)} of its training split, {split}"
    else:
        split, documents = scored, loaded.eval_docs
        numbers = range(max(len(documents) - count, 0), len(documents))
        where = f"the last {len(numbers)} of {len(documents)} of {split}, the split that is scored"
        apart = numbers.start
    if not numbers:
        raise UserError(f"{task}: there are no documents in {split}; calibrate on another task")
    asked = loaded.doc_to_messages, config.generation_kwargs or {}
    requests = (Request(task, f"{split} {n}", documents, n, *asked) for n in numbers)
    return Source(task, tuple(requests), where, apart)


@dataclass(frozen=True)
class _Drawn:
    """Documents of a miniature by number, drawn when asked for; the rows of its tables as one."""

    name: str

    def __getitem__(self, number: int) -> dict[str, Any]:
        from sparsemm_eval.tiny.benchmarks import BENCHMARKS, draw

        return dict(ChainMap(*draw(BENCHMARKS[self.name], CALIBRATION_SEED, number)))


# --- images and lines of one's own ---------------------------------------------------------------


def _folder(folder: Path, count: int, question: str) -> Source:
    """The first images of a folder by name, each with one question."""
    known = Image.registered_extensions()
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in known)
    except OSError as error:
        raise UserError(f"data={folder}: it cannot be listed ({error.strerror})") from error
    chosen = files[:count]
    if not chosen:
        raise UserError(f"data={folder}: it holds no images; give a folder of PNG or JPEG files")
    for path in chosen:
        _check_image(path, str(path))
    requests = (
        Request(_kind_of(folder.resolve().name), path.name, chosen, number, _asking(question), {})
        for number, path in enumerate(chosen)
    )
    where = f"the first {len(chosen)} of {len(files)} images by name, asked: {question}"
    return Source(_kind_of(folder.resolve().name), tuple(requests), where)


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    question: str = Field(pattern=r"\S")
    image: str | None = None
    kind: str | None = Field(None, pattern=r"\S", max_length=_LONGEST_KIND)


def _file(path: Path, count: int) -> tuple[Source, ...]:
    """The first lines of each kind: {"question": …, "image": path or none, "kind": … or none}."""
    # All lines before the first prompt: a fault in the last one must not cost hours.
    lines: dict[str, list[tuple[int, _Line]]] = {}
    try:
        for number, value in read_json_lines(path):
            line = _read_line(value, f"{path}:{number}")
            of_kind = lines.setdefault(_kind_of(line.kind or path.stem), [])
            if len(of_kind) == count:
                continue
            if line.image is not None:
                _check_image(path.parent / line.image, f"{path}:{number}: image {line.image}")
            of_kind.append((number, line))
    except NotUnderstood as error:
        words = str(error)  # "line 3: …", as all errors here name a line, or one of the whole file
        place = f"{path}:" if words.startswith("line ") else f"data={path}: "
        raise UserError(place + words.removeprefix("line ")) from error
    if not lines:
        raise UserError(
            f'data={path}: it has no lines; give lines such as {{"question": "What is it?", '
            '"image": "photo.png"}'
        )
    sources = []
    for kind, chosen in lines.items():
        documents = [(path.parent / one.image if one.image else None, one) for _, one in chosen]
        requests = (
            Request(kind, f"line {number}", documents, place, _line_messages, {})
            for place, (number, _) in enumerate(chosen)
        )
        where = f"the first {len(chosen)} lines of this kind"
        sources.append(Source(kind, tuple(requests), where))
    return tuple(sources)


def _read_line(value: Any, where: str) -> _Line:
    try:
        return _Line.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        words = "it must have a word in it" if "pattern" in first["type"] else first["msg"]
        raise UserError(f"{where}: {field or 'line'}: {words}") from error


def _kind_of(name: str) -> str:
    """A kind's name, which tables show: one short line."""
    return printable(" ".join(name.split()))[:_LONGEST_KIND]


def _asking(question: str) -> Any:
    return lambda path: _messages(path, question)


def _line_messages(document: tuple[Path | None, _Line]) -> list[dict]:
    return _messages(document[0], document[1].question)


def _messages(path: Path | None, question: str) -> list[dict]:
    content: list[dict] = []
    if path is not None:
        content.append({"type": "image", "url": read_image(path, str(path))})
    content.append({"type": "text", "text": question})
    return [{"role": "user", "content": content}]


def _check_image(path: Path, where: str) -> None:
    """Raise UserError unless a file begins as an image does; it is decoded when it is its turn."""
    try:
        with open_image(path):
            pass
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: it cannot be read ({one_line(error)})") from error
