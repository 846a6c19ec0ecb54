"""One generate_until: requests to batches to answers, for one model and those that read alike."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lmms_eval.api.instance import Instance
from loguru import logger
from PIL import Image
from transformers import BatchFeature

from sparsemm_eval.engine.answers import Answer, answer_key
from sparsemm_eval.engine.decode import Decoded, shares_prompt
from sparsemm_eval.engine.graph import release
from sparsemm_eval.engine.samples import (
    SAMPLE_ERRORS,
    Sample,
    cut,
    generation_options,
    image_hash,
    read_chat,
)
from sparsemm_eval.engine.waves import free_memory, out_of_memory, plan_waves, token_bytes
from sparsemm_eval.errors import one_line

if TYPE_CHECKING:
    from sparsemm_eval.engine.wrapper import SparseMMModel


class Run:
    """One generate_until: finds, batches and computes answers.

    Parameters
    ----------
    model : SparseMMModel
        Whose requests they are; its fellows' answers are computed along.
    """

    def __init__(self, model: SparseMMModel) -> None:
        self.model = model
        self.answers: dict[str, Answer] = {}
        self.computed: set[str] = set()
        self.order: list[str] = []
        self.cells: dict[str, str] = {}
        self.repeats: Counter[str] = Counter()
        self.waiting: dict[tuple, list[Sample]] = defaultdict(list)
        self.queued: set[str] = set()
        # Keys of the answers that fellows have, by (fellow's place, task).
        self.theirs: dict[tuple[int, str], set[str]] = {}
        self.waves = 1

    def add(self, request: Instance) -> None:
        """Take a request; a full batch is computed at once, so that few images are held."""
        _, _, gen_kwargs, doc_id, task, split = request.args
        self._open_cell(task)
        document = f"{split} {doc_id}"
        try:
            options, until = generation_options(gen_kwargs)
            parts = self.model.memo.find(self._documents(request), document, task, gen_kwargs)
            chat = None
            if parts is None:
                chat = self._read(request)
                parts = {
                    "prompt": chat[0],
                    "images": [image_hash(image) for image in chat[1]],
                    "repeat": 0,
                    "task": task,
                    "document": document,
                    "generation": [list(option) for option in options],
                    "until": until,
                }
                self.model.memo.keep(self._documents(request), document, task, gen_kwargs, parts)
            parts, key = self._numbered(parts)
            is_new = key not in self.answers and key not in self.queued
            if is_new and chat is None:
                chat = self._read(request)
        except SAMPLE_ERRORS as error:
            key = answer_key({"failed": [task, split, doc_id], "cell": self.cells[task]})
            self.order.append(key)
            self._fail(key, task, document, _words(error))
            return
        self.order.append(key)
        if not is_new:
            return
        batch = self.waiting[options]
        batch.append(Sample(task, document, *chat, options, until, key, parts))
        self.queued.add(key)
        if len(batch) == self.model.batch_size:
            self._compute(self.waiting.pop(options))

    def finish(self) -> list[Answer]:
        """Compute what waits; the answers in the order of their requests."""
        for batch in self.waiting.values():
            self._compute(batch)
        self.model.store.close()
        return [self.answers[key] for key in self.order]

    def _open_cell(self, task: str) -> None:
        if task in self.cells:
            return
        self.cells[task] = self.model.cell_of(task)
        found = self.model.store.read(self.cells[task])
        self.answers.update(found)
        if found and self.model.rank == 0:
            logger.info(
                f"{task}: {len(found)} answers of this cell are in {self.model.store.folder}; "
                "those that fit are used and not computed again"
            )

    def _documents(self, request: Instance) -> Any:
        """The data set that a request is about."""
        *_, task, split = request.args
        return self.model.task_dict[task][split]

    def _read(self, request: Instance) -> tuple[str, tuple[Image.Image, ...]]:
        """Prompt and images of a request."""
        _, doc_to_messages, _, doc_id, _, _ = request.args
        document = self._documents(request)[doc_id]
        return read_chat(self.model.processor, doc_to_messages(document))

    def _numbered(self, parts: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
        """What a request of these parts is made of, and its key."""
        key = self.model.key_of_parts(parts)
        if dict(parts["generation"])["do_sample"]:
            # The same request again asks for another draw, not for the same one.
            self.repeats[key] += 1
            parts = {**parts, "repeat": self.repeats[key]}
            key = self.model.key_of_parts(parts)
        return parts, key

    def _compute(self, samples: list[Sample]) -> None:
        """Answer a batch, for the fellows too that lack it."""
        # Outside of what a sample may raise: weights that cannot be loaded are no sample's fault.
        self.model.checkpoint.load()
        self._answer(samples, [self.model, *self._lacking(samples)])

    def _answer(self, samples: list[Sample], models: list[SparseMMModel]) -> None:
        """Answer samples under models, in waves that fit into memory."""
        try:
            inputs = self.model.read_batch(samples)
        except SAMPLE_ERRORS as error:
            failure = _Failure(_words(error), out_of_memory(error))
        else:
            for wave in self._plan(samples, models, inputs):
                self._answer_wave(samples, wave, inputs)
            return
        self._halve(samples, models, failure)

    def _plan(
        self, samples: list[Sample], models: list[SparseMMModel], inputs: BatchFeature
    ) -> list[list[SparseMMModel]]:
        """Models that are decoded together; each wave reads the prompts again."""
        weights = self.model.checkpoint.model
        waves = plan_waves(
            [model.method for model in models],
            inputs["attention_mask"].sum(1).tolist(),
            dict(samples[0].options)["max_new_tokens"],
            token_bytes(weights),
            free_memory(weights),
        )
        if len(waves) > self.waves:
            self.waves = len(waves)
            logger.info(
                f"memory for {len(samples)} samples under {len(models)} methods is short: they "
                f"are decoded in {len(waves)} waves, and each reads the prompts again"
            )
        return [[models[place] for place in wave] for wave in waves]

    def _answer_wave(
        self, samples: list[Sample], models: list[SparseMMModel], inputs: BatchFeature
    ) -> None:
        """Answer samples under models that are decoded together."""
        try:
            decoded = self.model.decode_batch(samples, inputs, [model.method for model in models])
        except SAMPLE_ERRORS as error:
            failure = _Failure(_words(error), out_of_memory(error))
        else:
            answers = [
                self._one_answer(model, sample, found, row)
                for model, found in zip(models, decoded, strict=True)
                for row, sample in enumerate(samples)
            ]
            self._store(answers)
            return
        # Not in the handler: until it is left, the failed attempt's tensors are held.
        release(self.model.checkpoint.model)
        if not failure.of_memory or len(models) == 1:
            self._halve(samples, models, failure)
            return
        torch.cuda.empty_cache()
        logger.warning(
            f"out of memory with {len(samples)} samples under {len(models)} methods; trying half "
            "the methods at a time"
        )
        half = (len(models) + 1) // 2
        self._answer_wave(samples, models[:half], inputs)
        self._answer_wave(samples, models[half:], inputs)

    def _halve(self, samples: list[Sample], models: list[SparseMMModel], failure: _Failure) -> None:
        """Try halves of samples that failed, until the one at fault stands alone."""
        torch.cuda.empty_cache()
        if len(samples) > 1:
            logger.warning(f"a batch of {len(samples)} failed ({failure.words}); trying halves")
            half = len(samples) // 2
            self._answer(samples[:half], models)
            self._answer(samples[half:], models)
            return
        (sample,) = samples
        if self.model in models:
            self._fail(sample.key, sample.task, sample.doc_id, failure.words)
        else:
            # Its fellow asks for it again, and it counts as failed there.
            cells = ", ".join(model.cell for model in models)
            logger.warning(f"{sample.task} {sample.doc_id} failed under {cells}: {failure.words}")

    def _lacking(self, samples: Sequence[Sample]) -> list[SparseMMModel]:
        """Fellows that have not answered all of these samples yet."""
        if not shares_prompt(dict(samples[0].options)):
            return []
        return [
            fellow
            for place, fellow in enumerate(self.model.fellows)
            if not all(
                fellow.key_of_parts(sample.parts) in self._found(place, sample.task)
                for sample in samples
            )
        ]

    def _found(self, place: int, task: str) -> set[str]:
        """Keys of what a fellow had answered when it was first asked for here."""
        if (place, task) not in self.theirs:
            fellow = self.model.fellows[place]
            self.theirs[place, task] = set(fellow.store.read(fellow.cell_of(task)))
        return self.theirs[place, task]

    def _one_answer(
        self, model: SparseMMModel, sample: Sample, decoded: Decoded, row: int
    ) -> Answer:
        tokens = decoded.tokens[row].tolist()
        text = model.processor.tokenizer.decode(tokens, skip_special_tokens=True)
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
            "device": str(model.checkpoint.model.device),
        }
        if model.mask is not None:
            record["masked_heads"] = model.mask.settings
        text = cut(text, sample.until).strip()
        key = sample.key if model is self.model else model.key_of_parts(sample.parts)
        return Answer(
            key, model.cell_of(sample.task), sample.task, sample.doc_id, text, None, record
        )

    def _fail(self, key: str, task: str, doc_id: str, cause: str) -> None:
        logger.error(f"{task} {doc_id} failed: {cause}")
        self._store([Answer(key, self.cells[task], task, doc_id, None, cause)])

    def _store(self, answers: list[Answer]) -> None:
        """Keep answers, of this run's model and of its fellows."""
        self.model.store.write(answers)
        own = [answer for answer in answers if answer.cell == self.cells[answer.task]]
        self.answers.update((answer.key, answer) for answer in own)
        self.computed.update(answer.key for answer in own)
        if self.model.progress is not None:
            self.model.progress(sum(answer.error is None for answer in answers))


@dataclass(frozen=True)
class _Failure:
    """Why an attempt failed, without the tensors that its traceback holds."""

    words: str
    of_memory: bool


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"
