"""The long way to a compressed cache: keep every token and mask the evicted ones.

A model on this attention keeps transformers' own DynamicCache. When all layers have read the
prompt, the method is asked which tokens each KV head keeps; from then on the others get no weight.
Attention is written out, in the model's precision, and shares no code with the cache under test.
"""

import math
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, LogitsProcessor, PreTrainedModel
from transformers.generation.utils import GenerateOutput

from sparsemm_eval.cache import CACHE_ARGUMENT, HeadBudgetCache
from sparsemm_eval.methods import Method, PromptLayer, keep_prompt

ORACLE = "evicted-tokens-masked"


class Oracle:
    """What one generation knows: the method, which positions are no padding, and who is kept.

    Parameters
    ----------
    method : Method
        Asked once a row, when all layers have read the prompt.
    valid : Tensor
        [B, n] bool, False on padding.
    visual : Tensor
        [B, n] bool, True on tokens of an image.
    both_ways : bool
        Whether tokens of an image see those of the same image after them too.
    """

    def __init__(
        self, method: Method, valid: Tensor, visual: Tensor, both_ways: bool = False
    ) -> None:
        self.method, self.valid, self.visual = method, valid, visual
        self.places = method.shape.places
        self.read: dict[int, tuple[Tensor, ...]] = {}  # of the layers that are compressed
        self.steps: Counter[int] = Counter()  # by layer, tokens that were fed one by one
        begins = visual & ~torch.nn.functional.pad(visual, (1, 0))[:, :-1]
        image = begins.cumsum(1) * visual
        self.alike = (image[:, :, None] == image[:, None]) & visual[:, None] & both_ways

    @cached_property
    def kept(self) -> dict[int, Tensor]:
        """[B, H, n] by layer."""
        kept = {layer: [] for layer in sorted(self.read)}
        for row, valid in enumerate(self.valid):
            layers = [
                PromptLayer(
                    index, *(x[row][:, valid] for x in read[:3]), read[3], self.visual[row, valid]
                )
                for index, read in sorted(self.read.items())
            ]
            for mask, of_layer in zip(
                keep_prompt([self.method], layers), kept.values(), strict=True
            ):
                whole = torch.zeros(mask.shape[1], len(valid), dtype=torch.bool)
                whole[:, valid] = mask[0]
                of_layer.append(whole)
        return {layer: torch.stack(rows) for layer, rows in kept.items()}

    def counts(self) -> Tensor:
        """Tokens of the prompt that are kept, [B, L, H]."""
        return torch.stack([self.kept[layer].sum(-1) for layer in sorted(self.kept)], 1)

    def visible(self, layer: int, window: int | None, *read: Tensor) -> Tensor:
        """Who sees whom, [B, H, m, positions]; the first call of a layer reads the prompt."""
        rows, heads, positions, _ = read[1].shape
        place, asked = self.places[layer], read[0].shape[2]
        to = torch.arange(positions)
        own = to[-asked:, None]
        near = to > own - (positions + 1 if window is None else window)
        if asked == positions:
            if place is not None:
                self.read[place] = read
            past = (to <= own) | self.alike
            # A padded position sees itself, or it would see nothing and turn into NaN.
            seen = (past & near & self.valid[:, None]) | torch.eye(positions, dtype=torch.bool)
            return seen[:, None].expand(rows, heads, positions, positions)
        self.steps[layer] += 1
        read = self.valid[:, None].expand(-1, heads, -1) if place is None else self.kept[place]
        answer = torch.ones(rows, heads, self.steps[layer], dtype=torch.bool)
        # transformers' own cache drops what has left a window.
        return torch.cat([read, answer], -1)[..., -positions:][:, :, None] & near


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    window = kwargs.get("sliding_window")
    # A method takes products to be divided by the root of a head's size.
    more = scaling * query.shape[-1] ** 0.5
    asked = query if math.isclose(more, 1) else query * more
    read = (asked, key, value, module.o_proj.weight)
    visible = module.oracle.visible(module.layer_idx, window, *read)
    group = query.shape[1] // key.shape[1]
    key, value, visible = (x.repeat_interleave(group, 1) for x in (key, value, visible))
    logits = torch.einsum("bhmd,bhnd->bhmn", query, key) * scaling
    weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("bhmn,bhnd->bmhd", weights, value), None


# Without a mask function of its own: the oracle masks by itself.
AttentionInterface.register(ORACLE, _attend)


def generate_masked(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    method: Method,
    kept: dict[int, Tensor] | None = None,
    **options: Any,
) -> tuple[GenerateOutput, Oracle]:
    """Generate on a stock cache, with what the method evicts masked, or all but what is `kept`.

    The beams of a row read the same prompt, so it does not matter which beam's mask one has.
    """
    beams = options.get("num_beams", 1)
    seen = (inputs["attention_mask"].bool(), visual_of(model, inputs))
    seen = (x.repeat_interleave(beams, 0) for x in seen)
    oracle = Oracle(method, *seen, both_ways="token_type_ids" in inputs)
    if kept is not None:
        oracle.kept = kept
    names = ("language_model", "text_model")
    decoder = next((getattr(model.model, x) for x in names if hasattr(model.model, x)), model.model)
    for layer in decoder.layers:
        layer.self_attn.oracle = oracle
    whole = model.config.get_text_config() is model.config
    model.set_attn_implementation({"" if whole else "text_config": ORACLE})
    return run(model, inputs, **options), oracle


def generate_budgeted(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    methods: Method | Sequence[Method],
    backend: str = "auto",
    **options: Any,
) -> tuple[GenerateOutput, HeadBudgetCache]:
    """Generate on the cache under test."""
    cache = HeadBudgetCache(methods, backend, visual=visual_of(model, inputs))
    return run(model, inputs, **{CACHE_ARGUMENT: cache}, **options), cache


def visual_of(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Which tokens are an image's."""
    return inputs["input_ids"] == getattr(model.config, "image_token_id", -1)


def run(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> GenerateOutput:
    """Generate 24 tokens greedily unless told otherwise, and note the logits of every step.

    They are taken from the model itself: generate rounds what it hands out to float32.
    """
    settings = {"do_sample": False, "max_new_tokens": 24, "return_dict_in_generate": True}
    seen: list[Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda module, given, out: seen.append(out[:, -1]))
    try:
        out = model.generate(**inputs, **settings | options)
    finally:
        hook.remove()
    out.logits = tuple(seen)
    return out


def new_tokens(out: GenerateOutput, inputs: dict[str, Tensor]) -> Tensor:
    """What was generated, [B, steps]."""
    return out.sequences[:, inputs["input_ids"].shape[1] :]


def logits(out: GenerateOutput) -> Tensor:
    """Logits of every step, [B, steps, V], in the model's precision."""
    return torch.stack(out.logits, 1)


class Forced(LogitsProcessor):
    """Leaves the given tokens alone, [rows, steps], one a step."""

    def __init__(self, tokens: Tensor, read: int) -> None:
        self.tokens, self.read = tokens, read

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.read
        return torch.full_like(scores, -torch.inf).scatter(1, self.tokens[:, step, None], 0)


def likelihood(logits: Tensor, tokens: Sequence[int]) -> tuple[float, bool]:
    """Of tokens under logits [steps, V] that each came out of."""
    given = torch.tensor(tokens)
    each = logits[: len(given)].double().log_softmax(-1).gather(-1, given[:, None])
    return each.sum().item(), torch.equal(logits[: len(given)].argmax(-1), given)
