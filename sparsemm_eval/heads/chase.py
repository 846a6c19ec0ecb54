"""Visual scores: how often each query head looks at the very place that is being read.

SparseMM, section 3.1: for a generated token that stands in one place of the image, a
head hits when its largest attention weight falls on an image token of that place; a hit counts
1 / (image tokens of the place). Here no attention matrix is kept: the answer is generated, or
known, then fed once behind its prompt, and each layer keeps the argmax of the rows that write it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import BatchFeature

from sparsemm_eval.errors import UserError, check_choice, check_int
from sparsemm_eval.heads.findings import Chase
from sparsemm_eval.heads.hits import score_page
from sparsemm_eval.heads.pages import Page
from sparsemm_eval.heads.reading import greedy_answers, read_prompts, teacher_forced
from sparsemm_eval.heads.records import PageRecords, PageScore
from sparsemm_eval.heads.regions import IMAGE_TOKENS, check_family, find_regions, image_positions
from sparsemm_eval.heads.watch import WatchCache
from sparsemm_eval.models.checkpoint import Checkpoint
from sparsemm_eval.models.samples import DEFAULT_NEW_TOKENS


def chase(
    checkpoint: Checkpoint,
    pages: Iterable[Page],
    count: int | None = None,
    *,
    image_tokens: str = "all",
    batch_size: int = 1,
    max_new_tokens: int = DEFAULT_NEW_TOKENS,
    records: Path | None = None,
) -> Chase:
    """Score every query head of a model on annotated pages.

    Parameters
    ----------
    checkpoint : Checkpoint
        Of a family whose regions are known.
    pages : iterable of Page
        What is read.
    count : int, optional
        How many pages there are, for the progress bar.
    image_tokens : {"all", "tiles"}
        Which tokens of an image a box is looked for in; see `regions`.
    batch_size : int
        Pages read together.
    max_new_tokens : int
        Where a generated answer ends at the latest.
    records : Path, optional
        Where each page's score is kept as soon as it exists; pages found there are not computed
        again.

    Raises
    ------
    ValueError
        In one sentence, if the family's regions are unknown (before weights are loaded), there is
        no page, no page is annotated, or nothing that the model says could be scored.
    """
    check_family(checkpoint.config.model_type)
    check_choice("image_tokens", image_tokens, IMAGE_TOKENS)
    check_int("batch_size", batch_size, least=1)
    check_int("max_new_tokens", max_new_tokens, least=1)
    run = _Run(checkpoint, image_tokens, batch_size, max_new_tokens, records)
    for page in tqdm(pages, total=count, desc="chasing heads", leave=False):
        run.add(page)
    return _checked(Chase(tuple(run.finish())), checkpoint)


def _checked(found: Chase, checkpoint: Checkpoint) -> Chase:
    if not found.pages:
        raise UserError("no pages to chase heads on: give at least 1 image")
    if found.left_out == len(found.pages):
        raise UserError(
            f"none of the {len(found.pages)} images has annotated text: give pages whose chunks "
            "have text and a box"
        )
    if not found.scores.any():
        raise UserError(
            f"{checkpoint.pretrained} says {found.accuracy:.0%} of the annotated characters, and "
            f"of {found.answer_tokens} tokens {found.tokens} could be scored, none of them a hit "
            "of any head: its heads cannot be scored by what it reads"
        )
    return found


class _Run:
    """One chase: finds, batches and computes the scores of pages."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        image_tokens: str,
        batch_size: int,
        max_new_tokens: int,
        records: Path | None,
    ) -> None:
        self.checkpoint, self.batch_size = checkpoint, batch_size
        self.image_tokens, self.max_new_tokens = image_tokens, max_new_tokens
        settings = {
            "checkpoint": checkpoint.hash,
            "dtype": checkpoint.dtype,
            "image_tokens": image_tokens,
            "max_new_tokens": max_new_tokens,
        }
        self.records = PageRecords(records, settings) if records else None
        self.known = list(self.records.done) if self.records else []
        self.scores: list[PageScore] = []
        self.waiting: list[Page] = []

    def add(self, page: Page) -> None:
        """Take a page; a full batch is computed at once."""
        place = len(self.scores) + len(self.waiting)
        if place < len(self.known):
            if self.known[place].digest != page.digest:
                raise UserError(
                    f"{self.records.path}: page {place} is not that of this data; give another "
                    "--output, or move it away to begin anew"
                )
            self.scores.append(self.known[place])
            return
        self.waiting.append(page)
        if len(self.waiting) == self.batch_size:
            self._compute()

    def finish(self) -> list[PageScore]:
        """Compute what waits; the scores of all pages, in order."""
        if self.waiting:
            self._compute()
        return self.scores

    def _compute(self) -> None:
        pages, self.waiting = self.waiting, []
        annotated = [page for page in pages if page.chunks]
        found = iter(self._score(annotated) if annotated else ())
        scores = [next(found) if page.chunks else PageScore(page.digest, None) for page in pages]
        if self.records is not None:
            self.records.write(scores)
        self.scores.extend(scores)

    @torch.inference_mode()
    def _score(self, pages: Sequence[Page]) -> list[PageScore]:
        checkpoint = self.checkpoint
        model, tokenizer = checkpoint.model, checkpoint.processor.tokenizer
        images = [page.image for page in pages]
        inputs = read_prompts(checkpoint.processor, images, [page.prompt for page in pages])
        sizes = [image.size for image in images]
        regions = find_regions(
            checkpoint.config, checkpoint.processor, inputs, sizes, self.image_tokens
        )
        inputs = inputs.to(model.device, model.dtype)
        answers = self._answers(pages, inputs)
        forced = teacher_forced(inputs, answers, tokenizer.pad_token_id)
        rows = max(map(len, answers))
        looked = np.zeros((len(pages), *self._heads, 0), dtype=int)
        said = None
        if rows:
            cache = WatchCache(checkpoint.shape.layers, rows)
            # Logits say what the model would say instead of a known text; a generated one it said.
            keep = rows + 1 if any(page.aligned for page in pages) else 1
            out = model(**forced, past_key_values=cache, use_cache=True, logits_to_keep=keep)
            said = out.logits[:, :-1].argmax(-1).cpu()
            looked = cache.looked().numpy()
        found = []
        for row, (page, answer, region) in enumerate(zip(pages, answers, regions, strict=True)):
            at = image_positions(checkpoint.config, forced["input_ids"][row], [region])[0]
            own = looked[row, ..., looked.shape[-1] - len(answer) :]
            right = [True] * len(answer)
            if page.aligned:
                right = (said[row, rows - len(answer) :] == torch.tensor(answer)).tolist()
            found.append(score_page(page, answer, tokenizer, own, right, region, at))
        return found

    def _answers(self, pages: Sequence[Page], inputs: BatchFeature) -> list[list[int]]:
        """Tokens of each page's known text, or of what the model says."""
        if all(page.aligned for page in pages):
            tokenizer = self.checkpoint.processor.tokenizer
            return [tokenizer(page.text, add_special_tokens=False)["input_ids"] for page in pages]
        return greedy_answers(self.checkpoint, inputs, self.max_new_tokens)

    @property
    def _heads(self) -> tuple[int, int]:
        return self.checkpoint.shape.layers, self.checkpoint.shape.query_heads
