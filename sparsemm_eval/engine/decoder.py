"""Rows of a batch decoded step by step, until each has ended."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from sparsemm_eval.cache import HeadBudgetCache
from sparsemm_eval.cache.ragged import Buffer
from sparsemm_eval.engine.step import Prompts, Start, Step, StepKey
from sparsemm_eval.methods import HeadMask

# The backend whose step can be captured: its calls depend on no length.
_CAPTURED = "cuda_ext"
# Stands for a token whose logits were not finite; the row has ended with it.
NO_TOKEN = -1
# Steps between looks at whether all rows have ended. A look is at the last look's time, so that the
# device always has steps to go on with: up to twice as many are decoded for nothing at the end.
_LOOK_EVERY = 2
_MOST_STEPS = 8
_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Rows:
    """What became of the rows of a batch, an entry each; as in `Decoded`, tokens uncut.

    `NO_TOKEN` ends a row whose logits were not finite.
    """

    tokens: list[Tensor]
    cache_bytes: list[int]
    kl_full: list[float | None]


@dataclass(frozen=True)
class Forced:
    """What became of rows whose tokens were given, an entry each.

    Parameters
    ----------
    log_likelihood : list of float
        Sum over the row's tokens, in nats.
    is_greedy : list of bool
        Whether each of them was the likeliest.
    not_finite : list of int or None
        At which token, from 1, the logits were not finite.
    cache_bytes : list of int
        As in `Rows`.
    """

    log_likelihood: list[float]
    is_greedy: list[bool]
    not_finite: list[int | None]
    cache_bytes: list[int]


class Decoder:
    """Captured steps of one model and the memory that steps read, kept from prompt to prompt.

    Parameters
    ----------
    layers : int
        Of the model.
    """

    def __init__(self, layers: int) -> None:
        self.buffers = [Buffer() for _ in range(layers)]
        self.steps: dict[StepKey, Step] = {}

    def bytes(self) -> int:
        """Bytes held for slots, in use or not."""
        return sum(buffer.bytes() for buffer in self.buffers)

    @torch.inference_mode()
    def decode(
        self,
        model: PreTrainedModel,
        cache: HeadBudgetCache,
        prompts: Prompts,
        options: Mapping[str, Any],
        mask: HeadMask | None = None,
        cuda_graph: str = "auto",
        after_step: Callable[[], None] | None = None,
    ) -> Rows:
        """Decode until all rows have ended.

        Parameters
        ----------
        model : PreTrainedModel
            The one this is kept for.
        cache : HeadBudgetCache
            In this decoder's buffers, with the prompts in it.
        prompts : Prompts
            As `prefill` read them.
        options, mask, cuda_graph
            As for `decode`.
        after_step : callable, optional
            Called after each.
        """
        with _on(model.device):
            loop = _Loop(self, model, cache, prompts, options, mask, cuda_graph)
            loop.run(after_step)
            return Rows(loop.tokens(), loop.cache_bytes, loop.kl_full)

    @torch.inference_mode()
    def force(
        self,
        model: PreTrainedModel,
        cache: HeadBudgetCache,
        prompts: Prompts,
        candidates: Sequence[Sequence[Sequence[int]]],
        mask: HeadMask | None = None,
        cuda_graph: str = "auto",
    ) -> Forced:
        """Decode given tokens, each candidate of a prompt as a row of its own.

        Parameters
        ----------
        model, cache, prompts, mask, cuda_graph
            As for `decode`; the cache's rows become those of the candidates: sample by sample, in
            it method by method, in it candidate by candidate.
        candidates : sequence of sequence of sequence of int
            By sample: tokens of each, one at least.
        """
        rows = [
            (sample, sample * len(cache.methods) + method, tokens)
            for sample, of_sample in enumerate(candidates)
            for method in range(len(cache.methods))
            for tokens in of_sample
        ]
        samples, owners, tokens = zip(*rows, strict=True)
        cache.batch_select_indices(torch.tensor(owners))
        with _on(model.device):
            loop = _Forcing(self, model, cache, prompts, samples, owners, tokens, mask, cuda_graph)
            loop.run(None)
            return loop.forced()

    def step(self, model: PreTrainedModel, cache: HeadBudgetCache, key: StepKey) -> Step:
        """The step of a key; one that is captured is kept, as capturing takes long."""
        step = self.steps.pop(key, None) or Step(model, cache, key)
        if key.way != "eager":
            self.steps[key] = step  # the newest last
        while len(self.steps) > _MOST_STEPS:
            self.steps.pop(next(iter(self.steps)))
        return step


class _Loop:
    """The steps of one batch.

    Rows that have ended are taken out whenever they are half of the batch; under a graph, whose
    buffers stay as they are, they cost no reading of their cache and stay until all have ended.
    """

    def __init__(
        self,
        decoder: Decoder,
        model: PreTrainedModel,
        cache: HeadBudgetCache,
        prompts: Prompts,
        options: Mapping[str, Any],
        mask: HeadMask | None,
        cuda_graph: str,
    ) -> None:
        self.decoder, self.model, self.cache = decoder, model, cache
        self.start, rows = prompts.start, len(prompts.start.ids)
        self.most = options["max_new_tokens"] - 1
        self.count = len(cache.methods)
        self.full = next((m for m, one in enumerate(cache.methods) if one.budget is None), None)
        way = _way(model, cache.backend(), cuda_graph)
        given = {**model.generation_config.to_dict(), **options}
        self.key = StepKey(
            rows if way == "eager" else 1 << (rows - 1).bit_length(),
            tuple(ends_of(model)),
            float(given.get("repetition_penalty") or 1),
            mask,
            cache.backend(),
            way,
        )
        # Of a model all of whose layers attend to so many last tokens only; else None.
        self.window = None
        if not cache.methods[0].shape.windows:
            self.window = getattr(model.config.get_text_config(), "sliding_window", None)
        self.width = prompts.width
        # Of the rows of the whole batch; `going` are those that are still in it.
        self.going = torch.arange(rows, device=model.device)
        self.new_tokens = torch.zeros(self.most + 1, rows, dtype=torch.long, device=model.device)
        self.new_tokens[0] = self.start.ids[:, -1].masked_fill(self.start.not_finite, NO_TOKEN)
        self.cache_bytes = [0] * rows
        self.kl_full: list[float | None] = [None] * rows
        self.done = 0

    def run(self, after_step: Callable[[], None] | None) -> None:
        """Decode until all rows have ended, or have as many tokens as they may."""
        if self.most and not bool(self.start.ended.all()):
            step = self._step()
            step.load(self.cache, self.start)
            step = self._without_ended(step)
            flag = _EndFlag(self.model.device) if self.key.ends else None
            over = False
            while self.done < self.most and not over:
                if self._slack() == 0:
                    for store in self.cache.stores:
                        store.grow()
                    step.cache.load(self.cache.stores, step.ended)
                over = self._until_full(step, flag, after_step)
                if not over and self.key.way == "eager":
                    step = self._without_ended(step)
        self._note_bytes(self.going.tolist(), self.cache.row_bytes().tolist())

    def tokens(self) -> list[Tensor]:
        """[steps] of each row, on the CPU; behind the one that ends a row stands anything."""
        return list(self.new_tokens[: self.done + 1].T.cpu())

    def _until_full(
        self, step: Step, flag: _EndFlag | None, after_step: Callable[[], None] | None
    ) -> bool:
        """Decode until slots run out, or half of the rows have ended; whether all have."""
        begun, rows, over = self.done, len(self.going), False
        end = min(self.most, begun + self._slack())
        while self.done < end and not over:
            if self.window is not None and self.width + self.done >= self.window:
                raise NotImplementedError(
                    f"the model attends to the last {self.window} tokens only (sliding window), "
                    "and prompt and answer are longer: HeadBudgetCache has no sliding window"
                )
            step.run(self.model)
            self.done += 1
            self._take(step, rows)
            if after_step is not None:
                after_step()
            if flag is None:
                continue
            if self.key.way != "eager":
                over = self.done % _LOOK_EVERY == 0 and flag.over(step.ended)
            elif 2 * (ended := int(step.ended.sum())) >= rows:
                over = ended == rows
                break
        self.cache.count_tokens(self.done - begun)
        return over

    def _take(self, step: Step, rows: int) -> None:
        """Note what a step has chosen for the rows that are going."""
        chosen = step.ids[:rows, 0].masked_fill(step.not_finite[:rows], NO_TOKEN)
        self.new_tokens[self.done, self.going] = chosen
        if self.done == 1 and self.full is not None and self.count > 1:
            self._compare(step.logits[:rows])

    def _slack(self) -> int:
        """Tokens that every layer has slots for."""
        return min(store.slack for store in self.cache.stores)

    def _step(self) -> Step:
        return self.decoder.step(self.model, self.cache, self.key)

    def _without_ended(self, step: Step) -> Step:
        """Go on without the rows that have ended, if they are half of an uncaptured batch."""
        stay = (~step.ended).nonzero()[:, 0]
        if self.key.way != "eager" or 2 * len(stay) > len(self.going) or not len(stay):
            return step
        held = self.cache.row_bytes().tolist()
        gone = step.ended.nonzero()[:, 0].tolist()
        self._note_bytes(self.going[gone].tolist(), [held[place] for place in gone])
        self.cache.batch_select_indices(stay)
        self.going = self.going[stay]
        self.key = replace(self.key, rows=len(stay))
        fewer = self._step()
        fewer.take_over(step, self.cache, stay)
        return fewer

    def _note_bytes(self, rows: Sequence[int], held: Sequence[int]) -> None:
        for row, size in zip(rows, held, strict=True):
            self.cache_bytes[row] = size

    def _compare(self, logits: Tensor) -> None:
        """Note how far rows are from full KV after their first new token."""
        # Methods share the first token, so that all rows of a sample are here or none.
        ended = self.start.ended.tolist()
        divergences = _kl_from(logits, self.full, self.count)
        for row, kl in zip(self.going.tolist(), divergences, strict=True):
            if not ended[row] and row % self.count != self.full and math.isfinite(kl):
                self.kl_full[row] = kl


class _Forcing(_Loop):
    """The steps of one batch whose tokens are given: the likeliest ones are noted and replaced."""

    def __init__(
        self,
        decoder: Decoder,
        model: PreTrainedModel,
        cache: HeadBudgetCache,
        prompts: Prompts,
        samples: Sequence[int],
        owners: Sequence[int],
        tokens: Sequence[Sequence[int]],
        mask: HeadMask | None,
        cuda_graph: str,
    ) -> None:
        device, before = model.device, prompts.start
        samples, owners = (torch.tensor(x, device=device) for x in (samples, owners))
        self.lengths = torch.tensor([len(row) for row in tokens], device=device)
        # [longest, rows]; nothing is read of what pads the shorter ones.
        self.given = pad_sequence([torch.tensor(row) for row in tokens]).to(device)
        not_finite = before.not_finite[owners]
        ended = not_finite | (self.lengths == 1)
        start = Start(self.given[0][:, None], before.positions[owners], ended, not_finite)
        options = {"max_new_tokens": len(self.given)}
        prompts = replace(prompts, start=start)
        super().__init__(decoder, model, cache, prompts, options, mask, cuda_graph)
        # Any token may be given, an end too, and none is made less likely for having been.
        self.key = replace(self.key, ends=(), penalty=1.0)
        self.log_likelihood = torch.zeros(len(tokens), dtype=torch.double, device=device)
        self.is_greedy = torch.ones(len(tokens), dtype=torch.bool, device=device)
        self.not_finite = not_finite.long()
        first = prompts.logits
        self._note(_log_softmax(first)[samples, self.given[0]], first.argmax(-1)[samples])

    def forced(self) -> Forced:
        """What was noted of the rows."""
        return Forced(
            self.log_likelihood.tolist(),
            self.is_greedy.tolist(),
            [token or None for token in self.not_finite.tolist()],
            self.cache_bytes,
        )

    def _take(self, step: Step, rows: int) -> None:
        given = self.given[self.done, self.going]
        log_likelihood = [
            _log_softmax(logits).gather(-1, tokens[:, None])[:, 0]
            for logits, tokens in zip(  # not all at once: a vocabulary is large
                step.logits[:rows].split(_ROWS_AT_ONCE), given.split(_ROWS_AT_ONCE), strict=True
            )
        ]
        self._note(torch.cat(log_likelihood), step.ids[:rows, 0])
        new = self._is_here() & step.not_finite[:rows] & (self.not_finite[self.going] == 0)
        self.not_finite[self.going] += new * (self.done + 1)
        step.ids[:rows, 0] = given
        step.ended[:rows].logical_or_(self.lengths[self.going] <= self.done + 1)

    def _note(self, log_likelihood: Tensor, likeliest: Tensor) -> None:
        """Add what is known of the tokens that are given now, by row."""
        here = self._is_here()
        self.log_likelihood[self.going] += log_likelihood.masked_fill(~here, 0)
        self.is_greedy[self.going] &= (likeliest == self.given[self.done, self.going]) | ~here

    def _is_here(self) -> Tensor:
        """Which of the rows that are going have a token now."""
        return self.done < self.lengths[self.going]


def _log_softmax(logits: Tensor) -> Tensor:
    return functional.log_softmax(logits.float(), -1)


def _on(device: torch.device) -> AbstractContextManager[None]:
    """Events and graphs are of the current device, which need not be the model's."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class _EndFlag:
    """Whether all rows have ended, as it was when it was last asked: nobody waits for that."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flags: deque[tuple[Tensor, torch.cuda.Event]] = deque()
        if device.type == "cuda":
            for _ in range(2):
                flag = torch.zeros((), dtype=torch.bool, pin_memory=True)
                self.flags.append((flag, torch.cuda.Event()))
        self.asked = False

    def over(self, ended: Tensor) -> bool:
        """Ask, and tell what was found when it was asked before."""
        flag, event = self.flags[0]
        flag.copy_(ended.all(), non_blocking=True)
        event.record()
        self.flags.rotate()
        if not self.asked:
            self.asked = True
            return False
        flag, event = self.flags[0]
        event.synchronize()
        return bool(flag)


_decoders: WeakKeyDictionary[PreTrainedModel, Decoder] = WeakKeyDictionary()


def decoder_of(model: PreTrainedModel) -> Decoder:
    """The model's decoder, made on first use; it goes with the model."""
    if model not in _decoders:
        _decoders[model] = Decoder(model.config.get_text_config().num_hidden_layers)
    return _decoders[model]


def held_bytes(model: PreTrainedModel) -> int:
    """Bytes that a model's decoder holds between prompts: free, as far as the next one goes."""
    return _decoders[model].bytes() if model in _decoders else 0


def release(model: PreTrainedModel) -> None:
    """Give back what is held between prompts; the next one makes it anew."""
    _decoders.pop(model, None)


def ends_of(model: PreTrainedModel) -> Sequence[int]:
    """Tokens at which the model's answers end."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return []
    return ends if isinstance(ends, list) else [ends]


def _way(model: PreTrainedModel, backend: str, cuda_graph: str) -> str:
    """How the step runs: captured where nothing in it depends on a length or waits."""
    if cuda_graph in ("eager", "off") or model.device.type != "cuda" or backend != _CAPTURED:
        return "eager"
    text = model.config.get_text_config()
    rope = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
    # These rotary embeddings are made anew as positions grow.
    if rope in ("dynamic", "longrope"):
        return "eager"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "eager"
    return "compile" if cuda_graph == "compile" else "graph"


def _kl_from(logits: Tensor, full: int, count: int) -> list[float]:
    """KL of full KV's distribution from each row's: rows [samples * count, V], float32, in nats."""
    divergences: list[float] = []
    for of_sample in logits.float().split(count):  # one by one: a vocabulary is large
        log_p = functional.log_softmax(of_sample, -1)
        kl = functional.kl_div(log_p, log_p[full], reduction="none", log_target=True).sum(-1)
        divergences += kl.clamp(min=0).tolist()
    return divergences
