"""Visual scores: against full attention matrices, and on disk."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsemm_eval.heads.chase import Chase, Page, chase, drawn_pages, write_scores
from sparsemm_eval.heads.regions import Qwen2VLRegions
from sparsemm_eval.methods import HeadScores
from sparsemm_eval.models.checkpoint import Checkpoint
from sparsemm_eval.tiny import default_checkpoint


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    """The embedded model in float64, where near-ties of attention do not flip an argmax."""
    checkpoint = Checkpoint(default_checkpoint(), "qwen2_vl", dtype="float32")
    checkpoint.model.double()
    return checkpoint


def matrix_scores(checkpoint: Checkpoint, page: Page) -> np.ndarray:
    """Scores from stock transformers, token by token, with every attention matrix in hand."""
    model, processor = checkpoint.model, checkpoint.processor
    content = [{"type": "image"}, {"type": "text", "text": page.prompt}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    inputs = processor(text=[prompt], images=[page.image], return_tensors="pt")
    inputs = inputs.to(dtype=torch.float64)
    model.set_attn_implementation("eager")
    out = model.generate(
        **inputs, max_new_tokens=len(page.text), do_sample=False, output_attentions=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    model.set_attn_implementation({"text_config": "sparsemm"})
    image = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten().numpy()
    layout = (16, 22, *page.image.size)
    said = processor.tokenizer.decode(out.sequences[0, inputs["input_ids"].shape[1] :])
    scores = np.zeros((checkpoint.shape.layers, checkpoint.shape.query_heads))
    for step, box in enumerate(page.boxes):
        assert said[step] == page.text[step], "choose a page that the model reads without error"
        if box is not None:
            tokens = image[Qwen2VLRegions(*layout).tokens(box)]
            for layer, weights in enumerate(out.attentions[step]):
                looked = weights[0, :, -1].argmax(-1).numpy()
                scores[layer] += np.isin(looked, tokens) / len(tokens)
    return scores


def read_without_error(checkpoint: Checkpoint) -> Page:
    """The first drawn page of which the model says every character."""
    for page in drawn_pages(40):
        if chase(checkpoint, [page], 1).accuracy == 1:
            return page
    pytest.fail("the embedded model reads none of 40 pages without error")


def test_one_pass_gives_the_scores_of_all_attention_matrices(checkpoint: Checkpoint) -> None:
    page = read_without_error(checkpoint)
    found = chase(checkpoint, [page], 1)
    expected = matrix_scores(checkpoint, page)
    assert expected.max() > 10
    np.testing.assert_allclose(found.scores[0], expected, rtol=1e-12)


def test_few_heads_hold_most_of_the_score(checkpoint: Checkpoint) -> None:
    found = chase(checkpoint, drawn_pages(10), 10)
    mass = np.sort(found.head_scores.values.ravel())[::-1]
    assert mass[:10].sum() > 0.8 * mass.sum()
    assert found.accuracy > 0.9


def test_the_shipped_scores_are_those_of_the_shipped_checkpoint(checkpoint: Checkpoint) -> None:
    shipped = Checkpoint(default_checkpoint(), "qwen2_vl")
    made = json.loads((default_checkpoint() / "head_scores.provenance.json").read_text())
    assert made["checkpoint_hash"] == shipped.hash
    shipped_scores = shipped.head_scores().values.ravel()
    fresh = chase(checkpoint, drawn_pages(15), 15).head_scores.values.ravel()
    assert np.corrcoef(shipped_scores, fresh)[0, 1] > 0.95


def test_scores_on_disk_are_read_back(tmp_path: Path) -> None:
    checkpoint = Checkpoint(default_checkpoint(), "qwen2_vl")
    scores = np.random.default_rng(0).random((4, 5, 8))
    write_scores(Chase(scores, 10, 20), tmp_path / "s.json", checkpoint, "made-up")
    read = HeadScores.read(tmp_path / "s.json", checkpoint.shape)
    np.testing.assert_allclose(read.values, scores.mean(0), atol=1e-6)
    made = json.loads((tmp_path / "s.provenance.json").read_text())
    assert (made["images"], made["character_accuracy"], made["data"]) == (4, 0.5, "made-up")


def test_no_pages_is_an_error(checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match="at least 1 image"):
        chase(checkpoint, [], 0)
