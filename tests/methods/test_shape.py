"""ModelShape: read from a model's config, whole or text part, and nothing is guessed."""

import pytest
from transformers import (
    CLIPVisionConfig,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPT2Config,
    LlamaConfig,
    LlavaNextConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3_5TextConfig,
)

from sparsemm_eval.errors import UserError
from sparsemm_eval.methods import ModelShape

TEXT = LlamaConfig(
    hidden_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16
)


def test_whole_model_and_text_part_have_one_shape() -> None:
    whole = LlavaNextConfig(vision_config=CLIPVisionConfig(), text_config=TEXT)
    for config in (TEXT, whole):
        shape = ModelShape.from_config(config)
        assert shape == ModelShape(3, 4, 2)
        assert shape.head_dim == 16


def test_what_a_config_leaves_out_is_what_transformers_takes_it_for() -> None:
    """Each query head its own KV head; a head's size from the hidden size."""
    shape = ModelShape.from_config(GPT2Config(n_embd=48, n_layer=2, n_head=3))
    assert (shape.layers, shape.query_heads, shape.kv_heads, shape.head_dim) == (2, 3, 3, 16)


def test_a_config_without_a_decoder_is_refused() -> None:
    with pytest.raises(UserError, match="num_hidden_layers"):
        ModelShape.from_config(PretrainedConfig())


def test_layers_of_a_sliding_window_beside_full_ones_are_left_out() -> None:
    shape = ModelShape.from_config(Gemma3TextConfig(num_hidden_layers=7, sliding_window=512))
    assert shape == ModelShape(1, 8, 4)
    assert shape.windows == (512,) * 5 + (None, 512)
    assert shape.places == (None,) * 5 + (0, None)
    # Where all slide, all are compressed, as long as the window holds them.
    shape = ModelShape.from_config(MistralConfig(num_hidden_layers=3, sliding_window=512))
    assert (shape.layers, shape.windows, shape.places) == (3, (), (0, 1, 2))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Qwen3_5TextConfig(num_hidden_layers=4), "has layers of linear_attention"),
        (Gemma4TextConfig(), "layers of unlike heads"),
        (Gemma3nTextConfig(), "num_kv_shared_layers=15"),
        (Gemma3TextConfig(num_hidden_layers=7, sliding_window=1), "sliding_window=1: it must be"),
    ],
)
def test_other_kinds_of_layers_are_refused(config: PretrainedConfig, words: str) -> None:
    with pytest.raises(UserError, match=words):
        ModelShape.from_config(config)


@pytest.mark.parametrize("head_dim", [0, -1, 1.5, True])
def test_no_size_of_a_head(head_dim: object) -> None:
    with pytest.raises(UserError, match=f"head_dim={head_dim}"):
        ModelShape(1, 2, 1, head_dim)
