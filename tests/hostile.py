"""Values that no program of ours writes, put in any place of those that it does."""

import copy
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

ODD = st.sampled_from([
    None, True, -1, 0, 10**18, 2**64 - 1, -64, 0.0, -0.5, 1e-300, 1e300, float("inf"),
    float("nan"), "", "x", "-64", "1e999", "9" * 500, r"$\foo$", "$", "a|b\nc", "\x1b[2J", "\ud800",
    "\u202e", "=1+1", "../../x", "/", "\0", "x" * 400, "[" + "-" * 20_000, "['a', 'b']", [], {},
    [[]], [None], {"": None}, {"score": 1e300}, {"score": "1"}, [{"metric": ["a"]}],
    {"index": "3", "answer": "A", "prediction": "A"}, {"image_id": [1], "pred": 3, "answer": []},
    {"index": 3, "answer": "A", "prediction": ["A"], "A": [1]},
])  # fmt: skip


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every place in a value, the value itself last."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in items:
        yield from places(inner, (*path, key))
    yield path


def changed(value: Any, path: tuple, odd: Any, rename: bool) -> Any:
    """A copy in which one place holds another value, or has another name."""
    if not path:
        return odd
    whole = copy.deepcopy(value)
    at = whole
    for key in path[:-1]:
        at = at[key]
    if rename and isinstance(at, dict):
        at[str(odd)] = at.pop(path[-1])
    else:
        at[path[-1]] = odd
    return whole


@st.composite
def hostile(draw: st.DrawFn, value: Any) -> Any:
    """A value with one place changed."""
    place = draw(st.sampled_from([*places(value)]))
    return changed(value, place, draw(ODD), draw(st.booleans()))


def spoilt(content: bytes) -> st.SearchStrategy[bytes]:
    """A file with a bit turned, cut off, or of other bytes."""
    turned = st.integers(0, 8 * len(content) - 1).map(
        lambda bit: (
            content[: bit // 8]
            + bytes([content[bit // 8] ^ 1 << bit % 8])
            + content[bit // 8 + 1 :]
        )
    )
    return turned | st.integers(0, len(content)).map(lambda end: content[:end]) | st.binary()
