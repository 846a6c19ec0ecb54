"""A checkpoint: found, checked and fingerprinted before any weight is loaded."""

from __future__ import annotations

import hashlib
import time
from contextlib import suppress
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from sparsemm_eval.cache import use_head_budget_attention
from sparsemm_eval.choices import ATTENTION, DTYPES
from sparsemm_eval.engine.hub import FILES, find_folder
from sparsemm_eval.engine.weights import check_weights
from sparsemm_eval.errors import UserError, check_choice, one_line, short_repr
from sparsemm_eval.families import Family, family_of
from sparsemm_eval.methods import (
    HeadScores,
    ModelShape,
    Sensitivity,
    find_scores,
)
from sparsemm_eval.methods.sensitivity import FILE_NAME as SENSITIVITY_FILE
from sparsemm_eval.methods.sensitivity import VISUAL, WORD, find_sensitivity
from sparsemm_eval.paths import cache_folder, write_whole
from sparsemm_eval.stored import NoFile, NotUnderstood, read_json

# A file of so many bytes is not read again to know its hash, once it has been as it is for some
# seconds.
_LARGE, _SETTLED = 1 << 24, 2.0
# What transformers takes as a device map beside devices.
_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
# Modules and packages of attentions that transformers does not bring along.
_FLASH = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn 3"),
}
# Of generation_config.json.
_NUMBERS = frozenset({
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "no_repeat_ngram_size",
    "num_beams", "num_return_sequences", "repetition_penalty", "temperature", "top_k", "top_p",
})  # fmt: skip


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
        In one sentence, if it cannot be found or read, is of another family, needs code of its
        own, or a weight file is broken or does not fit the config; or if there is no such device,
        or no such attention.
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
        check_choice("dtype", dtype, DTYPES)
        _check_device(device_map)
        _check_attention(attn_implementation)
        self.pretrained = str(pretrained)
        self.dtype, self.device_map = dtype, device_map
        self.attn_implementation = attn_implementation
        self.folder = find_folder(self.pretrained, revision)
        _check_files(self.folder, self.pretrained)
        _check_generation_file(self.folder, self.pretrained)
        self.config = _read_config(self.folder, self.pretrained)
        if model_type not in (None, self.config.model_type):
            raise UserError(
                f"pretrained={self.pretrained} is a {self.config.model_type} checkpoint; this "
                f"model takes {model_type}"
            )
        try:
            _ = self.shape
        except UserError as error:
            raise UserError(f"pretrained={self.pretrained}: {error}") from error
        check_weights(self.folder, self.pretrained, self.config)

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
        """Layers and heads of the decoder that methods compress."""
        return ModelShape.from_config(self.config)

    @cached_property
    def hash(self) -> str:
        """SHA-256 over all that decides its answers: weights, configs, tokenizer, processor."""
        digest = hashlib.sha256()
        files = {path for pattern in FILES for path in self.folder.glob(pattern)}
        for path in sorted(files):
            # Head scores decide a method's answers, not the model's; they are keyed apart.
            if not path.name.startswith("head_scores"):
                digest.update(f"{path.name} {_file_hash(path)}\n".encode())
        return digest.hexdigest()

    @cached_property
    def processor(self) -> ProcessorMixin:
        """Tokenizer and image processor, padding on the left."""
        try:
            processor = AutoProcessor.from_pretrained(self.folder, trust_remote_code=False)
        except Exception as error:  # transformers raises what it likes on a file's content
            raise UserError(
                f"pretrained={self.pretrained}: its processor cannot be read ({one_line(error)})"
                f"{_own_code(self.folder)}"
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
        UserError
            If they cannot be loaded; if a tensor is lacking or of another shape, which transformers
            would make up, with a warning.
        """
        try:
            model, info = AutoModelForImageTextToText.from_pretrained(
                self.folder,
                dtype=self.dtype if self.dtype == "auto" else getattr(torch, self.dtype),
                device_map=self.device_map,
                attn_implementation=self.attn_implementation,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=False,
                use_safetensors=True,
            )
        except Exception as error:  # a model's code on a checkpoint's numbers raises what it likes
            raise UserError(
                f"pretrained={self.pretrained}: its weights cannot be loaded "
                f"({type(error).__name__}: {one_line(error)}){_own_code(self.folder)}"
            ) from error
        for name, stored, wanted in sorted(info["mismatched_keys"]):
            raise UserError(
                f"pretrained={self.pretrained}: its weights do not fit its config.json: {name} is "
                f"of {tuple(stored)}, and must be of {tuple(wanted)}; take both from one model"
            )
        if missing := sorted(info["missing_keys"]):
            raise UserError(
                f"pretrained={self.pretrained}: its weight files lack {len(missing)} tensors that "
                f"its config.json asks for, such as {missing[0]}"
            )
        layers = len(self.shape.places)
        if more := [
            name for name in sorted(info["unexpected_keys"]) if f".layers.{layers}." in name
        ]:
            raise UserError(
                f"pretrained={self.pretrained}: its weights do not fit its config.json: they have "
                f"{more[0]}, and num_hidden_layers is {layers}; take both from one model"
            )
        use_head_budget_attention(model)
        return model.eval()

    @property
    def number_bytes(self) -> int:
        """Bytes of a number of its keys and values."""
        named = self.dtype if self.dtype != "auto" else self.config.dtype
        dtype = getattr(torch, named) if isinstance(named, str) else named or torch.float32
        return dtype.itemsize

    def load(self) -> None:
        """Load the weights now, unless they are there."""
        _ = self.model

    def release(self) -> None:
        """Drop the weights; the next use loads them again."""
        self.__dict__.pop("model", None)

    def head_scores(self, path: str | Path | None = None) -> HeadScores:
        """The given scores, or the visual ones found for this checkpoint.

        Parameters
        ----------
        path : str or Path, optional
            A score file or a sensitivity file, or by a word the checkpoint's own: ``visual`` as
            when none is given, or ``sensitivity``. A mixture may stand behind a sensitivity, as in
            ``sensitivity@share``.

        Raises
        ------
        FileNotFoundError, ValueError
            If there is none, or it does not fit.
        """
        if (found := self.sensitivity_of(path)) is not None:
            sensitivity, mixture = found
            return sensitivity.head_scores(mixture)
        if _is_given(path):
            return HeadScores.read(str(path), self.shape)
        command = f"sparsemm-eval chase --model {self.pretrained}"
        places = (self.folder / "head_scores.json", self.scores_cache())
        return HeadScores.read(find_scores("head_scores", *places, command), self.shape)

    def sensitivity_of(self, path: str | Path | None) -> tuple[Sensitivity, str] | None:
        """The sensitivity that given head scores are of, and their mixture; None if of none.

        Parameters
        ----------
        path : str or Path or None
            As for `head_scores`.

        Raises
        ------
        FileNotFoundError, ValueError
            If it is the checkpoint's own and there is none, or it does not fit.
        """
        if not _is_given(path):
            return None
        word, _, mixture = str(path).partition("@")
        if word == WORD:
            return self.sensitivity(), mixture or "root"
        return find_sensitivity(str(path), self.shape)

    def sensitivity(self, path: str | Path | None = None) -> Sensitivity:
        """The given sensitivity file, or the one found for this checkpoint.

        Raises
        ------
        FileNotFoundError, ValueError
            If there is none, or it does not fit.
        """
        command = f"sparsemm-eval sensitivity --model {self.pretrained} --data TASKS"
        beside = self.folder / SENSITIVITY_FILE
        found = path or find_scores(WORD, beside, self.sensitivity_cache(), command)
        return Sensitivity.read(str(found), self.shape)

    def scores_cache(self) -> Path:
        """Where a chase on this very checkpoint leaves its scores."""
        return cache_folder() / "head_scores" / f"{self.hash}.json"

    def sensitivity_cache(self) -> Path:
        """Where the command leaves the sensitivity of this very checkpoint."""
        return cache_folder() / "head_scores" / f"{self.hash}.sensitivity.json"


def _is_given(head_scores: str | Path | None) -> bool:
    """Whether head scores are others than the checkpoint's own visual ones."""
    # lmms-eval makes a number of a name such as 2026.
    return head_scores is not None and str(head_scores) not in ("", VISUAL)


def _check_files(folder: Path, pretrained: str) -> None:
    """Raise UserError for a pipe or a folder in a file's place: a reader might wait for ever."""
    for pattern in FILES:
        for path in sorted(folder.glob(pattern)):
            if not path.is_file():
                raise UserError(f"pretrained={pretrained}: {path.name} in it is no file")


def _check_generation_file(folder: Path, pretrained: str) -> None:
    """Raise UserError for a default of generation that transformers would only stumble over."""
    words = f"pretrained={pretrained}: generation_config.json"
    try:
        content = read_json(folder / "generation_config.json")
    except NoFile:
        return
    except NotUnderstood as error:
        raise UserError(f"{words} cannot be read ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{words} cannot be read (it is no object)")
    for name, value in content.items():
        if name.endswith("_token_id"):
            ids = value if isinstance(value, list) else [value]
            fits = all(isinstance(one, int) and not isinstance(one, bool) for one in ids)
            wanted = "a token's number, or a list of them"
        elif name in ("use_cache", "do_sample") or name.startswith(("output_", "return_dict")):
            fits, wanted = isinstance(value, bool), "true or false"
        elif name in _NUMBERS:
            fits = isinstance(value, int | float) and not isinstance(value, bool)
            wanted = "a number"
        else:
            continue
        if value is not None and not fits:
            raise UserError(f"{words} has {name}={short_repr(value)}: it must be {wanted}")


def _read_config(folder: Path, pretrained: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises what it likes on a file's content
        raise UserError(
            f"pretrained={pretrained}: its config.json cannot be read ({one_line(error)})"
            f"{_own_code(folder)}"
        ) from error


def _own_code(folder: Path) -> str:
    """Where a checkpoint names code of its own, as words of a sentence; "" if nowhere."""
    files = []
    for path in sorted(folder.glob("*.json")):
        with suppress(NotUnderstood):
            content = read_json(path)
            if isinstance(content, dict) and "auto_map" in content:
                files.append(path.name)
    if not files:
        return ""
    return (
        f"; it holds code of its own (auto_map in {', '.join(files)}), which is never run here: "
        "give a checkpoint of an architecture that transformers has"
    )


def _check_device(device_map: Any) -> None:
    """Raise UserError unless weights can lie where a device map says."""
    if isinstance(device_map, dict):
        for device in device_map.values():
            if device != "disk":
                _check_device(device)
        return
    if device_map in _MAPS:
        return
    words = f"device_map={short_repr(device_map)}"
    try:
        # transformers takes a number as a GPU's.
        device = torch.device("cuda" if isinstance(device_map, int) else device_map)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"{words}: it must be a device such as cpu or cuda:0, or one of {', '.join(_MAPS)}"
        ) from error
    if device.type == "meta":
        raise UserError(f"{words}: there are no weights on it, give cpu or cuda")
    if device.type != "cuda":
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = device_map if isinstance(device_map, int) else device.index or 0
    if not 0 <= number < count:
        found = f"GPUs 0 to {count - 1} are" if count else "no GPU is"
        raise UserError(f"{words}: {found} seen here; give one that is there, or cpu")


def _check_attention(name: Any) -> None:
    """Raise UserError unless the vision tower can attend in this way here."""
    check_choice("attn_implementation", name, ATTENTION)
    package = _FLASH.get(name)
    if package is None:
        return
    words = f"attn_implementation={name}"
    if find_spec(package[0]) is None:
        raise UserError(f"{words}: {package[1]} is not installed; install it, or give sdpa")
    if not torch.cuda.is_available():
        raise UserError(f"{words}: it runs on a GPU, and none is seen here; give sdpa")


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
