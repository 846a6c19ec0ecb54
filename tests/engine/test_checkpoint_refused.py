"""A checkpoint that cannot be used is refused in one sentence, before any weight is loaded."""

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.fixtures import change_config, sentence
from engine.llava_checkpoints import build_llava
from safetensors.torch import load_file, save_file
from transformers import Qwen2VLConfig

from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.weights import _unfit


def truncate(path: Path, share: float) -> None:
    """Keep the beginning of a file only."""
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b'"text"',
        b"{}",
        b"\xff\xfe\0",
        b'{"model_type": "nope"}',
        b'{"model_type": 3}',
    ],
    ids=str,
)
def test_config_that_is_none(folder: Path, unloaded: None, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json cannot be read") as caught:
        Checkpoint(folder, "qwen2_vl")
    assert f"pretrained={folder}" in sentence(caught)


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        (None, {"text_config": [1]}),
        (None, {"dtype": "float99"}),
        ("text_config", {"num_hidden_layers": "five"}),
        ("vision_config", {"depth": None}),
    ],
    ids=str,
)
def test_config_with_values_of_a_wrong_kind(
    folder: Path, unloaded: None, part: str | None, changes: dict[str, Any]
) -> None:
    change_config(folder, part, **changes)
    with pytest.raises(ValueError, match=r"config\.json cannot be read") as caught:
        Checkpoint(folder, "qwen2_vl")
    assert f"pretrained={folder}" in sentence(caught)


def test_no_config(folder: Path, unloaded: None) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json cannot be read") as caught:
        Checkpoint(folder, "qwen2_vl")
    assert f"pretrained={folder}" in sentence(caught)


def test_no_weights(folder: Path, unloaded: None) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no \*\.safetensors weight file") as caught:
        Checkpoint(folder, "qwen2_vl")
    assert f"pretrained={folder}" in sentence(caught)


@pytest.mark.parametrize("share", [0, 1e-6, 0.001, 0.5, 0.999])
def test_weights_cut_off(folder: Path, unloaded: None, share: float) -> None:
    truncate(folder / "model.safetensors", share)
    with pytest.raises(ValueError, match=r"model\.safetensors is broken") as caught:
        Checkpoint(folder, "qwen2_vl")
    assert f"pretrained={folder}" in sentence(caught)


def test_a_shard_is_missing(folder: Path, unloaded: None) -> None:
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (folder / "model.safetensors").rename(folder / names[0])
    index = {"weight_map": {"a": names[0], "b": names[1]}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"{names[1]} is missing") as caught:
        Checkpoint(folder, "qwen2_vl")
    assert f"pretrained={folder}" in sentence(caught)


@pytest.mark.parametrize("content", ["", "{", "{}", "[]", '{"weight_map": 3}', '"text"'])
def test_an_index_that_is_none(folder: Path, unloaded: None, content: str) -> None:
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json is broken") as caught:
        Checkpoint(folder, "qwen2_vl")
    assert f"pretrained={folder}" in sentence(caught)


def test_weights_that_lack_a_tensor(folder: Path) -> None:
    """Transformers alone draws it at random, and every answer after is noise."""
    weights = load_file(folder / "model.safetensors")
    lost = next(name for name in weights if name.endswith("layers.4.mlp.down_proj.weight"))
    del weights[lost]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    found = Checkpoint(folder, "qwen2_vl")
    with pytest.raises(ValueError, match=r"lack 1 tensor.*layers\.4\.mlp\.down_proj") as caught:
        found.load()
    assert f"pretrained={folder}" in sentence(caught)


@pytest.mark.parametrize(
    ("found", "asked"), [("qwen2_vl", "llava_next"), ("llava_next", "qwen2_vl")]
)
def test_another_family(
    untrained: Path, tmp_path: Path, unloaded: None, found: str, asked: str
) -> None:
    folder = untrained if found == "qwen2_vl" else build_llava("llama", tmp_path / "llava")
    with pytest.raises(ValueError, match=f"is a {found} checkpoint.*takes {asked}") as caught:
        Checkpoint(folder, asked)
    assert f"pretrained={folder}" in sentence(caught)


@pytest.mark.parametrize("dtype", ["int8", "bf16", "Float32", "", "float64"])
def test_unknown_dtype(untrained: Path, unloaded: None, dtype: str) -> None:
    with pytest.raises(ValueError, match="dtype=") as caught:
        Checkpoint(untrained, "qwen2_vl", dtype=dtype)
    assert repr(dtype) in sentence(caught)
    assert "bfloat16" in sentence(caught)


@pytest.mark.parametrize(
    "pretrained",
    ["/no/such/folder", "no/such-repository", "a path with blanks", "a/b/c", "~/model"],
)
@pytest.mark.parametrize("revision", [None, "main", 7])
def test_a_path_that_does_not_exist(
    unloaded: None, pretrained: str, revision: str | int | None
) -> None:
    """Offline; a revision of digits comes from lmms-eval as a number."""
    with pytest.raises(ValueError, match="is no folder and cannot be had from the hub") as caught:
        Checkpoint(pretrained, "qwen2_vl", revision=revision)
    assert f"pretrained={pretrained}" in sentence(caught)


def test_a_file_in_place_of_a_folder(untrained: Path, unloaded: None) -> None:
    path = untrained / "model.safetensors"
    with pytest.raises(ValueError, match="is no folder") as caught:
        Checkpoint(path, "qwen2_vl")
    assert str(path) in sentence(caught)


@pytest.mark.parametrize("name", ["tokenizer.json", "processor_config.json"])
@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_a_processor_that_is_none(
    folder: Path, unloaded: None, name: str, content: str | None
) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    found = Checkpoint(folder, "qwen2_vl")
    with pytest.raises(ValueError, match="its processor cannot be read") as caught:
        _ = found.processor
    assert f"pretrained={folder}" in sentence(caught)


def test_no_chat_template(folder: Path, unloaded: None) -> None:
    (folder / "chat_template.jinja").unlink()
    found = Checkpoint(folder, "qwen2_vl")
    with pytest.raises(ValueError, match="no chat template") as caught:
        _ = found.processor
    assert f"pretrained={folder}" in sentence(caught)


# --- code of its own ----------------------------------------------------------------------------


@pytest.fixture
def trap(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint's own modules, which leave a trace if they run; whoever asks is told yes."""
    trace = folder.parent / "trace"
    for name in ("configuration_own", "modeling_own", "processing_own"):
        (folder / f"{name}.py").write_text(f"open({str(trace)!r}, 'w').close()\n")
    monkeypatch.setattr("builtins.input", lambda *_: "yes")
    return trace


MAPS = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModelForImageTextToText": "modeling_own.OwnModel",
}


def test_code_of_an_unknown_architecture_is_never_run(
    folder: Path, trap: Path, unloaded: None
) -> None:
    change_config(folder, model_type="own", auto_map=MAPS)
    with pytest.raises(ValueError, match=r"code of its own \(auto_map in config\.json\)") as caught:
        Checkpoint(folder)
    assert "never run here" in sentence(caught)
    assert not trap.exists()


def test_a_known_architecture_is_loaded_as_transformers_has_it(folder: Path, trap: Path) -> None:
    change_config(folder, auto_map=MAPS)
    for name in ("processor_config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        content["auto_map"] = {
            "AutoProcessor": "processing_own.OwnProcessor",
            "AutoTokenizer": ["processing_own.OwnTokenizer", None],
        }
        (folder / name).write_text(json.dumps(content))
    found = Checkpoint(folder, "qwen2_vl")
    assert type(found.processor).__name__ == "Qwen2VLProcessor"
    assert type(found.model).__name__ == "Qwen2VLForConditionalGeneration"
    assert not trap.exists()


def test_code_of_an_unknown_processor_is_never_run(
    folder: Path, trap: Path, unloaded: None
) -> None:
    for name in ("processor_config.json", "preprocessor_config.json"):
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        content |= {
            "processor_class": "OwnProcessor",
            "auto_map": {"AutoProcessor": "processing_own.OwnProcessor"},
        }
        path.write_text(json.dumps(content))
    # Transformers takes its own processor of the model's type instead, or none.
    with suppress(ValueError):
        _ = Checkpoint(folder, "qwen2_vl").processor
    assert not trap.exists()


# --- where and how it is to run -----------------------------------------------------------------


@pytest.mark.parametrize(
    "device_map",
    ["cudda", "gpu", "", "cpu:x", 7.5, "meta", {"": "nowhere"}, ["cpu"], None, "cuda:-1"],
)
def test_no_such_device(untrained: Path, unloaded: None, device_map: Any) -> None:
    with pytest.raises(ValueError, match="device_map=") as caught:
        Checkpoint(untrained, device_map=device_map)
    assert "cpu" in sentence(caught)


@pytest.mark.parametrize("device_map", ["cuda", "cuda:7", 7, {"": "cuda:7"}, {"": 7}])
def test_a_gpu_that_is_not_there(
    untrained: Path, unloaded: None, monkeypatch: pytest.MonkeyPatch, device_map: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no GPU is seen here; give one that is there, or cpu"):
        Checkpoint(untrained, device_map=device_map)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    if device_map == "cuda":
        Checkpoint(untrained, device_map=device_map)
        return
    with pytest.raises(ValueError, match="GPUs 0 to 1 are seen here"):
        Checkpoint(untrained, device_map=device_map)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"a": "cpu", "b": "disk"}])
def test_devices_that_are_there(untrained: Path, device_map: Any) -> None:
    Checkpoint(untrained, device_map=device_map)


@pytest.mark.parametrize("name", ["nonsense", "", None, 3, "someone/kernel", "paged|sdpa"])
def test_unknown_attention(untrained: Path, unloaded: None, name: Any) -> None:
    with pytest.raises(ValueError, match="attn_implementation=") as caught:
        Checkpoint(untrained, attn_implementation=name)
    assert "sdpa, eager" in sentence(caught)


def test_flash_attention_without_its_package(
    untrained: Path, unloaded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsemm_eval.engine.checkpoint.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="flash_attention_2: flash-attn is not installed"):
        Checkpoint(untrained, attn_implementation="flash_attention_2")
    monkeypatch.setattr("sparsemm_eval.engine.checkpoint.find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="flash_attention_3: it runs on a GPU"):
        Checkpoint(untrained, attn_implementation="flash_attention_3")


# --- weights of another model -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 7}, "vocab_size and hidden_size"),
        ({"hidden_size": 64}, "hidden_size"),
        ({"num_hidden_layers": 6, "max_window_layers": 6}, "5 layers, num_hidden_layers is 6"),
        ({"num_key_value_heads": 1}, "KV heads times their size"),
    ],
    ids=str,
)
def test_weights_that_do_not_fit_the_config(
    folder: Path, unloaded: None, changes: dict[str, Any], words: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    changed = {**changes}
    if "num_hidden_layers" in changes and "layer_types" in config["text_config"]:
        changed["layer_types"] = ["full_attention"] * changes["num_hidden_layers"]
    change_config(folder, "text_config", **changed)
    with pytest.raises(ValueError, match=words) as caught:
        Checkpoint(folder, "qwen2_vl")
    assert f"pretrained={folder}: its weights do not fit its config.json" in sentence(caught)


def test_more_layers_than_are_run_are_found_as_they_are_loaded(folder: Path) -> None:
    """Not before: some checkpoints have layers that transformers knows not to run."""
    config = json.loads((folder / "config.json").read_text())
    changed = {"num_hidden_layers": 3}
    if "layer_types" in config["text_config"]:
        changed["layer_types"] = ["full_attention"] * 3
    change_config(folder, "text_config", **changed)
    with pytest.raises(ValueError, match=r"they have .*layers\.3\..*num_hidden_layers is 3"):
        Checkpoint(folder, "qwen2_vl").load()


@pytest.mark.parametrize(
    "extra",
    [
        {"model.connector.perceiver_resampler.layers.0.self_attn.k_proj.weight": (4, 4)},
        {"model.layers.5.self_attn.k_proj.weight": (4, 4)},  # to predict a second token
        {"model.layers.1.linear_attn.in_proj.weight": (3, 3)},
    ],
    ids=str,
)
def test_layers_of_other_kinds_are_no_misfit(extra: dict[str, tuple[int, ...]]) -> None:
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 8,
        }
    )  # fmt: skip
    shapes = {
        "model.embed_tokens.weight": (9, 8),
        "model.layers.0.self_attn.k_proj.weight": (4, 8),
        "model.layers.1.mlp.up_proj.weight": (8, 8),
        "visual.layers.0.self_attn.k_proj.weight": (2, 2),
    }
    assert list(_unfit(shapes, config)) == []
    assert list(_unfit(shapes | extra, config)) == []


def test_a_tower_of_another_size_is_found_as_it_is_loaded(folder: Path) -> None:
    """Transformers would draw what does not fit at random, with a warning."""
    config = json.loads((folder / "config.json").read_text())
    change_config(folder, "vision_config", mlp_ratio=config["vision_config"]["mlp_ratio"] + 1)
    with pytest.raises(ValueError, match="its weights") as caught:
        Checkpoint(folder, "qwen2_vl").load()
    assert f"pretrained={folder}" in sentence(caught)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 0},
        {"num_attention_heads": 0},
        {"num_hidden_layers": 0, "layer_types": []},
        {"num_key_value_heads": 3},
        {"num_attention_heads": -4},
    ],
    ids=str,
)
def test_heads_and_layers_that_cannot_be(
    folder: Path, unloaded: None, changes: dict[str, Any]
) -> None:
    change_config(folder, "text_config", **changes)
    with pytest.raises(ValueError, match=f"pretrained={folder}: ") as caught:
        Checkpoint(folder, "qwen2_vl")
    sentence(caught)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "lost link"])
def test_what_is_no_file_is_not_waited_for(folder: Path, name: str, kind: str) -> None:
    path = folder / name
    path.unlink()
    if kind == "lost link":
        path.symlink_to("nowhere")
    else:
        os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with pytest.raises(ValueError, match=f"{re.escape(name)} in it is no file"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"eos_token_id": ""}, "eos_token_id='': it must be a token's number"),
        ({"pad_token_id": [1, True]}, "pad_token_id="),
        ({"output_hidden_states": "1_000"}, "it must be true or false"),
        ({"repetition_penalty": "1e3"}, "repetition_penalty='1e3': it must be a number"),
        ([1], "it is no object"),
        ({"eos_token_id": 10**400}, "cannot be read"),
    ],
    ids=str,
)
def test_defaults_of_generation_that_cannot_be(folder: Path, content: Any, words: str) -> None:
    (folder / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"generation_config\.json") as caught:
        Checkpoint(folder)
    assert words in sentence(caught)
