"""Names of models and methods."""

import pandas as pd
import pytest

from sparsemm_eval.families import PLAIN
from sparsemm_eval.methods import FROM_FILES, ModelShape, make_method, method_names, method_settings
from sparsemm_eval.methods.registry import QUESTION
from sparsemm_eval.report.names import (
    DEFAULTS,
    METHOD_NAMES,
    chance_score,
    distinct,
    find_benchmark,
    in_order,
    labels_in_order,
    last_part,
    method_label,
    paper_model,
    top_score,
)
from sparsemm_eval.sweep.tables import chance_of
from sparsemm_eval.tiny.benchmarks import BENCHMARKS


@pytest.mark.parametrize(
    ("name", "paper"),
    [
        ("llava-hf/llava-v1.6-vicuna-7b-hf", "LLaVA-NeXT-Vicuna-7B"),
        ("liuhaotian/llava-v1.6-vicuna-7b", "LLaVA-NeXT-Vicuna-7B"),
        ("/data/models/llava-v1.6-mistral-7b-hf/", "LLaVA-NeXT-Mistral-7B"),
        ("Qwen/Qwen2-VL-7B-Instruct", "Qwen2-VL-7B-Instruct"),
        ("cache/models--Qwen--Qwen2-VL-7B-Instruct/snapshots/0a1b2c", "Qwen2-VL-7B-Instruct"),
        ("qwen2-vl-7b-instruct", "Qwen2-VL-7B-Instruct"),
        ("Qwen/Qwen2-VL-2B-Instruct", None),
        ("mine", None),
        ("", None),
    ],
)
def test_models_of_the_paper_are_known_by_repository_and_folder(
    name: str, paper: str | None
) -> None:
    assert paper_model(name) == paper


def test_a_checkpoint_is_called_as_its_last_part() -> None:
    assert last_part("embedded:qwen2vl") == "qwen2vl"
    assert last_part("a/b/c/") == "c"
    assert last_part("/") == "/"


def test_chance_is_that_of_the_best_constant_answer() -> None:
    known = chance_of(f"{name}_mini" for name in BENCHMARKS)
    for task, (_, score) in known.items():
        metric = find_benchmark(task).metric
        assert chance_score(task, metric) == pytest.approx(
            score / top_score(task, metric, None), abs=5e-4
        )
        assert chance_score(task, "another") == 0
    assert chance_score("docvqa_val", "anls") == 0


def test_defaults_are_those_of_the_methods() -> None:
    """A file that does not state a setting was made with the method's own default."""
    shape = ModelShape(layers=1, query_heads=1, kv_heads=1)
    stated = set()
    for name in method_names():
        reads = method_settings(name)
        given = {"budget": 64} if "budget" in reads else {}
        given |= {file: kind.alike(shape) for file, kind in FROM_FILES.items() if file in reads}
        settings = make_method(name, shape, **given).settings
        own = {key: value for key, value in settings.items() if key in DEFAULTS}
        assert own == {key: DEFAULTS[key] for key in own}, name
        stated |= {*own}
    assert DEFAULTS["protocol"] == PLAIN
    assert DEFAULTS["question"] == QUESTION[0]  # not stated where it is seen
    assert stated | {"protocol", "question"} == {*DEFAULTS}


def test_every_method_has_a_name() -> None:
    assert {*method_names()} <= {*METHOD_NAMES}
    assert method_label("sparsemm", {"ratio": 1.0, "allocation": "exact"}) == (
        "SparseMM (ratio=1, allocation=exact)"
    )
    assert method_label("mine", {}) == "mine"


# As they are to stand; those that are not the paper's behind it, by name.
ORDERED = {
    "benchmark": ["DocVQA", "TextVQA", "VQAv2", "infovqa_val", "mme"],
    "model": ["LLaVA-NeXT-Vicuna-7B", "LLaVA-NeXT-Mistral-7B", "Qwen2-VL-7B-Instruct", "a", "b"],
    "method": ["fullkv", "sparsemm", "snapkv", "streaming", "h2o", "mine"],
    "budget": [256.0, 64.0, 8.0],
    "label": [
        "SnapKV", "SnapKV (window=8)", "SnapKV (window=16)", "SparseMM (ratio=0.1)",
        "SparseMM (ratio=0.3)", "SparseMM (ratio=1)",
    ],
}  # fmt: skip


@pytest.mark.parametrize("column", ORDERED)
def test_one_order(column: str) -> None:
    cells = pd.DataFrame({column: ORDERED[column]}).sample(frac=1, random_state=3)
    assert in_order(cells, (column,))[column].tolist() == ORDERED[column]
    assert distinct(pd.concat([cells, cells]), column) == ORDERED[column]


def test_full_kv_and_what_was_measured_stand_first() -> None:
    cells = pd.DataFrame(
        {"budget": [64, None, 256, None], "source": ["measured", "table3", "table3", "measured"]}
    )
    assert in_order(cells, ("source", "budget")).index.tolist() == [3, 0, 1, 2]
    assert in_order(cells, ("budget", "source")).index.tolist() == [3, 1, 2, 0]


def test_labels_stand_in_the_order_of_their_methods() -> None:
    labels = {"mine": "mine", "Random (seed=10)": "random", "Random (seed=9)": "random",
              "SparseMM": "sparsemm"}  # fmt: skip
    cells = pd.DataFrame({"label": list(labels), "method": list(labels.values())})
    assert labels_in_order(cells) == labels
    assert list(labels_in_order(cells)) == [
        "SparseMM", "Random (seed=9)", "Random (seed=10)", "mine"
    ]  # fmt: skip
