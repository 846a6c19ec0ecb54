"""RaggedKV: pack, append, attend and select, against one sequence at a time in float64."""

from dataclasses import dataclass

import pytest
import torch
from cache.sequences import (
    assert_books_agree,
    assert_same_sequences,
    draw,
    poison,
    sequences,
    softmax_attention,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsemm_eval.cache import CacheBytes, RaggedKV
from sparsemm_eval.cache.extension import load_extension

# Inputs are rounded to the dtype before both sides see them. What is left is the output's own
# rounding (half an ulp of values up to about 4) and, for float32, the order of summation.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


@pytest.fixture(autouse=True, scope="module")
def _compiled() -> None:
    """A model's cache loads the op when it resolves its backend; here there is none."""
    load_extension("cpu")


# What a sequence may keep of its prompt, from none to all.
SHARES = (0.0, 0.02, 0.3, 0.9, 1.0)


def quick(examples: int) -> settings:
    """Run the same examples every time, however busy the machine."""
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


@dataclass(frozen=True)
class Case:
    """A prompt of `samples` rows, packed `copies` times over, then grown by `steps` tokens."""

    samples: int
    copies: int
    kv_heads: int
    group: int
    tokens: int
    dim: int
    steps: int
    backend: str
    dtype: torch.dtype
    shares: tuple[float, ...]
    seed: int

    @property
    def rows(self) -> int:
        return self.samples * self.copies

    def prompt(self) -> tuple[Tensor, Tensor, Tensor]:
        """Draw keys and values [samples, H, n, D] and what each row keeps [rows, H, n]."""
        generator = torch.Generator().manual_seed(self.seed)
        _, key, value = draw(self.samples, (1, self.kv_heads), self.tokens, self.dim, self.seed)
        share = torch.tensor(self.shares)
        pick = torch.randint(len(share), (self.rows, self.kv_heads, 1), generator=generator)
        drawn = torch.rand(self.rows, self.kv_heads, self.tokens, generator=generator)
        return key.to(self.dtype), value.to(self.dtype), drawn < share[pick]

    def token(self, step: int) -> list[Tensor]:
        """Draw query, key and value of one new token a row."""
        heads = (self.kv_heads * self.group, self.kv_heads)
        drawn = draw(self.rows, heads, 1, self.dim, self.seed + 1 + step)
        return [x.to(self.dtype) for x in drawn]


@st.composite
def cases(draw_one: st.DrawFn) -> Case:
    """Draw a small case; some have every sequence equally long, which is a path of its own."""
    backend = draw_one(st.sampled_from(["cuda_ext", "torch"]))
    dtypes = [x for x in TOLERANCE if backend == "torch" or x != torch.float64]
    return Case(
        backend=backend,
        samples=draw_one(st.integers(1, 3)),
        copies=draw_one(st.integers(1, 3)),
        kv_heads=draw_one(st.integers(1, 3)),
        group=draw_one(st.integers(1, 8)),
        tokens=draw_one(st.integers(1, 60)),
        dim=draw_one(st.sampled_from([8, 16, 64, 80, 96, 128])),
        steps=draw_one(st.integers(1, 40)),
        dtype=draw_one(st.sampled_from(dtypes)),
        shares=draw_one(st.sampled_from([SHARES, SHARES[:2], (0.0,), (1.0,)])),
        seed=draw_one(st.integers(0, 2**31)),
    )


@quick(150)
@given(cases())
def test_attends_to_what_is_kept_and_what_came_since(case: Case) -> None:
    """Every step against softmax attention over each sequence, with NaN in every free slot."""
    key, value, mask = case.prompt()
    kv = RaggedKV.pack(key, value, mask)
    assert (kv.rows, kv.kv_heads) == (case.rows, case.kv_heads)
    assert torch.equal(kv.kept, mask.sum(-1))
    scale = 0.7 * case.dim**-0.5  # the model's scale is used, whatever it is
    wanted = []
    for row, kept in enumerate(mask):
        both = key[row // case.copies], value[row // case.copies]
        wanted += [tuple(x[head, positions] for x in both) for head, positions in enumerate(kept)]
    for step in range(case.steps):
        query, new_key, new_value = case.token(step)
        poison(kv)
        out = kv.append_attend(query, new_key, new_value, scale, case.backend)
        assert out.shape == (case.rows, 1, case.kv_heads * case.group, case.dim)
        assert out.dtype == case.dtype
        assert_books_agree(kv)
        fresh = zip(new_key.flatten(0, 1), new_value.flatten(0, 1), strict=True)
        wanted = [
            (torch.cat([k, one]), torch.cat([v, two]))
            for (k, v), (one, two) in zip(wanted, fresh, strict=True)
        ]
        queries = query.reshape(len(wanted), case.group, case.dim)
        expected = torch.stack(
            [softmax_attention(q, k, v, scale) for q, (k, v) in zip(queries, wanted, strict=True)]
        )
        error = (out.reshape(expected.shape).double() - expected).abs().max()
        assert error < TOLERANCE[case.dtype]
    for (k, v), (held_key, held_value) in zip(wanted, sequences(kv), strict=True):
        assert torch.equal(k, held_key)
        assert torch.equal(v, held_value)


@quick(100)
@given(cases(), st.data())
def test_selected_rows_are_packed_anew(case: Case, data: st.DataObject) -> None:
    """Rows dropped, repeated and out of order, in the middle of an answer."""
    key, value, mask = case.prompt()
    chosen = data.draw(st.lists(st.integers(0, case.rows - 1), min_size=1, max_size=6))
    rows = torch.tensor(chosen)
    kv = RaggedKV.pack(key, value, mask)
    samples = rows // case.copies
    fresh = RaggedKV.pack(key[samples], value[samples], mask[rows])
    half = case.steps // 2
    for step in range(half):
        query, new_key, new_value = case.token(step)
        kv.append_attend(query, new_key, new_value, 0.2, case.backend)
        token = (query[rows], new_key[rows], new_value[rows])
        fresh.append_attend(*token, 0.2, case.backend)
    before = [(k.clone(), v.clone()) for k, v in sequences(kv)]
    selected = kv.select_rows(rows)
    for step in range(half, case.steps):
        query, new_key, new_value = (x[rows] for x in case.token(step))
        poison(selected)
        out = selected.append_attend(query, new_key, new_value, 0.2, case.backend)
        again = fresh.append_attend(query, new_key, new_value, 0.2, case.backend)
        torch.testing.assert_close(out, again)
    assert_books_agree(selected)
    assert_same_sequences(selected, fresh)
    for (k, v), (now_key, now_value) in zip(before, sequences(kv), strict=True):
        assert torch.equal(k, now_key), "the rows that were chosen from have changed"
        assert torch.equal(v, now_value)


def test_free_slots_are_zero() -> None:
    """A kernel may read them under a weight of zero, so they must not hold NaN."""
    key = torch.full((2, 2, 9, 8), 3.0)
    kv = RaggedKV.pack(key, key, torch.rand(2, 2, 9) < 0.5)
    for _ in range(20):
        kv.append_attend(key[:, :, :1], key[:, :, :1], key[:, :, :1], 1.0, "torch")
        assert kv.keys.sum() == kv.values.sum() == 3 * 8 * int(kv.lengths.sum())


@quick(60)
@given(cases(), st.integers(0, 9))
def test_a_bound_on_what_is_kept_packs_the_same(case: Case, more: int) -> None:
    """Where nobody waits to know how many tokens there are; what is too much belongs to nobody."""
    key, value, mask = case.prompt()
    known, bound = (
        RaggedKV.pack(key, value, mask, most) for most in (None, int(mask.sum()) + more)
    )
    assert len(bound.keys) == len(bound.values) == len(known.keys) + more
    assert torch.equal(known.offsets, bound.offsets)
    assert torch.equal(known.lengths, bound.lengths)
    assert_same_sequences(known, bound)
    assert torch.equal(known.keys, bound.keys[: len(known.keys)])
    assert torch.equal(known.values, bound.values[: len(known.values)])


def test_a_sequence_with_nothing_in_it_has_only_its_answer() -> None:
    """A row that is all padding attends to its own new tokens, first of all to the first."""
    _, key, value = draw(1, (1, 2), 5, 8)
    kv = RaggedKV.pack(key, value, torch.zeros(1, 2, 5, dtype=torch.bool))
    assert kv.bytes().keys == 0
    query, new_key, new_value = draw(1, (4, 2), 1, 8, seed=1)
    out = kv.append_attend(query, new_key, new_value, 1.0, "torch")
    torch.testing.assert_close(out[0, 0], new_value[0, :, 0].repeat_interleave(2, 0))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_large_logits_neither_overflow_nor_vanish(dtype: torch.dtype) -> None:
    """Softmax is stable where the logits themselves would overflow in half precision."""
    _, key, value = draw(1, (1, 1), 50, 64)
    key, value, query = (30 * key).to(dtype), value.to(dtype), (30 * key[:, :, :1]).to(dtype)
    kv = RaggedKV.pack(key, value, torch.ones(1, 1, 50, dtype=torch.bool))
    out = kv.append_attend(query, key[:, :, 1:2], value[:, :, 1:2], 1.0, "torch")
    torch.testing.assert_close(out[0, 0, 0], value[0, 0, 0])


def test_bytes_add_up() -> None:
    one, two = CacheBytes(1, 2, 3, 4), CacheBytes(10, 20, 30, 40)
    assert one + two == CacheBytes(11, 22, 33, 44)
    assert (one + two).total == 110
    assert CacheBytes().total == 0
