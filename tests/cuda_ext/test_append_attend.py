"""sparsemm::append_attend against attention written out in float64, on CPU and CUDA alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from cuda_ext.cases import (
    TOLERANCE,
    Case,
    call,
    check,
    draw_case,
    expected,
    load_or_skip,
    new_token,
)
from hypothesis import given, settings
from hypothesis import strategies as st

RAGGED = [0, 1, 8191, 15, 16, 17, 63, 64, 65, 300, 2, 127, 128, 1000, 0]
GROUPS = range(1, 9)
DTYPES = {
    "cpu": [torch.float32, torch.bfloat16, torch.float16],
    "cuda": [torch.float16, torch.bfloat16],
}
CUDA_DIMS = [64, 96, 128]


def on(device: str, *values: object) -> object:
    """Parameters of one test on one device."""
    return pytest.param(device, *values, marks=[pytest.mark.gpu] if device == "cuda" else [])


@pytest.fixture(autouse=True)
def _loaded(request: pytest.FixtureRequest) -> None:
    call_spec = getattr(request.node, "callspec", None)
    load_or_skip(call_spec.params.get("device", "cpu") if call_spec else "cpu")


each_device = pytest.mark.parametrize("device", [on("cpu"), on("cuda")])
each_dtype = pytest.mark.parametrize(
    ("device", "dtype"),
    [on(device, dtype) for device, all_of in DTYPES.items() for dtype in all_of],
)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dim", CUDA_DIMS)
@each_dtype
def test_wildly_ragged(device: str, dtype: torch.dtype, dim: int, group: int) -> None:
    check(draw_case(RAGGED, group, dim, dtype, device))


@pytest.mark.parametrize("group", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("dim", [1, 7, 16, 33, 80, 130])
@pytest.mark.parametrize("dtype", DTYPES["cpu"])
def test_any_head_size_and_group_on_cpu(dtype: torch.dtype, dim: int, group: int) -> None:
    check(draw_case(RAGGED, group, dim, dtype, "cpu"))


@each_dtype
def test_one_sequence_of_any_length(device: str, dtype: torch.dtype) -> None:
    """Up to 8,192 tokens and the new one, at and beside every power of two."""
    for power in range(14):
        for length in {2**power - 1, 2**power, 2**power + 1} - {8193}:
            check(draw_case([length], 2, 64, dtype, device))


@each_device
def test_many_short_sequences(device: str) -> None:
    """As many as a batch of 31 rows has; one of them is long."""
    lengths = [s * 7 % 61 for s in range(31 * 32)]
    lengths[500] = 4000
    check(draw_case(lengths, 1, 64, DTYPES[device][0], device))


@each_dtype
def test_until_all_are_full(device: str, dtype: torch.dtype) -> None:
    """Each has other room; full ones are left alone while their neighbours go on."""
    lengths, free = [0, 3, 62, 500, 40, 7], [5, 0, 9, 3, 1, 70]
    case = draw_case(lengths, 4, 64, dtype, device, free=free, finished=[4])
    for step in range(max(free) + 2):
        token = (x.to(device, dtype) for x in new_token(len(lengths), 4, 64, step))
        case = replace(case, **dict(zip(("q", "k_new", "v_new"), token, strict=True)))
        check(case)
    ends = [length + more for length, more in zip(lengths, free, strict=True)]
    ends[4] = ~lengths[4]
    assert case.lengths.tolist() == ends


@each_device
def test_full_is_nan_and_finished_is_zero(device: str) -> None:
    """A finished one gives 0 whether it had room left or not; an empty one may be finished."""
    case = draw_case(
        [4, 4, 4, 0, 9], 2, 64, torch.float16, device, free=[0, 0, 1, 1, 1], finished=[1, 2, 3]
    )
    out = check(case)
    assert out[0].isnan().all()
    assert torch.equal(out[1:4], torch.zeros_like(out[1:4]))
    assert out[4].isfinite().all()


@each_device
def test_nobody_lives(device: str) -> None:
    check(draw_case([3, 5], 3, 64, torch.float16, device, free=[0, 2], finished=[1]))


@each_device
def test_no_sequences(device: str) -> None:
    case = draw_case([], 3, 64, torch.float16, device)
    assert check(case).shape == (0, 3, 64)


@each_device
def test_new_token_alone_is_its_value(device: str) -> None:
    case = draw_case([0, 0], 2, 64, torch.float16, device)
    assert torch.equal(call(case), case.v_new[:, None].expand(2, 2, 64))


@each_dtype
def test_views_as_attention_hands_them_over(device: str, dtype: torch.dtype) -> None:
    """Query, key and value need not be contiguous."""
    case = draw_case(RAGGED, 3, 64, dtype, device)
    contiguous = case.clone()
    views = {
        "q": case.q.transpose(1, 2).contiguous().transpose(1, 2),
        "k_new": case.k_new.T.contiguous().T,
        "v_new": torch.stack([case.v_new, case.v_new], 1)[:, 1],
    }
    assert not any(x.is_contiguous() for x in views.values())
    assert torch.equal(check(replace(case, **views)), call(contiguous))


@each_dtype
def test_large_logits(device: str, dtype: torch.dtype) -> None:
    """One token takes all the weight, wherever it lies; nothing overflows."""
    case = draw_case([2000, 3, 200], 2, 64, dtype, device)
    case = replace(case, q=case.q * 30)
    check(case)


@each_device
def test_twice_the_same(device: str) -> None:
    """Deterministic to the bit."""
    case = draw_case(RAGGED, 2, 64, DTYPES[device][0], device)
    assert torch.equal(call(case.clone()), call(case))


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "lengths", [[8191], [9000, 1, 2], [700, 650, 710], [1, 0, 3, 30_000], RAGGED], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES["cpu"])
@pytest.mark.usefixtures("two_threads")
def test_two_threads_equal_one(dtype: torch.dtype, lengths: list[int]) -> None:
    """Long sequences are split between them, and put together again."""
    case = draw_case(lengths, 2, 32, dtype, "cpu")
    again = case.clone()
    two = check(case)
    torch.set_num_threads(1)
    torch.testing.assert_close(two, call(again), **TOLERANCE[dtype])


@pytest.mark.usefixtures("two_threads")
def test_more_threads_than_work() -> None:
    torch.set_num_threads(7)
    check(draw_case([5, 0, 3000], 1, 16, torch.float32, "cpu"))
    check(draw_case([20_000], 8, 64, torch.float32, "cpu"))


@st.composite
def sequences(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    """Lengths, free slots, and which of them are finished."""
    lengths = draw(st.lists(st.integers(0, 70) | st.integers(0, 2000), min_size=1, max_size=12))
    several = {"min_size": len(lengths), "max_size": len(lengths)}
    free = draw(st.lists(st.integers(0, 3), **several))
    dead = draw(st.lists(st.booleans(), **several))
    return lengths, free, [s for s, finished in enumerate(dead) if finished]


@each_device
@settings(max_examples=60, deadline=None)
@given(ragged=sequences(), group=st.sampled_from(GROUPS), data=st.data())
def test_any_ragged_lengths(
    device: str, ragged: tuple[list[int], ...], group: int, data: st.DataObject
) -> None:
    dim = data.draw(st.sampled_from(CUDA_DIMS) if device == "cuda" else st.integers(1, 70))
    dtype = data.draw(st.sampled_from(DTYPES[device]))
    lengths, free, finished = ragged
    check(draw_case(lengths, group, dim, dtype, device, free=free, finished=finished))


@each_dtype
def test_opcheck(device: str, dtype: torch.dtype) -> None:
    """What torch itself asks of an op: schema, meta kernel, and tracing with dynamic shapes."""
    case = draw_case([5, 0, 70, 3], 2, 64, dtype, device, finished=[1])
    for cached in (case.k_cache, case.v_cache):
        cached.nan_to_num_()  # opcheck takes NaN for a difference
    torch.library.opcheck(
        torch.ops.sparsemm.append_attend.default,
        case.arguments,
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        **TOLERANCE[dtype],
    )


def test_meta_gives_the_shape() -> None:
    case = draw_case([5, 9], 3, 24, torch.bfloat16, "cpu")
    on_meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in case.arguments]
    out = torch.ops.sparsemm.append_attend(*on_meta)
    assert (out.shape, out.dtype, out.device.type) == ((2, 3, 24), torch.bfloat16, "meta")


REFUSED: dict[str, tuple[Callable[[Case], dict], type[Exception], str]] = {
    "flat q": (lambda c: {"q": c.q[0]}, ValueError, r"q must be \[S, G, D\], got \[2, 64\]"),
    "no head": (lambda c: {"q": c.q[:, :0]}, ValueError, "G and D of at least 1"),
    "k_new": (lambda c: {"k_new": c.k_new[:1]}, ValueError, r"k_new must be \[S, D\] = \[2, 64\]"),
    "v_new": (lambda c: {"v_new": c.v_new[:, 1:]}, ValueError, r"v_new .* got \[2, 63\]"),
    "cache": (lambda c: {"k_cache": c.k_cache[:, 1:]}, ValueError, r"k_cache must be \[T, D\]"),
    "strided": (
        lambda c: {"v_cache": c.v_cache.T.contiguous().T},
        ValueError,
        "v_cache must be contiguous",
    ),
    "slots": (lambda c: {"v_cache": c.v_cache[1:]}, ValueError, "equally many slots"),
    "offsets": (lambda c: {"offsets": c.offsets[1:]}, ValueError, r"offsets must be \[S \+ 1\]"),
    "lengths": (lambda c: {"lengths": c.lengths[1:]}, ValueError, r"lengths must be \[S\]"),
    "mixed": (lambda c: {"k_new": c.k_new.double()}, TypeError, "k_new must be Half as q is"),
    "long": (lambda c: {"lengths": c.lengths.long()}, TypeError, r"lengths must be Int \(int32\)"),
    "double": (
        lambda c: {n: x.double() for n, x in vars(c).items() if n[0] in "qkv"},
        TypeError,
        "got Double",
    ),
    "gradient": (
        lambda c: {"q": c.q.clone().requires_grad_()},
        NotImplementedError,
        "q requires grad, .* under torch.no_grad",
    ),
}


@each_device
@pytest.mark.parametrize("what", REFUSED)
def test_refused_in_one_sentence(device: str, what: str) -> None:
    """Before anything is written."""
    change, error, sentence = REFUSED[what]
    case = draw_case([3, 5], 2, 64, torch.float16, device)
    before = case.clone()
    with pytest.raises(error, match=sentence):
        call(replace(case, **change(case)))
    assert torch.equal(case.lengths, before.lengths)
    torch.testing.assert_close(case.k_cache, before.k_cache, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "offsets", [[0, 9, 5], [-1, 4, 12], [0, 4, 99_999]], ids=["descend", "before", "behind"]
)
def test_offsets_out_of_the_cache_are_refused_on_cpu(offsets: list[int]) -> None:
    """CUDA cannot look at them without waiting for the device."""
    case = draw_case([3, 5], 2, 64, torch.float32, "cpu")
    with pytest.raises(ValueError, match="offsets must ascend"):
        call(replace(case, offsets=torch.tensor(offsets, dtype=torch.int32)))


def test_gradients_are_no_matter_without_grad_mode() -> None:
    case = draw_case([3, 5], 2, 64, torch.float32, "cpu")
    case.q.requires_grad_()
    with torch.no_grad():
        assert not check(case).requires_grad


def test_nan_and_infinite_keys_show() -> None:
    """A sequence that holds one gives NaN as softmax does, and its neighbours do not notice."""
    case = draw_case([90, 90, 90, 90], 1, 16, torch.float32, "cpu")
    first = case.offsets.tolist()
    case.k_cache[first[0] + 80] = torch.nan
    case.k_cache[first[2] + 3, 0] = torch.inf
    case.q[2, 0, 0] = 1.0
    out = check(case)
    assert out.isnan().flatten(1).all(1).tolist() == [True, False, True, False]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES["cuda"])
@pytest.mark.parametrize("device", ["cuda"])
def test_in_a_cuda_graph_while_lengths_grow(device: str, dtype: torch.dtype) -> None:
    """One capture serves every step, until and beyond the last free slot."""
    lengths, free = [0, 3, 62, 5000, 40], [5, 0, 9, 30, 20]
    case = draw_case(lengths, 4, 128, dtype, device, free=free, finished=[4])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(case.clone())  # whatever is set up once must not fall into the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = torch.ops.sparsemm.append_attend(*case.arguments)
    for step in range(max(free) + 2):
        token = new_token(len(lengths), 4, 128, step)
        for static, drawn in zip((case.q, case.k_new, case.v_new), token, strict=True):
            static.copy_(drawn)
        wanted, keys, values, grown = expected(case)
        graph.replay()
        torch.testing.assert_close(out.double(), wanted, equal_nan=True, **TOLERANCE[dtype])
        assert torch.equal(case.lengths, grown)
        for cache, after in ((case.k_cache, keys), (case.v_cache, values)):
            assert torch.equal(cache.view(torch.int16), after.view(torch.int16))
