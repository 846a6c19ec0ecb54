"""Ways to damage a file: what disks and kills do to bytes, and what people put into text."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

# Values that parsers, tables and pictures have stumbled over.
HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, -64, 1e308, -0.0, 10**400, 1 << 70, "", " ", "nan", "NaN",
    float("nan"), float("inf"), [], {}, [[]], {"": None}, "../../etc/passwd", "a\x00b",
    "$\\foo$", "\\input{x}", "|x|", "=1+1", "\x1b[31mred\x1b[0m", "\u202eright", "<b>1</b>",
    "[" + "-" * 20_000, "x" * 100_000, "\ud800", "\U0001d4b3" * 50, "1e3", "0x10", "1_000",
    [1, [2, [3]]], {"a": {"b": {"c": 1}}}, [0] * 5_000, "task 99999999999999999999", "`",
    "\n\n# head\n", "{{7*7}}",
)  # fmt: skip


def damage_bytes(path: Path, chance: random.Random) -> str:
    """Damage a file as a disk, a network or a kill may; says how."""
    data = bytearray(path.read_bytes())
    ways = [_flip, _flip, _flip, _flips, _cut, _cut, _zeros, _noise, _appended, _emptied]
    way = chance.choice(ways if data else [_appended])
    said = way(data, chance)
    path.write_bytes(data)
    return said


def damage_kind(path: Path, chance: random.Random) -> str:
    """Put something that is no regular file in a file's place."""
    ways: dict[str, Callable[[], None]] = {
        "a FIFO": lambda: os.mkfifo(path),
        "a folder": path.mkdir,
        "a link to itself": lambda: path.symlink_to(path.name),
        "a link to nothing": lambda: path.symlink_to("nothing-here"),
        "a link to an endless file": lambda: path.symlink_to("/dev/zero"),
        "nothing": lambda: None,
    }
    name = chance.choice(list(ways))
    path.unlink()
    ways[name]()
    return f"{name} in its place"


def damage_values(path: Path, chance: random.Random) -> str | None:
    """Put hostile values into a JSON, JSONL or YAML file; None if it is none of these."""
    if path.suffix not in (".json", ".jsonl", ".yaml"):
        return None
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        lines = text.splitlines()
        if not lines:
            return None
        place = chance.randrange(len(lines))
        lines[place], said = _changed_text(lines[place], chance)
        path.write_bytes(_encoded("\n".join(lines) + "\n"))
        return f"line {place + 1}: {said}"
    if path.suffix == ".json":
        text, said = _changed_text(text, chance)
    else:
        tree = yaml.safe_load(text)
        said = _change(tree, chance)
        try:
            text = yaml.safe_dump(tree, sort_keys=False)
        except (yaml.YAMLError, UnicodeError):
            return None
    path.write_bytes(_encoded(text))
    return said


def _changed_text(text: str, chance: random.Random) -> tuple[str, str]:
    if chance.random() < 0.15:
        depth = chance.choice([500, 5_000, 100_000])
        deep = chance.choice(["[" * depth, "[" * depth + "]" * depth, '{"a":' * depth])
        return deep, f"nested {depth} deep"
    if chance.random() < 0.1:
        return text[:-1] + f', "more": {"9" * 5_000}}}', "a number of 5,000 digits"
    tree = json.loads(text)
    said = _change(tree, chance)
    return json.dumps(tree), said


def _change(tree: Any, chance: random.Random) -> str:
    """Change one place of a tree, wherever in it."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            places.append((node, key))
            if isinstance(value, dict | list):
                walk(value)

    if isinstance(tree, dict | list):
        walk(tree)
    if not places:
        return "unchanged"
    node, key = chance.choice(places)
    way = chance.random()
    if way < 0.1:
        del node[key]
        return f"without {key!r}"
    if way < 0.2 and isinstance(node, dict):
        node[f"{key}2"] = node[key]
        return f"{key!r} under another name as well"
    if way < 0.3 and isinstance(node, dict):
        node[chance.choice(["$\\foo$", "", "\ud800", "a" * 10_000, "=x"])] = node.pop(key)
        return f"{key!r} under a hostile name"
    node[key] = value = chance.choice(HOSTILE)
    return f"{key!r} is {str(value)[:30]!a}" if not isinstance(value, int) else f"{key!r} a number"


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogatepass")


def _flip(data: bytearray, chance: random.Random) -> str:
    place, bit = chance.randrange(len(data)), chance.randrange(8)
    data[place] ^= 1 << bit
    return f"bit {bit} of byte {place} flipped"


def _flips(data: bytearray, chance: random.Random) -> str:
    count = chance.randint(2, 40)
    for _ in range(count):
        _flip(data, chance)
    return f"{count} bits flipped"


def _cut(data: bytearray, chance: random.Random) -> str:
    size = chance.randrange(len(data))
    del data[size:]
    return f"cut off after {size} bytes"


def _zeros(data: bytearray, chance: random.Random) -> str:
    begin = chance.randrange(len(data))
    end = min(len(data), begin + chance.choice([1, 16, 512, 4096]))
    data[begin:end] = bytes(end - begin)
    return f"bytes {begin} to {end} zero"


def _noise(data: bytearray, chance: random.Random) -> str:
    begin = chance.randrange(len(data))
    end = min(len(data), begin + chance.choice([1, 16, 512, 4096]))
    data[begin:end] = chance.randbytes(end - begin)
    return f"bytes {begin} to {end} noise"


def _appended(data: bytearray, chance: random.Random) -> str:
    more = chance.randbytes(chance.choice([1, 100, 4096]))
    data.extend(more)
    return f"{len(more)} bytes of noise appended"


def _emptied(data: bytearray, chance: random.Random) -> str:
    data.clear()
    return "emptied"
