"""Requests to batches to answers, for one checkpoint and many cells."""

from __future__ import annotations

import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from loguru import logger
from transformers import BatchFeature

from sparsemm_eval import __version__
from sparsemm_eval.engine.answers import Answer, AnswerStore, SampleFailures, answer_key
from sparsemm_eval.engine.cell import Cell
from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.decode import Decoded, decode, not_finite_words, score
from sparsemm_eval.engine.decoder import release
from sparsemm_eval.engine.generation import cut, generation_options
from sparsemm_eval.engine.memory import (
    free_memory,
    out_of_memory,
    plan_micro_batches,
    token_bytes,
)
from sparsemm_eval.engine.requests import (
    Memo,
    Reading,
    Request,
    Sample,
    check_template,
    model_inputs,
    to_model,
    truncated_images,
)
from sparsemm_eval.errors import UserError, one_line
from sparsemm_eval.families import Family, family_digest
from sparsemm_eval.methods import method_digest

# So many first samples that fail alike, a whole batch at least, are no samples' fault.
_ALIKE = 3
# What a sample may raise while it is decoded, by what its data does. Everything else, such as a
# TypeError, is an error of this program and ends the run.
_SAMPLE_ERRORS = (ArithmeticError, LookupError, MemoryError, OSError, RuntimeError, ValueError)


@dataclass(frozen=True)
class Answers:
    """A cell's answers to requests.

    Parameters
    ----------
    answers : list of Answer
        In the order of the requests; failures too.
    computed : frozenset of str
        Keys of those that were not there before.
    digests : mapping
        By task and document: `Reading.digest` of those that could be read.
    """

    answers: list[Answer]
    computed: frozenset[str]
    digests: Mapping[tuple[str, str], str]

    @property
    def failed(self) -> list[Answer]:
        """Failures, each once: lmms-eval may ask for a sample more than once."""
        by_key = {answer.key: answer for answer in self.answers if answer.error is not None}
        return list(by_key.values())


class AllFailed(RuntimeError):
    """The first samples failed alike: a fault of the program or the machine, with its traceback."""


class Runner:
    """Answers requests for cells; those that read alike read each prompt once for all of them.

    Parameters
    ----------
    checkpoint : Checkpoint
        Whose weights are loaded when the first answer is to be computed.
    cells : sequence of Cell
        Whose answers are asked for.
    store : AnswerStore
        Where answers are looked for and put.
    family : Family
        The checkpoint's, with its settings.
    batch_size : int
        Samples that are read together.
    backend, cuda_graph : str
        As `sparsemm_eval.engine.decode.decode` takes them.
    truncated_images : bool
        Take images whose files are cut off, what is missing of them grey, instead of failing.
    allow_failed : int
        So many samples of a task may fail, and its score is made without them.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        cells: Sequence[Cell],
        store: AnswerStore,
        family: Family,
        batch_size: int = 1,
        backend: str = "auto",
        cuda_graph: str = "auto",
        truncated_images: bool = False,
        allow_failed: int = 0,
    ) -> None:
        self.checkpoint, self.cells, self.store = checkpoint, tuple(cells), store
        self.family, self.batch_size = family, batch_size
        self.backend, self.cuda_graph = backend, cuda_graph
        self.truncated_images, self.allow_failed = truncated_images, allow_failed
        self.processor = family.configure(checkpoint.processor)
        check_template(self.processor, checkpoint.pretrained, family)
        self.memo = Memo()

    def words(self, cell: Cell, task: str) -> str:
        """A cell on a task, as its answers name it."""
        return f"{self.family.lmms_name} {task} {cell}"

    def key(self, cell: Cell, parts: Mapping[str, Any]) -> str:
        """Key of an answer: all that decides its text, and nothing else."""
        method = cell.method
        plugins = [method_digest(method.name), family_digest(type(self.family))]
        plugin = ":".join(digest for digest in plugins if digest is not None)
        return answer_key(
            {
                "version": __version__,
                "model": self.family.lmms_name,
                "checkpoint": self.checkpoint.hash,
                "dtype": self.checkpoint.dtype,
                "family": self.family.keyed,
                "method": method.name,
                "settings": method.settings,
                # Only where there is one: a key without is as old as the answers.
                **({"mask": cell.mask.settings} if cell.mask is not None else {}),
                **({"plugin": plugin} if plugin else {}),
                **({"truncated_images": True} if self.truncated_images else {}),
                **parts,
            }
        )

    def answer(
        self,
        requests: Iterable[Request],
        cells: Sequence[Cell] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Answers]:
        """Answer requests under cells, from disk where an answer is there already.

        Parameters
        ----------
        requests : iterable of Request
            Read one by one: few images are held.
        cells : sequence of Cell, optional
            Some of the runner's; default all.
        progress : callable, optional
            Called whenever answers are on disk that were not before, with how many.

        Returns
        -------
        list of Answers
            One a cell.

        Raises
        ------
        UserError, AllFailed
            If the first samples all fail alike, out of memory or otherwise, or a task's
            generation_kwargs cannot be. What others' code raises on a document's data is that
            sample's failure; what decoding raises and no data can do, such as a TypeError, is
            raised as it is.
        """
        chosen = self.cells if cells is None else tuple(cells)
        # Two shares of heads may silence the same: cells that are equal are answered once.
        unlike = tuple(dict.fromkeys(chosen))
        run = _Pass(self, unlike, progress or (lambda count: None))
        for request in requests:
            run.add(request)
        answered = dict(zip(unlike, run.finish(), strict=True))
        return [answered[cell] for cell in chosen]

    def read_batch(self, samples: Sequence[Sample]) -> BatchFeature:
        """Samples through the processor, padded on the left, where the model lies."""
        prompts = [sample.prompt for sample in samples]
        visuals = [sample.visuals for sample in samples]
        inputs = model_inputs(self.processor, self.family, prompts, visuals)
        return to_model(inputs, self.checkpoint.model)

    def decode_batch(
        self, samples: Sequence[Sample], inputs: BatchFeature, cells: Sequence[Cell]
    ) -> list[Decoded]:
        """Decode samples of equal options under cells of equal masks, read together."""
        pad = self.processor.tokenizer.pad_token_id
        options = {"pad_token_id": pad} if pad is not None else {}
        options |= dict(samples[0].options)
        methods = [cell.method for cell in cells]
        how = (self.backend, cells[0].mask, self.cuda_graph)
        candidates = [sample.candidates for sample in samples]
        if any(candidates):
            return score(self.checkpoint.model, inputs, methods, candidates, options, *how)
        return decode(self.checkpoint.model, inputs, methods, options, *how)


class _Pass:
    """One pass over requests, for some cells of a runner."""

    def __init__(
        self, runner: Runner, cells: tuple[Cell, ...], progress: Callable[[int], None]
    ) -> None:
        self.runner, self.cells, self.progress = runner, cells, progress
        # By cell: answers by key, keys in the order of requests, keys that were computed here.
        self.answers: list[dict[str, Answer]] = [{} for _ in cells]
        self.order: list[list[str]] = [[] for _ in cells]
        self.computed: list[set[str]] = [set() for _ in cells]
        self.queued: list[set[str]] = [set() for _ in cells]
        self.digests: dict[tuple[str, str], str] = {}  # of documents, by task and document
        self.words: dict[str, list[str]] = {}  # of the cells, by task
        self.repeats: Counter[str] = Counter()
        # Samples by generation settings, the cells that lack them, and whether they are scored.
        self.waiting: dict[tuple, list[Sample]] = defaultdict(list)
        self.most_batches = 1
        # Causes of the samples that failed before the first answer; None after it.
        self.alike: list[_Failure] | None = []

    def add(self, request: Request) -> None:
        """Take a request; a full batch is computed at once, so that few images are held."""
        self._open(request.task)
        # The task's settings, no document's: what cannot be ends the run.
        options, until = generation_options(request.generation, self.runner.family.max_new_tokens)
        memo, chat = self.runner.memo, None
        known = memo.find(request)
        if known is None:
            if (chat := self._read(request)) is None:
                return
            known = _parts(request, chat, options, until), chat.digest
            memo.keep(request, *known)
        parts, self.digests[request.task, request.document] = known
        parts = self._numbered(parts)
        keys = [self.runner.key(cell, parts) for cell in self.cells]
        lacking = tuple(
            place
            for place, key in enumerate(keys)
            if key not in self.answers[place] and key not in self.queued[place]
        )
        if lacking and chat is None and (chat := self._read(request)) is None:
            return
        for place, key in enumerate(keys):
            self.order[place].append(key)
        if not lacking:
            return
        for place in lacking:
            self.queued[place].add(keys[place])
        alike = options, lacking, bool(chat.candidates)
        batch = self.waiting[alike]
        read = chat.prompt, chat.visuals
        made = options, until, parts, chat.candidates
        batch.append(Sample(request.task, request.document, *read, *made))
        if len(batch) == self.runner.batch_size:
            self._compute(self.waiting.pop(alike), lacking)

    def finish(self) -> list[Answers]:
        """Compute what waits; each cell's answers in the order of the requests."""
        for alike in list(self.waiting):
            _, lacking, _ = alike
            self._compute(self.waiting.pop(alike), lacking)
        self.runner.store.close()
        return [
            Answers([answers[key] for key in order], frozenset(computed), self.digests)
            for answers, order, computed in zip(
                self.answers, self.order, self.computed, strict=True
            )
        ]

    def _open(self, task: str) -> None:
        """Look up what cells have answered of a task."""
        if task in self.words:
            return
        self.words[task] = [self.runner.words(cell, task) for cell in self.cells]
        stored = 0
        for words, answers in zip(self.words[task], self.answers, strict=True):
            of_cell = self.runner.store.read(words)
            answers.update(of_cell)
            stored += len(of_cell)
        if stored:
            whose = "this cell" if len(self.cells) == 1 else f"these {len(self.cells)} cells"
            logger.info(
                f"{task}: {stored} answers of {whose} are in {self.runner.store.folder}; "
                "those that fit are used and not computed again"
            )

    def _read(self, request: Request) -> Reading | None:
        """A request's document; None if the sample failed."""
        try:
            with truncated_images(self.runner.truncated_images):
                return request.read(self.runner.processor, self.runner.family)
        # Others' code on the document's data: whatever it raises is about this sample. Were it
        # about all of them, the first would fail alike.
        except Exception as error:  # noqa: BLE001
            self._fail_reading(request, _Failure.of(error))
            return None

    def _numbered(self, parts: Mapping[str, Any]) -> Mapping[str, Any]:
        """What a request is made of: one that is sampled again asks for another draw."""
        if not dict(parts["generation"])["do_sample"]:
            return parts
        same = answer_key(parts)
        self.repeats[same] += 1
        return {**parts, "repeat": self.repeats[same]}

    def _compute(self, samples: list[Sample], places: tuple[int, ...]) -> None:
        """Answer a batch under cells, those of equal masks together."""
        # Outside of what a sample may raise: neither a folder that cannot be written to, which is
        # found before weights load, nor weights that cannot be loaded are a sample's fault.
        self.runner.store.write([])
        self.runner.checkpoint.load()
        by_mask: dict[Any, list[int]] = defaultdict(list)
        for place in places:
            by_mask[self.cells[place].mask].append(place)
        for alike in by_mask.values():
            self._answer(samples, alike)
        self._stop_if_all_fail()

    def _answer(self, samples: list[Sample], places: list[int]) -> None:
        """Answer samples under cells, in micro-batches that fit into memory."""
        try:
            inputs = self.runner.read_batch(samples)
        # The processor's code on the samples' data: whatever it raises is about them.
        except Exception as error:  # noqa: BLE001
            failure = _Failure.of(error)
        else:
            for part in self._plan(samples, places, inputs):
                self._answer_part(samples, part, inputs)
            return
        self._halve(samples, places, failure)

    def _plan(
        self, samples: list[Sample], places: list[int], inputs: BatchFeature
    ) -> list[list[int]]:
        """Cells that are decoded together; each micro-batch reads the prompts again."""
        weights = self.runner.checkpoint.model
        lengths = inputs["attention_mask"].sum(1).tolist()
        new_tokens = dict(samples[0].options)["max_new_tokens"]
        if any(sample.candidates for sample in samples):  # each is a row of its own
            rows = zip(lengths, samples, strict=True)
            lengths = [length for length, sample in rows for _ in sample.candidates]
            new_tokens = max(len(one) for sample in samples for one in sample.candidates)
        batches = plan_micro_batches(
            [self.cells[place].method for place in places],
            lengths,
            new_tokens,
            token_bytes(weights),
            free_memory(weights),
        )
        if len(batches) > self.most_batches:
            self.most_batches = len(batches)
            logger.info(
                f"memory for {len(samples)} samples under {len(places)} methods is short: they "
                f"are decoded in {len(batches)} micro-batches, and each reads the prompts again"
            )
        return [[places[number] for number in batch] for batch in batches]

    def _answer_part(self, samples: list[Sample], places: list[int], inputs: BatchFeature) -> None:
        """Answer samples under cells that are decoded together."""
        cells = [self.cells[place] for place in places]
        try:
            decoded = self.runner.decode_batch(samples, inputs, cells)
        except _SAMPLE_ERRORS as error:
            failure = _Failure.of(error)
        else:
            self._note_not_finite(samples, places, decoded)
            self._store(
                [
                    (place, self._one_answer(place, sample, of_method, row))
                    for place, of_method in zip(places, decoded, strict=True)
                    for row, sample in enumerate(samples)
                ]
            )
            return
        # Not in the handler: until it is left, the failed attempt's tensors are held.
        release(self.runner.checkpoint.model)
        if not failure.of_memory or len(places) == 1:
            self._halve(samples, places, failure)
            return
        torch.cuda.empty_cache()
        logger.warning(
            f"out of memory with {len(samples)} samples under {len(places)} methods; trying half "
            "the methods at a time"
        )
        half = (len(places) + 1) // 2
        self._answer_part(samples, places[:half], inputs)
        self._answer_part(samples, places[half:], inputs)

    def _halve(self, samples: list[Sample], places: list[int], failure: _Failure) -> None:
        """Try halves of samples that failed, until the one at fault stands alone."""
        torch.cuda.empty_cache()
        if len(samples) > 1:
            logger.warning(f"a batch of {len(samples)} failed ({failure.words}); trying halves")
            half = len(samples) // 2
            self._answer(samples[:half], places)
            self._answer(samples[half:], places)
            return
        (sample,) = samples
        if self.alike is not None:
            self.alike.append(failure)
        whose = "" if len(places) == len(self.cells) else self._whose(places)
        logger.error(f"{sample.task} {sample.doc_id} failed{whose}: {failure.words}")
        self._store(
            [
                (place, self._failed(place, sample.task, sample.doc_id, key, failure.words))
                for place in places
                for key in (self.runner.key(self.cells[place], sample.parts),)
            ]
        )

    def _note_not_finite(
        self, samples: list[Sample], places: list[int], decoded: Sequence[Decoded]
    ) -> None:
        """Say which samples have no answer because the model's numbers are none."""
        for row, sample in enumerate(samples):
            at = {
                place: of_method.not_finite[row]
                for place, of_method in zip(places, decoded, strict=True)
                if of_method.not_finite[row] is not None
            }
            if not at:
                continue
            words = not_finite_words(self.runner.checkpoint.model, min(at.values()))
            if self.alike is not None:
                self.alike.append(_Failure(words, of_memory=False, of_user=True, trace=""))
            whose = "" if len(at) == len(self.cells) else self._whose([*at])
            logger.error(f"{sample.task} {sample.doc_id} failed{whose}: {words}")

    def _stop_if_all_fail(self) -> None:
        """End the run if its first samples failed alike: that is no sample's fault."""
        # Those that wait have not failed yet, and so many may fail as the user says.
        enough = max(_ALIKE, self.runner.batch_size, self.runner.allow_failed + 1)
        if self.waiting or self.alike is None or len(self.alike) < enough:
            return
        if len({failure.words for failure in self.alike}) > 1:
            return
        (first, *_) = self.alike
        if first.of_memory:
            raise UserError(
                f"each of the first samples ran out of memory ({first.words}), alone and under "
                "one method: choose a smaller model or smaller images, or give it more memory"
            )
        if first.of_user:
            words = first.words.removeprefix("UserError: ")
            raise UserError(f"{', '.join(self.words)}: {words}")
        raise AllFailed(
            f"the first {len(self.alike)} samples all failed alike, so that the run stops:\n"
            f"{first.trace}"
        )

    def _whose(self, places: Sequence[int]) -> str:
        return f" under {', '.join(str(self.cells[place]) for place in places)}"

    def _one_answer(self, place: int, sample: Sample, decoded: Decoded, row: int) -> Answer:
        cell = self.cells[place]
        key = self.runner.key(cell, sample.parts)
        if (token := decoded.not_finite[row]) is not None:
            words = not_finite_words(self.runner.checkpoint.model, token)
            return self._failed(place, sample.task, sample.doc_id, key, words)
        tokens = decoded.tokens[row].tolist()
        text = self.runner.processor.tokenizer.decode(tokens, skip_special_tokens=True)
        rows = len(decoded.tokens)
        record = {
            "prompt_tokens": decoded.prompt_tokens[row],
            "new_tokens": len(tokens),
            "tokens": tokens,
            "kl_full": decoded.kl_full[row],
            "kept_per_head": decoded.kept[row].double().mean().item(),
            "kept_bytes": decoded.kept_bytes[row],
            "cache_bytes": decoded.cache_bytes[row],
            "seconds": decoded.seconds / rows,
            "backend": decoded.backend,
            "batch_size": rows,
            "device": str(self.runner.checkpoint.model.device),
        }
        if sample.candidates:
            record["candidates"] = [asdict(one) for one in decoded.candidates[row]]
        if cell.mask is not None:
            record["masked_heads"] = cell.mask.settings
        return Answer(
            key,
            self.words[sample.task][place],
            sample.task,
            sample.doc_id,
            cut(text, sample.until).strip(),
            None,
            record,
        )

    def _fail_reading(self, request: Request, failure: _Failure) -> None:
        """Note a sample that has no prompt, and so no key of its own."""
        cause = failure.words
        logger.error(f"{request.task} {request.document} failed: {cause}")
        if self.alike is not None:
            self.alike.append(failure)
        failed = []
        for place, words in enumerate(self.words[request.task]):
            key = answer_key({"failed": [request.task, request.document], "cell": words})
            self.order[place].append(key)
            answer = self._failed(place, request.task, request.document, key, cause)
            failed.append((place, answer))
        self._store(failed)
        self._stop_if_all_fail()

    def _failed(self, place: int, task: str, document: str, key: str, cause: str) -> Answer:
        return Answer(key, self.words[task][place], task, document, None, cause)

    def _store(self, answers: list[tuple[int, Answer]]) -> None:
        """Put answers, each with its cell's place, on disk."""
        self.runner.store.write([answer for _, answer in answers])
        for place, answer in answers:
            self.answers[place][answer.key] = answer
            self.computed[place].add(answer.key)
        finished = sum(answer.error is None for _, answer in answers)
        if finished:
            self.alike = None
        self.progress(finished)


@dataclass(frozen=True)
class _Failure:
    """Why an attempt failed, without the tensors that its traceback holds."""

    words: str
    of_memory: bool
    of_user: bool  # something the user can mend
    trace: str

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        words = f"{type(error).__name__}: {one_line(error)}"
        trace = "".join(traceback.format_exception(error))
        return cls(words, out_of_memory(error), isinstance(error, UserError), trace)


def _parts(
    request: Request,
    chat: Reading,
    options: tuple[tuple[str, Any], ...],
    until: tuple[str, ...],
) -> dict[str, Any]:
    """All that decides an answer beside the cell."""
    return {
        "prompt": chat.prompt,
        "images": list(chat.hashes),
        "repeat": 0,
        "task": request.task,
        "document": request.document,
        "generation": [list(option) for option in options],
        "until": until,
        # Only where there are any: a key without is as old as the answers.
        **({"candidates": chat.candidates} if chat.candidates else {}),
    }


def raise_failures(
    answered: Sequence[Answers], store: AnswerStore, world_size: int, allowed: int = 0
) -> None:
    """Raise on every rank if samples failed on any: no rank may wait for one that is gone.

    Parameters
    ----------
    answered : sequence of Answers
        One a cell.
    store : AnswerStore
        Where the others are safe.
    world_size : int
        Ranks that run together.
    allowed : int
        So many samples of each task may fail.

    Raises
    ------
    SampleFailures
        Naming the first of them, and how many there are.
    """
    failed: dict[tuple[str, str], str] = {}
    for answers in answered:
        for failure in answers.failed:
            failed.setdefault((failure.task, failure.doc_id), str(failure.error))
    if world_size > 1:
        # Not accelerate's gather_object: under torchrun on CPUs it gathers nothing.
        gathered: list[dict[tuple[str, str], str]] = [{} for _ in range(world_size)]
        torch.distributed.all_gather_object(gathered, failed)
        failed = {at: cause for of_rank in gathered for at, cause in of_rank.items()}
    of_task = Counter(task for task, _ in failed)
    if any(count > allowed for count in of_task.values()):
        (task, document), cause = next(iter(failed.items()))
        more = f" (allow_failed={allowed})" if allowed else ""
        raise SampleFailures(
            f"{len(failed)} samples failed{more}, so no score is written; the others are safe in "
            f"{store.folder} and are not computed again. First: {task} {document}: {cause}"
        )
