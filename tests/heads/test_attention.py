"""Attention over the image: against the attention matrices of stock transformers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from models.fixtures import Stock, change_config, photo
from models.llava_checkpoints import build_llava
from PIL import Image

from sparsemm_eval.heads.attention import ImageAttention, Scene, attend
from sparsemm_eval.heads.draw import drawn_scene, rank_heads
from sparsemm_eval.heads.regions import Qwen2VLRegions
from sparsemm_eval.models.checkpoint import Checkpoint
from sparsemm_eval.tiny import default_checkpoint

FAMILIES = ["qwen2_vl", "llama", "mistral", "sliding window"]
TOKENS = 6


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded Qwen2-VL, and LLaVA-NeXT with random weights on several backbones."""
    if request.param == "qwen2_vl":
        return Checkpoint(default_checkpoint(), dtype="float32")
    backbone = "llama" if request.param == "llama" else "mistral"
    folder = build_llava(backbone, tmp_path_factory.mktemp("model"))
    if request.param == "sliding window":
        # Shorter than the prompt: some of the image is out of sight.
        change_config(folder, "text_config", sliding_window=40)
    return Checkpoint(folder, dtype="float32")


def matrix_mean(checkpoint: Checkpoint, scene: Scene) -> tuple[str, np.ndarray]:
    """Greedy answer, and the mean of its rows of all attention matrices, image columns only."""
    stock = Stock(checkpoint.folder)
    stock.model.set_attn_implementation("eager")
    inputs = stock.inputs({"images": [scene.image], "question": scene.question})
    ids = stock.model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)
    length = inputs["input_ids"].shape[1]
    special = torch.tensor(stock.processor.tokenizer.all_special_ids)
    ends = torch.isin(ids[0, length:], special).nonzero().flatten().tolist()
    new = ids[0, length : length + ends[0]] if ends else ids[0, length:]
    assert len(new) > 1, "choose a scene with a longer answer"
    inputs["input_ids"] = ids[:, : length + len(new)]
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(
            inputs["mm_token_type_ids"], (0, len(new))
        )
    with torch.inference_mode():
        attentions = stock.model(**inputs, output_attentions=True).attentions
    image = inputs["input_ids"][0] == checkpoint.config.image_token_id
    mean = torch.stack(attentions)[:, 0, :, length - 1 : -1][..., image].mean(-2)
    return stock.processor.tokenizer.decode(new).strip(), mean.numpy()


def test_the_weights_are_those_of_eager_attention(checkpoint: Checkpoint) -> None:
    scene = drawn_scene()
    if checkpoint.config.model_type == "llava_next":
        scene = Scene(photo(57, 40), "Is it red?")
    looks = attend(checkpoint, scene, TOKENS)
    answer, expected = matrix_mean(checkpoint, scene)
    assert looks.answer == answer
    assert looks.weights.shape == expected.shape
    np.testing.assert_allclose(looks.weights, expected, atol=1e-5)


def test_the_heads_of_the_highest_scores_look_at_the_answer() -> None:
    checkpoint = Checkpoint(default_checkpoint(), dtype="float32")
    scene = drawn_scene()
    looks = attend(checkpoint, scene)
    heads = np.array(rank_heads(checkpoint.head_scores(), best=3, worst=10)).T
    on_box = looks.on_box(scene.box)[tuple(heads)]
    assert on_box[:3].min() > 0.5 > 0.1 > on_box[3:].mean()


def test_shares_add_up() -> None:
    weights = np.random.default_rng(0).dirichlet(np.ones(13), size=(2, 4))[..., :12]
    looks = ImageAttention("", 1, weights, Qwen2VLRegions(40, 30, "all", 3, 4))
    np.testing.assert_allclose(looks.on_image, looks.on_box((0, 0, 40, 30)))
    np.testing.assert_allclose(looks.on_image, sum(looks.on_parts().values()))
    np.testing.assert_allclose(looks.on_box((1, 1, 12, 9)), weights[..., [0, 1]].sum(-1))


def test_an_empty_answer_is_named(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    end = torch.tensor([[checkpoint.processor.tokenizer.eos_token_id]])
    monkeypatch.setattr(
        checkpoint.model, "generate", lambda input_ids, **_: torch.cat([input_ids, end], 1)
    )
    with pytest.raises(ValueError, match=r"the answer to 'What\?' is empty"):
        attend(checkpoint, Scene(Image.new("RGB", (64, 48)), "What?"))
