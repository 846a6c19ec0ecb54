"""A checkpoint is known and checked before any weight is loaded."""

import json
import os
import shutil
from collections.abc import Callable
from hashlib import sha1, sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine.fixtures import change_config, sentence
from engine.llava_checkpoints import build_llava
from safetensors.torch import load_file, save_file

from sparsemm_eval.engine import checkpoint
from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.methods import HeadScores, ModelShape, Sensitivity
from sparsemm_eval.methods.sensitivity import Kind

COMMIT = "c0ffee" + "0" * 34


# --- what it is ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("backbone", "kv_heads"), [("llama", 4), ("mistral", 2)])
def test_shape_of_llava(tmp_path: Path, backbone: str, kv_heads: int) -> None:
    """MHA and GQA."""
    found = Checkpoint(build_llava(backbone, tmp_path / backbone), "llava_next")
    assert found.shape == ModelShape(layers=3, query_heads=4, kv_heads=kv_heads)


def test_shape_without_a_word_on_kv_heads(tmp_path: Path) -> None:
    """Old Vicuna configs say nothing: every query head is its own."""
    folder = build_llava("llama", tmp_path / "llava")
    config = json.loads((folder / "config.json").read_text())
    del config["text_config"]["num_key_value_heads"]
    (folder / "config.json").write_text(json.dumps(config))
    assert Checkpoint(folder, "llava_next").shape == ModelShape(3, 4, 4)


def test_shape_of_qwen2vl(untrained: Path) -> None:
    assert Checkpoint(untrained, "qwen2_vl").shape == ModelShape(5, 8, 4)


@pytest.mark.parametrize(
    ("asked", "loaded"),
    [("auto", torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16)],
)
def test_dtype_of_the_weights(untrained: Path, asked: str, loaded: torch.dtype) -> None:
    assert Checkpoint(untrained, "qwen2_vl", dtype=asked).model.dtype == loaded


def test_weights_are_loaded_on_first_use_and_released(untrained: Path) -> None:
    found = Checkpoint(untrained, "qwen2_vl")
    model = found.model
    assert found.model is model
    found.load()
    assert found.model is model
    found.release()
    found.release()
    assert found.model is not model
    assert not found.model.training


def test_padding_is_on_the_left_whatever_the_checkpoint_says(tmp_path: Path) -> None:
    folder = build_llava("llama", tmp_path / "llava")
    assert json.loads((folder / "tokenizer_config.json").read_text())["padding_side"] == "right"
    assert Checkpoint(folder, "llava_next").processor.tokenizer.padding_side == "left"


# --- its hash -----------------------------------------------------------------------------------


def other_weights(folder: Path) -> None:
    """Change one number."""
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def other_vocabulary(folder: Path) -> None:
    """Swap two tokens."""
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"A":', '"@":').replace('"B":', '"A":'))


def other_template(folder: Path) -> None:
    """Put a word in front of every prompt."""
    path = folder / "chat_template.jinja"
    path.write_text("Look! " + path.read_text())


def more_weights(folder: Path) -> None:
    """Add a second weight file."""
    shutil.copy(folder / "model.safetensors", folder / "model-2.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        other_weights,
        other_vocabulary,
        other_template,
        more_weights,
        lambda folder: change_config(folder, "text_config", rms_norm_eps=1e-3),
        lambda folder: change_config(folder, "vision_config", depth=2),
    ],
)
def test_hash_changes_with_what_decides_answers(
    folder: Path, untrained: Path, change: Callable[[Path], None]
) -> None:
    before = Checkpoint(untrained, "qwen2_vl").hash
    assert Checkpoint(folder, "qwen2_vl").hash == before
    change(folder)
    assert Checkpoint(folder, "qwen2_vl").hash != before


def test_hash_does_not_change_with_what_decides_nothing(folder: Path) -> None:
    before = Checkpoint(folder, "qwen2_vl").hash
    (folder / "head_scores.json").write_text("{}")
    (folder / "head_scores.provenance.json").write_text("{}")
    (folder / "README.md").write_text("# Another card")
    (folder / ".gitattributes").write_text("*")
    assert Checkpoint(folder, "qwen2_vl").hash == before


def test_hash_needs_no_weights(folder: Path, unloaded: None) -> None:
    assert len(Checkpoint(folder, "qwen2_vl").hash) == 64


# --- downloaded ---------------------------------------------------------------------------------


@pytest.fixture
def downloaded(untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with one repository, as a download leaves it: links to blobs.

    The large ones are named by SHA-256, the small ones by git's SHA-1.
    """
    repository = tmp_path / "hub" / "models--some--reader"
    snapshot = repository / "snapshots" / COMMIT
    for path in (snapshot, repository / "blobs", repository / "refs"):
        path.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for path in untrained.iterdir():
        name = sha256 if path.suffix == ".safetensors" else sha1
        blob = repository / "blobs" / name(path.read_bytes()).hexdigest()
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(blob)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_a_repository_is_found_offline_once_downloaded(
    downloaded: Path, untrained: Path, revision: str | None
) -> None:
    found = Checkpoint("some/reader", "qwen2_vl", revision=revision)
    assert found.folder == downloaded
    assert found.shape == Checkpoint(untrained, "qwen2_vl").shape
    found.load()
    assert found.hash == Checkpoint(untrained, "qwen2_vl").hash


def test_a_blob_is_known_by_its_content_and_not_by_its_name(downloaded: Path) -> None:
    """Whatever has taken its place in the hub's cache, under the same name or another."""
    before = Checkpoint("some/reader", "qwen2_vl").hash
    link = downloaded / "model.safetensors"
    blob = link.resolve()
    shutil.copy(blob, other := blob.with_name("0" * 64))
    link.unlink()
    link.symlink_to(other)
    assert Checkpoint("some/reader", "qwen2_vl").hash == before
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    link.unlink()
    link.symlink_to(blob)
    assert Checkpoint("some/reader", "qwen2_vl").hash != before


@pytest.fixture
def remembering(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """All files count as large and settled; how many were read since the last call."""
    reads = [0]
    opened = Path.open

    def counted(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        reads[0] += mode == "rb" and path.suffix == ".safetensors"
        return opened(path, mode, *args, **kwargs)

    monkeypatch.setattr(checkpoint, "_LARGE", 1)
    monkeypatch.setattr(checkpoint, "_SETTLED", -1)
    monkeypatch.setattr(Path, "open", counted)

    def since() -> int:
        count, reads[0] = reads[0], 0
        return count

    return since


def test_a_large_file_is_read_once(folder: Path, remembering: Callable[[], int]) -> None:
    before = Checkpoint(folder, "qwen2_vl").hash
    assert remembering() == 1
    assert Checkpoint(folder, "qwen2_vl").hash == before
    assert remembering() == 0
    weights = folder / "model.safetensors"
    found = weights.stat()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    # As long, and as old as it was: only the system's own time of change tells.
    os.utime(weights, ns=(found.st_atime_ns, found.st_mtime_ns))
    assert Checkpoint(folder, "qwen2_vl").hash != before
    content[-1] ^= 1
    weights.write_bytes(content)
    assert Checkpoint(folder, "qwen2_vl").hash == before


def test_a_file_that_was_just_written_is_not_remembered(
    folder: Path, remembering: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_SETTLED", 60)
    for _ in range(2):
        assert len(Checkpoint(folder, "qwen2_vl").hash) == 64
        assert remembering() == 1


@pytest.mark.parametrize("content", [b"", b"\xff", b"0" * 64, b"{}", "flipped", "another's"])
def test_a_damaged_memory_is_not_believed(
    folder: Path, remembering: Callable[[], int], user_cache: Path, content: bytes | str
) -> None:
    before = Checkpoint(folder, "qwen2_vl").hash
    records = list((user_cache / "file_hashes").iterdir())
    texts = [path.read_bytes() for path in records]
    for number, path in enumerate(records):
        flipped = bytes([texts[number][0] ^ 1]) + texts[number][1:]
        known = {"flipped": flipped, "another's": texts[number - 1]}
        path.write_bytes(known[content] if isinstance(content, str) else content)
    remembering()
    assert Checkpoint(folder, "qwen2_vl").hash == before
    assert remembering() == 1


def test_a_cache_that_cannot_be_written_costs_a_reading(
    folder: Path, remembering: Callable[[], int], user_cache: Path
) -> None:
    user_cache.write_text("a file where the folder should be")
    assert len({Checkpoint(folder, "qwen2_vl").hash for _ in range(2)}) == 1
    assert remembering() == 2


@pytest.mark.parametrize("revision", ["dev", "0" * 40])
def test_a_revision_that_was_not_downloaded(
    downloaded: Path, unloaded: None, revision: str
) -> None:
    with pytest.raises(ValueError, match="cannot be had from the hub") as caught:
        Checkpoint("some/reader", "qwen2_vl", revision=revision)
    assert "pretrained=some/reader" in sentence(caught)


# --- head scores --------------------------------------------------------------------------------


def scores(layers: int = 5, heads: int = 8, first: float = 1) -> HeadScores:
    """Some head scores."""
    return HeadScores(np.arange(first, first + layers * heads).reshape(layers, heads))


def test_scores_beside_the_checkpoint_come_first(folder: Path, user_cache: Path) -> None:
    found = Checkpoint(folder, "qwen2_vl")
    scores(first=2).write(folder / "head_scores.json")
    found.scores_cache().parent.mkdir(parents=True)
    scores(first=3).write(found.scores_cache())
    scores(first=4).write(folder / "other.json")
    assert found.head_scores() == scores(first=2)
    assert found.head_scores(folder / "other.json") == scores(first=4)
    assert user_cache in found.scores_cache().parents


def test_scores_in_the_user_cache_are_of_this_very_checkpoint(folder: Path) -> None:
    found = Checkpoint(folder, "qwen2_vl")
    found.scores_cache().parent.mkdir(parents=True)
    scores().write(found.scores_cache())
    assert found.head_scores() == scores()
    other_weights(folder)
    with pytest.raises(FileNotFoundError):
        Checkpoint(folder, "qwen2_vl").head_scores()


def test_no_scores_name_the_command_that_makes_them(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="sparsemm-eval chase") as caught:
        Checkpoint(folder, "qwen2_vl").head_scores()
    assert f"`sparsemm-eval chase --model {folder}`" in sentence(caught)
    assert "head_scores=PATH" in sentence(caught)


def test_scores_that_are_not_where_they_were_said_to_be(folder: Path) -> None:
    scores().write(folder / "head_scores.json")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json") as caught:
        Checkpoint(folder, "qwen2_vl").head_scores("nowhere.json")
    sentence(caught)


@pytest.mark.parametrize("shape", [(5, 4), (4, 8), (32, 32)])
def test_scores_of_another_model(folder: Path, shape: tuple[int, int]) -> None:
    path = folder / "head_scores.json"
    scores(*shape).write(path)
    with pytest.raises(ValueError, match="use scores chased on this model") as caught:
        Checkpoint(folder, "qwen2_vl").head_scores()
    assert str(path) in sentence(caught)


def test_words_name_the_checkpoints_own_scores(folder: Path) -> None:
    found = Checkpoint(folder, "qwen2_vl")
    with pytest.raises(FileNotFoundError, match="sparsemm-eval sensitivity --model"):
        found.head_scores("sensitivity@share")
    scores().write(folder / "head_scores.json")
    losses = {"a": np.eye(5, 4), "b": np.arange(20.0).reshape(5, 4)}
    kinds = {name: Kind(loss, 1, 3) for name, loss in losses.items()}
    sensitivity = Sensitivity(found.shape, 8, kinds, np.zeros((5, 4), dtype=np.int64))
    for path in (folder / "head_scores.sensitivity.json", folder / "other.json"):
        sensitivity.write(path)
    assert found.head_scores("visual") == found.head_scores("") == scores()
    assert found.sensitivity_of(None) is found.sensitivity_of("visual") is None
    assert found.sensitivity_of(folder / "head_scores.json") is None
    for name in ("sensitivity", str(folder / "other.json")):
        for mixture in ("root", "share+b", "root+a+b*2"):
            wanted = sensitivity.head_scores(mixture)
            assert found.head_scores(f"{name}@{mixture}") == wanted
            assert found.sensitivity_of(f"{name}@{mixture}") == (sensitivity, mixture)
        assert found.head_scores(name) == sensitivity.head_scores("root")
    with pytest.raises(ValueError, match="leave out what stands behind @") as caught:
        found.head_scores(folder / "head_scores.json@share")
    sentence(caught)
