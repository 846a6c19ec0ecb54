"""Rows of a SQLite file page by page, past its header and tree: what is left of a damaged one.

Nothing here is checked: who reads the rows must know each by a digest. The file format is SQLite's
own (https://www.sqlite.org/fileformat2.html): leaves of tables, and pages that hold what is too
long for a leaf.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

PAGE = 4096
_LEAF = 0x0D
# Bytes of a row that lie on its leaf, if it is longer than the first of these.
_MOST = PAGE - 35
_LEAST = (PAGE - 12) * 32 // 255 - 23
_INTEGER_BYTES = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}


def rows_in_pages(content: bytes) -> Iterator[tuple]:
    """Whatever looks like a row of a table, of all tables, in use or not.

    Parameters
    ----------
    content : bytes
        Of a file, or what is left of it, whose pages are of `PAGE` bytes.
    """
    for start in range(PAGE, len(content), PAGE):  # the first page holds names of tables only
        page = content[start : start + PAGE]
        if page[0] != _LEAF:
            continue
        count = int.from_bytes(page[3:5], "big")
        for place in range(8, min(8 + 2 * count, len(page) - 1), 2):
            cell = int.from_bytes(page[place : place + 2], "big")
            try:
                yield tuple(_values(_payload(content, page, cell)))
            except (IndexError, ValueError, struct.error):
                continue  # its own bytes are damaged, or cut off


def _payload(content: bytes, page: bytes, cell: int) -> bytes:
    """Bytes of one row, from its leaf and the pages that go on with it."""
    size, cell = _varint(page, cell)
    _, cell = _varint(page, cell)  # the row's number
    if size > len(content):
        raise ValueError("it is longer than the file")
    if size <= _MOST:
        return page[cell : cell + size]
    local = _LEAST + (size - _LEAST) % (PAGE - 4)
    local = local if local <= _MOST else _LEAST
    payload = page[cell : cell + local]
    following = page[cell + local : cell + local + 4]
    while len(payload) < size:
        start = (int.from_bytes(following, "big") - 1) * PAGE
        part = content[start + 4 : start + PAGE] if start > 0 else b""
        if not part:
            raise ValueError("its next page is not there")
        payload += part[: size - len(payload)]
        following = content[start : start + 4]
    return payload


def _values(payload: bytes) -> Iterator[Any]:
    """Values of one row; each one's kind and length stand in front of all."""
    place, kinds = _varint(payload, 0)[1], []
    end = _varint(payload, 0)[0]
    while place < end:
        kind, place = _varint(payload, place)
        kinds.append(kind)
    place = end
    for kind in kinds:
        if kind in (0, 8, 9):  # NULL and two integers, which take no bytes
            yield {0: None, 8: 0, 9: 1}[kind]
            continue
        size = _INTEGER_BYTES.get(kind, 8 if kind == 7 else (kind - 12) // 2)
        value = payload[place : place + size]
        if size < 0 or len(value) < size:
            raise ValueError("it is cut off")
        place += size
        if kind in _INTEGER_BYTES:
            yield int.from_bytes(value, "big", signed=True)
        elif kind == 7:
            yield struct.unpack(">d", value)[0]
        else:
            yield value.decode() if kind % 2 else value


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """An integer of one to nine bytes, and the place behind it."""
    number = 0
    for count in range(9):
        byte = data[place + count]
        if count == 8:
            return number << 8 | byte, place + 9
        number = number << 7 | byte & 0x7F
        if byte < 0x80:
            return number, place + count + 1
    raise AssertionError("nine bytes are the most")
