"""The ablation that a grid cannot make: its twin computes the same, and it runs to its tables."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from heads import ablation

from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.heads.calibration import calibration_prompts
from sparsemm_eval.tiny import embedded_checkpoints


def test_a_twin_answers_alike_with_a_kv_head_for_each_query_head(tmp_path: Path) -> None:
    folder = embedded_checkpoints()["qwen2vl"]
    twin = Checkpoint(ablation.make_twin(folder, tmp_path / "twin"), dtype="float32")
    own = Checkpoint(folder, dtype="float32")
    assert (own.shape.kv_heads, twin.shape.kv_heads, twin.shape.query_heads) == (4, 8, 8)
    prompt = next(calibration_prompts(own, "docvqa_mini", 1))
    inputs = own.processor(text=[prompt.prompt], images=[*prompt.visuals], return_tensors="pt")
    with torch.inference_mode():
        logits = [one.model(**inputs).logits for one in (own, twin)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_shares_that_are_equal_overlap_wholly_and_apart_ones_not_at_all() -> None:
    one = np.array([[0.5, 0.5], [0.0, 0.0]])
    assert ablation.overlap(one, one) == 1
    assert ablation.overlap(one, one[::-1]) == 0
    assert ablation.overlap(one, one.T) == 0.5


def test_it_runs_to_its_tables_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablation, "KINDS", ("docvqa_mini", "gqa_mini"))
    monkeypatch.setattr(ablation, "BUDGETS", (24,))
    found = ablation.ablation("qwen2vl", [2, 4], 2, tmp_path)
    assert found["prompts"]["2"]["kinds"] == 2
    assert 0 < found["prompts"]["2"]["two_sets"] <= 1
    assert set(found["kept"]["share"]) == {
        "visual", "2 prompts", "4 prompts", "KV heads", "query heads"
    }  # fmt: skip
    assert "tmp" not in json.dumps(found)
    assert "| query heads" in ablation.tables({"qwen2vl": found})
    assert ablation.ablation("qwen2vl", [2, 4], 2, tmp_path) == found
