"""The least that a step of decoding must read, and how long memory takes for it."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from sparsemm_eval.errors import UserError
from sparsemm_eval.methods import Method, ModelShape

GIB = 1 << 30
# Datasheets' memory bandwidth in GB/s; a large copy reaches about 0.9 of it.
BANDWIDTHS = {"a100-40gb": 1555, "a100-80gb": 2039, "h100": 3350, "h200": 4800, "b200": 8000}


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that one step reads: the decoder's and the output layer's, no embeddings."""
    skipped = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    decoder = [p for p in model.model.language_model.parameters() if id(p) not in skipped]
    return sum(p.numel() * p.element_size() for p in [*decoder, *model.lm_head.parameters()])


def token_bytes(model: PreTrainedModel) -> int:
    """Bytes of the key and value of one token in one KV head."""
    return 2 * ModelShape.from_config(model.config).head_dim * model.dtype.itemsize


def kept_tokens(methods: Sequence[Method], tokens: int) -> int:
    """Tokens that rows keep of one prompt, all layers and KV heads together.

    Exact where scores decide only which tokens are kept and not how many; else what they are
    asked to keep.
    """
    total = 0
    for method in methods:
        shape = method.shape
        layers = [method.most_kept(layer, tokens) for layer in range(shape.layers)]
        nominal = shape.kv_heads * min(tokens, method.budget or tokens)
        total += sum(nominal if kept is None else kept for kept in layers)
    return total


def kv_bytes(model: PreTrainedModel, methods: Sequence[Method], tokens: int, steps: int) -> int:
    """Bytes of keys and values that the mean of so many steps reads and writes, all rows."""
    shape = methods[0].shape
    sequences = len(methods) * shape.layers * shape.kv_heads
    read = kept_tokens(methods, tokens) + sequences * (steps + 1) // 2  # the step's own token too
    return (read + sequences) * token_bytes(model)


def bandwidth_of(word: str) -> float:
    """Bytes a second from GB/s or a GPU's name.

    Raises
    ------
    ValueError
        For a word that is neither.
    """
    known = BANDWIDTHS.get(word.lower())
    if known is not None:
        return known * 1e9
    try:
        value = float(word)
    except ValueError:
        value = -1.0
    if not value > 0:
        raise UserError(
            f"bandwidth={word!r}: it must be GB/s, such as 4200, or one of {', '.join(BANDWIDTHS)}"
        )
    return value * 1e9
