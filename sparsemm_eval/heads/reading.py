"""A model reads images: prompts in, greedy answers out, and both fed again in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from transformers import BatchFeature, ProcessorMixin

from sparsemm_eval.models.checkpoint import Checkpoint
from sparsemm_eval.models.samples import generation_options


def read_prompts(
    processor: ProcessorMixin, images: Sequence[Image.Image], questions: Sequence[str]
) -> BatchFeature:
    """A model's inputs for an image and a question each, padded on the left.

    Parameters
    ----------
    processor : ProcessorMixin
        With a chat template, which goes around every question.
    images : sequence of Image
        RGB, one a prompt.
    questions : sequence of str
        As a user asks them.
    """
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            tokenize=False,
            add_generation_prompt=True,
        )
        for question in questions
    ]
    bos = processor.tokenizer.bos_token
    return processor(
        text=prompts,
        images=list(images),
        padding=True,
        return_tensors="pt",
        # Some templates write it themselves.
        add_special_tokens=not (bos and prompts[0].startswith(bos)),
    )


@torch.inference_mode()
def greedy_answers(
    checkpoint: Checkpoint, inputs: Mapping[str, Tensor], max_new_tokens: int
) -> list[list[int]]:
    """Tokens of what the model says to each prompt, on a plain cache.

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
        Without the token that ends it. One of an image ends it too: fed again, it would ask for an
        image.
    """
    model, tokenizer = checkpoint.model, checkpoint.processor.tokenizer
    options = dict(generation_options({"max_new_tokens": max_new_tokens})[0])
    if tokenizer.pad_token_id is not None:
        options["pad_token_id"] = tokenizer.pad_token_id
    said = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    eos = model.generation_config.eos_token_id
    ends = {checkpoint.config.image_token_id, *(eos if isinstance(eos, list) else [eos])}
    return [list(takewhile(lambda token: token not in ends, row)) for row in said.tolist()]


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
    if "mm_token_type_ids" in inputs:
        forced["mm_token_type_ids"] = extend(
            "mm_token_type_ids", [torch.zeros_like(e) for e in ends], 0
        )
    if "image_grid_thw" not in inputs:
        # Qwen2-VL makes positions of its own from the mask; others count padding unless told.
        forced["position_ids"] = (forced["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return forced
