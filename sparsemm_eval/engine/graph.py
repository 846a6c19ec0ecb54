"""Greedy decoding at the speed of memory: a step that is captured once, then replayed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsemm_eval.cache import HeadBudgetCache
from sparsemm_eval.cache.ragged import Buffer
from sparsemm_eval.engine.step import Kind, Start, Step

# Steps between looks at whether all rows have ended. A look is at the last look's time, so that the
# device always has steps to go on with: up to twice as many are decoded for nothing at the end.
LOOK_EVERY = 2
MOST_GRAPHS = 8


class StaticDecoder:
    """Steps of one model and the memory that they read, kept from prompt to prompt.

    Parameters
    ----------
    layers : int
        Of the model.
    """

    def __init__(self, layers: int) -> None:
        self.buffers = [Buffer() for _ in range(layers)]
        self.steps: dict[Kind, Step] = {}

    def bytes(self) -> int:
        """Bytes held for slots, in use or not."""
        return sum(buffer.bytes() for buffer in self.buffers)

    def decode(
        self,
        model: PreTrainedModel,
        cache: HeadBudgetCache,
        start: Start,
        kind: Kind,
        most: int,
        after_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Decode until all rows have ended.

        Parameters
        ----------
        model : PreTrainedModel
            The one this is kept for.
        cache : HeadBudgetCache
            In this decoder's buffers, filled.
        start : Start
            The rows.
        kind : Kind
            With at least so many rows.
        most : int
            New tokens beside the first, at least 1.
        after_step : callable, optional
            Given the number of steps so far and the last one's logits [R, vocabulary].

        Returns
        -------
        Tensor
            [R, at most ``most``] new tokens; behind the one that ends a row stands anything.
        """
        # Events and graphs are of the current device, which need not be the model's.
        on_gpu = model.device.type == "cuda"
        with torch.cuda.device(model.device) if on_gpu else nullcontext():
            return self._decode(model, cache, start, kind, most, after_step)

    def _decode(
        self,
        model: PreTrainedModel,
        cache: HeadBudgetCache,
        start: Start,
        kind: Kind,
        most: int,
        after_step: Callable[[int, Tensor], None] | None,
    ) -> Tensor:
        step = self._step(model, kind)
        step.load(cache, start)
        rows, stores = len(start.ids), cache.stores
        said = torch.empty(most, rows, dtype=torch.long, device=model.device)
        watch = _Watch(model.device) if kind.ends else None
        done, over = 0, False
        while done < most and not over:
            if stores[0].slack == 0:
                for store in stores:
                    store.grow()
                step.cache.load(stores, step.ended)
            run = self._ready(model, step)
            free, begun = min(stores[0].slack, most - done), done
            while done < begun + free and not over:
                run()
                said[done].copy_(step.ids[:rows, 0])
                done += 1
                if after_step is not None:
                    after_step(done, step.logits[:rows])
                over = watch is not None and done % LOOK_EVERY == 0 and watch.over(step.ended)
            cache.count_tokens(done - begun)
        return said[:done].T

    def _step(self, model: PreTrainedModel, kind: Kind) -> Step:
        step = self.steps.pop(kind, None) or Step(model, kind)
        self.steps[kind] = step  # the newest last
        while len(self.steps) > MOST_GRAPHS:
            self.steps.pop(next(iter(self.steps)))
        return step

    def _ready(self, model: PreTrainedModel, step: Step) -> Callable[[], None]:
        """What runs the step: its graph, captured anew where memory has moved."""
        if step.kind.way == "eager":
            return lambda: step(model)
        if step.graph is None or step.places != step.cache.places():
            step.capture(model)
        return step.graph.replay


class _Watch:
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
        if self.device.type != "cuda":
            return bool(ended.all())
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


_decoders: WeakKeyDictionary[PreTrainedModel, StaticDecoder] = WeakKeyDictionary()


def decoder_of(model: PreTrainedModel) -> StaticDecoder:
    """The model's decoder, made on first use; it goes with the model."""
    if model not in _decoders:
        _decoders[model] = StaticDecoder(model.config.get_text_config().num_hidden_layers)
    return _decoders[model]


def held_bytes(model: PreTrainedModel) -> int:
    """Bytes that a model's decoder holds between prompts: free, as far as the next one goes."""
    return _decoders[model].bytes() if model in _decoders else 0


def release(model: PreTrainedModel) -> None:
    """Give back what is held between prompts; the next one makes it anew."""
    _decoders.pop(model, None)
