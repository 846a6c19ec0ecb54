"""Settings do what they say, and a method of one's own brings its own."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from engine.fixtures import ask, pages, refused, rows, sentence

from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.lmms import Qwen2VLSparseMM
from sparsemm_eval.methods import Allocation, Prompt, register_method, registry
from sparsemm_eval.tiny import default_checkpoint

MakeQwen = Callable[..., Qwen2VLSparseMM]


@pytest.mark.usefixtures("unloaded")
def test_settings_of_other_methods_are_dropped(answers: Path) -> None:
    """So that one command line serves all methods."""
    given = {"pretrained": str(default_checkpoint()), "answers": str(answers), "batch_size": "4"}
    many = {"budget": 64, "window": 8, "ratio": 0.2, "floor": 0.3, "seed": 1, "head_scores": "no"}
    models = [Qwen2VLSparseMM(**given, method=name, **many) for name in ("fullkv", "snapkv")]
    assert [model.method.budget for model in models] == [None, 64]
    assert {model.runner.batch_size for model in models} == {4}


def test_as_the_command_line_makes_it(answers: Path) -> None:
    """All settings in one string, numbers among them."""
    arguments = (
        f"pretrained={default_checkpoint()},method=snapkv,budget=64,window=8,answers={answers}"
    )
    more = {"batch_size": "2", "max_batch_size": None, "device": "cpu"}
    model = Qwen2VLSparseMM.create_from_arg_string(f"{arguments},dtype=float32", more)
    assert len(ask(model, pages(1))) == 1
    assert rows(answers)[0].record["kept_per_head"] == 64


# --- image limits -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        ({}, 16 * 22),
        ({"max_pixels": 8 * 11 * 256}, 8 * 11),
        ({"min_pixels": 32 * 44 * 256, "max_pixels": 33 * 45 * 256}, 32 * 44),
    ],
    ids=str,
)
def test_pixels_set_the_number_of_image_tokens(
    qwen: MakeQwen, answers: Path, settings: dict[str, int], tokens: int
) -> None:
    """A page of 16 x 22 cells of 256 pixels, one token each."""
    (document,) = pages(1)
    ask(qwen(**settings), [document])
    around = rows(answers)[0].record["prompt_tokens"] - tokens
    assert len(document["question"]) <= around <= len(document["question"]) + 3


def test_models_of_one_checkpoint_keep_their_own_pixels(qwen: MakeQwen, answers: Path) -> None:
    """Made one after the other and used in turn."""
    small, own = qwen(max_pixels=8 * 11 * 256), qwen()
    for model in (own, small):
        ask(model, pages(1))
    first, second = (row.record["prompt_tokens"] for row in rows(answers))
    assert first - second == 16 * 22 - 8 * 11


# --- a method of one's own ----------------------------------------------------------------------


@dataclass(frozen=True)
class FirstLayers(Allocation):
    """All of the budget to the first layers, none to the others."""

    layers: int = 1

    def paper(self, prompt: Prompt) -> np.ndarray:
        return np.round(self.wants(prompt)).astype(np.int64)

    def wants(self, prompt: Prompt) -> np.ndarray:
        shape = prompt.shape
        served = np.arange(shape.layers)[:, None] < self.layers
        share = prompt.base * shape.layers / self.layers
        return np.where(served, share, 0.0) * np.ones((1, shape.kv_heads))


@pytest.fixture
def _first_layers() -> Iterator[None]:
    names = ("first_layers", "first_layers_too")
    for name in names:
        register_method(name, FirstLayers)
    yield
    for name in names:
        registry._registry.pop(name)


@pytest.mark.usefixtures("_first_layers")
def test_a_method_of_ones_own(qwen: MakeQwen, reader: Checkpoint, answers: Path) -> None:
    """One class and one line make it known to the wrapper, with its settings."""
    common = {"method": "first_layers", "budget": 40, "window": 8}
    for settings in ({}, {"layers": 2}, {"method": "first_layers_too"}):
        ask(qwen(**common | settings), pages(1))
    one, two, other_name = rows(answers)
    assert len({one.key, two.key, other_name.key}) == 3
    assert "first_layers(" in one.cell
    assert "layers=2" in two.cell
    assert one.record["kept_per_head"] == two.record["kept_per_head"] == 40
    with pytest.raises(ValueError, match="tiers='x'") as caught:
        qwen(**common, tiers="x")
    assert "layers" in sentence(caught)
    with pytest.raises(ValueError, match="budget=8 is too small"):
        qwen(method="first_layers", budget=8, window=8)


def test_its_settings_go_with_it() -> None:
    """Unregistered again, neither the name nor its setting is known."""
    assert "first_layers" in refused(method="first_layers")
    assert "layers=2" in refused(layers=2)


def test_the_graph_can_be_turned_off(qwen: MakeQwen) -> None:
    """With a word, or as --model_args reads True and False."""
    assert qwen().runner.cuda_graph == "auto"
    for value, meant in ((False, "off"), (True, "auto"), ("compile", "compile")):
        assert qwen(cuda_graph=value).runner.cuda_graph == meant
    with pytest.raises(ValueError, match="cuda_graph='on': it must be one of auto, compile"):
        qwen(cuda_graph="on")


def test_answers_do_not_depend_on_the_graph(qwen: MakeQwen, answers: Path) -> None:
    """It is how they are computed, not what: their keys and texts are the same."""
    documents = pages(2)
    texts = {
        way: ask(qwen(cuda_graph=way, answers=answers / way), documents) for way in ("eager", "off")
    }
    assert texts["eager"] == texts["off"]
    one, other = (qwen(cuda_graph=way) for way in ("eager", "off"))
    assert len({model.runner.key(model.cell, {"prompt": "p"}) for model in (one, other)}) == 1
