"""What lmms-eval finds of this package."""

import subprocess
import sys

import pytest
from lmms_eval.models import get_model, list_available_models

from sparsemm_eval.engine.lmms import LlavaSparseMM, Qwen2VLSparseMM, SparseMM
from sparsemm_eval.families import find_family

# Every import a run makes before it is told which model to use. The second word of a line tells
# whether torch or transformers was imported by us and not by lmms-eval itself.
LIGHT = """
import sys
import lmms_eval.models.registry_v2
before = set(sys.modules)
import sparsemm_eval.engine.manifest as manifest
manifest.manifests()
print(sorted(name for name in sys.modules if name.startswith("sparsemm_eval")))
print(sorted(set(sys.modules) - before & {"torch", "transformers", "numpy", "accelerate"}))
"""
FIRST = """
import sparsemm_eval.engine.manifest
from lmms_eval.models import list_available_models
print([name for name in list_available_models() if name.endswith("sparsemm")])
"""


def output(script: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "Failed to load model entry-point" not in done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("sparsemm", SparseMM),
        ("llava_sparsemm", LlavaSparseMM),
        ("qwen2vl_sparsemm", Qwen2VLSparseMM),
    ],
)
def test_lmms_eval_resolves_our_names(name: str, model: type[SparseMM]) -> None:
    assert name in list_available_models()
    assert get_model(name) is model
    simple = get_model(name, force_simple=True)
    assert issubclass(simple, model)
    assert (model.is_simple, simple.is_simple) == (False, True)


def test_a_name_of_one_family_is_what_its_answers_are_named_by() -> None:
    for model in (LlavaSparseMM, Qwen2VLSparseMM):
        name = find_family(model.model_type).lmms_name
        assert get_model(name) is model


def test_the_manifest_imports_nothing_heavy() -> None:
    """Were it to fail on import, all other plugins of lmms-eval would be lost too."""
    ours, heavy = output(LIGHT).splitlines()
    assert ours == str(["sparsemm_eval", "sparsemm_eval.engine", "sparsemm_eval.engine.manifest"])
    assert heavy == "[]"


def test_the_manifest_may_be_imported_first() -> None:
    """Lmms-eval loads it while it is imported itself: whoever is first, our names are known."""
    assert output(FIRST) == "['llava_sparsemm', 'qwen2vl_sparsemm', 'sparsemm']\n"
