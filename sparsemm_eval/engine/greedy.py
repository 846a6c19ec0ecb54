"""Which requests decode between static buffers, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from sparsemm_eval.cache.backends import resolve_backend
from sparsemm_eval.cache.static import BACKEND
from sparsemm_eval.engine.step import Kind
from sparsemm_eval.errors import check_choice
from sparsemm_eval.methods import HeadMask, ModelShape

CUDA_GRAPH = ("auto", "compile", "eager", "off")
# Generation settings that change nothing in greedy decoding, or are heeded apart.
_WITHOUT_EFFECT = {
    "_from_model_config", "bos_token_id", "do_sample", "early_stopping", "eos_token_id",
    "epsilon_cutoff", "eta_cutoff", "length_penalty", "max_length", "max_new_tokens",
    "min_new_tokens", "min_p", "pad_token_id", "repetition_penalty", "temperature", "top_h",
    "top_k", "top_p", "transformers_version", "typical_p", "use_cache",
}  # fmt: skip
_NEUTRAL = {
    "num_beams": 1, "num_return_sequences": 1, "num_beam_groups": 1, "min_length": 0,
    "no_repeat_ngram_size": 0, "encoder_repetition_penalty": 1.0, "diversity_penalty": 0.0,
}  # fmt: skip


def check_cuda_graph(value: Any) -> str:
    """The setting as a word; True and False are auto and off.

    Raises
    ------
    ValueError
        For any other value.
    """
    word = {True: "auto", False: "off"}.get(value, value) if isinstance(value, bool) else value
    check_choice("cuda_graph", word, CUDA_GRAPH)
    return word


def static_kind(
    model: PreTrainedModel,
    rows: int,
    longest: int,
    options: Mapping[str, Any],
    backend: str,
    mask: HeadMask | None,
    cuda_graph: str,
) -> Kind | None:
    """The kind of step that decodes a request, or None if transformers' ``generate`` does.

    Parameters
    ----------
    model : PreTrainedModel
        With its generation_config.
    rows : int
        Samples times methods.
    longest : int
        Tokens that a row may come to, prompt included.
    options : mapping
        Of ``generate``.
    backend : str
        As set by the user.
    mask : HeadMask or None
        Query heads that are silenced.
    cuda_graph : {"auto", "compile", "eager", "off"}
        auto and compile: on a GPU; eager: without a graph, on any device.
    """
    if cuda_graph == "off" or (cuda_graph != "eager" and model.device.type != "cuda"):
        return None
    given = {**model.generation_config.to_dict(), **options}
    if not _is_plain(given) or not _runs_static(model, backend, longest):
        return None
    way = "graph" if cuda_graph == "auto" else cuda_graph
    penalty = float(given.get("repetition_penalty") or 1)
    return Kind(bucket(rows), tuple(ends_of(model)), penalty, mask, way)


def bucket(rows: int) -> int:
    """Rows of the step that serves so many: the next power of two."""
    return 1 << (rows - 1).bit_length()


def ends_of(model: PreTrainedModel) -> Sequence[int]:
    """Tokens at which the model's answers end."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return []
    return ends if isinstance(ends, list) else [ends]


def _is_plain(given: Mapping[str, Any]) -> bool:
    """Whether tokens are the likeliest ones, but for a repetition penalty."""
    # The first token comes out of `generate` itself, which heeds one token at least.
    if given.get("do_sample") or (given.get("min_new_tokens") or 0) > 1:
        return False
    return all(
        value is None or value is False or name in _WITHOUT_EFFECT or value == _NEUTRAL.get(name)
        for name, value in given.items()
    )


def _runs_static(model: PreTrainedModel, backend: str, longest: int) -> bool:
    """Whether a step of the model depends on no length and waits for nothing."""
    text = model.config.get_text_config()
    window = getattr(text, "sliding_window", None)
    rope = (getattr(text, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope") or (window is not None and longest > window):
        return False
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return False
    shape = ModelShape.from_config(model.config)
    runs = resolve_backend(backend, model.device, model.dtype, shape.head_dim, shape.group_size)
    return runs == BACKEND
