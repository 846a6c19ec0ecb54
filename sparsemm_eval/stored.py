"""JSON and text that came from disk: bounded before it is read, checked before it is used.

Whatever lies in a file, reading it ends at once in a value or in `NotUnderstood` with its reason.
What that means, a refusal or a file that is left out, only the caller knows.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from sparsemm_eval.errors import short_repr

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")
# Bytes. The largest results file that lmms-eval writes has a few megabytes.
MOST_BYTES = 64 << 20
_MOST_OF_LINES = 4 << 30
_MOST_OF_LINE = 16 << 20
# Lists and objects inside each other; no file that is written here or by lmms-eval has ten.
MOST_DEPTH = 64
_INTEGERS = range(-(2**63), 2**64)
_LONGEST_INTEGER = 20  # characters of any of these
CHECKSUM = "checksum"
_LINE = f"# {CHECKSUM}: "


class NotUnderstood(ValueError):
    """What a file holds cannot be used; the reason as a short sentence without the file's name."""


class NoFile(NotUnderstood):
    """There is no such file."""


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """All of a regular file; a pipe, a device or a folder never blocks.

    Parameters
    ----------
    path : Path
        The file.
    most : int
        Bytes it may have.

    Raises
    ------
    NotUnderstood
        If it is no regular file, larger, or cannot be opened; `NoFile` if it is not there.
    """
    with _opened(path, most) as file:
        return _read(file, most)


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """As `read_bytes`, as UTF-8."""
    return _decoded(read_bytes(path, most))


def read_json(path: Path, most: int = MOST_BYTES) -> Any:
    """The value of a JSON file, which keeps to the bounds of `parse_json`.

    Raises
    ------
    NotUnderstood
        As `read_bytes` and `parse_json`.
    """
    return parse_json(read_text(path, most))


def read_json_as(path: Path, kind: type[T], most: int = MOST_BYTES) -> T:
    """A JSON file as a dataclass or another type that pydantic can check; unknown keys are left.

    Raises
    ------
    NotUnderstood
        As `read_json` and `checked`, and with the first entry that is of another type.
    """
    text = json.dumps(checked(read_json(path, most)))
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        given = "" if first["type"] == "missing" else f"={short_repr(first['input'])}"
        raise NotUnderstood(f"its entry {place}{given}: {first['msg']}") from None


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Number, from 1, and value of each line of a JSONL file that is not empty, read as asked for.

    Raises
    ------
    NotUnderstood
        As `read_json`, with the line's number.
    """
    with _opened(path, _MOST_OF_LINES) as file:
        number = 0
        while line := _read(file, _MOST_OF_LINE, line=number + 1):
            number += 1
            try:
                if line.strip():
                    yield number, parse_json(_decoded(line))
            except NotUnderstood as error:
                raise NotUnderstood(f"line {number}: {error}") from error


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Numbers that are none, and floats that overflow, stay as Python has them: lmms-eval writes NaN
    for an unknown error. Halves of a surrogate pair, which no file can be written with, become
    replacement characters.

    Raises
    ------
    NotUnderstood
        If it is no JSON, an object has a key twice, an integer has more than 64 bits, or more than
        `MOST_DEPTH` lists and objects stand inside each other.
    """
    try:
        value = json.loads(text, parse_int=_integer, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.rstrip() else ""
        where = f"{line}column {error.colno}"
        raise NotUnderstood(f"it is no JSON, or was cut off ({error.msg} at {where})") from error
    except RecursionError:
        raise NotUnderstood(_TOO_DEEP) from None
    if _is_deep(value):
        raise NotUnderstood(_TOO_DEEP)
    if "\\ud" in text or "\\uD" in text:
        return _whole_characters(value)
    return value


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """An object with the SHA-256 of all that is in it, so that `checked` sees it was changed."""
    return {**content, CHECKSUM: _checksum(content)}


def checked(value: Any) -> Any:
    """A value without its checksum; one that has none, as of an older version, is as it is.

    Raises
    ------
    NotUnderstood
        If it is not as it was written.
    """
    if not isinstance(value, dict) or CHECKSUM not in value:
        return value
    content = {name: inner for name, inner in value.items() if name != CHECKSUM}
    if value[CHECKSUM] != _checksum(content):
        raise NotUnderstood("it was changed since it was written")
    return content


def with_checksum_line(text: str) -> str:
    """A text of whole lines with its SHA-256 in a last one, a comment in YAML."""
    return f"{text}{_LINE}{hashlib.sha256(text.encode()).hexdigest()}\n"


def checked_text(text: str) -> str:
    """A text without its line of `with_checksum_line`; one that has none is as it is.

    Raises
    ------
    NotUnderstood
        If it is not as it was written.
    """
    content, line, known = text.rpartition(_LINE)
    if not line:
        return text
    if known.strip() != hashlib.sha256(content.encode()).hexdigest():
        raise NotUnderstood(
            "it was changed since it was written; if by you, remove its last line, the checksum"
        )
    return content


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


_TOO_DEEP = f"more than {MOST_DEPTH} of its lists and objects stand inside each other"


def _opened(path: Path, most: int) -> IO[bytes]:
    try:
        # A pipe that nobody writes to would wait for ever.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NoFile("there is no such file") from None
    except OSError as error:
        raise NotUnderstood(f"it cannot be opened ({error.strerror})") from error
    except ValueError as error:  # a name with a zero byte
        raise NotUnderstood(f"it cannot be opened ({error})") from error
    about = os.fstat(handle)
    if not stat.S_ISREG(about.st_mode):
        fault = "it is no file but a folder, a pipe or a device"
    elif about.st_size > most:
        fault = f"it has {about.st_size:,} bytes, and {most:,} are read at most"
    else:
        return os.fdopen(handle, "rb")
    os.close(handle)
    raise NotUnderstood(fault)


def _read(file: IO[bytes], most: int, line: int | None = None) -> bytes:
    """All of a file, or its next line; a file may grow while it is read."""
    try:
        if line is None:
            # Python sets memory aside for all that is asked for.
            content = file.read(os.fstat(file.fileno()).st_size + 1)
        else:
            content = file.readline(most + 1)
    except OSError as error:
        raise NotUnderstood(f"it cannot be read ({error.strerror})") from error
    if len(content) > most:
        where = "it" if line is None else f"line {line}"
        raise NotUnderstood(f"{where} has more than {most:,} bytes")
    return content


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotUnderstood(f"it is no UTF-8 text ({error.reason})") from error


def _integer(text: str) -> int:
    if len(text) <= _LONGEST_INTEGER and (value := int(text)) in _INTEGERS:
        return value
    shown = text if len(text) <= 40 else f"{text[:20]}… of {len(text):,} digits"
    raise NotUnderstood(f"it has the integer {shown}: it must fit into 64 bits")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise NotUnderstood(f"{short_repr(twice)} is there twice")
    return value


def _is_deep(value: Any) -> bool:
    """Level by level: a value that is too deep must not be walked by calls inside calls."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MOST_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    return bool(level)


def _whole_characters(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_whole_characters(inner) for inner in value]
    if isinstance(value, dict):
        return {_whole_characters(key): _whole_characters(inner) for key, inner in value.items()}
    return value


@cache
def _adapter(kind: type[T]) -> TypeAdapter[T]:
    from pydantic import TypeAdapter  # heavy: not before a file asks for it

    return TypeAdapter(kind)
