"""How answers are generated: a task's generation_kwargs, each of them heeded or refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparsemm_eval.errors import UserError, short_repr

DEFAULT_NEW_TOKENS = 1024
# No answer is as long, and a count that is much larger would only end in an error of memory.
_MOST = 1_000_000


def _integer(least: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        number = _number(value)
        if not (number.is_integer() and least <= number <= _MOST):
            raise ValueError(f"an integer of at least {least}, and at most {_MOST:,}")
        return int(number)

    return read


def _between(least: float, most: float, words: str) -> Callable[[Any], Any]:
    def read(value: Any) -> Any:
        number = _number(value)
        if not least <= number <= most:
            raise ValueError(words)
        return number if isinstance(value, str) else value

    return read


def _float(value: Any) -> float:
    """A finite number; transformers takes some settings as a float only, not as the integer 1."""
    number = _number(value)
    if not math.isfinite(number):
        raise ValueError("a finite number")
    return number


def _temperature(value: Any) -> float:
    if not 0 <= (number := _number(value)) < math.inf:
        raise ValueError("a finite number of at least 0")
    return number


def _penalty(value: Any) -> float:
    if not 0 < (number := _number(value)) < math.inf:
        raise ValueError("a finite number above 0")
    return number


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("true or false")
    return value


def _number(value: Any) -> float:
    """As a float, NaN if it is none; YAML reads 1e3 as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        return float(value)
    except ValueError:
        return math.nan
    except OverflowError:
        return math.inf


def _texts(value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError("text, or a list of texts")
    return tuple(texts)


# What transformers' `generate` is given, and what each must be.
_OPTIONS: dict[str, Callable[[Any], Any]] = {
    "do_sample": _truth,
    "early_stopping": _truth,
    "length_penalty": _float,
    "max_new_tokens": _integer(1),
    "min_new_tokens": _integer(0),
    "min_p": _between(0, 1, "a number from 0 to 1"),
    "no_repeat_ngram_size": _integer(0),
    "num_beams": _integer(1),
    "repetition_penalty": _penalty,
    "temperature": _temperature,
    "top_k": _integer(0),
    "top_p": _between(0, 1, "a number from 0 to 1"),
}
# Texts that end an answer, by all the names that tasks give them.
_ENDS = ("until", "stop", "stop_sequences", "stop_strings")
# What changes nothing here, and so is left out: with which value (None is any), and why.
WITHOUT_EFFECT: dict[str, tuple[Any, str]] = {
    "image_aspect_ratio": (None, "how an image is cut up is the checkpoint's own to say"),
    "num_return_sequences": (1, "one answer a sample; repeats of a task are samples of their own"),
    "seed": (None, "draws follow lmms-eval's own --seed, and greedy decoding draws nothing"),
    "skip_special_tokens": (True, "answers are decoded without special tokens"),
    "use_cache": (True, "answers are decoded on a cache, which is what is measured"),
}


def generation_options(
    gen_kwargs: Mapping[str, Any], new_tokens: int | None = None
) -> tuple[tuple[tuple[str, Any], ...], tuple[str, ...]]:
    """A task's generation_kwargs as transformers' options, and the texts that end an answer.

    Greedy unless the task asks for a temperature above 0.

    Parameters
    ----------
    gen_kwargs : mapping
        The task's.
    new_tokens : int, optional
        The limit where the task sets none; default 1,024, as with most of lmms-eval's own models.

    Returns
    -------
    tuple of (str, value)
        Sorted by name.
    tuple of str
        The answer ends before any of these.

    Raises
    ------
    UserError
        For a setting that is not heeded, or a value that cannot be.
    """
    options: dict[str, Any] = {}
    ends: tuple[str, ...] = ()
    for name, value in gen_kwargs.items():
        if name in _ENDS:
            ends += () if value is None else _read(name, _texts, value)
        elif name in _OPTIONS:
            options[name] = None if value is None else _read(name, _OPTIONS[name], value)
        elif name in WITHOUT_EFFECT:
            only, why = WITHOUT_EFFECT[name]
            if value is not None and only not in (None, value):
                raise UserError(f"{name}={short_repr(value)}: it can only be {only} ({why})")
        else:
            raise UserError(
                f"{name}={short_repr(value)}: no such setting of generation is heeded; leave it "
                f"out, or give one of {', '.join(sorted((*_OPTIONS, *_ENDS)))}"
            )
    if options.get("max_new_tokens") is None:
        options["max_new_tokens"] = new_tokens or DEFAULT_NEW_TOKENS
    if (options.get("temperature") or 0) > 0:
        options["do_sample"] = True
    else:
        # None takes a default of the checkpoint's own generation_config out of force.
        options |= {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return tuple(sorted(options.items())), ends


def check_generation(task: str, gen_kwargs: Any) -> None:
    """Refuse a task's generation_kwargs as `generation_options`, with the task's name.

    Raises
    ------
    UserError
        In one sentence.
    """
    if not isinstance(gen_kwargs, Mapping | None):
        raise UserError(f"{task}: generation_kwargs={short_repr(gen_kwargs)}: it must be a mapping")
    try:
        generation_options(gen_kwargs or {})
    except UserError as error:
        raise UserError(f"{task}: generation_kwargs {error}") from error


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of the strings that end it."""
    for end in until:
        if end:
            text = text.split(end)[0]
    return text


def _read(name: str, reader: Callable[[Any], Any], value: Any) -> Any:
    try:
        return reader(value)
    except ValueError as error:
        raise UserError(f"{name}={short_repr(value)}: it must be {error}") from None
