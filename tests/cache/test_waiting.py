"""Reading a prompt asks the device for nothing, layer after layer: on a GPU each time would wait.

What cannot be seen on a CPU, copies between host and device, `tests/bench/test_gpu.py` watches.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cache.models import COMPRESSING, SAMPLES, WINDOW, budgeted, method_for, prompt, shape_of
from torch.utils._python_dispatch import TorchDispatchMode

from sparsemm_eval.cache import CACHE_ARGUMENT, HeadBudgetCache
from sparsemm_eval.cache.layer import RaggedLayer
from sparsemm_eval.methods import Checks, Ranking, make_method

# Operations whose result, or its size, the host has to know before it goes on.
# `nonzero_static` is told its result's size.
WAITING = ("_local_scalar_dense", "nonzero.", "equal", "masked_select", "is_nonzero", "_unique2",
           "bincount", "repeat_interleave.Tensor", "index.Tensor_bool")  # fmt: skip


class Asked(TorchDispatchMode):
    """Counts operations that ask."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = str(func).removeprefix("aten.")
        if any(name.startswith(word) for word in WAITING):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[int, Counter[str]]:
    """What each layer asked while it compressed its prompt."""
    found: dict[int, Counter[str]] = {}
    compress: Callable = RaggedLayer._compress

    def watched(self: RaggedLayer, *args: Any) -> None:
        with Asked() as mode:
            compress(self, *args)
        found[self.index] = mode.counts

    monkeypatch.setattr(RaggedLayer, "_compress", watched)
    return found


def test_the_counter_counts() -> None:
    mask = torch.tensor([True, False])
    with Asked() as mode:
        mask.nonzero()
        int(mask.sum())
    assert mode.counts == {"nonzero.default": 1, "_local_scalar_dense.default": 1}


@pytest.mark.parametrize("samples", [SAMPLES[:1], SAMPLES], ids=["one", "padded"])
@pytest.mark.parametrize("family", ["llama-gqa", "qwen2vl"])
def test_layers_ask_nothing(family: str, samples: tuple, asked: dict[int, Counter[str]]) -> None:
    """All methods at once; the first layer alone may look at the mask, for all of them."""
    model = budgeted(family, seed=2)
    # AdaKV's exact counts are shared out on the host.
    methods = [
        method_for(model, name, allocation=allocation)
        for name, allocation in COMPRESSING
        if (name, allocation) != ("adakv", "exact")
    ]
    cache = HeadBudgetCache([method_for(model, "fullkv"), *methods])
    with torch.inference_mode():
        model.generate(**prompt(model, samples), **{CACHE_ARGUMENT: cache}, max_new_tokens=1)
    assert sorted(asked) == [0, 1, 2]
    assert not any(asked[layer] for layer in (1, 2))
    if len(samples) == 1:
        assert not asked[0]


def test_adakvs_bound_holds_whatever_the_scores() -> None:
    """A layer is packed before it is known how many tokens its heads keep."""
    shape = shape_of(budgeted("llama-mha"))
    generator = torch.Generator().manual_seed(0)
    for budget in range(WINDOW + 1, 60, 3):
        for floor in (0.0, 0.2, 0.35, 1.0):
            method = make_method("adakv", shape, budget=budget, window=WINDOW, floor=floor)
            for n in (budget + 1, budget + 7, 3 * budget):
                scores = torch.rand(shape.kv_heads, n - WINDOW, generator=generator) ** 8
                counts = method.counts_of_layer(method.prompt(n), 0, Ranking(scores), Checks())
                kept = int(counts.sum()) + WINDOW * shape.kv_heads
                assert kept <= method.most_kept(0, n) <= kept + shape.kv_heads
