"""SparseMMModel: lmms-eval's requests in, answers out, nothing lost on the way."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from PIL import Image
from tqdm import tqdm
from transformers import BatchFeature, ProcessorMixin

from sparsemm_eval import __version__
from sparsemm_eval.cache import BACKENDS
from sparsemm_eval.methods import (
    MASK_MODES,
    HeadMask,
    HeadScores,
    Method,
    canonical_settings,
    make_method,
    method_names,
    method_settings,
    read_head_mask,
)
from sparsemm_eval.methods.checks import check_choice, one_line
from sparsemm_eval.models.answers import Answer, AnswerStore, SampleFailures, answer_key
from sparsemm_eval.models.checkpoint import Checkpoint
from sparsemm_eval.models.decode import Decoded, generate, generate_rows, shares_prompt
from sparsemm_eval.models.requirements import check_tasks
from sparsemm_eval.models.samples import (
    SAMPLE_ERRORS,
    Sample,
    cut,
    generation_options,
    image_hash,
    positive_int,
    read_chat,
)

DEFAULT_ANSWERS = "results/answers"
_CHECKPOINT = ("revision", "dtype", "device_map", "attn_implementation")


class SparseMMModel(lmms):
    """A vision-language model on a head-budgeted KV cache, as an lmms-eval chat model.

    A subclass names a family: its ``model_id`` in lmms-eval, its ``model_type`` in transformers
    and the settings only it has.

    Parameters
    ----------
    pretrained : str
        Folder or hub repository of the checkpoint.
    method : str
        One of `sparsemm_eval.methods.method_names`.
    batch_size : int
        Samples that are read and decoded together.
    device : str, optional
        Where the model lies; default the process's own GPU, or the CPU.
    max_batch_size : optional
        lmms-eval's; not used.
    checkpoint : Checkpoint, optional
        One loaded already; it is shared and not released after a run. From Python only.
    **settings
        All others of ``--model_args``: revision, dtype, device_map, attn_implementation, backend,
        answers, mask_heads, mask_mode, and what the method and the family read.

    Raises
    ------
    ValueError, FileNotFoundError
        In one sentence, before any weight is loaded.
    """

    is_simple = False
    model_id: ClassVar[str]
    model_type: ClassVar[str]
    family_settings: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        pretrained: str | None = None,
        method: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | str | None = None,
        checkpoint: Checkpoint | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self._refuse_unknown(settings)
        if method is None:
            raise ValueError(f"method is missing: give one of {', '.join(method_names())}")
        if pretrained is None and checkpoint is None:
            raise ValueError("pretrained is missing: give a checkpoint's folder or hub repository")
        self.batch_size = positive_int("batch_size", batch_size)
        self.backend = settings.get("backend", "auto")
        check_choice("backend", self.backend, BACKENDS)
        if self.backend == "varlen" and not torch.cuda.is_available():
            raise ValueError(
                "backend=varlen needs a CUDA device, and there is none: use auto or torch"
            )
        chosen = canonical_settings(
            method, {name: value for name, value in settings.items() if name not in self._own()}
        )
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        # Of several processes each has its own GPU, whatever --device says to all of them.
        if device is None or self._world_size > 1:
            device = str(self.accelerator.device)
        self._owns_checkpoint = checkpoint is None
        self.checkpoint = checkpoint or Checkpoint(
            pretrained,
            self.model_type,
            **{"device_map": device}
            | {name: settings[name] for name in _CHECKPOINT if name in settings},
        )
        if "head_scores" in method_settings(method):
            chosen["head_scores"] = self._head_scores(settings)
        self.method: Method = make_method(method, self.checkpoint.shape, **chosen)
        self.mask = self._read_mask(settings)
        self.family = {name: settings.get(name) for name in self.family_settings}
        self.processor = self.configure(self.checkpoint.processor, **self.family)
        self.store = AnswerStore(settings.get("answers", DEFAULT_ANSWERS))
        # Other cells that read prompts as this one does: a batch is answered for them too.
        self.fellows: tuple[SparseMMModel, ...] = ()
        logger.info(f"{self.model_id}: {self.cell} on {self.checkpoint.pretrained}")

    @classmethod
    def configure(cls, processor: ProcessorMixin, **family: Any) -> ProcessorMixin:
        """Apply the family's settings to a processor."""
        return processor

    @property
    def cell(self) -> str:
        """Method and masked heads in words."""
        return str(self.method) if self.mask is None else f"{self.method} {self.mask}"

    def cell_of(self, task: str) -> str:
        """This model on a task, in words."""
        return f"{self.model_id} {task} {self.cell}"

    @property
    def device(self) -> torch.device:
        """Of this process, for lmms-eval's own collectives."""
        return self.accelerator.device

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer all requests, from disk where an answer is there already.

        Raises
        ------
        ValueError
            Before the first, if the metric of one of their tasks cannot run here.
        SampleFailures
            After all others are answered and safe, if samples failed: no score is made of them.
        """
        check_tasks(request.args[4] for request in requests)
        run = _Run(self)
        for request in tqdm(requests, desc=self.cell, disable=self.rank != 0):
            run.add(request)
        answers = run.finish()
        # By key: lmms-eval may ask for a sample more than once.
        failed = {answer.key: answer for answer in answers if answer.error is not None}
        self._raise_failures(list(failed.values()))
        self._report(answers, run)
        return [
            GenerationResult(
                answer.text,
                TokenCounts(answer.record["prompt_tokens"], answer.record["new_tokens"]),
            )
            for answer in answers
        ]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError(
            f"{self.model_id} answers one turn: a second prompt on a compressed cache is not "
            "defined by the methods; choose tasks whose output_type is generate_until"
        )

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            f"{self.model_id} has no loglikelihood: it reads its candidates without decoding, so "
            "a compressed cache would change nothing; choose tasks of output_type generate_until"
        )

    def clean(self) -> None:
        """lmms-eval is done with generating: give the memory back for its judges."""
        # A shared checkpoint stays, and there is nothing else to free: the cost of looking for it
        # would be that of a whole cell.
        if self._owns_checkpoint:
            self.checkpoint.release()
            super().clean()

    def key_of(self, prompt: str, images: Sequence[Image.Image], **where: Any) -> str:
        """Key of an answer: all that decides its text, and nothing else."""
        hashes = [image_hash(image) for image in images]
        return self.key_of_parts({"prompt": prompt, "images": hashes, **where})

    def key_of_parts(self, parts: Mapping[str, Any]) -> str:
        """Key of an answer, from all that decides its text beside the cell itself."""
        return answer_key(
            {
                "version": __version__,
                "model": self.model_id,
                "checkpoint": self.checkpoint.hash,
                "dtype": self.checkpoint.dtype,
                "family": self.family,
                "method": self.method.name,
                "settings": self.method.settings,
                # Only where there is one: a key without is as old as the answers.
                **({"mask": self.mask.settings} if self.mask is not None else {}),
                **parts,
            }
        )

    def reads_as(self, other: SparseMMModel) -> bool:
        """Whether another cell reads a prompt exactly as this one does: only methods differ."""
        return (
            self.checkpoint is other.checkpoint
            and (self.family, self.mask, self.backend) == (other.family, other.mask, other.backend)
            and self.store.folder == other.store.folder
        )

    def run_batch(self, samples: Sequence[Sample], methods: Sequence[Method]) -> list[Decoded]:
        """Read samples of equal options together, and decode them under each method."""
        prompts = [sample.prompt for sample in samples]
        images = [image for sample in samples for image in sample.images]
        bos = self.processor.tokenizer.bos_token
        model = self.checkpoint.model
        inputs: BatchFeature = self.processor(
            text=prompts,
            images=images or None,
            padding=True,
            return_tensors="pt",
            add_special_tokens=not (bos and prompts[0].startswith(bos)),
        ).to(model.device, model.dtype)
        pad = self.processor.tokenizer.pad_token_id
        options = {"pad_token_id": pad} if pad is not None else {}
        options |= dict(samples[0].options)
        if len(methods) == 1:
            return [generate(model, inputs, methods[0], options, self.backend, self.mask)]
        return generate_rows(model, inputs, methods, options, self.backend, self.mask)

    def _report(self, answers: Sequence[Answer], run: _Run) -> None:
        """State what was kept, and whether anything was compressed at all."""
        if not answers:
            return
        records = [answer.record for answer in answers]
        count = len(records)
        whole = sum(record["kept_per_head"] == record["prompt_tokens"] for record in records)
        new = [answer.record for answer in answers if answer.key in run.computed]
        seconds = sum(record["seconds"] for record in new)
        tokens = sum(record["new_tokens"] for record in new)
        log_metrics(
            total_elapsed_time=seconds,
            total_gen_tokens=tokens,
            avg_speed=tokens / seconds if seconds else 0.0,
            additional_metrics={
                "samples": count,
                "samples_found": count - len(new),
                "nominal_tokens_per_head": self.method.budget or 0,
                "kept_tokens_per_head": sum(r["kept_per_head"] for r in records) / count,
                "prompt_tokens": sum(r["prompt_tokens"] for r in records) / count,
                "kept_kv_bytes": sum(r["kept_bytes"] for r in records) / count,
                "cache_bytes": sum(r["cache_bytes"] for r in records) / count,
                "share_uncompressed": whole / count,
            },
        )
        if self.method.budget is not None and whole > count / 2:
            logger.warning(
                f"{self.method.name} left {whole} of {count} samples uncompressed: their prompts "
                f"fit budget={self.method.budget}, so this is mostly a full-KV result"
            )

    def _raise_failures(self, failed: list[Answer]) -> None:
        """Raise on every rank if samples failed on any: no rank may wait for one that is gone."""
        words = [f"{a.task} {a.doc_id}: {a.error}" for a in failed]
        if self.world_size > 1:
            # Not accelerate's gather_object: under torchrun on CPUs it gathers nothing.
            gathered: list[list[str]] = [[] for _ in range(self.world_size)]
            torch.distributed.all_gather_object(gathered, words)
            words = [word for of_rank in gathered for word in of_rank]
        if words:
            raise SampleFailures(
                f"{len(words)} samples failed, so no score is written; the others are safe in "
                f"{self.store.folder} and are not computed again. First: {words[0]}"
            )

    @classmethod
    def _own(cls) -> set[str]:
        """Settings that are not a method's."""
        return {
            *_CHECKPOINT, "backend", "answers", "mask_heads", "mask_mode", *cls.family_settings
        }  # fmt: skip

    def _head_scores(self, settings: Mapping[str, Any]) -> HeadScores:
        return self.checkpoint.head_scores(settings.get("head_scores"))

    def _read_mask(self, settings: Mapping[str, Any]) -> HeadMask | None:
        mode = settings.get("mask_mode", "query")
        check_choice("mask_mode", mode, MASK_MODES)
        if settings.get("mask_heads") is None:
            return None
        shape = self.checkpoint.shape
        return read_head_mask(
            settings["mask_heads"], mode, shape, lambda: self._head_scores(settings)
        )

    def _refuse_unknown(self, settings: Mapping[str, Any]) -> None:
        methods = {setting for name in method_names() for setting in method_settings(name)}
        known = {"pretrained", "method", "batch_size", "device"} | self._own() | methods
        unknown = sorted(set(settings) - known)
        if unknown:
            name = unknown[0]
            raise ValueError(
                f"{name}={settings[name]!r}: {self.model_id} has no such setting; it knows "
                f"{', '.join(sorted(known))}"
            )


class _Run:
    """One generate_until: finds, batches and computes answers."""

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

    def add(self, request: Instance) -> None:
        """Take a request; a full batch is computed at once, so that few images are held."""
        _, doc_to_messages, gen_kwargs, doc_id, task, split = request.args
        self._open_cell(task)
        try:
            document = self.model.task_dict[task][split][doc_id]
            prompt, images = read_chat(self.model.processor, doc_to_messages(document))
            sample = self._sample(prompt, images, gen_kwargs, f"{split} {doc_id}", task)
        except SAMPLE_ERRORS as error:
            key = answer_key({"failed": [task, split, doc_id], "cell": self.cells[task]})
            self.order.append(key)
            self._fail(key, task, f"{split} {doc_id}", error)
            return
        self.order.append(sample.key)
        if sample.key in self.answers or sample.key in self.queued:
            return
        batch = self.waiting[sample.options]
        batch.append(sample)
        self.queued.add(sample.key)
        if len(batch) == self.model.batch_size:
            self._compute(self.waiting.pop(sample.options))

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

    def _sample(
        self,
        prompt: str,
        images: tuple[Image.Image, ...],
        gen_kwargs: Mapping[str, Any],
        doc_id: str,
        task: str,
    ) -> Sample:
        options, until = generation_options(gen_kwargs)
        parts = {
            "prompt": prompt,
            "images": [image_hash(image) for image in images],
            "repeat": 0,
            "task": task,
            "document": doc_id,
            "generation": [list(option) for option in options],
            "until": until,
        }
        key = self.model.key_of_parts(parts)
        if dict(options)["do_sample"]:
            # The same request again asks for another draw, not for the same one.
            self.repeats[key] += 1
            parts["repeat"] = self.repeats[key]
            key = self.model.key_of_parts(parts)
        return Sample(task, doc_id, prompt, images, options, until, key, parts)

    def _compute(self, samples: list[Sample]) -> None:
        """Answer a batch; one that fails is halved until the sample at fault stands alone."""
        # Outside the try: weights that cannot be loaded are no sample's fault.
        self.model.checkpoint.load()
        models = [self.model, *self._lacking(samples)]
        try:
            decoded = self.model.run_batch(samples, [model.method for model in models])
        except SAMPLE_ERRORS as error:
            if len(samples) == 1:
                self._fail(samples[0].key, samples[0].task, samples[0].doc_id, error)
                return
            logger.warning(f"a batch of {len(samples)} failed ({one_line(error)}); trying halves")
            half = len(samples) // 2
            self._compute(samples[:half])
            self._compute(samples[half:])
            return
        answers = [
            self._answer(model, sample, found, row)
            for model, found in zip(models, decoded, strict=True)
            for row, sample in enumerate(samples)
        ]
        self._store(answers, own=len(samples))

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

    def _answer(self, model: SparseMMModel, sample: Sample, decoded: Decoded, row: int) -> Answer:
        text = model.processor.tokenizer.decode(decoded.tokens[row], skip_special_tokens=True)
        rows = len(decoded.tokens)
        record = {
            "prompt_tokens": decoded.prompt_tokens[row],
            "new_tokens": len(decoded.tokens[row]),
            "kept_per_head": decoded.kept[row].double().mean().item(),
            "kept_bytes": decoded.kept_bytes[row],
            "cache_bytes": decoded.cache_bytes // rows,
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

    def _fail(self, key: str, task: str, doc_id: str, error: Exception) -> None:
        cause = f"{type(error).__name__}: {one_line(error)}"
        logger.error(f"{task} {doc_id} failed: {cause}")
        self._store([Answer(key, self.cells[task], task, doc_id, None, cause)])

    def _store(self, answers: list[Answer], own: int = 1) -> None:
        """Keep answers, the first ``own`` of which are of this run's model."""
        self.model.store.write(answers)
        self.answers.update((answer.key, answer) for answer in answers[:own])
        self.computed.update(answer.key for answer in answers[:own])
