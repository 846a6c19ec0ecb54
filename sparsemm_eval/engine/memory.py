"""How many methods are decoded at once: as many rows as fit into the memory that is free."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch
from transformers import PreTrainedModel

from sparsemm_eval.cache.ragged import LEAST_SLACK
from sparsemm_eval.engine.decoder import held_bytes
from sparsemm_eval.methods import Method, ModelShape

# What planned rows may take of the memory that is free: the rest is for the prompt's own pass (one
# dense layer, activations, vision tower), for a layer that is copied while it grows, and for
# whatever else runs on the machine.
SHARE = 0.8


def row_bytes(method: Method, tokens: int, new_tokens: int, token_bytes: int) -> int:
    """Bytes of a row's cache at its longest.

    Parameters
    ----------
    method : Method
        Keeps its budget of the prompt, or all of it.
    tokens, new_tokens : int
        Of the prompt, and at most after it.
    token_bytes : int
        One token's keys and values in all layers that methods compress, and KV heads.
    """
    kept = min(tokens, method.tokens(tokens))
    windows = [window for window in method.shape.windows if window is not None]
    sliding = sum(min(tokens + new_tokens, window) + LEAST_SLACK for window in windows)
    a_layer = token_bytes // method.shape.layers
    return (kept + new_tokens + LEAST_SLACK) * token_bytes + sliding * a_layer


def plan_micro_batches(
    methods: Sequence[Method],
    lengths: Sequence[int],
    new_tokens: int,
    token_bytes: int,
    free: int,
) -> list[list[int]]:
    """Split methods into micro-batches whose rows fit; each of them reads the prompts again.

    Parameters
    ----------
    methods : sequence of Method
        To decode samples under.
    lengths : sequence of int
        Tokens of each sample's prompt.
    new_tokens : int
        At most so many a row.
    token_bytes : int
        As for `row_bytes`.
    free : int
        Bytes of free memory, as `free_memory` finds them.

    Returns
    -------
    list of list of int
        Places in ``methods``, each once and in order, but those that keep everything first: others
        of their micro-batch are compared to them. A method that does not fit alone is alone in one.
    """
    batches: list[list[int]] = []
    left = 0.0
    for place in sorted(range(len(methods)), key=lambda place: methods[place].budget is not None):
        need = sum(row_bytes(methods[place], n, new_tokens, token_bytes) for n in lengths)
        if need > left:
            batches.append([])
            left = SHARE * free
        batches[-1].append(place)
        left -= need
    return batches


def token_bytes(model: PreTrainedModel) -> int:
    """Bytes of one token's keys and values in all layers that methods compress, and KV heads."""
    shape = ModelShape.from_config(model.config)
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * model.dtype.itemsize


def free_memory(model: PreTrainedModel) -> int:
    """Bytes that are free where a model lies; on GPUs what torch holds and does not use is free.

    So is what the model's decoder keeps for the next prompt's rows.

    Over several GPUs the decoder's layers are taken as spread evenly: the fullest one counts.
    Of a CPU it is what the machine has, whatever limit is set for this process.
    """
    devices = {parameter.device for parameter in model.parameters()}
    gpus = [device for device in devices if device.type == "cuda"]
    if not gpus:
        return psutil.virtual_memory().available
    return held_bytes(model) + len(gpus) * min(
        torch.cuda.mem_get_info(gpu)[0]
        + torch.cuda.memory_reserved(gpu)
        - torch.cuda.memory_allocated(gpu)
        for gpu in gpus
    )


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "not enough memory" in words or "can't allocate memory" in words or "out of memory" in words
    )
