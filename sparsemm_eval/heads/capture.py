"""Where heads look while an answer is written; no attention matrix is kept.

A model reads images and answers greedily, or its answer is known; then prompt and answer are fed
together, once. Each layer attends as ever, computes the weights of the rows that write the answer
again, a few at a time, and keeps of them only what was asked for.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import BatchFeature, Cache, ProcessorMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sparsemm_eval.cache import CACHE_ARGUMENT, AttendingLayer
from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.decode import not_finite_words
from sparsemm_eval.engine.generation import generation_options
from sparsemm_eval.engine.requests import Visual, model_inputs
from sparsemm_eval.engine.videos import Video
from sparsemm_eval.errors import UserError
from sparsemm_eval.families import Family
from sparsemm_eval.methods import ModelShape

# Rows whose logits over all keys are held at a time.
_BLOCK = 32


def read_prompts(
    processor: ProcessorMixin,
    visuals: Sequence[Visual],
    questions: Sequence[str],
    family: type[Family] = Family,
) -> BatchFeature:
    """A model's inputs for an image or a video and a question each, padded on the left.

    Parameters
    ----------
    processor : ProcessorMixin
        With a chat template, which goes around every question.
    visuals : sequence of Image or Video
        One a prompt; images in RGB.
    questions : sequence of str
        As a user asks them.
    family : type
        The model's, where its processor takes images in a way of its own.
    """
    kinds = ["video" if isinstance(visual, Video) else "image" for visual in visuals]
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": question}]}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for kind, question in zip(kinds, questions, strict=True)
    ]
    return model_inputs(processor, family, prompts, [[visual] for visual in visuals])


@torch.inference_mode()
def greedy_answers(
    checkpoint: Checkpoint, inputs: Mapping[str, Tensor], max_new_tokens: int
) -> list[list[int]]:
    """Tokens of what the model answers to each prompt, on a plain cache.

    Parameters
    ----------
    checkpoint : Checkpoint
        The model.
    inputs : mapping
        The prompts, padded on the left, on the model's device.
    max_new_tokens : int
        Where an answer ends at the latest.

    Returns
    -------
    list of list of int
        Without the token that ends it. One of an image or a video ends it too: fed again, it would
        ask for one.
    """
    model, tokenizer = checkpoint.model, checkpoint.processor.tokenizer
    options = dict(generation_options({"max_new_tokens": max_new_tokens})[0])
    if tokenizer.pad_token_id is not None:
        options["pad_token_id"] = tokenizer.pad_token_id
    new = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    eos = model.generation_config.eos_token_id
    shown = ("image_token_id", "video_token_id")
    ends = {getattr(checkpoint.config, name, None) for name in shown}
    ends |= set(eos if isinstance(eos, list) else [eos])
    return [list(takewhile(lambda token: token not in ends, row)) for row in new.tolist()]


def teacher_forced(
    inputs: Mapping[str, Tensor], answers: Sequence[Sequence[int]], pad_token: int | None
) -> dict[str, Tensor]:
    """The same inputs with each answer behind its prompt, padded on the left.

    Parameters
    ----------
    inputs : mapping
        B prompts, padded on the left.
    answers : sequence of sequence of int
        Tokens of B answers.
    pad_token : int or None
        What rows are padded with; None where the tokenizer has none.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    ends = [torch.tensor(answer, dtype=ids.dtype, device=ids.device) for answer in answers]
    longest = max(int(row.sum()) + len(end) for row, end in zip(mask, ends, strict=True))

    def extend(name: str, tails: Sequence[Tensor], fill: int) -> Tensor:
        rows = [
            torch.cat([row[keep], tail.to(row.dtype)])
            for row, keep, tail in zip(inputs[name], mask, tails, strict=True)
        ]
        return torch.stack([pad(row, (longest - len(row), 0), value=fill) for row in rows])

    forced = dict(inputs)
    forced["input_ids"] = extend("input_ids", ends, pad_token or 0)
    forced["attention_mask"] = extend("attention_mask", [torch.ones_like(e) for e in ends], 0)
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            forced[name] = extend(name, [torch.zeros_like(e) for e in ends], 0)
    if not {"image_grid_thw", "video_grid_thw"} & inputs.keys():
        # Qwen2-VL makes positions of its own from the mask; others count padding unless told.
        forced["position_ids"] = (forced["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return forced


@torch.inference_mode()
def feed(
    checkpoint: Checkpoint,
    inputs: Mapping[str, Tensor],
    answers: Sequence[Sequence[int]],
    capture: Cache,
    logits_to_keep: int = 1,
) -> tuple[Tensor, Tensor]:
    """Feed prompts and answers in one pass, in which `capture` takes what it keeps.

    Parameters
    ----------
    checkpoint : Checkpoint
        The model.
    inputs, answers
        As for `teacher_forced`, on the model's device.
    capture : ArgmaxCapture or WeightCapture
        With as many rows as the longest answer has tokens.
    logits_to_keep : int
        How many of the last positions have logits.

    Returns
    -------
    tuple of Tensor
        Input ids [B, n], padded on the left, and logits [B, logits_to_keep, vocabulary].

    Raises
    ------
    UserError
        If logits are not finite.
    """
    forced = teacher_forced(inputs, answers, checkpoint.processor.tokenizer.pad_token_id)
    given = {CACHE_ARGUMENT: capture, "use_cache": True, "logits_to_keep": logits_to_keep}
    logits = checkpoint.model(**forced, **given).logits
    if not logits.amax(-1).isfinite().all():
        raise UserError(
            f"pretrained={checkpoint.pretrained}: where heads look means nothing, as "
            f"{not_finite_words(checkpoint.model)}"
        )
    return forced["input_ids"], logits


class ArgmaxCapture(Cache):
    """A cache that keeps nothing but which position each head looked at most.

    Parameters
    ----------
    shape : ModelShape
        Of the decoder; layers that methods do not compress are left out.
    rows : int
        Tokens of the longest answer; answers end where the rows of the batch end.
    """

    def __init__(self, shape: ModelShape, rows: int) -> None:
        self.captures = [_ArgmaxLayer(rows) for _ in range(shape.layers)]
        super().__init__(layers=_beside_others(shape, self.captures))

    def looked(self) -> Tensor:
        """[B, L, Hq, rows]: position of the largest weight in the row that wrote each token."""
        return torch.stack([layer.looked for layer in self.captures], 1).cpu()


class WeightCapture(Cache):
    """A cache that keeps nothing but the weights on some positions, averaged over the answer.

    Parameters
    ----------
    shape : ModelShape
        Of the decoder; layers that methods do not compress are left out.
    rows : int
        Tokens of the answer; all answers of the batch have as many.
    positions : ndarray
        Integers: the positions whose weights are kept.
    """

    def __init__(self, shape: ModelShape, rows: int, positions: np.ndarray) -> None:
        columns = torch.from_numpy(positions)
        self.captures = [_MeanLayer(rows, columns) for _ in range(shape.layers)]
        super().__init__(layers=_beside_others(shape, self.captures))

    def weights(self) -> Tensor:
        """[B, L, Hq, positions]: mean over the rows that wrote the answer."""
        return torch.stack([layer.weights for layer in self.captures], 1)


def _beside_others(shape: ModelShape, captures: Sequence[_CaptureLayer]) -> list[_CaptureLayer]:
    """A layer for each of the model's: those that capture, and others that only attend."""
    return [_OtherLayer(0) if place is None else captures[place] for place in shape.places]


class _CaptureLayer(AttendingLayer):
    """Dense attention that shows the logits of its last rows to `capture`."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows

    @abstractmethod
    def capture(self, blocks: Iterator[Tensor], scaling: float) -> None:
        """Take the answer's logits [B, Hq, rows, n], not scaled yet, block by block of rows."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[_CaptureLayer, _CaptureLayer]:
        self.lazy_initialization(key_states, value_states)
        self.pending = (key_states, value_states)
        return self, self

    def attend(
        self, module: torch.nn.Module, query: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        key, value = self.pending
        del self.pending
        out, _ = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        self.capture(self._logits(query, key, mask), kwargs["scaling"])
        return out

    def _logits(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        n, heads = key.shape[2], key.shape[1]
        exact = torch.promote_types(query.dtype, torch.float32)
        keys = key.to(exact)[:, :, None].transpose(-1, -2)  # [B, H, 1, D, n]
        grouped = query.unflatten(1, (heads, -1))  # [B, H, G, n, D]
        places = torch.arange(n, device=key.device)
        # Row r stands one before the token it writes: the last token of the text writes nothing.
        for start in range(n - self.rows - 1, n - 1, _BLOCK):
            rows = slice(start, min(start + _BLOCK, n - 1))
            logits = grouped[..., rows, :].to(exact) @ keys
            # A mask is there where it says more than causal: padding, or a sliding window.
            seen = places <= places[rows, None] if mask is None else mask[:, :, None, rows]
            yield logits.masked_fill(~seen, -torch.inf).flatten(1, 2)

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """The name of `get_max_length` in transformers 5.17."""
        return -1


class _OtherLayer(_CaptureLayer):
    def capture(self, blocks: Iterator[Tensor], scaling: float) -> None:
        """Look at nothing."""


class _ArgmaxLayer(_CaptureLayer):
    looked: Tensor

    def capture(self, blocks: Iterator[Tensor], scaling: float) -> None:
        # The largest weight is where the largest logit is: no softmax is needed.
        self.looked = torch.cat([block.argmax(-1) for block in blocks], -1)


class _MeanLayer(_CaptureLayer):
    weights: Tensor

    def __init__(self, rows: int, columns: Tensor) -> None:
        super().__init__(rows)
        self.columns = columns

    def capture(self, blocks: Iterator[Tensor], scaling: float) -> None:
        total = sum((block * scaling).softmax(-1).sum(-2) for block in blocks)
        self.weights = (total[..., self.columns.to(total.device)] / self.rows).cpu()
