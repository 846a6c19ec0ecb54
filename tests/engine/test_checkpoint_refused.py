"""A checkpoint that cannot be used is refused in one sentence, before any weight is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
from engine.fixtures import change_config, sentence
from engine.llava_checkpoints import build_llava
from safetensors.torch import load_file, save_file

from sparsemm_eval.engine.checkpoint import Checkpoint


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
