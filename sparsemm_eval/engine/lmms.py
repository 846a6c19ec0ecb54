"""What lmms-eval sees: a cell as one of its models, and scores of its own tasks."""

from __future__ import annotations

import hashlib
import json
import re
from argparse import Namespace
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import handle_non_serializable, sanitize_list
from loguru import logger
from tqdm import tqdm

from sparsemm_eval.cache import check_backend
from sparsemm_eval.choices import BACKENDS
from sparsemm_eval.engine.answers import Answer, AnswerStore
from sparsemm_eval.engine.cell import (
    CHECKPOINT_SETTINGS,
    RUN_SETTINGS,
    Cell,
    make_cell,
    make_family,
    refuse_unknown,
)
from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.decode import check_cuda_graph
from sparsemm_eval.engine.generation import check_generation
from sparsemm_eval.engine.requests import Request, positive_int, with_candidates
from sparsemm_eval.engine.runner import Answers, Runner, raise_failures
from sparsemm_eval.engine.tasks import WITHOUT_PROMPT, check_kind, check_kinds, check_tasks
from sparsemm_eval.errors import UserError, check_choice, check_int, short_repr
from sparsemm_eval.families import family_settings, find_family
from sparsemm_eval.methods import FROM_FILES, Method, load_plugin, method_names
from sparsemm_eval.paths import write_whole
from sparsemm_eval.report.provenance import (
    CALIBRATED,
    CALIBRATION_SCORED,
    EMPTY_ANSWERS,
    FAILED_SAMPLES,
    OURS,
)

DEFAULT_ANSWERS = "results/answers"
_LONGEST_NAME = 120  # characters of a file that is named by its cell


class CellModel(lmms):
    """A cell of a runner, as an lmms-eval chat model.

    Parameters
    ----------
    runner : Runner
        What answers; others may share it.
    cell : Cell
        One of the runner's.
    answered : collection of str, optional
        Documents that have an answer, each "split number"; the others are known to have failed,
        and are not tried again. Default: none is known yet.
    is_simple : bool, optional
        Whether lmms-eval is to ask as it asks simple models, the only ones it gives candidates to
        score (`sparsemm_eval.engine.tasks.is_scored`). Default: as the class says.
    """

    is_simple = False

    def __init__(
        self,
        runner: Runner,
        cell: Cell,
        answered: Collection[str] | None = None,
        is_simple: bool | None = None,
    ) -> None:
        super().__init__()
        if is_simple is not None:
            self.is_simple = is_simple
        self.runner, self.cell, self.answered = runner, cell, answered
        self._was_asked = False

    @property
    def method(self) -> Method:
        """What is kept of a prompt."""
        return self.cell.method

    def cell_of(self, task: str) -> str:
        """This model on a task, in words."""
        return self.runner.words(self.cell, task)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer all requests, from disk where an answer is there already.

        Raises
        ------
        UserError
            Before the first, if the metric of one of their tasks cannot run here, its
            generation_kwargs cannot be heeded, or another task of the run cannot be answered.
        SampleFailures
            After all others are answered and safe, if more samples of a task failed than may: no
            score is made of it.
        """
        self._check(requests)
        asked = [(Request.of(one, self.task_dict), [one]) for one in requests]
        return [
            GenerationResult("") if one is None else GenerationResult(one.text, _counts(one))
            for one in self._answer(asked)
        ]

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Score candidates, those of one document together; raises as `generate_until`.

        Returns
        -------
        list of GenerationResult
            In the place of its text a pair, as lmms-eval's evaluator makes text of any other: what
            the task's metric takes, and whether greedy decoding gives the candidate. Choices
            (output_type multiple_choice) are compared by their loss, of which the least wins: minus
            the log-likelihood in nats, summed over tokens, since acc_norm divides it by the length.
            An output_type loglikelihood gets the log-likelihood itself.
        """
        self._check(requests)
        asked = with_candidates(requests, self.task_dict)
        flat = [(request, [one for same in alike for one in same]) for request, alike in asked]
        results: dict[int, GenerationResult] = {}
        for (_, alike), answer in zip(asked, self._answer(flat), strict=True):
            for place, same in enumerate(alike):
                result = GenerationResult((0.0, False))
                if answer is not None:
                    found = answer.record["candidates"][place]
                    sign = -1 if isinstance(same[0].args[1], str) else 1
                    value = sign * found["log_likelihood"], found["is_greedy"]
                    result = GenerationResult(value, _counts(answer))
                results |= {id(one): result for one in same}
        return [results[id(one)] for one in requests]

    def _check(self, requests: Sequence[Instance]) -> None:
        """Refuse what cannot be answered, of all that is asked, before any is."""
        self._was_asked = True
        tasks = {request.task_name for request in requests}
        check_tasks(tasks)
        # What lmms-eval will ask later, and of simple models what it asks as if it were one turn.
        sure = {one.task_name for one in requests if one.request_type != "generate_until"}
        check_kinds(self.task_dict.keys() - (sure if self.is_simple else tasks))
        for request in requests:
            _check_request(request)

    def _answer(self, asked: Sequence[tuple[Request, list[Instance]]]) -> list[Answer | None]:
        """Answers to requests, each with the instances that it is of; None of one that failed.

        A sample that failed, and may, is withdrawn: its request is of no document any more, so that
        lmms-eval scores the others alone, as where only a part of a task is run again.
        """
        of_run = {one.document for one, _ in asked}
        known = of_run if self.answered is None else self.answered
        bar = tqdm(asked, desc=str(self.cell), disable=self.rank != 0)
        tried = (one for one, _ in bar if one.document in known)
        (answered,) = self.runner.answer(tried, [self.cell])
        raise_failures([answered], self.runner.store, self.world_size, self.runner.allow_failed)
        answers = iter(answered.answers)
        results: list[Answer | None] = []
        failed: dict[str, set[str]] = defaultdict(set)
        for one, instances in asked:
            answer = next(answers) if one.document in known else None
            if answer is None or answer.error is not None:
                answer = None
                failed[one.task].add(one.document)
                for instance in instances:
                    instance.doc_id = None
            results.append(answer)
        self._report(answered, failed)
        return results

    @property
    def apply_chat_template(self) -> Any:
        """What lmms-eval asks a model for under --apply_chat_template.

        Raises
        ------
        UserError
            Always: there is nothing to ask for.
        """
        raise UserError(
            "--apply_chat_template: all prompts go through the checkpoint's own chat template "
            "anyway; leave it out"
        )

    chat_template = apply_chat_template

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refused: UserError that names the task."""
        for request in requests:
            check_kind(request.task_name, request.request_type)
        return []

    def clean(self) -> None:
        """Keep the weights: others share them, and looking for memory costs as much as a cell."""
        if not self._was_asked:
            logger.warning(
                "lmms-eval's --use_cache had all answers, so that nothing is known of what was "
                "kept of the prompts, and the results do not state it; the folder of answers finds "
                "them again as well, and knows: leave --use_cache out"
            )
            log_metrics(0.0, 0, 0.0, {"samples": 0, "served_by_use_cache": 1})
        self._was_asked = False

    def _report(self, answered: Answers, failed: Mapping[str, set[str]]) -> None:
        """State what was kept, what failed or is empty, what the method was calibrated on, and
        whether any was compressed at all.
        """
        finished = [answer for answer in answered.answers if answer.error is None]
        flaws = {f"{FAILED_SAMPLES}/{task}": len(of_task) for task, of_task in failed.items()}
        empty = Counter(answer.task for answer in finished if not answer.text)
        flaws |= {f"{EMPTY_ANSWERS}/{task}": count for task, count in empty.items()}
        flaws |= self._calibrated(finished, answered.digests)
        # lmms-eval writes what the first rank says.
        flaws = _over_ranks(flaws, self.world_size)
        if kinds := self.method.calibration:
            self._warn_of_calibration({answer.task for answer in finished}, flaws)
            flaws |= {f"{CALIBRATED}/{kind}": len(set(own)) for kind, own in kinds.items()}
        records = [answer.record for answer in finished]
        if not records:
            if flaws:
                log_metrics(0.0, 0, 0.0, {"samples": 0, **flaws})
            return
        count, method = len(records), self.method
        whole = sum(record["kept_per_head"] == record["prompt_tokens"] for record in records)
        new = [one.record for one in finished if one.key in answered.computed]
        seconds = sum(record["seconds"] for record in new)
        tokens = sum(record["new_tokens"] for record in new)
        log_metrics(
            total_elapsed_time=seconds,
            total_gen_tokens=tokens,
            avg_speed=tokens / seconds if seconds else 0.0,
            additional_metrics={
                "samples": count,
                "samples_found": count - len(new),
                "nominal_tokens_per_head": 0
                if method.budget is None
                else sum(method.tokens(r["prompt_tokens"]) for r in records) / count,
                "kept_tokens_per_head": sum(r["kept_per_head"] for r in records) / count,
                "prompt_tokens": sum(r["prompt_tokens"] for r in records) / count,
                "kept_kv_bytes": sum(r["kept_bytes"] for r in records) / count,
                "cache_bytes": sum(r["cache_bytes"] for r in records) / count,
                "share_uncompressed": whole / count,
                "query_aware": float(method.query_aware),
                **flaws,
            },
        )
        if method.budget is not None and whole > count / 2:
            # Of many cells one line says it for all: `cli.common.quiet` leaves these out.
            logger.bind(of_cell=True).warning(
                f"{method.name} left {whole} of {count} samples uncompressed: their prompts "
                f"fit budget={method.budget}, so this is mostly a full-KV result"
            )
        choices = [one for record in records for one in record.get("candidates", ())]
        if method.budget is not None and choices and all(len(x["tokens"]) == 1 for x in choices):
            logger.bind(of_cell=True).warning(
                f"the choices of {', '.join(sorted({one.task for one in finished}))} are of one "
                "token, whose likelihood comes out of the prefill: no method changes it"
            )

    def _calibrated(
        self, finished: Sequence[Answer], digests: Mapping[tuple[str, str], str]
    ) -> dict[str, int]:
        """By task, how many of its scored documents the method was calibrated on."""
        if not (kinds := self.method.calibration):
            return {}
        known = {digest for documents in kinds.values() for digest in documents}
        scored = {(answer.task, answer.doc_id) for answer in finished}
        shared = Counter(task for task, doc in scored if digests[task, doc] in known)
        return {f"{CALIBRATION_SCORED}/{task}": count for task, count in shared.items()}

    def _warn_of_calibration(self, tasks: Collection[str], counts: Mapping[str, int]) -> None:
        """Say of which tasks the method was calibrated on what is scored here."""
        kinds = self.method.calibration
        documents = len({digest for own in kinds.values() for digest in own})
        for task in sorted(tasks):
            scored = counts.get(f"{CALIBRATION_SCORED}/{task}", 0)
            if self.rank == 0 and (task in kinds or scored):
                # Of many cells tables say it for all.
                logger.bind(of_cell=True).warning(
                    f"{self.method.name} was calibrated on {documents} documents "
                    f"({', '.join(kinds)}), of which {scored} are among those of {task} that are "
                    "scored"
                )


class SparseMM(CellModel):
    """``--model sparsemm``: a checkpoint of any known family on a head-budgeted KV cache.

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
        A Python file or a module that registers methods or families of one's own.
    **settings
        All others of ``--model_args``: revision, dtype, device_map, attn_implementation, backend,
        cuda_graph, truncated_images, allow_failed, answers, mask_heads, mask_mode, protocol, and
        what the method and the family read.

    Raises
    ------
    UserError
        In one sentence, before any weight is loaded.
    """

    model_type: ClassVar[str | None] = None

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
        if plugin is not None:
            load_plugin(str(plugin))
        name = "sparsemm" if self.model_type is None else find_family(self.model_type).lmms_name
        refuse_unknown(settings, {"pretrained", "plugin", "batch_size", "device", "answers"}, name)
        if method is None:
            raise UserError(f"method is missing: give one of {', '.join(method_names())}")
        if pretrained is None and checkpoint is None:
            raise UserError("pretrained is missing: give a checkpoint's folder or hub repository")
        answers = settings.pop("answers", DEFAULT_ANSWERS)
        self.accelerator = Accelerator()
        rank, world_size = _ranks()
        # Of several processes each has its own GPU, whatever --device says to all of them.
        if device is None or world_size > 1:
            device = str(self.accelerator.device)
        self._owns_checkpoint = checkpoint is None
        checkpoint = checkpoint or Checkpoint(
            pretrained,
            self.model_type,
            **{"device_map": device}
            | {name: settings[name] for name in CHECKPOINT_SETTINGS if name in settings},
        )
        cells = [{"method": method, **settings}]
        super().__init__(
            runner := make_runner(checkpoint, cells, answers, batch_size), runner.cells[0]
        )
        self._rank, self._world_size = rank, world_size
        logger.info(f"{self.runner.family.lmms_name}: {self.cell} on {checkpoint.pretrained}")

    @property
    def device(self) -> torch.device:
        """This process's device, for lmms-eval's own collectives."""
        return self.accelerator.device

    def clean(self) -> None:
        """lmms-eval is done with generating: give the memory back for its judges."""
        super().clean()
        if self._owns_checkpoint:
            self.runner.checkpoint.release()
            super(CellModel, self).clean()


class LlavaSparseMM(SparseMM):
    """``--model llava_sparsemm``: a LlavaNextForConditionalGeneration checkpoint."""

    model_type = "llava_next"


class Qwen2VLSparseMM(SparseMM):
    """``--model qwen2vl_sparsemm``: a Qwen2VLForConditionalGeneration checkpoint."""

    model_type = "qwen2_vl"


class SimpleSparseMM(SparseMM):
    """``--model sparsemm --force_simple``: lmms-eval gives choices to simple models alone."""

    is_simple = True


class SimpleLlavaSparseMM(LlavaSparseMM):
    """``--model llava_sparsemm --force_simple``."""

    is_simple = True


class SimpleQwen2VLSparseMM(Qwen2VLSparseMM):
    """``--model qwen2vl_sparsemm --force_simple``."""

    is_simple = True


def _counts(answer: Answer) -> TokenCounts:
    """How many tokens were read and written, as lmms-eval states it."""
    return TokenCounts(answer.record["prompt_tokens"], answer.record["new_tokens"])


def make_runner(
    checkpoint: Checkpoint,
    cells: Sequence[Mapping[str, Any]],
    answers: str | Path,
    batch_size: int | str = 1,
    settings: Mapping[str, Any] | None = None,
) -> Runner:
    """Make what answers for cells of one checkpoint; no weights are loaded.

    Parameters
    ----------
    checkpoint : Checkpoint
        Of a known family.
    cells : sequence of mapping
        Settings of each, method first; those of the family and of the run are alike in all.
    answers : str or Path
        Folder of the answers.
    batch_size : int
        Samples that are read together.
    settings : mapping, optional
        More settings that all cells share.

    Raises
    ------
    UserError
        For an unknown family, or settings that cannot be.
    """
    shared = {**cells[0], **(settings or {})}
    backend = shared.get("backend", "auto")
    check_choice("backend", backend, BACKENDS)
    cuda_graph = check_cuda_graph(shared.get("cuda_graph", "auto"))
    truncated = shared.get("truncated_images", False)
    if not isinstance(truncated, bool):
        raise UserError(f"truncated_images={short_repr(truncated)}: it must be true or false")
    check_int("allow_failed", shared.get("allow_failed", 0), least=0)
    on_cpu = checkpoint.device_map == "cpu" or not torch.cuda.is_available()
    check_backend(backend, "cpu" if on_cpu else "cuda")
    family = make_family(checkpoint.family, shared)
    aside = {*CHECKPOINT_SETTINGS, *RUN_SETTINGS, "protocol", *family_settings()}
    chosen = [
        {name: value for name, value in {**(settings or {}), **cell}.items() if name not in aside}
        for cell in cells
    ]
    return Runner(
        checkpoint,
        [make_cell(checkpoint, cell) for cell in chosen],
        AnswerStore(answers),
        family,
        positive_int("batch_size", batch_size),
        backend,
        cuda_graph,
        truncated,
        shared.get("allow_failed", 0),
    )


def results_path(folder: Path, task: str, cell: Mapping[str, Any]) -> Path:
    """Where in a folder the results file of a cell on a task lies."""
    words = "-".join([task, *map(str, cell.values())])
    name = re.sub(r"[^\w.+-]", "_", words)
    if FROM_FILES.keys() & cell.keys():
        # Names of files may be long, and alike but for signs that no file's name should have.
        name = f"{name[:_LONGEST_NAME]}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"
    return folder / f"{name}_results.json"


def score(
    model: CellModel,
    stated: Mapping[str, Any],
    task: str,
    samples: int | None,
    manager: TaskManager,
    path: Path,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Score a cell on a task through lmms-eval, files on disk whole or not at all.

    A file of all answers and their scores comes to lie beside the results file, in lmms-eval's own
    form: ``<results>_samples_<task>.jsonl``.

    Parameters
    ----------
    model : CellModel
        The cell.
    stated : mapping
        Its settings, as the results file is to state them.
    task : str
        Known to the manager.
    samples : int or None
        The first so many of the task; None takes all.
    manager : TaskManager
        Of `sparsemm_eval.engine.tasks.task_manager`.
    path : Path
        The results file, as `results_path` names it; its folder is made if it is not there.
    about : mapping, optional
        How this was made, for the results file's entry `OURS`.

    Raises
    ------
    SampleFailures
        If a sample has no answer: then there is no score.
    """
    name = path.name.removesuffix("_results.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    # As text where that can be read back: a system prompt may have commas.
    text = all("," not in str(value) for value in stated.values())
    model_args = ",".join(f"{name}={value}" for name, value in stated.items())
    # Tasks are loaded anew for each model: what a metric counts in its module starts from zero.
    results = simple_evaluate(
        model=model,
        model_args=model_args if text else dict(stated),
        tasks=[task],
        limit=samples,
        task_manager=manager,
        log_samples=True,
        verbosity="WARNING",
        # As on its command line: metrics see documents without images, which would be decoded
        # again for every cell, and what they write goes where results go.
        cli_args=Namespace(process_with_media=False, output_path=str(path.with_name(name))),
    )
    for of_task, lines in results.pop("samples", {}).items():
        file = path.with_name(f"{name}_samples_{of_task}.jsonl")
        write_whole(file, "".join(map(_sample_line, lines)))
    if about is not None:
        results[OURS] = dict(about)
    write_whole(path, json.dumps(results, indent=1, default=str))


def _check_request(request: Instance) -> None:
    """Raise UserError for a request that cannot be answered as it is meant."""
    task = request.task_name
    if len(request.args) == 2:
        raise UserError(f"{task}: {WITHOUT_PROMPT}")
    _, second, third, *_ = request.args
    messages, generation = (second, third) if isinstance(third, Mapping) else (third, second)
    if not callable(messages):
        raise UserError(
            f"{task}: lmms-eval's --cache_requests forgets how a document is put as messages; "
            "leave it out, finished answers are kept anyway"
        )
    if getattr(messages, "__module__", None) == simple_evaluate.__module__:
        # What an agentic task asks is made by the evaluator itself, round by round.
        check_kind(task, "generate_until_agentic")
    # A bound method of lmms-eval's task. Its examples stand in a text that no message holds.
    config = getattr(getattr(messages, "__self__", None), "config", None)
    shots = getattr(config, "num_fewshot", None)
    if shots and getattr(config, "doc_to_visual", None) is not None:
        raise UserError(
            f"{task}: num_fewshot={shots}: lmms-eval puts no examples into the messages of a task "
            "with images; leave --num_fewshot out, or choose another task"
        )
    if isinstance(generation, Mapping):
        check_generation(task, generation)


def _sample_line(sample: Mapping[str, Any]) -> str:
    """One answer as lmms-eval's samples files have it: no document, nothing of an image."""
    left_out = ("doc", "arguments", "input_media", "resps")
    line = {name: value for name, value in sample.items() if name not in left_out}
    responses, filtered = (sanitize_list(sample[name]) for name in ("resps", "filtered_resps"))
    # Lists of a request's answers are told apart only where a document has several requests.
    responses, filtered = (part[0] if len(part) == 1 else part for part in (responses, filtered))
    line |= {
        "target": str(sample["target"]),
        "filtered_resps": filtered,
        "input": sample["arguments"][0],
    }
    if responses not in (filtered, [filtered]):
        line["resps"] = responses
    return json.dumps(line, default=handle_non_serializable, ensure_ascii=False) + "\n"


def _over_ranks(counts: dict[str, int], world_size: int) -> dict[str, int]:
    """Counts of all ranks together."""
    if world_size == 1:
        return counts
    # Not accelerate's gather_object: under torchrun on CPUs it gathers nothing.
    gathered: list[dict[str, int]] = [{} for _ in range(world_size)]
    torch.distributed.all_gather_object(gathered, counts)
    return dict(sum(map(Counter, gathered), Counter()))


def _ranks() -> tuple[int, int]:
    """This process's rank, and how many run together."""
    # Not as accelerate counts: under torchrun on CPUs it starts a group and sees one process.
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
