"""The field's other methods once more, slowly: the oracle of the tests beside it.

One prompt without padding, float64, one loop per sum the rule names. A scorer is called as
`scores = NAME(query, key, value, out_weight, visual, positions, **settings)` for one layer and
gives [H, n - window]: a score for each token before the window, the better the higher.

- query [Hq, m, d]: after RoPE, of the last m tokens; m is at least the window, and n where the
  rule needs more than the window's queries. key [H, n, d], after RoPE; value [H, n, dv].
- out_weight [hidden, Hq * dv]: the layer's output projection.
- visual [n]: which tokens are of an image. positions [n], or [3, n] for three-axis RoPE.
- Settings a rule does not read are ignored, so that one dict serves all.

Prompts that fit their budget are kept whole by every method and are no matter of this file.
Queries attend to all keys up to themselves. Layer rules and keep rules follow the scorers.

Where a rule leaves room, the docstring says what was decided; a setting marked "public code" gives
what the method's authors run instead. Of the papers only the abstracts were at hand: decisions
follow the wording of the rules, the conventions of this package, and where both are silent the
public code as it was read (kvpress, MixKV, LAVa, CAKE, TGV-KV; VL-Cache has none).
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
from methods import reference

Array = np.ndarray
Maybe = Array | None


# --- attention ----------------------------------------------------------------------------------


def attend(query: Array, key: Array, scale: float | None = None, among: Maybe = None) -> Array:
    """Attention rows [m, n] of one query head's last m tokens.

    The softmax runs over the keys up to the query itself, and of those over `among` [n] alone
    where it is given. A query with no such key pays nothing to anyone.
    """
    rows, tokens, dim = len(query), len(key), key.shape[1]
    factor = 1 / math.sqrt(dim) if scale is None else scale
    paid = np.zeros((rows, tokens))
    for row in range(rows):
        seen = tokens - rows + row + 1
        visible = [at for at in range(seen) if among is None or among[at]]
        if not visible:
            continue
        logits = [factor * float(np.dot(query[row].astype(float), key[at])) for at in visible]
        top = max(logits)
        weights = [math.exp(logit - top) for logit in logits]
        total = math.fsum(weights)
        for at, weight in zip(visible, weights, strict=True):
            paid[row, at] = weight / total
    return paid


def members(query: Array, key: Array) -> list[list[int]]:
    """Name the query heads of each KV head."""
    group = len(query) // len(key)
    return [list(range(head * group, (head + 1) * group)) for head in range(len(key))]


def reduce_group(parts: list[Array], how: str) -> Array:
    """Reduce over the query heads of a KV head, by `mean` or `max`."""
    return sum(parts) / len(parts) if how == "mean" else np.maximum.reduce(parts)


def snapkv(
    query: Array,
    key: Array,
    value: Maybe = None,
    out_weight: Maybe = None,
    visual: Maybe = None,
    positions: Maybe = None,
    *,
    window: int = 32,
    kernel_size: int = 5,
    pooling: str = "avg",
    group_reduction: str = "mean",
    scale: float | None = None,
    **_other: object,
) -> Array:
    """Window attention: mean over the window's queries, then over the group, then pooled."""
    tokens = key.shape[1]
    scores = []
    for head, heads in enumerate(members(query, key)):
        parts = [
            attend(query[q][-window:], key[head], scale)[:, : tokens - window].sum(0) / window
            for q in heads
        ]
        reduced = reduce_group(parts, group_reduction)
        scores.append(reference.pool(reduced, kernel_size, pooling))
    return np.array(scores)


# --- scorers ------------------------------------------------------------------------------------


def length(vector: Array) -> float:
    """Measure a vector, in the Euclidean norm."""
    return math.sqrt(math.fsum(float(x) ** 2 for x in vector))


def unit(vector: Array) -> Array:
    """Scale a vector to length 1; the zero vector stays zero."""
    return vector.astype(float) / (length(vector) or 1.0)


def mean_unit_key(key: Array) -> Array:
    """Average the unit keys [n, d] of a head over all of its tokens."""
    return sum(unit(k) for k in key) / len(key)


def keydiff(
    query: Array,
    key: Array,
    value: Maybe = None,
    out_weight: Maybe = None,
    visual: Maybe = None,
    positions: Maybe = None,
    *,
    window: int = 0,
    **_other: object,
) -> Array:
    """Minus the cosine between a key and the mean of the head's unit keys, over all n tokens.

    Decided: no window by default; the mean takes window tokens in; keys or a mean of length 0
    have cosine 0.
    """
    candidates = key.shape[1] - window
    scores = []
    for head in key:
        mean = unit(mean_unit_key(head))
        scores.append([-float(np.dot(unit(k), mean)) for k in head[:candidates]])
    return np.array(scores)


def knorm(
    query: Array,
    key: Array,
    value: Maybe = None,
    out_weight: Maybe = None,
    visual: Maybe = None,
    positions: Maybe = None,
    *,
    window: int = 0,
    **_other: object,
) -> Array:
    """Minus the key's length after RoPE (which leaves it as it was). Decided: no window."""
    candidates = key.shape[1] - window
    return np.array([[-length(k) for k in head[:candidates]] for head in key])


def tova(
    query: Array,
    key: Array,
    value: Maybe = None,
    out_weight: Maybe = None,
    visual: Maybe = None,
    positions: Maybe = None,
    *,
    window: int = 1,
    scale: float | None = None,
    **_other: object,
) -> Array:
    """The last query's attention, averaged over all query heads; the same for each KV head.

    Decided: the window is the last token, kept; no pooling.
    """
    parts = [
        attend(query[q][-1:], key[head], scale)[0]
        for head, heads in enumerate(members(query, key))
        for q in heads
    ]
    mean = sum(parts) / len(parts)
    return np.array([mean[: key.shape[1] - window]] * len(key))


def similarity(key: Array) -> float:
    """Average cosine of two different keys [n, d] of a head: MixKV's r.

    By the short form (n |mean unit key|^2 - 1) / (n - 1), not clipped: it may be just below 0.
    """
    mean = mean_unit_key(key)
    return (len(key) * float(np.dot(mean, mean)) - 1) / (len(key) - 1)


def min_max_to_mean(values: Array, mean: float) -> Array:
    """Shift and scale values to 0..1, then scale them so that they average to `mean`.

    Decided: equal values say nothing and become zeros.
    """
    low, high = min(values), max(values)
    if low == high:
        return np.zeros(len(values))
    spread = np.array([(x - low) / (high - low) for x in values])
    return spread * (mean / (math.fsum(spread) / len(spread)))


def mixkv(
    query: Array,
    key: Array,
    value: Maybe = None,
    out_weight: Maybe = None,
    visual: Maybe = None,
    positions: Maybe = None,
    *,
    window: int = 32,
    r: float | None = None,
    **settings: object,
) -> Array:
    """Importance and diversity, (1 - r) I + r D (arXiv 2510.20707).

    Decided: "the attention" is the pooled window attention, as in `snapkv`, and its mean is over
    the head's candidates; I is the sum of the two terms, not their average; the mean unit key and
    r are over all n tokens; min-max is over the candidates. `r` fixes the share of all heads, for
    tests. Public code takes r from a table and adds 1e-8 to divisors.
    """
    candidates = key.shape[1] - window
    attention = snapkv(query, key, window=window, **settings)
    closeness = keydiff(query, key, window=window)
    scores = []
    for head in range(len(key)):
        mean = math.fsum(attention[head]) / candidates
        lengths = [length(v) for v in value[head, :candidates]]
        importance = attention[head] + min_max_to_mean(lengths, mean)
        diversity = min_max_to_mean(closeness[head], mean)
        share = similarity(key[head]) if r is None else r
        scores.append((1 - share) * importance + share * diversity)
    return np.array(scores)


def lava(
    query: Array,
    key: Array,
    value: Maybe = None,
    out_weight: Maybe = None,
    visual: Maybe = None,
    positions: Maybe = None,
    *,
    window: int = 32,
    kernel_size: int = 7,
    pooling: str = "max",
    group_reduction: str = "max",
    scale: float | None = None,
    norm_of_window: bool = True,
    **_other: object,
) -> Array:
    """Pooled window attention times the head's largest |value|_1 (arXiv 2509.09754).

    Decided: kernel 7 and max pooling, as in public code; a query head is pooled before the maximum
    over the group (which changes nothing while both are maxima); the largest value is sought among
    all n tokens. Public code seeks it before the window: `norm_of_window=False`.
    """
    candidates = key.shape[1] - window
    scores = []
    for head, heads in enumerate(members(query, key)):
        values = value[head] if norm_of_window else value[head, :candidates]
        largest = max(math.fsum(abs(float(x)) for x in v) for v in values)
        parts = []
        for q in heads:
            mean = attend(query[q][-window:], key[head], scale)[:, :candidates].sum(0) / window
            parts.append(reference.pool(mean, kernel_size, pooling) * largest)
        scores.append(reduce_group(parts, group_reduction))
    return np.array(scores)


def cake(
    query: Array,
    key: Array,
    value: Maybe = None,
    out_weight: Maybe = None,
    visual: Maybe = None,
    positions: Maybe = None,
    *,
    window: int = 32,
    kernel_size: int = 5,
    pooling: str = "avg",
    group_reduction: str = "mean",
    scale: float | None = None,
    gamma: float = 200.0,
    ddof: int = 0,
    **_other: object,
) -> Array:
    """Mean plus gamma times the variance of what the window's queries pay (arXiv 2503.12491).

    Decided: the variance is that of a query head's w weights for a token, dividing by w, so that
    a window of one query has variance 0; public code divides by w - 1: `ddof=1`. The group's
    indicators are averaged (not their rows), then pooled.
    """
    candidates = key.shape[1] - window
    scores = []
    for head, heads in enumerate(members(query, key)):
        parts = []
        for q in heads:
            paid = attend(query[q][-window:], key[head], scale)[:, :candidates]
            mean = paid.sum(0) / window
            variance = sum((row - mean) ** 2 for row in paid) / (window - ddof)
            parts.append(mean + gamma * variance)
        reduced = reduce_group(parts, group_reduction)
        scores.append(reference.pool(reduced, kernel_size, pooling))
    return np.array(scores)


def post_vision(visual: Array | None, tokens: int) -> int:
    """Count the tokens after the last visual one.

    Decided: a prompt without an image is text after vision as a whole. One that ends in an image
    has no such query, and the rule does not apply.
    """
    if visual is None or not visual.any():
        return tokens
    last = max(at for at in range(tokens) if visual[at])
    if last == tokens - 1:
        raise ValueError("no text after the last visual token")
    return tokens - 1 - last


def vlcache(
    query: Array,
    key: Array,
    value: Maybe = None,
    out_weight: Maybe = None,
    visual: Maybe = None,
    positions: Maybe = None,
    *,
    window: int = 0,
    group_reduction: str = "mean",
    scale: float | None = None,
    **_other: object,
) -> Array:
    """Sum of what the text after the last visual token pays to a token (arXiv 2410.23317).

    Decided: several images count as one, up to the last; markers after the image are text; the
    group is averaged; no pooling; the window is 0, as `vlcache_keep` protects the recent.
    """
    tokens = key.shape[1]
    rows = post_vision(visual, tokens)
    scores = []
    for head, heads in enumerate(members(query, key)):
        parts = [attend(query[q][-rows:], key[head], scale).sum(0) for q in heads]
        scores.append(reduce_group(parts, group_reduction)[: tokens - window])
    return np.array(scores)


def rotation(rotate: Callable[[Array, object], Array], position: object, dim: int) -> Array:
    """Write the rotation at a position as a matrix [d, d], by rotating the unit vectors."""
    return np.stack([rotate(axis, position) for axis in np.eye(dim)], axis=1)


def expected(
    query: Array,
    key: Array,
    value: Maybe = None,
    out_weight: Maybe = None,
    visual: Maybe = None,
    positions: Maybe = None,
    *,
    rotate: Callable[[Array, object], Array],
    window: int = 0,
    future: int = 512,
    sinks: int = 4,
    scale: float | None = None,
    sinks_in_gaussian: bool = True,
    sinks_in_softmax: bool = True,
    **_other: object,
) -> Array:
    """Attention that a Gaussian of the prompt's queries is expected to pay (arXiv 2510.00636).

    `rotate(vector, position)` applies the model's RoPE, where a position is what
    `positions[..., token]` holds: a number, or three. All n queries are needed; they are rotated
    back, and the Gaussian's mean and covariance are taken to the average rotation over the next
    `future` positions: from the largest position + 1, on all axes alike.

    Decided: the covariance divides by the number of queries; the Gaussian is of all n queries and
    the softmax over all n keys; the sinks, whose score is infinite, are only kept. Public code
    leaves the sinks out of both: `sinks_in_gaussian=False`, `sinks_in_softmax=False`.
    """
    tokens, dim = key.shape[1:]
    factor = 1 / math.sqrt(dim) if scale is None else scale
    positions = np.arange(tokens) if positions is None else np.asarray(positions)
    turned = np.zeros((dim, dim))
    for step in range(1, future + 1):
        at = int(positions.max()) + step
        turned += rotation(rotate, at if positions.ndim == 1 else np.full(3, at), dim)
    turned /= future
    turns = [rotation(rotate, positions[..., t], dim) for t in range(tokens)]
    scores = []
    for head, heads in enumerate(members(query, key)):
        parts = []
        for q in heads:
            first = 0 if sinks_in_gaussian else sinks
            before = [
                np.linalg.solve(turns[t], query[q, t].astype(float)) for t in range(first, tokens)
            ]
            mean = sum(before) / len(before)
            covariance = sum(np.outer(x - mean, x - mean) for x in before) / len(before)
            moved, spread = turned @ mean, turned @ covariance @ turned.T
            first = 0 if sinks_in_softmax else sinks
            logits = [
                factor * float(moved @ k) + factor**2 * float(k @ spread @ k) / 2
                for k in key[head, first:].astype(float)
            ]
            top = max(logits)
            weights = [math.exp(logit - top) for logit in logits]
            parts.append(np.array([0.0] * first + weights) / math.fsum(weights))
        reduced = sum(parts) / len(parts)
        row = [math.inf if t < sinks else reduced[t] * length(v) for t, v in enumerate(value[head])]
        scores.append(row[: tokens - window])
    return np.array(scores)


def text_priority(paid: Array, text: list[int]) -> dict[int, float]:
    """Weigh each text token by the text->text attention it gets, per query that can pay it.

    `paid` [n, n]. Decided: the token's own row counts among the "later" ones, else the last
    token would divide by 0.
    """
    weights = {}
    for at in text:
        later = [row for row in text if row >= at]
        weights[at] = math.fsum(float(paid[row, at]) for row in later) / len(later)
    return weights


def tgvkv(
    query: Array,
    key: Array,
    value: Maybe = None,
    out_weight: Maybe = None,
    visual: Maybe = None,
    positions: Maybe = None,
    *,
    window: int = 0,
    scale: float | None = None,
    heads: str = "group",
    full_softmax: bool = False,
    **_other: object,
) -> Array:
    """Text->vision attention, weighted by each text token's priority (arXiv 2606.03075).

    All n queries are needed. Decided: text is every token that is not visual, before the image
    too (its row of text->vision attention is empty); text->vision is a softmax over the vision
    keys before the query, text->text one over the text keys; both are weighted per query head and
    then averaged over the group. Text stands before all vision, ordered by its priority. Public
    code runs the softmax over all keys (`full_softmax=True`), averages the attention over all
    query heads of the layer first (`heads="layer"`) and knows no text before the image.
    """
    tokens = key.shape[1]
    visual = np.zeros(tokens, bool) if visual is None else np.asarray(visual, bool)
    text = [at for at in range(tokens) if not visual[at]]

    def both(q: int, head: int) -> tuple[Array, Array]:
        if full_softmax:
            paid = attend(query[q], key[head], scale)
            return paid, paid
        return (
            attend(query[q], key[head], scale, among=visual),
            attend(query[q], key[head], scale, among=~visual),
        )

    def judge(to_vision: Array, to_text: Array) -> tuple[Array, Array]:
        priority = text_priority(to_text, text)
        seen = sum((priority[t] * to_vision[t] for t in text), np.zeros(tokens))
        return seen, np.array([priority.get(at, 0.0) for at in range(tokens)])

    groups = members(query, key)
    if heads == "layer":
        pairs = [both(q, head) for head, group in enumerate(groups) for q in group]
        averaged = [sum(side) / len(pairs) for side in zip(*pairs, strict=True)]
        judged = [judge(*averaged)] * len(key)
    else:
        judged = []
        for head, group in enumerate(groups):
            sides = zip(*[judge(*both(q, head)) for q in group], strict=True)
            judged.append(tuple(sum(side) / len(group) for side in sides))
    scores = []
    for seen, priority in judged:
        above = 1 + max((seen[at] for at in range(tokens) if visual[at]), default=0.0)
        row = [seen[at] if visual[at] else above + priority[at] for at in range(tokens)]
        scores.append(row[: tokens - window])
    return np.array(scores)


SCORERS = {
    "snapkv": snapkv, "mixkv": mixkv, "lava": lava, "vlcache": vlcache, "keydiff": keydiff,
    "tova": tova, "knorm": knorm, "cake": cake, "expected": expected, "tgvkv": tgvkv,
}  # fmt: skip


# --- tokens per layer, for each of its heads, beside the window ---------------------------------


def share_layers(
    weights: Sequence[float], base: int, room: int, allocation: str = "paper"
) -> list[int]:
    """Share len(weights) * base tokens per head among layers in proportion to their weights.

    `paper` rounds each share, halves to even, and caps it at `room`; what is capped is lost.
    `exact` shares it on, to the token, ties to the lower layer. Weights of 0 throughout: equal.
    """
    layers = len(weights)
    total = math.fsum(weights)
    shares = [weight / total if total > 0 else 1 / layers for weight in weights]
    want = [share * layers * base for share in shares]
    if allocation == "paper":
        return [min(round(tokens), room) for tokens in want]
    return reference.spend([Fraction(x) for x in want], room, layers * min(base, room))


def lava_entropy(scores: Array) -> float:
    """Entropy of a layer's scores [H, candidates], normalised together, over log of their number.

    Decided: a layer with a single score, or of zeros, has entropy 0.
    """
    flat = [float(x) for head in scores for x in head]
    total = math.fsum(flat)
    if total <= 0 or len(flat) < 2:
        return 0.0
    parts = [x / total for x in flat if x > 0]
    return -math.fsum(p * math.log(p) for p in parts) / math.log(len(flat))


def lava_layers(scores: Sequence[Array], base: int, allocation: str = "paper") -> list[int]:
    """LAVa's tokens per head of each layer: in proportion to the layers' entropies.

    Decided: all layers' entropies settle the budgets; the earlier cuts save memory and nothing
    else, as a smaller budget keeps a part of what a larger one kept (`lava_cascade`).
    """
    room = scores[0].shape[1]
    return share_layers([lava_entropy(layer) for layer in scores], base, room, allocation)


def best_of_layer(scores: Array, total: int) -> list[int]:
    """Tokens of each head among the `total` best of the layer's heads together.

    Decided: as they are, without AdaKV's scaling and floor; ties to the lower head.
    """
    ranked = sorted(
        (-float(x), head, at) for head, row in enumerate(scores) for at, x in enumerate(row)
    )
    taken = [head for _, head, _ in ranked[:total]]
    return [taken.count(head) for head in range(len(scores))]


def lava_counts(scores: Sequence[Array], base: int, allocation: str = "paper") -> list[list[int]]:
    """LAVa's tokens per layer and head: a layer's heads share H times its tokens per head."""
    budgets = lava_layers(scores, base, allocation)
    return [
        best_of_layer(layer, len(layer) * budget)
        for layer, budget in zip(scores, budgets, strict=True)
    ]


def lava_cascade(scores: Sequence[Array], base: int, window: int) -> list[Array]:
    """LAVa's keep masks as a model meets them: each new layer cuts the earlier ones again.

    The whole model's budget is shared among the layers met so far, with `paper` rounding.
    """
    room, layers = scores[0].shape[1], len(scores)
    held: list[Array] = []
    for met in range(1, layers + 1):
        held.append(np.ones(scores[met - 1].shape, bool))
        entropies = [lava_entropy(layer) for layer in scores[:met]]
        total = math.fsum(entropies)
        for layer in range(met):
            share = entropies[layer] / total if total > 0 else 1 / met
            budget = min(round(share * layers * base), room)
            left = np.where(held[layer], scores[layer], -math.inf)
            counts = best_of_layer(left, len(left) * budget)
            held[layer] = keep(left, counts, 0) & held[layer]
    return [np.hstack([mask, np.ones((len(mask), window), bool)]) for mask in held]


def cake_preference(query, key, *, window=32, scale=None, tau1=1.0, tau2=1.0, **_other) -> float:
    """A layer's preference, entropy^(1 / tau1) * variance^(1 / tau2), for `share_layers`.

    Of the window's attention to the tokens before it, as the full softmax left it. Entropy sums
    over query heads, queries and tokens; variance (over the queries) over heads and tokens. Means
    in place of the sums, or w - 1 in place of w, would scale all layers alike.
    """
    entropy = variance = 0.0
    for head, heads in enumerate(members(query, key)):
        for q in heads:
            paid = attend(query[q][-window:], key[head], scale)[:, : key.shape[1] - window]
            entropy -= math.fsum(x * math.log(x) for x in paid.ravel().tolist() if x > 0)
            mean = paid.sum(0) / window
            variance += math.fsum(((paid - mean) ** 2).ravel().tolist()) / window
    return entropy ** (1 / tau1) * variance ** (1 / tau2)


def vlcache_density(query, key, visual=None, *, share=0.01, scale=None, **_other) -> float:
    """Share of a layer's post-vision attention that reaches 1% of its row's maximum.

    Decided: among the entries a query may see (its own included), over all rows together; mean
    over the query heads; an entry at just 1% counts.
    """
    tokens = key.shape[1]
    rows = post_vision(visual, tokens)
    shares = []
    for head, heads in enumerate(members(query, key)):
        for q in heads:
            paid = attend(query[q][-rows:], key[head], scale)
            reached = entries = 0
            for row in range(rows):
                seen = paid[row, : tokens - rows + row + 1]
                reached += sum(x >= share * max(seen) for x in seen)
                entries += len(seen)
            shares.append(reached / entries)
    return math.fsum(shares) / len(shares)


def vlcache_layers(
    densities: Sequence[float], budget: int, tokens: int, allocation: str = "paper"
) -> list[int]:
    """VL-Cache's tokens per head of each layer, of all n: b L d_l / sum d, from 1% to 100% of n.

    Decided: clipped, then rounded, halves to even, at least 1. `exact` takes the clipped ones for
    what the layers want and spends L b, so that a layer may end somewhat below 1%.
    """
    total = math.fsum(densities)
    layers = len(densities)
    want = [min(max(budget * layers * d / total, 0.01 * tokens), tokens) for d in densities]
    if allocation == "paper":
        return [max(round(x), 1) for x in want]
    return reference.spend([Fraction(x) for x in want], tokens, layers * budget)


def tgvkv_mass(query, key, visual, *, scale=None, **_other) -> float:
    """A layer's text->vision attention mass, for `share_layers`.

    Decided: of the softmax over all keys, since one over the vision keys alone has the same mass
    in every layer; sum over all text queries, mean over query heads.
    """
    masses = []
    for head, heads in enumerate(members(query, key)):
        for q in heads:
            paid = attend(query[q], key[head], scale)
            masses.append(
                math.fsum(float(paid[t, v]) for t in np.flatnonzero(~visual)
                          for v in np.flatnonzero(visual))
            )  # fmt: skip
    return math.fsum(masses) / len(masses)


# --- compositions: counts of the present reference on any scores --------------------------------


def uniform_counts(layers: int, heads: int, base: int, room: int) -> list[list[int]]:
    """The same for every head."""
    return reference.snapkv(reference.Setting("snapkv", layers, heads, heads, base, 0), room)


def pyramid_counts(
    layers: int, heads: int, base: int, room: int, allocation: str = "paper"
) -> list[list[int]]:
    """Fewer from layer to layer; the heads of a layer are equal."""
    setting = reference.Setting("pyramidkv", layers, heads, heads, base, 0, allocation=allocation)
    return reference.pyramidkv(setting, room)


def adakv_counts(
    scores: Array, base: int, floor: float = 0.2, allocation: str = "paper"
) -> list[int]:
    """AdaKV's split of a layer's H * base tokens among its heads, on any finite scores [H, n - w].

    `base` may be a layer rule's: then floor and scaling are of that layer's own base. Decided:
    scores whose sum is not positive (KeyDiff's, KNorm's) are compared as they are.
    """
    assert np.isfinite(scores).all(), "AdaKV scales by sums, so its scores are finite"
    heads, room = scores.shape
    setting = reference.Setting(
        "adakv", 1, heads, heads, base, 0, allocation=allocation, floor=floor
    )
    if base == 0:
        return [0] * heads
    held, _ = reference.adakv_held(list(scores), base)
    return reference.adakv_layer(setting, held, room)


# --- what is kept -------------------------------------------------------------------------------


def keep(scores: Array, counts: Sequence[int], window: int) -> Array:
    """Mask [H, n]: a head's `count` best tokens, ties to the earlier one, and the window."""
    heads, candidates = scores.shape
    mask = np.zeros((heads, candidates + window), bool)
    for head, count in enumerate(counts):
        mask[head, reference.best(scores[head], count)] = True
        mask[head, candidates:] = True
    return mask


def output_norms(value: Array, out_weight: Array, query_heads: int) -> Array:
    """Mean over a head's group of |W_o,q v|_1, for each token: [H, n]."""
    heads, tokens, dim = value.shape
    group = query_heads // heads
    norms = np.zeros((heads, tokens))
    for head in range(heads):
        for q in range(head * group, (head + 1) * group):
            part = out_weight[:, q * dim : (q + 1) * dim].astype(float)
            for at in range(tokens):
                moved = part @ value[head, at].astype(float)
                norms[head, at] += math.fsum(abs(float(x)) for x in moved) / group
    return norms


def critical_keep(
    scores: Array, counts: Sequence[int], window: int, norms: Array,
    share: float = 0.5, epsilon: float = 1e-4,
) -> Array:  # fmt: skip
    """CriticalKV's mask [H, n] on any scores and counts (arXiv 2502.03805).

    The first int(share * count) tokens of a head are its best by score; the rest the best of the
    others by (score + epsilon) * norm, with `norms` [H, n] of `output_norms`. Decided: a count is
    what a head keeps beside the window (public code halves the budget with its window inside);
    half of an odd count is rounded down; under AdaKV the counts, floor included, come from the
    plain scores; negative scores enter as they are.
    """
    heads, candidates = scores.shape
    mask = np.zeros((heads, candidates + window), bool)
    for head, count in enumerate(counts):
        first = reference.best(scores[head], int(share * count))
        second = (scores[head] + epsilon) * norms[head, :candidates]
        second[first] = -math.inf
        mask[head, first] = True
        mask[head, reference.best(second, count - len(first))] = True
        mask[head, candidates:] = True
    return mask


def vlcache_keep(scores: Array, count: int, recent: float = 0.1) -> Array:
    """VL-Cache's mask [H, n]: the most recent tenth of the layer's count, then the best others.

    `scores` [H, n] are of all tokens. Decided: the tenth is rounded down, and may be none.
    """
    protected = int(recent * count)
    candidates = scores.shape[1] - protected
    counts = [count - protected] * len(scores)
    return keep(scores[:, :candidates], counts, protected)
