"""Visual scores: how often each query head looks at the very place that is being read.

SparseMM, section 3.1: for a generated token that stands in one place of the image, a
head hits when its largest attention weight falls on an image token of that place; a hit counts
1 / (image tokens of the place). Here no attention matrix is kept: the known text is fed once, and
each layer keeps the argmax of the rows that write it.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sparsemm_eval import __version__
from sparsemm_eval.cache import AttendingLayer
from sparsemm_eval.heads.regions import Box, Qwen2VLRegions
from sparsemm_eval.methods import HeadScores
from sparsemm_eval.models.checkpoint import Checkpoint
from sparsemm_eval.tiny.documents import Split, draw_document, stream, transcript_question

# Drawn documents of their own: no benchmark, no training page and no test of one is among them.
CHASE_SEED = 7_001


@dataclass(frozen=True, eq=False)
class Page:
    """An image whose text is known character by character.

    Parameters
    ----------
    image : Image
        The page.
    prompt : str
        What asks the model to read it.
    text : str
        What it should say.
    boxes : tuple
        Box of each character of ``text`` in pixels, None where there is none.
    """

    image: Image.Image
    prompt: str
    text: str
    boxes: tuple[Box | None, ...]


@dataclass(frozen=True, eq=False)
class Chase:
    """What a chase found.

    Parameters
    ----------
    scores : ndarray
        [images, L, Hq]: sum over the scored tokens of each image.
    tokens : int
        Scored tokens: those that stand in one place and that the model itself would have said.
    asked : int
        Tokens that stand in one place.
    """

    scores: np.ndarray
    tokens: int
    asked: int

    @property
    def accuracy(self) -> float:
        """Share of the text that the model itself would have said."""
        return self.tokens / self.asked

    @property
    def head_scores(self) -> HeadScores:
        """Mean over the images."""
        return HeadScores(self.scores.mean(0))


def drawn_pages(count: int) -> Iterable[Page]:
    """Drawn documents, to be read whole."""
    for number in range(count):
        document = draw_document(stream(Split.HELD_OUT, CHASE_SEED, number))
        question = transcript_question(document)
        boxes = document.boxes_of(question)
        yield Page(document.image, question.prompt, question.answer, boxes)


def chase(checkpoint: Checkpoint, pages: Iterable[Page], count: int) -> Chase:
    """Score every query head of a Qwen2-VL on pages whose text is known.

    Parameters
    ----------
    checkpoint : Checkpoint
        A Qwen2-VL.
    pages : iterable of Page
        What is read.
    count : int
        How many pages there are, for the progress bar.

    Raises
    ------
    ValueError
        If there is no page, the family's regions are unknown, or the model reads nothing right.
    """
    if checkpoint.config.model_type != "qwen2_vl":
        raise ValueError(
            f"{checkpoint.pretrained} is a {checkpoint.config.model_type} checkpoint: where its "
            "image tokens lie is known for qwen2_vl only"
        )
    scores, tokens, asked = [], 0, 0
    for page in tqdm(pages, total=count, desc="chasing heads", leave=False):
        page_scores, page_tokens, page_asked = _score(checkpoint, page)
        scores.append(page_scores)
        tokens += page_tokens
        asked += page_asked
    if not scores:
        raise ValueError("no pages to chase heads on: give at least 1 image")
    if tokens == 0:
        raise ValueError(
            f"{checkpoint.pretrained} read none of {asked} characters right, so its heads cannot "
            "be scored by what they read"
        )
    return Chase(np.stack(scores), tokens, asked)


@torch.inference_mode()
def _score(checkpoint: Checkpoint, page: Page) -> tuple[np.ndarray, int, int]:
    """Scores [L, Hq] of one page, its scored tokens and its tokens with a place."""
    model, processor = checkpoint.model, checkpoint.processor
    inputs, answer, places = _teacher_forced(checkpoint, page)
    cache = _WatchCache(checkpoint.shape.layers, rows=len(answer))
    logits = model(
        **inputs, past_key_values=cache, use_cache=True, logits_to_keep=len(answer) + 1
    ).logits[0, :-1]
    said = logits.argmax(-1).tolist() == np.array(answer)
    image = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten().tolist()
    regions = _regions(processor, inputs, page.image)
    looked = cache.looked()  # [L, Hq, rows]
    scores = np.zeros(looked.shape[:2])
    asked = [row for row, box in enumerate(places) if box is not None]
    for row in asked:
        if said[row]:
            tokens = np.array(image)[regions.tokens(places[row])]
            scores += np.isin(looked[:, :, row], tokens) / len(tokens)
    return scores, int(said[asked].sum()), len(asked)


def _teacher_forced(
    checkpoint: Checkpoint, page: Page
) -> tuple[dict[str, Tensor], list[int], list[Box | None]]:
    """Inputs of prompt and text together, the text's tokens, and the box of each."""
    model, processor = checkpoint.model, checkpoint.processor
    content = [{"type": "image"}, {"type": "text", "text": page.prompt}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    inputs = processor(text=[prompt], images=[page.image], return_tensors="pt")
    answer = processor.tokenizer(page.text, add_special_tokens=False, return_offsets_mapping=True)
    ids = torch.tensor([answer["input_ids"]])
    inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        text = torch.zeros_like(ids)
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], text], 1)
    places = [_union(page.boxes[start:stop]) for start, stop in answer["offset_mapping"]]
    return inputs.to(model.device, model.dtype), answer["input_ids"], places


def _union(boxes: tuple[Box | None, ...]) -> Box | None:
    known = [box for box in boxes if box is not None]
    if not known:
        return None
    x0, y0, x1, y1 = zip(*known, strict=True)
    return min(x0), min(y0), max(x1), max(y1)


def _regions(processor: Any, inputs: dict[str, Tensor], image: Image.Image) -> Qwen2VLRegions:
    _, rows, columns = inputs["image_grid_thw"][0].tolist()
    merge = processor.image_processor.merge_size
    return Qwen2VLRegions(rows // merge, columns // merge, *image.size)


class _WatchCache(Cache):
    """Dense attention that remembers where each head of the last rows looked most."""

    def __init__(self, layers: int, rows: int) -> None:
        super().__init__(layers=[_WatchLayer(rows) for _ in range(layers)])

    def looked(self) -> np.ndarray:
        """[L, Hq, rows]: position of the largest attention weight."""
        return torch.stack([layer.looked for layer in self.layers]).cpu().numpy()


class _WatchLayer(AttendingLayer):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.looked: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[_WatchLayer, _WatchLayer]:
        self.lazy_initialization(key_states, value_states)
        self.pending = (key_states, value_states)
        return self, self

    def attend(
        self, module: torch.nn.Module, query: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        key, value = self.pending
        del self.pending
        out, _ = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        n, heads = key.shape[2], key.shape[1]
        # Row r stands one before the token it writes: the last token of the text writes nothing.
        rows = slice(n - self.rows - 1, n - 1)
        grouped = query[0, :, rows].unflatten(0, (heads, -1))  # [H, G, rows, D]
        logits = grouped @ key[0, :, None].transpose(-1, -2)
        seen = torch.arange(n, device=key.device) <= torch.arange(n, device=key.device)[rows, None]
        # The largest weight is where the largest logit is: no softmax is needed.
        self.looked = logits.masked_fill(~seen, -torch.inf).argmax(-1).flatten(0, 1)
        return out

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """The name of `get_max_length` in transformers 5.17."""
        return -1


def write_scores(found: Chase, path: Path, checkpoint: Checkpoint, data: str) -> None:
    """Write scores in the published format, and beside them how they were made.

    Parameters
    ----------
    found : Chase
        What was found.
    path : Path
        JSON {"layer-head": [value per image]}; provenance goes to ``<stem>.provenance.json``.
    checkpoint : Checkpoint
        The model.
    data : str
        Name of the data.
    """
    layers, heads = found.scores.shape[1:]
    table = {
        f"{layer}-{head}": [round(float(value), 6) for value in found.scores[:, layer, head]]
        for layer in range(layers)
        for head in range(heads)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table) + "\n", encoding="utf-8")
    provenance = {
        "scores": path.name,
        "scores_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "checkpoint_hash": checkpoint.hash,
        "model_type": checkpoint.config.model_type,
        "data": data,
        "images": len(found.scores),
        "scored_tokens": found.tokens,
        "character_accuracy": round(found.accuracy, 4),
        "versions": {
            "sparsemm_eval": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
    beside = path.with_name(f"{path.stem}.provenance.json")
    beside.write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")
