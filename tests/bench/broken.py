"""Entries that a benchmark must find out."""

from torch import Tensor

from sparsemm_eval.bench.entries import Padded, Torch


class WrongScale(Torch):
    """Attends with half the scale."""

    name = "torch"

    def step(self, layer: int) -> Tensor:
        layers = self.layers
        right, layers.scale = layers.scale, layers.scale / 2
        out = super().step(layer)
        layers.scale = right
        return out


class Unmasked(Padded):
    """Attends to its padding."""

    name = "padded_sdpa"

    def step(self, layer: int) -> Tensor:
        self.masks[layer].zero_()
        return super().step(layer)


class Forgetful(Torch):
    """Attends well, and keeps nothing of the token."""

    name = "torch"

    def step(self, layer: int) -> Tensor:
        out = super().step(layer)
        store = self.layers.stores[layer]
        store.keys[(store.offsets[:-1] + store.lengths - 1).long()] = 0
        return out


class NotANumber(Torch):
    """Gives NaN for one sequence."""

    name = "torch"

    def step(self, layer: int) -> Tensor:
        out = super().step(layer)
        out[0] = float("nan")
        return out


class Raising(Torch):
    """Breaks."""

    name = "torch"

    def step(self, layer: int) -> Tensor:
        raise RuntimeError("out of\nluck")
