"""A grid in one pass and its cells one by one: the same answers, and ratios of what was timed."""

import json
import statistics
from pathlib import Path

import pytest

from sparsemm_eval.bench.models import LARGE
from sparsemm_eval.bench.options import SharedPrefillOptions
from sparsemm_eval.bench.shared_prefill import run


@pytest.mark.parametrize("model", ["qwen2vl", "llava_next"])
def test_all_ways_answer_alike(model: str, tmp_path: Path) -> None:
    path = tmp_path / "made" / "shared_prefill.json"
    small = SharedPrefillOptions(model, "cpu", samples=3, batch_size=2, repeats=1, out=path)
    done = run(small, "shared-prefill")
    assert list(done.files) == [path]
    found = json.loads(path.read_text())
    shown = ("seconds", "grid_over_one_full", "one_by_one_over_grid", "answers_unlike")
    assert done.text.splitlines() == [f"{name}: {found[name]}" for name in shown]
    assert found["answers_unlike"] == 0
    assert found["cells"] == 31
    times = {name: statistics.median(values) for name, values in found["seconds"].items()}
    assert min(times.values()) > 0
    ratio = times["one_by_one"] / times["grid"]
    assert found["one_by_one_over_grid"] == pytest.approx(ratio, abs=0.02, rel=0.02)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "shared_prefill.json"
    with pytest.raises(ValueError, match=rf"model='gpt'.*qwen2vl.*{LARGE[0]}"):
        run(SharedPrefillOptions("gpt", "cpu", out=path), "shared-prefill")
    with pytest.raises(ValueError, match="samples=0: it must be an integer of at least 1"):
        run(SharedPrefillOptions(samples=0, out=path), "shared-prefill")
    assert not path.exists()
