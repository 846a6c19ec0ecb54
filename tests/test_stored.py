"""Whatever lies in a file, reading it ends at once in a value or in a reason."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsemm_eval.errors import one_line, printable, short_repr
from sparsemm_eval.stored import (
    MOST_DEPTH,
    NoFile,
    NotUnderstood,
    checked,
    checked_text,
    parse_json,
    read_bytes,
    read_json,
    read_json_as,
    read_json_lines,
    with_checksum,
    with_checksum_line,
)

KEYS = st.text(max_size=8)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | KEYS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
)


@given(VALUES)
def test_what_is_written_is_read_as_json_reads_it(value: object) -> None:
    text = json.dumps(value)
    assert parse_json(text) == json.loads(text)


@given(
    st.binary(max_size=200)
    | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace"))
)
def test_any_bytes_are_a_value_or_a_reason(
    tmp_path_factory: pytest.TempPathFactory, content
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(content)
    reasons = []
    for read in (read_json, lambda path: list(read_json_lines(path))):
        try:
            read(path)
        except NotUnderstood as error:
            reasons.append(str(error))
    assert all("\n" not in reason and len(reason) < 300 for reason in reasons)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 200_000, "inside each other"),
        ("[" * 900 + "]" * 900, "inside each other"),
        ('{"a":' * (MOST_DEPTH + 1) + "0" + "}" * (MOST_DEPTH + 1), "inside each other"),
        ("9" * 5000, "64 bits"),
        (f'{{"score": {10**400}}}', "64 bits"),
        (f"[{-(2**63) - 1}]", "64 bits"),
        ('{"a": 1, "a": 2}', "'a' is there twice"),
        ('{"a": 1', "cut off"),
        ("", "no JSON"),
        ("\ufeff{}", "no JSON"),
    ],
)
def test_what_is_not_understood_has_a_reason(text: str, reason: str) -> None:
    with pytest.raises(NotUnderstood, match=reason) as raised:
        parse_json(text)
    assert len(str(raised.value)) < 200


def test_what_other_programs_write_is_read() -> None:
    assert math.isnan(parse_json('{"acc_stderr,none": NaN}')["acc_stderr,none"])
    assert parse_json("[1e999]") == [math.inf]
    assert parse_json('["\\ud800", "\\ud83d\\ude00"]') == ["\ufffd", "\U0001f600"]
    deepest = "[" * MOST_DEPTH + "]" * MOST_DEPTH
    assert json.dumps(parse_json(deepest)) == deepest


def test_only_regular_files_are_read_and_none_blocks(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", 1 << 40)  # no block of it is on the disk
    for path, reason in (
        (tmp_path / "pipe", "a pipe"),
        (tmp_path / "loop", "symbolic links"),
        (tmp_path / "huge", "bytes"),
        (tmp_path, "a folder"),
        (Path("/dev/zero"), "a device"),
        (Path("a\0b"), "null byte"),
    ):
        with pytest.raises(NotUnderstood, match=reason):
            read_json(path)
        with pytest.raises(NotUnderstood, match=reason):
            list(read_json_lines(path))
    with pytest.raises(NoFile):
        read_json(tmp_path / "none")
    (tmp_path / "ten").write_bytes(b"0123456789")
    assert read_bytes(tmp_path / "ten", most=10) == b"0123456789"
    with pytest.raises(NotUnderstood, match="10 bytes"):
        read_bytes(tmp_path / "ten", most=9)


def test_a_line_is_named_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": "\xe2\x80\xa8"}\n{"a"')
    lines = read_json_lines(path)
    assert [next(lines), next(lines)] == [(1, {"a": 1}), (3, {"a": "\u2028"})]
    with pytest.raises(NotUnderstood, match="line 4: it is no JSON, or was cut off"):
        next(lines)


@dataclass(frozen=True)
class _Part:
    name: str
    size: int = 1


@dataclass(frozen=True)
class _Whole:
    parts: tuple[_Part, ...]
    about: Mapping[str, str]


def test_types_are_those_of_the_dataclass(tmp_path: Path) -> None:
    path = tmp_path / "whole.json"
    path.write_text('{"parts": [{"name": "a", "newer": 3}], "about": {"b": "c"}, "more": []}')
    assert read_json_as(path, _Whole) == _Whole((_Part("a"),), {"b": "c"})
    for text, reason in (
        ('{"parts": [{"name": "a", "size": "5"}], "about": {}}', "its entry parts.0.size='5'"),
        ('{"parts": [{"name": "a", "size": true}], "about": {}}', "its entry parts.0.size=True"),
        ('{"parts": [{}], "about": {}}', "its entry parts.0.name: Field required"),
        ("[]", "dictionary|object"),
        ('{"parts": [], "about": {"b": [[[[[]]]]]}}', "its entry about.b"),
        ('{"parts": 1, "parts": []}', "twice"),
    ):
        path.write_text(text)
        with pytest.raises(NotUnderstood, match=reason):
            read_json_as(path, _Whole)


def test_a_value_is_shortened_before_it_is_written_out() -> None:
    bomb: list = ["x" * 100]
    for _ in range(12):
        bomb = [bomb] * 12  # 12**12 texts, were it written out
    assert len(short_repr(bomb)) <= 60
    assert len(short_repr({"a": bomb, "b": "x" * 10**6})) <= 60
    assert short_repr(10**5000) == "an integer of 16,610 bits"
    assert short_repr([1.5, "a", None]) == "[1.5, 'a', None]"


@pytest.mark.parametrize(
    "name", ["\x1b[31mred", "two\nlines", "a\u202egnp.exe", "\x9b2J", "\ud800", "\u2066x", "\x07"]
)
def test_nothing_from_a_file_moves_the_terminal(name: str) -> None:
    for text in (printable(name), one_line(ValueError(name))):
        assert text.isprintable()
        text.encode("utf-8")
    assert printable("Größe 縮 \U0001f600") == "Größe 縮 \U0001f600"


def test_every_changed_bit_of_a_checked_object_shows(tmp_path: Path) -> None:
    """It is refused, or the same in other letters, or without checksum and otherwise as it was."""
    content = {"name": "a", "samples": 6, "share": 0.25, "more": [{"b": "é"}, None, True]}
    data = json.dumps(with_checksum(content)).encode()
    path = tmp_path / "a.json"
    for place in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            found = checked(read_json(path))
        except NotUnderstood:
            continue
        assert {name: found.get(name) for name in content} == content
        assert len(found) <= len(content) + 1  # the checksum under another name


def test_an_object_of_an_older_version_is_as_it_is() -> None:
    assert checked({"a": 1}) == {"a": 1}
    assert checked([1]) == [1]
    assert checked(with_checksum({"a": 1})) == {"a": 1}


def test_every_changed_bit_of_a_checked_text_shows() -> None:
    text = "name: a\nmodels: [b]\nsamples: 6\n"
    data = with_checksum_line(text).encode()
    assert checked_text(data.decode()) == checked_text(text) == text
    for place in range(8 * len(data)):
        damaged = bytearray(data)
        damaged[place // 8] ^= 1 << place % 8
        try:
            found = checked_text(damaged.decode("ascii"))
        except (NotUnderstood, UnicodeDecodeError):
            continue
        # Its last line is no checksum any more, or one of the same number.
        assert found.startswith(text)
