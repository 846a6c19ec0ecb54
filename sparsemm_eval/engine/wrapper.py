"""SparseMMModel: lmms-eval's requests in, answers out, nothing lost on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from sparsemm_eval.cache import BACKENDS, check_backend
from sparsemm_eval.engine.answers import Answer, AnswerStore, SampleFailures, answer_key
from sparsemm_eval.engine.batches import Run
from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.decode import Decoded, generate, generate_rows
from sparsemm_eval.engine.greedy import check_cuda_graph
from sparsemm_eval.engine.requirements import check_tasks
from sparsemm_eval.engine.samples import Memo, Sample, image_hash, positive_int
from sparsemm_eval.errors import UserError, check_choice
from sparsemm_eval.methods import (
    MASK_MODES,
    HeadMask,
    HeadScores,
    Method,
    canonical_settings,
    load_plugin,
    make_method,
    method_digest,
    method_names,
    method_settings,
    read_head_mask,
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
    plugin : str, optional
        A Python file or a module that registers methods of one's own.
    **settings
        All others of ``--model_args``: revision, dtype, device_map, attn_implementation, backend,
        cuda_graph, answers, mask_heads, mask_mode, and what the method and the family read.

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
        plugin: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if plugin is not None:
            load_plugin(str(plugin))
        self._refuse_unknown(settings)
        if method is None:
            raise UserError(f"method is missing: give one of {', '.join(method_names())}")
        if pretrained is None and checkpoint is None:
            raise UserError("pretrained is missing: give a checkpoint's folder or hub repository")
        self.batch_size = positive_int("batch_size", batch_size)
        self.backend = settings.get("backend", "auto")
        check_choice("backend", self.backend, BACKENDS)
        self.cuda_graph = check_cuda_graph(settings.get("cuda_graph", "auto"))
        chosen = canonical_settings(
            method, {name: value for name, value in settings.items() if name not in self._own()}
        )
        self.accelerator = Accelerator()
        # Not as accelerate counts: under torchrun on CPUs it starts a group and sees one process.
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._rank = torch.distributed.get_rank()
            self._world_size = torch.distributed.get_world_size()
        # Of several processes each has its own GPU, whatever --device says to all of them.
        if device is None or self._world_size > 1:
            device = str(self.accelerator.device)
        on_cpu = "cpu" in (device, settings.get("device_map")) or not torch.cuda.is_available()
        check_backend(self.backend, "cpu" if on_cpu else "cuda")
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
        # What was read of samples; models of one checkpoint may share it.
        self.memo = Memo()
        # Told how many answers, of fellows too, were computed, each time some are on disk.
        self.progress: Callable[[int], None] | None = None
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
        run = Run(self)
        silent = self.rank != 0 or self.progress is not None
        for request in tqdm(requests, desc=self.cell, disable=silent):
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
        plugin = method_digest(self.method.name)
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
                **({"plugin": plugin} if plugin is not None else {}),
                **parts,
            }
        )

    def reads_as(self, other: SparseMMModel) -> bool:
        """Whether another cell reads a prompt exactly as this one does: only methods differ."""
        return (
            self.checkpoint is other.checkpoint
            and (self.family, self.mask) == (other.family, other.mask)
            and (self.backend, self.cuda_graph) == (other.backend, other.cuda_graph)
            and self.store.folder == other.store.folder
        )

    def read_batch(self, samples: Sequence[Sample]) -> BatchFeature:
        """Samples through the processor, padded on the left, where the model lies."""
        prompts = [sample.prompt for sample in samples]
        images = [image for sample in samples for image in sample.images]
        bos = self.processor.tokenizer.bos_token
        model = self.checkpoint.model
        return self.processor(
            text=prompts,
            images=images or None,
            padding=True,
            return_tensors="pt",
            add_special_tokens=not (bos and prompts[0].startswith(bos)),
        ).to(model.device, model.dtype)

    def decode_batch(
        self, samples: Sequence[Sample], inputs: BatchFeature, methods: Sequence[Method]
    ) -> list[Decoded]:
        """Decode samples of equal options under each method, from one reading of the prompts."""
        pad = self.processor.tokenizer.pad_token_id
        options = {"pad_token_id": pad} if pad is not None else {}
        options |= dict(samples[0].options)
        model = self.checkpoint.model
        how = (self.backend, self.mask, self.cuda_graph)
        if len(methods) == 1:
            return [generate(model, inputs, methods[0], options, *how)]
        return generate_rows(model, inputs, methods, options, *how)

    def _report(self, answers: Sequence[Answer], run: Run) -> None:
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
            # Of many cells one line says it for all: `cli.common.quiet` leaves these out.
            logger.bind(of_cell=True).warning(
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
            *_CHECKPOINT, "backend", "cuda_graph", "answers", "mask_heads", "mask_mode",
            *cls.family_settings,
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
        known = {"pretrained", "method", "plugin", "batch_size", "device"} | self._own() | methods
        unknown = sorted(set(settings) - known)
        if unknown:
            name = unknown[0]
            raise UserError(
                f"{name}={settings[name]!r}: {self.model_id} has no such setting; it knows "
                f"{', '.join(sorted(known))}"
            )
