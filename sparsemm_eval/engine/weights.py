"""Weight files as their headers have them: whole, and of the shapes that the config says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from sparsemm_eval.errors import UserError, one_line
from sparsemm_eval.stored import NotUnderstood, read_json

_EMBEDDING = re.compile(r"(?P<decoder>(?:.*\.)?)embed_tokens\.weight")
_TOWERS = ("vision", "visual", "audio")


def check_weights(folder: Path, pretrained: str, config: PreTrainedConfig) -> None:
    """Read the headers of all weight files; no weight is loaded.

    Raises
    ------
    UserError
        Unless every file is there, with a header that fits its size, and the decoder's vocabulary,
        layers and KV heads are those of the config.
    """
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = _indexed(index, pretrained)
        missing = sorted(names - {path.name for path in files})
        if missing:
            raise UserError(f"pretrained={pretrained}: weight file {missing[0]} is missing")
    if not files:
        raise UserError(f"pretrained={pretrained}: no *.safetensors weight file in {folder}")
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            shapes.update(_shapes(path))
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"pretrained={pretrained}: {path.name} is broken ({one_line(error)})"
            ) from error
    # Weights of fewer bits are stored in shapes of their own.
    if getattr(config, "quantization_config", None) is None:
        for words in _unfit(shapes, config):
            raise UserError(
                f"pretrained={pretrained}: its weights do not fit its config.json: {words}; take "
                "both from one model"
            )


def _shapes(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118
            yield name, tuple(file.get_slice(name).get_shape())


def _unfit(shapes: dict[str, tuple[int, ...]], config: PreTrainedConfig) -> Iterator[str]:
    """What of a text decoder is stored otherwise than the config says.

    Only what no checkpoint of any architecture has is told here. Layers may be of several kinds,
    and more of them than are run (to predict several tokens): what is left is seen when weights are
    loaded.
    """
    text = config.get_text_config()
    embeddings = [
        found
        for name in shapes
        if (found := _EMBEDDING.fullmatch(name)) and not any(one in name for one in _TOWERS)
    ]
    if len(embeddings) != 1:
        return
    (embedding,) = embeddings
    shape, wanted = shapes[embedding[0]], (text.vocab_size, text.hidden_size)
    if shape != wanted:
        yield f"{embedding[0]} is of {shape}, and vocab_size and hidden_size are {wanted}"
    layers = re.compile(rf"{re.escape(embedding['decoder'])}layers\.(\d+)\.(.*)")
    found = [(part, name) for name in shapes if (part := layers.fullmatch(name))]
    numbers = {int(part[1]) for part, _ in found}
    if numbers and not numbers.issuperset(range(text.num_hidden_layers)):
        yield f"they have {len(numbers)} layers, num_hidden_layers is {text.num_hidden_layers}"
    heads = getattr(text, "num_attention_heads", None)
    kv_heads = getattr(text, "num_key_value_heads", None)
    kv_heads = heads if kv_heads is None else kv_heads
    head_dim = getattr(text, "head_dim", None) or (heads and text.hidden_size // heads)
    keys = {name: shapes[name] for part, name in found if part[2] == "self_attn.k_proj.weight"}
    if heads and head_dim and len(set(keys.values())) == 1:
        wanted = (kv_heads * head_dim, text.hidden_size)
        for name, shape in keys.items():
            if shape != wanted:
                words = "KV heads times their size and hidden_size"
                yield f"{name} is of {shape}, and {words} are {wanted}"


def _indexed(index: Path, pretrained: str) -> set[str]:
    """Names of the weight files that an index lists."""
    try:
        return set(read_json(index)["weight_map"].values())
    except (NotUnderstood, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"pretrained={pretrained}: {index.name} is broken ({one_line(error)})"
        ) from error
