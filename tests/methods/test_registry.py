"""The door for a method of one's own: what is registered, what is refused, and how it is shown."""

import importlib.util
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsemm_eval.errors import UserError
from sparsemm_eval.methods import (
    Allocation,
    ModelShape,
    Prompt,
    canonical_settings,
    make_method,
    method_names,
    method_settings,
    register_method,
    registry,
    shown_name,
)
from sparsemm_eval.methods.allocation import Uniform

SHAPE = ModelShape(2, 4, 2)
OWN_FILE = """
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from sparsemm_eval.methods import Allocation, LayerAllocation, Prompt, Ranking, register_method


@dataclass(frozen=True)
class Half(Allocation):
    part: float = 0.5
    tiers: tuple[int, ...] = (1, 2)

    def wants(self, prompt: Prompt) -> np.ndarray:
        return np.full((prompt.shape.layers, prompt.shape.kv_heads), self.part * prompt.base)

    def paper(self, prompt: Prompt) -> np.ndarray:
        return np.floor(self.wants(prompt))


@dataclass(frozen=True)
class Peaks(LayerAllocation):
    share: float = 0.5

    def wants(self, prompt: Prompt, ranking: Ranking) -> Tensor:
        peaks = ranking.best[:, 0]
        return peaks / peaks.sum() * prompt.base * len(peaks)

    def paper(self, prompt: Prompt, ranking: Ranking) -> Tensor:
        return self.wants(prompt, ranking).floor().long()


register_method("half", Half, label="Half of it")
register_method("peaks", Peaks)
"""


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))


@pytest.fixture
def own_file(tmp_path: Path) -> Path:
    path = tmp_path / "own_methods.py"
    path.write_text(OWN_FILE)
    return path


def test_a_file_of_ones_own(own_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its fields are settings at once, also where annotations are text."""
    spec = importlib.util.spec_from_file_location("own_methods", own_file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "own_methods", module)
    spec.loader.exec_module(module)
    assert {"half", "peaks"} <= set(method_names())
    assert {"part", "tiers", "budget", "window", "allocation"} <= set(method_settings("half"))
    assert canonical_settings("half", {"part": 0.3, "ratio": 0.1}) == {"part": 0.3}
    assert (shown_name("half"), shown_name("peaks")) == ("Half of it", "peaks")
    method = make_method("half", SHAPE, budget=12, window=4, part=0.25)
    assert method.settings["part"] == 0.25
    query, key = torch.randn(1, 4, 40, 8), torch.randn(1, 2, 40, 8)
    assert method.keep(query, key, 0).sum(-1).tolist() == [[4 + 2, 4 + 2]]
    for allocation in ("paper", "exact"):
        peaks = make_method("peaks", SHAPE, budget=12, window=4, allocation=allocation)
        kept = int(peaks.keep(query, key, 1).sum())
        assert kept == 24 if allocation == "exact" else 22 <= kept <= 24
    with pytest.raises(UserError, match="Half cannot be hashed"):
        make_method("half", SHAPE, budget=12, window=4, tiers=[1, 2])


def test_a_notebooks_cell_may_run_twice(own_file: Path) -> None:
    """Classes that are defined anew by the same code; another's method keeps its name."""
    run = f"exec(compile(open({str(own_file)!r}).read(), 'cell', 'exec'))\n"
    clash = textwrap.dedent("""
        class Other(Half): pass
        Other = dataclass(frozen=True)(Other)
        try:
            register_method("half", Other)
        except ValueError as error:
            print(error)
    """)
    done = subprocess.run(
        [sys.executable, "-c", run + run + clash], capture_output=True, text=True, check=True
    )
    assert "'half' is registered already, by" in done.stdout
    assert "Half" in done.stdout


def test_a_built_in_name_is_taken() -> None:
    with pytest.raises(UserError, match=r"'snapkv' is registered already.*Uniform"):
        register_method("snapkv", Kept)
    assert type(make_method("snapkv", SHAPE, budget=40).allocation) is Uniform


@dataclass(frozen=True)
class Kept(Allocation):
    """Fine as it is."""

    share: float = 0.5

    def paper(self, prompt: Prompt) -> np.ndarray:
        return np.full((prompt.shape.layers, prompt.shape.kv_heads), 1)

    def wants(self, prompt: Prompt) -> np.ndarray:
        return self.paper(prompt)


class Plain(Kept):
    """Its own field is none, without a word, if this were let through."""

    more: int = 1


@dataclass
class Thawed(Kept.__mro__[1]):
    share: float = 0.5

    def paper(self, prompt: Prompt) -> np.ndarray: ...

    def wants(self, prompt: Prompt) -> np.ndarray: ...


@dataclass(frozen=True)
class Unfinished(Allocation):
    def paper(self, prompt: Prompt) -> np.ndarray: ...


@dataclass(frozen=True)
class Windowless:
    least_budget = 1

    def __call__(self, query: Tensor, key: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Clashing:
    share: float = 0.5
    window = 0
    least_budget = 1

    def __call__(self, query: Tensor, key: Tensor) -> Tensor: ...


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("a,b", Kept), "'a,b': a name is made of"),
        (("", Kept), "a name is made of"),
        ((3, Kept), "a name is made of"),
        (("own", Kept()), "must be a class deriving from Allocation"),
        (("own", Windowless), "Windowless must be a class deriving from Allocation"),
        (("own", Plain), "Plain must be a frozen dataclass"),
        (("own", Thawed), "Thawed must be a frozen dataclass"),
        (("own", Unfinished), "Unfinished has no wants"),
        (("own", Kept, Windowless), "Windowless has no window"),
        (("own", Kept, Clashing), "two settings named share"),
    ],
)
def test_what_cannot_be_a_method(arguments: tuple, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        register_method(*arguments)
    assert "\n" not in str(caught.value)
    assert "own" not in method_names()
