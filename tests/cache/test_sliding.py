"""SlidingKV: every sequence sees its last tokens, against attention over them written out."""

from __future__ import annotations

import pytest
import torch
from cache.sequences import draw, poison, sequences, softmax_attention
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemm_eval.cache.extension import load_extension
from sparsemm_eval.cache.sliding import SlidingKV

HEADS, GROUP, DIM = 2, 2, 8


@pytest.fixture(autouse=True, scope="module")
def _compiled() -> None:
    load_extension("cpu")


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    tokens=st.integers(1, 40),
    padding=st.integers(0, 30),
    window=st.integers(2, 60),
    copies=st.integers(1, 2),
    steps=st.integers(1, 70),
    choose=st.integers(0, 70),
    backend=st.sampled_from(["torch", "cuda_ext"]),
)
def test_each_step_sees_the_window(
    tokens: int, padding: int, window: int, copies: int, steps: int, choose: int, backend: str
) -> None:
    """Of two prompts, the second padded; rows are taken out, doubled and put in another order."""
    padding = min(padding, tokens - 1)
    _, key, value = draw(2, (HEADS * GROUP, HEADS), tokens, DIM)
    seen = torch.arange(tokens) >= torch.tensor([[0], [padding]])
    seen &= torch.arange(tokens) > tokens - window
    held = seen.sum(1).tolist()
    store = SlidingKV.pack_last(key, value, seen, held, window, copies)
    # All that each row has read, whether it sees it or not.
    rows = [
        (key[sample, :, skip:], value[sample, :, skip:])
        for sample, skip in enumerate((0, padding))
        for _ in range(copies)
    ]
    for step in range(steps):
        poison(store)
        if step == choose:
            order = [len(rows) - 1, 0, 0]
            store, rows = store.select_rows(torch.tensor(order)), [rows[row] for row in order]
        query, new_key, new_value = draw(len(rows), (HEADS * GROUP, HEADS), 1, DIM, seed=step)
        out = store.append_attend(query, new_key, new_value, 0.3, backend)
        for row, (keys, values) in enumerate(rows):
            keys, values = (
                torch.cat([keys, new_key[row]], 1),
                torch.cat([values, new_value[row]], 1),
            )
            rows[row] = keys, values
            for head in range(HEADS):
                mine = slice(head * GROUP, (head + 1) * GROUP)
                near = (x[head, -window:] for x in rows[row])
                wanted = softmax_attention(query[row, mine, 0], *near, 0.3)
                assert (out[row, 0, mine] - wanted).abs().max() < 1e-5
        lengths = torch.tensor([len(one) for one, _ in sequences(store)])
        assert torch.equal(store.held().flatten(), lengths)
        assert lengths.max() <= window
        slots = [int(one) for one in store.row_bytes() // (2 * 4 * DIM)]
        assert sum(slots) == len(store.keys)
        each = store.bytes()
        assert each.keys == each.values == int(lengths.sum()) * 4 * DIM
        assert each.keys + each.values + each.slack == 2 * store.keys.nbytes
