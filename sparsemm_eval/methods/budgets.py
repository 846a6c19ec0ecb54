"""How many tokens each KV head keeps of a prompt, without the prompt: from its length alone."""

import numpy as np
import torch

from sparsemm_eval.errors import UserError, check_int
from sparsemm_eval.methods.allocation import LayerAllocation, Prompt
from sparsemm_eval.methods.method import Method


def tokens_per_head(method: Method, n: int) -> np.ndarray:
    """Tokens that each KV head keeps of a prompt of n tokens, window included.

    Parameters
    ----------
    method : Method
        Of a rule that looks at prompts' lengths alone (SparseMM, section 3.3).
    n : int
        Tokens of the prompt.

    Returns
    -------
    ndarray
        [L, H] int64; `Method.keep` keeps as many.

    Raises
    ------
    ValueError
        If the method looks at the prompt's attention, or n is no number of tokens.
    """
    check_int("tokens", n, least=1)
    shape = method.shape
    if method.keeps_all(n):
        return np.full((shape.layers, shape.kv_heads), n)
    if isinstance(method.allocation, LayerAllocation):
        raise UserError(
            f"method={method.name}: what its heads keep depends on each prompt's attention, not on "
            "its length alone; take a method that shares the budget before it sees a prompt"
        )
    window = method.scorer.window
    prompt = Prompt(shape, method.budget - window, n - window)
    unseen = torch.empty(shape.kv_heads, 0)
    counts = [
        method.allocation.counts(prompt, layer, unseen, method.exact)
        for layer in range(shape.layers)
    ]
    return window + torch.stack(counts).numpy()
