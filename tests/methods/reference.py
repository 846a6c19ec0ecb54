"""The methods once more, slowly: the oracle of the tests beside it.

One unpadded prompt at a time, float64 scores, one loop per sum the definition names. The `paper`
allocations are plain float64; the `exact` ones are rational numbers, so that a tie is a tie and
not a matter of the order in which something was added up.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

Array = np.ndarray
# Cut-offs closer than this (relative) may fall differently in float32.
UNSTABLE = 1e-5


@dataclass(frozen=True)
class Setting:
    """A method with its settings on a model; settings it does not read are ignored."""

    method: str
    layers: int
    query_heads: int
    kv_heads: int
    budget: int = 0
    window: int = 32
    kernel_size: int = 5
    pooling: str = "avg"
    group_reduction: str = "mean"
    allocation: str = "paper"
    ratio: float = 0.1
    floor: float = 0.2
    seed: int = 0
    sinks: int = 4
    head_scores: Array | None = None

    @property
    def base(self) -> int:
        """Tokens per KV head beside the window."""
        return self.budget - self.window


@dataclass(frozen=True)
class Answer:
    """What one prompt keeps: `counts` [L][H], window included, and the scores behind them."""

    tokens: int
    counts: list[list[int]]
    positions: list[list[list[int]]]
    scores: list[list[Array]] | None
    stable: list[bool]


def keep(setting: Setting, queries: list[Array], keys: list[Array]) -> Answer:
    """Keep tokens of one prompt; per layer, queries are [Hq, n, d] and keys [H, n, d]."""
    tokens = keys[0].shape[1]
    if setting.method in ("fullkv", "local", "streaming"):
        return _by_position(setting, tokens)
    if tokens <= setting.budget:
        return _everywhere(setting, list(range(tokens)), tokens)
    scores = [layer_scores(setting, q, k) for q, k in zip(queries, keys, strict=True)]
    beside, stable = allot(setting, scores, tokens - setting.window)
    window = list(range(tokens - setting.window, tokens))
    positions = [
        [best(head, count) + window for head, count in zip(layer, row, strict=True)]
        for layer, row in zip(scores, beside, strict=True)
    ]
    counts = [[len(kept) for kept in layer] for layer in positions]
    return Answer(tokens, counts, positions, scores, stable)


def _by_position(setting: Setting, tokens: int) -> Answer:
    budget = tokens if setting.method == "fullkv" else min(setting.budget, tokens)
    sinks = setting.sinks if setting.method == "streaming" and budget < tokens else 0
    kept = list(range(sinks)) + list(range(tokens - budget + sinks, tokens))
    return _everywhere(setting, kept, tokens)


def _everywhere(setting: Setting, kept: list[int], tokens: int) -> Answer:
    heads, layers = setting.kv_heads, setting.layers
    counts = [[len(kept)] * heads for _ in range(layers)]
    return Answer(tokens, counts, [[kept] * heads] * layers, None, [True] * layers)


# --- scores -------------------------------------------------------------------------------------


def layer_scores(setting: Setting, query: Array, key: Array) -> list[Array]:
    """Give every token before the window a score, for each KV head of a layer."""
    group = setting.query_heads // setting.kv_heads
    scores = []
    for head in range(setting.kv_heads):
        members = [
            window_attention(query[q], key[head], setting.window)
            for q in range(head * group, (head + 1) * group)
        ]
        if setting.group_reduction == "mean":
            reduced = sum(members) / group
        else:
            reduced = np.maximum.reduce(members)
        scores.append(pool(reduced, setting.kernel_size, setting.pooling))
    return scores


def window_attention(query: Array, key: Array, window: int) -> Array:
    """Average what the last `window` queries of a query head pay to each token before them."""
    tokens, dim = key.shape
    total = np.zeros(tokens - window)
    for row in range(window):
        seen = tokens - window + row + 1
        logits = key[:seen].astype(np.float64) @ query[row - window].astype(np.float64)
        logits /= math.sqrt(dim)
        weights = np.exp(logits - logits.max())
        total += (weights / weights.sum())[: tokens - window]
    return total / window


def pool(scores: Array, kernel_size: int, pooling: str) -> Array:
    """Pool over neighbours; outside the prompt lie zeros, and the mean counts them."""
    reach = kernel_size // 2
    pooled = np.zeros(len(scores))
    for centre in range(len(scores)):
        around = [
            float(scores[at]) if 0 <= at < len(scores) else 0.0
            for at in range(centre - reach, centre + reach + 1)
        ]
        pooled[centre] = math.fsum(around) / kernel_size if pooling == "avg" else max(around)
    return pooled


def best(scores: Array, count: int) -> list[int]:
    """Positions of the `count` best scores, in position order; ties go to the lower position."""
    ranked = sorted(range(len(scores)), key=lambda at: (-scores[at], at))
    return sorted(ranked[:count])


# --- allocations, in tokens beside the window ---------------------------------------------------


def allot(
    setting: Setting, scores: list[list[Array]], room: int
) -> tuple[list[list[int]], list[bool]]:
    """Tokens per layer and KV head, and per layer whether float32 must agree on them."""
    stable = [True] * setting.layers
    if setting.method == "adakv":
        held = [adakv_held(layer, setting.base) for layer in scores]
        stable = [steady for _, steady in held]
        counts = [adakv_layer(setting, shares, room) for shares, _ in held]
    else:
        counts = ALLOTMENTS[setting.method](setting, room)
    return counts, stable


def snapkv(setting: Setting, room: int) -> list[list[int]]:
    """The same for every head."""
    return [[min(setting.base, room)] * setting.kv_heads for _ in range(setting.layers)]


def pyramidkv(setting: Setting, room: int) -> list[list[int]]:
    """Fewer from layer to layer; the heads of a layer are equal."""
    base, layers = setting.base, setting.layers
    low = base // 20
    high = 2 * base - low
    if high >= room:
        high = room
        low = 2 * base - high
    if layers == 1:
        per_layer = [base]
    elif setting.allocation == "paper":
        per_layer = [high - layer * ((high - low) // (layers - 1)) for layer in range(layers)]
    else:
        ramp = [high - Fraction(layer * (high - low), layers - 1) for layer in range(layers)]
        per_layer = spend(ramp, room, layers * base)
    return [[min(count, room)] * setting.kv_heads for count in per_layer]


def adakv_held(scores: list[Array], base: int) -> tuple[list[int], bool]:
    """Tokens of each head among the layer's H * base best, and whether a wide gap decides it."""
    entries = []
    for head, values in enumerate(scores):
        ranked = sorted((float(value) for value in values), reverse=True)
        total = math.fsum(ranked)
        scale = math.fsum(ranked[:base]) / total if total > 0 else 1.0
        entries += [(-value * scale, head, rank) for rank, value in enumerate(ranked)]
    entries.sort()
    taken = entries[: len(scores) * base]
    cut = -taken[-1][0]
    near = {head for value, head, _ in entries if abs(-value - cut) <= UNSTABLE * cut}
    held = [sum(head == owner for _, owner, _ in taken) for head in range(len(scores))]
    return held, len(near) == 1


def adakv_layer(setting: Setting, held: list[int], room: int) -> list[int]:
    """What a layer's heads may keep when `held` of its best tokens are theirs."""
    floor = int(setting.floor * setting.base)
    if setting.allocation == "paper":
        return [min(round((1 - setting.floor) * count + floor), room) for count in held]
    # The setting as it was written: 0.2 means a fifth, not the float next to it.
    share = 1 - Fraction(str(setting.floor))
    return spend([share * count + floor for count in held], room, setting.kv_heads * setting.base)


def sparsemm(setting: Setting, room: int) -> list[list[int]]:
    """By visual score, over the whole model."""
    return by_head_score(setting, setting.head_scores, room)


def random(setting: Setting, room: int) -> list[list[int]]:
    """By scores drawn once, layer by layer, one for each query head."""
    generator = np.random.Generator(np.random.PCG64(setting.seed))
    return by_head_score(setting, generator.random((setting.layers, setting.query_heads)), room)


def by_head_score(setting: Setting, scores: Array, room: int) -> list[list[int]]:
    """A floor for every KV head; the rest of the model's budget by share of the score."""
    heads, group = setting.kv_heads, setting.query_heads // setting.kv_heads
    summed = [
        sum(Fraction(float(score)) for score in row[head * group : (head + 1) * group])
        for row in scores
        for head in range(heads)
    ]
    floor = int(setting.ratio * setting.base)
    pot = (setting.base - floor) * len(summed)
    if setting.allocation == "paper":
        total = float(sum(summed))
        flat = [min(round(float(x) / total * pot + floor), room) for x in summed]
    else:
        total = sum(summed)
        want = [x * pot / total + floor for x in summed]
        flat = spend(want, room, setting.base * len(summed))
    return [flat[at : at + heads] for at in range(0, len(flat), heads)]


ALLOTMENTS: dict[str, Callable[[Setting, int], list[list[int]]]] = {
    "snapkv": snapkv,
    "pyramidkv": pyramidkv,
    "sparsemm": sparsemm,
    "random": random,
}


def spend(want: list[Fraction], room: int, total: int) -> list[int]:
    """Whole tokens that sum to `total`: clip and share till nothing changes, then round."""
    given = [min(Fraction(x), Fraction(room)) for x in want]
    while sum(given) != total:
        excess = total - sum(given)
        unclipped = [at for at, x in enumerate(given) if x < room]
        weight = sum(want[at] for at in unclipped)
        for at in unclipped:
            part = want[at] / weight if weight else Fraction(1, len(unclipped))
            given[at] = min(given[at] + excess * part, Fraction(room))
    counts = [math.floor(x) for x in given]
    by_remainder = sorted(range(len(given)), key=lambda at: (counts[at] - given[at], at))
    for at in by_remainder[: total - sum(counts)]:
        counts[at] += 1
    return counts
