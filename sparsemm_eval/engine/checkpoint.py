"""A checkpoint: found, checked and fingerprinted before any weight is loaded."""

from __future__ import annotations

import hashlib
import json
import time
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from sparsemm_eval.cache import use_head_budget_attention
from sparsemm_eval.choices import DTYPES
from sparsemm_eval.errors import UserError, one_line
from sparsemm_eval.families import Family, family_of
from sparsemm_eval.methods import HeadScores, ModelShape, find_head_scores
from sparsemm_eval.paths import cache_folder, write_whole
from sparsemm_eval.tiny import find_checkpoint

# A file of so many bytes is not read again to know its hash, once it has been as it is for some
# seconds.
_LARGE, _SETTLED = 1 << 24, 2.0
_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.safetensors"]


class Checkpoint:
    """A Hugging Face checkpoint.

    Parameters
    ----------
    pretrained : str or Path
        A folder, a repository on the hub (downloaded once, found offline afterwards), or
        ``embedded:qwen2vl`` and ``embedded:llava_next``.
    model_type : str, optional
        What its config must say, such as "llava_next" or "qwen2_vl"; None takes any family.
    revision : str, optional
        Of a hub repository.
    dtype : {"auto", "float32", "bfloat16", "float16"}
        Of the weights; auto takes the checkpoint's own.
    device_map : str or dict
        As transformers'; a device such as "cpu" or "cuda:0", or "auto".
    attn_implementation : str
        Of the vision tower. The decoder runs on the head-budgeted attention, whose dense part
        is sdpa.

    Raises
    ------
    ValueError
        In one sentence, if it cannot be found or read, is of another family, or a weight file
        is broken.
    """

    def __init__(
        self,
        pretrained: str | Path,
        model_type: str | None = None,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        device_map: str | dict = "cpu",
        attn_implementation: str = "sdpa",
    ) -> None:
        if dtype not in DTYPES:
            raise UserError(f"dtype={dtype!r}: it must be one of {', '.join(DTYPES)}")
        self.pretrained = str(pretrained)
        self.dtype, self.device_map = dtype, device_map
        self.attn_implementation = attn_implementation
        self.folder = _folder(find_checkpoint(self.pretrained), revision)
        self.config = _read_config(self.folder, self.pretrained)
        if model_type not in (None, self.config.model_type):
            raise UserError(
                f"pretrained={self.pretrained} is a {self.config.model_type} checkpoint; this "
                f"model takes {model_type}"
            )
        _check_weights(self.folder, self.pretrained)

    @property
    def family(self) -> type[Family]:
        """What is particular to its model_type.

        Raises
        ------
        UserError
            If no family is known for it, or the family refuses it.
        """
        family = family_of(self.config)
        family.check(self.config)
        return family

    @property
    def shape(self) -> ModelShape:
        """Layers and heads of the decoder."""
        return ModelShape.from_config(self.config)

    @cached_property
    def hash(self) -> str:
        """SHA-256 over all that decides its answers: weights, configs, tokenizer, processor."""
        digest = hashlib.sha256()
        files = {path for pattern in _FILES for path in self.folder.glob(pattern)}
        for path in sorted(files):
            # Head scores decide a method's answers, not the model's; they are keyed apart.
            if not path.name.startswith("head_scores"):
                digest.update(f"{path.name} {_file_hash(path)}\n".encode())
        return digest.hexdigest()

    @cached_property
    def processor(self) -> ProcessorMixin:
        """Tokenizer and image processor, padding on the left."""
        try:
            processor = AutoProcessor.from_pretrained(self.folder)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(
                f"pretrained={self.pretrained}: its processor cannot be read ({one_line(error)})"
            ) from error
        if not getattr(processor, "chat_template", None):
            raise UserError(
                f"pretrained={self.pretrained} has no chat template: add chat_template.jinja"
            )
        processor.tokenizer.padding_side = "left"
        return processor

    @cached_property
    def model(self) -> PreTrainedModel:
        """The weights, loaded on first use, with the decoder on the head-budgeted attention.

        Raises
        ------
        ValueError
            If the weight files lack a tensor: transformers would make it up, with a warning.
        """
        model, info = AutoModelForImageTextToText.from_pretrained(
            self.folder,
            dtype=self.dtype if self.dtype == "auto" else getattr(torch, self.dtype),
            device_map=self.device_map,
            attn_implementation=self.attn_implementation,
            output_loading_info=True,
        )
        if missing := sorted(info["missing_keys"]):
            raise UserError(
                f"pretrained={self.pretrained}: its weight files lack {len(missing)} tensors that "
                f"its config.json asks for, such as {missing[0]}"
            )
        use_head_budget_attention(model)
        return model.eval()

    def load(self) -> None:
        """Load the weights now, unless they are there."""
        _ = self.model

    def release(self) -> None:
        """Drop the weights; the next use loads them again."""
        self.__dict__.pop("model", None)

    def head_scores(self, path: str | Path | None = None) -> HeadScores:
        """The given score file, or the one found for this checkpoint.

        Raises
        ------
        FileNotFoundError, ValueError
            If there is none, or it does not fit.
        """
        command = f"sparsemm-eval chase --model {self.pretrained}"
        found = path or find_head_scores(self.folder, self.scores_cache(), command)
        return HeadScores.read(found, self.shape)

    def scores_cache(self) -> Path:
        """Where a chase on this very checkpoint leaves its scores."""
        return cache_folder() / "head_scores" / f"{self.hash}.json"


def _folder(pretrained: str, revision: str | None) -> Path:
    if Path(pretrained).is_dir():
        return Path(pretrained).resolve()
    # lmms-eval makes a number of a revision such as 2.
    revision = None if revision is None else str(revision)
    # The hub first, then what is cached: not every huggingface_hub does the second by itself.
    causes: list[Exception] = []
    for cached in (False, True):
        try:
            found = snapshot_download(
                pretrained, revision=revision, allow_patterns=_FILES, local_files_only=cached
            )
            return Path(found)
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            causes.append(error)
    raise UserError(
        f"pretrained={pretrained} is no folder and cannot be had from the hub "
        f"({one_line(causes[0])}): give a folder, or a repository that is reachable or cached"
    ) from causes[0]


def _read_config(folder: Path, pretrained: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder)
    except (
        OSError, ValueError, LookupError, TypeError, AttributeError, StrictDataclassError
    ) as error:  # fmt: skip
        raise UserError(
            f"pretrained={pretrained}: its config.json cannot be read ({one_line(error)})"
        ) from error


def _check_weights(folder: Path, pretrained: str) -> None:
    """Raise ValueError unless every weight file is there, with a header that fits its size."""
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = _indexed(index, pretrained)
        missing = sorted(names - {path.name for path in files})
        if missing:
            raise UserError(f"pretrained={pretrained}: weight file {missing[0]} is missing")
    if not files:
        raise UserError(f"pretrained={pretrained}: no *.safetensors weight file in {folder}")
    for path in files:
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"pretrained={pretrained}: {path.name} is broken ({one_line(error)})"
            ) from error


def _indexed(index: Path, pretrained: str) -> set[str]:
    """Names of the weight files that an index lists."""
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"pretrained={pretrained}: {index.name} is broken ({one_line(error)})"
        ) from error


def _file_hash(path: Path) -> str:
    """SHA-256 of a file's content; a large one is read once and then known by its inode."""
    # Never by its name: a blob of the hub's cache is called after what was downloaded once.
    found = path.resolve().stat()
    if found.st_size < _LARGE:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    stamp = (str(path.resolve()), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
    name = hashlib.sha256(repr(stamp).encode()).hexdigest()
    record = cache_folder() / "file_hashes" / name
    if (known := _remembered(record)) is not None:
        return known
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    # What was written a moment ago may be written again within one tick of the clock.
    if time.time() - max(found.st_mtime, found.st_ctime) > _SETTLED:
        with suppress(OSError):  # a cache that cannot be written to costs another reading
            write_whole(record, f"{digest.hexdigest()} {_seal(name, digest.hexdigest())}")
    return digest.hexdigest()


def _remembered(record: Path) -> str | None:
    """The hash that a record holds; None if there is none, or it is not as it was written."""
    try:
        known, seal = record.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return known if seal == _seal(record.name, known) else None


def _seal(name: str, known: str) -> str:
    return hashlib.sha256(f"{name} {known}".encode()).hexdigest()
