"""What a model loses when KV heads keep less of a prompt: many rows on one prompt's cache.

A prompt is read once, and answered greedily on its whole cache. Then the same answer is fed again
in any number of rows, each of which sees another part of the prompt's keys and values: of each KV
head the first so many tokens of a ranking. The prompt's keys and values are never copied: a row is
a mask over them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sparsemm_eval.cache import CACHE_ARGUMENT, AttendingLayer
from sparsemm_eval.cache.attention import usual_scale
from sparsemm_eval.engine.decode import not_finite_words
from sparsemm_eval.errors import UserError
from sparsemm_eval.families import family_of
from sparsemm_eval.methods import ModelShape, Ranking
from sparsemm_eval.methods.sensitivity import RULES, rule_scores

# Bytes beside the model and a prompt: at least, and as a share of the weights'.
_LEAST_ROOM, _ROOM = 1 << 28, 0.1


def room(model: PreTrainedModel) -> float:
    """Bytes that rows which are fed together may take, and as many that held prompts may.

    Both together are small beside what a plain run of the model takes.
    """
    return max(_LEAST_ROOM, _ROOM * sum(parameter.nbytes for parameter in model.parameters()))


class SharedPrompt(Cache):
    """One prompt's keys and values, seen by rows that each see another part of them.

    Parameters
    ----------
    shape : ModelShape
        Of the decoder; rows see all of what layers that methods do not compress attend to.
    window : int
        Queries that observe the prompt, for the rankings of `sparsemm_eval.methods.sensitivity`.
    """

    def __init__(self, shape: ModelShape, window: int) -> None:
        self.starved = [_SharedLayer(window) for _ in range(shape.layers)]
        self.sliding = [_SlidingLayer(window) for window in shape.windows if window is not None]
        others = iter(self.sliding)
        super().__init__(
            layers=[
                next(others) if place is None else self.starved[place] for place in shape.places
            ]
        )

    def begin(self, rules: Tensor, counts: Tensor) -> None:
        """Start rows that have nothing but the prompt.

        Parameters
        ----------
        rules : Tensor
            [rows, L, H] int64: by which rule each head ranks the prompt's tokens.
        counts : Tensor
            [rows, L, H] int64: how many of the ranking it sees.
        """
        for number, layer in enumerate(self.starved):
            layer.begin(rules[:, number], counts[:, number])
        for layer in self.sliding:
            layer.begin_rows(len(rules))

    def bytes(self) -> int:
        """Bytes of keys, values and rankings."""
        held = [x for layer in self.layers for x in (layer.key, layer.value, layer.ranks)]
        return sum(x.nbytes for x in held)


class _SharedLayer(AttendingLayer):
    """Dense while the prompt is read; then one prompt under many rows."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window
        self.key: Tensor | None = None  # [H, n, D]
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[_SharedLayer, _SharedLayer]:
        self.lazy_initialization(key_states, value_states)
        self.pending = (key_states, value_states)
        return self, self

    def begin(self, rules: Tensor, counts: Tensor) -> None:
        """Start rows [rows, H] of rules and counts."""
        heads = torch.arange(rules.shape[1], device=rules.device)
        # One row may see all of a head by any rule.
        self.hidden = self.ranks[rules, heads] >= counts[..., None]  # [rows, H, n]
        self.begin_rows(len(rules))

    def begin_rows(self, rows: int) -> None:
        """Start so many rows that have nothing of an answer yet."""
        shape = (rows, self.key.shape[0], 0, self.key.shape[2])
        self.new = (self.key.new_zeros(shape), self.value.new_zeros(shape))

    def attend(
        self, module: torch.nn.Module, query: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        key, value = self.pending
        del self.pending
        if self.key is None:
            out, _ = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
            self._read(usual_scale(query, kwargs.get("scaling"))[0], key[0], value[0])
            return out
        self.new = (torch.cat([self.new[0], key], 2), torch.cat([self.new[1], value], 2))
        scale = kwargs.get("scaling")
        return self._attend(query, query.shape[-1] ** -0.5 if scale is None else scale)

    def _read(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Rank the prompt's tokens by every rule, and let one row see all of them."""
        self.key, self.value = key, value
        scores = rule_scores(query, key, self.window, range(len(RULES)))
        self.ranks = torch.stack([Ranking(scores[rule]).ranks(0) for rule in range(len(RULES))])
        everything = torch.full((1, key.shape[0]), key.shape[1], device=key.device)
        self.begin(torch.zeros_like(everything), everything)

    def _attend(self, query: Tensor, scale: float) -> Tensor:
        rows, _, tokens, dim = query.shape
        new_key, new_value = self.new
        heads, n, _ = self.key.shape
        exact = torch.promote_types(query.dtype, torch.float32)
        grouped = query.unflatten(1, (heads, -1)).to(exact) * scale  # [rows, H, G, tokens, D]
        # All rows' queries of a head in one product with its keys.
        flat = grouped.transpose(0, 1).reshape(heads, -1, dim)
        on_prompt = (flat @ self.key.to(exact).transpose(1, 2)).view(heads, rows, -1, tokens, n)
        on_prompt.masked_fill_(self._hidden(tokens), -torch.inf)
        on_new = (grouped @ new_key.to(exact)[:, :, None].transpose(-1, -2)).transpose(0, 1)
        steps = torch.arange(new_key.shape[2], device=query.device)
        on_new = on_new.masked_fill(self._unseen(steps, steps[-tokens:, None]), -torch.inf)
        weights = torch.cat([on_prompt, on_new], -1).softmax(-1)  # [H, rows, G, tokens, n + new]
        out = weights[..., :n].reshape(heads, -1, n) @ self.value.to(exact)
        out = out.view(heads, rows, -1, tokens, dim).transpose(0, 1)
        out = out + weights[..., n:].transpose(0, 1) @ new_value.to(exact)[:, :, None]
        return out.flatten(1, 2).transpose(1, 2).to(query.dtype)

    def _hidden(self, tokens: int) -> Tensor:
        """What of the prompt the newest tokens do not see; as [H, rows, G, tokens, n]."""
        return self.hidden.transpose(0, 1)[:, :, None, None]

    def _unseen(self, steps: Tensor, own: Tensor) -> Tensor:
        """Which tokens of the answer those at places `own` do not see."""
        return steps > own

    def get_seq_length(self) -> int:
        return 0 if self.key is None else self.key.shape[1] + self.new[0].shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        """The name of `get_max_length` in transformers 5.17."""
        return -1


class _SlidingLayer(_SharedLayer):
    """One prompt under many rows that all see the last tokens of it."""

    def __init__(self, window: int) -> None:
        super().__init__(window)
        self.ranks = torch.empty(0)

    def _read(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        self.key, self.value = key, value
        self.begin_rows(1)

    def _hidden(self, tokens: int) -> Tensor:
        n, after = self.key.shape[1], self.new[0].shape[2]
        places = torch.arange(n + after, device=self.key.device)
        return self._unseen(places[:n], places[-tokens:, None])

    def _unseen(self, steps: Tensor, own: Tensor) -> Tensor:
        return (steps > own) | (steps <= own - self.window)


class AnsweredPrompt:
    """A prompt that was read, with what the model answers it on its whole cache.

    Parameters
    ----------
    model : PreTrainedModel
        On `sparsemm_eval.cache.use_head_budget_attention`.
    inputs : mapping
        The processor's output for one prompt, on the model's device.
    window : int
        Queries that observe.
    options : mapping
        Of transformers' ``generate``, for a greedy answer.
    answer : sequence of int, optional
        The answer, where it is known: then the prompt is only read.

    Raises
    ------
    UserError
        If the logits of the answer are not finite.
    """

    @torch.inference_mode()
    def __init__(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, Tensor],
        window: int,
        options: Mapping[str, Any],
        answer: list[int] | None = None,
    ) -> None:
        self.model, self.family = model, family_of(model.config)
        shape = ModelShape.from_config(model.config)
        self.cache = SharedPrompt(shape, window)
        given = {CACHE_ARGUMENT: self.cache, **options}
        if answer is not None:
            given["max_new_tokens"] = 1
        ids = model.generate(**inputs, **given)
        self.n = inputs["input_ids"].shape[1]
        # The token that ends it counts too: whether an answer ends is a decision like any other.
        self.answer: list[int] = ids[0, self.n :].tolist() if answer is None else answer
        delta = self.family.rope_delta(model)
        self.first = self.n + (0 if delta is None else int(delta[0, 0]))
        everything = np.full((1, shape.layers, shape.kv_heads), self.n)
        self.whole = self._log_probabilities(np.zeros_like(everything), everything)[0]
        if not self.whole.isfinite().all():
            raise UserError(f"what is lost by starving heads means nothing, {self._not_finite()}")

    def bytes(self) -> int:
        """Bytes that it holds."""
        return self.cache.bytes() + self.whole.nbytes

    @torch.inference_mode()
    def divergence(self, rules: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """How far rows are from the whole cache at each token of the answer after the first.

        Parameters
        ----------
        rules, counts : ndarray
            [rows, L, H] integers: by which rule each head ranks the prompt's tokens, and how many
            of them it sees; all of a shorter prompt.

        Returns
        -------
        ndarray
            [rows, T - 1] float64: KL(whole || row) in nats, for an answer of T tokens.

        Raises
        ------
        UserError
            If a row's logits are not finite: at once, and not when all has been measured.
        """
        parts = []
        each = self._rows_together()
        for start in range(0, len(counts), each):
            rows = slice(start, start + each)
            logs = self._log_probabilities(rules[rows], counts[rows])
            parts.append((self.whole.exp() * (self.whole - logs)).sum(-1).double().cpu().numpy())
        found = np.concatenate(parts)
        if not np.isfinite(found).all():
            raise UserError(f"what is lost by starving heads means nothing, {self._not_finite()}")
        return found.clip(min=0)

    def _not_finite(self) -> str:
        return f"as {not_finite_words(self.model)}"

    def _rows_together(self) -> int:
        """Rows that are fed together, for what they take to be small beside the model."""
        layer = self.cache.layers[0]
        config = self.model.config.get_text_config()
        tokens = max(1, len(self.answer) - 1)
        weights = 3 * config.num_attention_heads * tokens * (self.n + tokens)
        words = 3 * tokens * config.vocab_size
        a_row = 4 * max(weights, words) + 2 * layer.key.nbytes // max(1, self.n) * tokens
        return max(1, int(room(self.model) / a_row))

    def _log_probabilities(self, rules: np.ndarray, counts: np.ndarray) -> Tensor:
        """[rows, T - 1, V] of the answer's tokens after the first, each fed those before it."""
        device = self.model.device
        self.cache.begin(torch.from_numpy(rules).to(device), torch.from_numpy(counts).to(device))
        fed = torch.tensor(self.answer[:-1], dtype=torch.long, device=device)
        rows = len(counts)
        if not len(fed):
            return torch.zeros(rows, 0, 1, device=device)
        places = (torch.arange(len(fed), device=device) + self.first).expand(rows, -1)
        logits = self.model(
            input_ids=fed.expand(rows, -1),
            position_ids=self.family.text_positions(self.model, places),
            # A mask that says nothing: 4-D ones are taken as they are, and none is made.
            attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
            **{CACHE_ARGUMENT: self.cache},
            use_cache=True,
            logits_to_keep=len(fed),
        ).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
