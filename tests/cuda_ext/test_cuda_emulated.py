"""The CUDA kernels, as they are, on an emulated device: every block, thread and fragment."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
EMULATOR = Path(__file__).parent / "emulator"
LENGTHS = (0, 1, 15, 16, 17, 57, 700, 31, 32, 0, 129)
SLACK = 3
# Of outputs up to about 4: half an ulp, and in half precision weights of 11 binary digits.
TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 8.5e-3}
EACH_DTYPE = pytest.mark.parametrize("dtype", TOLERANCE, ids=["half", "bfloat16"])
EACH_DIM = pytest.mark.parametrize("dim", [64, 96, 128])


class Pointers(ctypes.Structure):
    """``sparsemm::AppendAttend``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in
          ("q", "k_new", "v_new", "k_cache", "v_cache", "offsets", "lengths", "out", "workspace")),
        ("sequences", ctypes.c_int32),
        ("groups", ctypes.c_int32),
        ("scale", ctypes.c_float),
    )  # fmt: skip


@dataclass
class Device:
    """An emulated one: ``processors`` times ``resident`` blocks attend."""

    library: ctypes.CDLL
    processors: int = 3
    resident: int = 2
    ptx_version: int = 90
    seed: int = 0

    def __call__(self, case: Case, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Run the op: query [S, G, D], key and value [S, D] to [S, G, D]."""
        out = torch.full_like(query, torch.nan)
        given = (query, key, value, case.keys, case.values, case.offsets, case.lengths, out)
        assert all(tensor.is_contiguous() for tensor in given)
        sequences, groups, dim = query.shape
        task = Pointers(*(x.data_ptr() for x in given), None, sequences, groups, dim**-0.5)
        workers = ctypes.c_int()
        error = self.library.emulate_append_attend(
            ctypes.byref(task), int(query.dtype == torch.bfloat16), dim, self.processors,
            self.resident, self.ptx_version, ctypes.c_uint(self.seed), ctypes.byref(workers),
        )  # fmt: skip
        assert error == 0, self.library.emulate_failure().decode()
        assert workers.value == self.processors * self.resident
        return out


@dataclass
class Case:
    """Ragged keys and values [T, D] with NaN in every slot that holds no token."""

    keys: Tensor
    values: Tensor
    offsets: Tensor
    lengths: Tensor

    @classmethod
    def draw(
        cls, lengths: tuple[int, ...], dim: int, dtype: torch.dtype, slack: int = SLACK
    ) -> Case:
        """Fill sequences of these lengths."""
        counts = torch.tensor(lengths, dtype=torch.int32)
        offsets = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        offsets[1:] = (counts + slack).cumsum(0)
        generator = torch.Generator().manual_seed(len(lengths))
        keys, values = (
            torch.randn(int(offsets[-1]), dim, generator=generator).to(dtype) for _ in range(2)
        )
        case = cls(keys, values, offsets, counts)
        free = torch.ones(len(keys), dtype=torch.bool)
        for start, length in zip(offsets.tolist(), lengths, strict=False):
            free[start : start + length] = False
        keys[free] = torch.nan
        values[free] = torch.nan
        return case

    def token(self, groups: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Draw query [S, G, D], key and value [S, D] of a step."""
        generator = torch.Generator().manual_seed(seed)
        sequences, (_, dim) = len(self.lengths), self.keys.shape
        shapes = ((sequences, groups, dim), (sequences, dim), (sequences, dim))
        query, key, value = (torch.randn(s, generator=generator).to(self.keys) for s in shapes)
        return 3 * query, key, value

    def step(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Case, Tensor]:
        """Return what must be there after the step, and its output in float64."""
        after = Case(
            self.keys.clone(), self.values.clone(), self.offsets.clone(), self.lengths.clone()
        )
        out = torch.zeros_like(query, dtype=torch.float64)
        for s, length in enumerate(self.lengths.tolist()):
            start, end = self.offsets[s].item(), self.offsets[s + 1].item()
            if length < 0:
                continue
            if start + length >= end:
                out[s] = torch.nan
                continue
            after.keys[start + length], after.values[start + length] = key[s], value[s]
            after.lengths[s] += 1
            keys, values = (
                x[start : start + length + 1].double() for x in (after.keys, after.values)
            )
            logits = query[s].double() @ keys.T * query.shape[-1] ** -0.5
            out[s] = logits.softmax(-1) @ values
        return after, out


def assert_same_bits(one: Tensor, other: Tensor) -> None:
    assert torch.equal(one.view(torch.int16), other.view(torch.int16))


def assert_step(device: Device, case: Case, groups: int, seed: int = 0) -> Tensor:
    """Run a step and hold output, cache and lengths to what they must be."""
    token = case.token(groups, seed)
    after, wanted = case.step(*token)
    out = device(case, *token)
    error = (out.double() - wanted).nan_to_num(0).abs().max()
    assert error < TOLERANCE[out.dtype]
    assert torch.equal(out.isnan(), wanted.isnan())
    assert torch.equal(case.lengths, after.lengths)
    assert_same_bits(case.keys, after.keys)  # NaN of free slots included
    assert_same_bits(case.values, after.values)
    return out


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the emulated device needs g++")
    built = tmp_path_factory.mktemp("emulated") / "emulated.so"
    sources = [EMULATOR / "driver.cpp", EMULATOR / "runtime.cpp"]
    subprocess.run(
        [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
         "-fPIC", "-shared", f"-I{EMULATOR}", *sources,
         "-x", "c++", ROOT / "cuda_ext" / "append_attend.cu", "-o", built],
        check=True,
    )  # fmt: skip
    loaded = ctypes.CDLL(str(built))
    loaded.emulate_failure.restype = ctypes.c_char_p
    loaded.emulate_rounding.argtypes = (ctypes.c_float, ctypes.c_int)
    loaded.emulate_rounding.restype = ctypes.c_uint16
    loaded.emulate_widening.argtypes = (ctypes.c_uint16, ctypes.c_int)
    loaded.emulate_widening.restype = ctypes.c_float
    return loaded


@pytest.fixture
def device(library: ctypes.CDLL) -> Device:
    return Device(library)


@pytest.mark.parametrize("groups", range(1, 9))
@EACH_DIM
@EACH_DTYPE
def test_equals_float64(device: Device, dtype: torch.dtype, dim: int, groups: int) -> None:
    device.seed = groups
    assert_step(device, Case.draw(LENGTHS, dim, dtype), groups)


@pytest.mark.parametrize("processors", [1, 2, 3, 5, 8, 13, 40, 300])
@EACH_DIM
def test_any_number_of_workers(device: Device, processors: int, dim: int) -> None:
    """From all sequences in one block to more blocks than there is work."""
    device.processors, device.resident = processors, 1
    assert_step(device, Case.draw(LENGTHS, dim, torch.float16), groups=2)


@EACH_DTYPE
def test_one_long_sequence_among_short_ones(device: Device, dtype: torch.dtype) -> None:
    device.processors = 20
    case = Case.draw((57, 3, 5000, 57, 0, 57), 128, dtype)
    assert_step(device, case, groups=7)


@pytest.mark.parametrize("position", range(0, 40, 3))
def test_long_sequence_begins_anywhere_in_a_span(device: Device, position: int) -> None:
    """Spans end before, in and behind the setup of the sequence that is shared."""
    assert_step(device, Case.draw((1,) * position + (900, 1), 64, torch.float16), groups=1)


@EACH_DIM
def test_lengths_grow_step_by_step(device: Device, dim: int) -> None:
    """Over the edge of a tile, until all are full; then nothing is written any more."""
    case = Case.draw((0, 13, 30, 200, 47), dim, torch.bfloat16, slack=5)
    for step in range(7):
        assert_step(device, case, groups=4, seed=step)
    assert case.lengths.tolist() == [5, 18, 35, 205, 52]


@pytest.mark.parametrize("processors", [1, 4, 50])
def test_finished_and_full_sequences_are_left_alone(device: Device, processors: int) -> None:
    device.processors = processors
    case = Case.draw(LENGTHS, 96, torch.float16)
    for s in (0, 3, 6, 10):
        case.lengths[s] = ~case.lengths[s]
    for s in (1, 5, 9):  # as long as there are slots, or (never, but still) longer
        case.lengths[s] = case.offsets[s + 1] - case.offsets[s] + (s == 5)
    out = assert_step(device, case, groups=3)
    assert (out[[0, 3, 6, 10]] == 0).all()
    assert out[[1, 5, 9]].isnan().all()


def test_sequences_without_slots(device: Device) -> None:
    case = Case.draw((0, 40, 0), 64, torch.float16, slack=0)
    assert_step(device, case, groups=2)


def test_no_sequence(device: Device) -> None:
    assert device(Case.draw((), 64, torch.float16), *Case.draw((), 64, torch.float16).token(1))\
        .shape == (0, 1, 64)  # fmt: skip


@pytest.mark.parametrize("sequences", [127, 129, 1000, 3000])
def test_more_sequences_than_threads(device: Device, sequences: int) -> None:
    generator = torch.Generator().manual_seed(sequences)
    lengths = torch.randint(0, 20, (sequences,), generator=generator)
    lengths[sequences // 3] = 300
    device.processors, device.resident = 2, 1
    assert_step(device, Case.draw(tuple(lengths.tolist()), 64, torch.float16, 1), groups=1)


def test_order_of_blocks_makes_no_difference(device: Device) -> None:
    outs = []
    for seed in range(4):
        device.seed = seed
        outs.append(assert_step(device, Case.draw(LENGTHS, 128, torch.float16), groups=3))
    for out in outs[1:]:
        assert_same_bits(outs[0], out)


def test_without_overlap_of_launches(device: Device) -> None:
    """As code compiled for compute capability 8.0 runs."""
    device.ptx_version = 80
    assert_step(device, Case.draw(LENGTHS, 64, torch.bfloat16), groups=8)


def test_logits_far_apart(device: Device) -> None:
    """No overflow where logits reach hundreds, on either side of a tile's edge."""
    case = Case.draw((200, 200), 64, torch.float16)
    query, key, value = case.token(2)
    query *= 20
    after, wanted = case.step(query, key, value)
    out = device(case, query, key, value)
    assert wanted.isfinite().all()
    assert (out.double() - wanted).abs().max() < TOLERANCE[out.dtype]
    assert torch.equal(case.lengths, after.lengths)


@pytest.mark.parametrize("processors", [1, 20])
def test_tiles_of_no_weight(device: Device, processors: int) -> None:
    """Logits of -inf, all over the tiles that come first and the spans of whole blocks."""
    device.processors = processors
    case = Case.draw((300, 300), 64, torch.float16)
    query, key, value = case.token(2)
    query[..., 0] = -1
    case.keys[:200, 0] = torch.inf
    after, wanted = case.step(query, key, value)
    out = device(case, query, key, value)
    assert wanted.isfinite().all()
    assert (out.double() - wanted).abs().max() < TOLERANCE[out.dtype]
    assert torch.equal(case.lengths, after.lengths)


@EACH_DTYPE
def test_emulator_rounds_as_torch_does(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """All 65,536 numbers of 16 bits, and between and beside them."""
    is_bfloat16 = int(dtype == torch.bfloat16)
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    exact = bits.view(dtype).float()
    widened = [library.emulate_widening(b & 0xFFFF, is_bfloat16) for b in bits.tolist()]
    torch.testing.assert_close(torch.tensor(widened), exact, rtol=0, atol=0, equal_nan=True)
    finite = exact[exact.isfinite()].sort().values
    middles = (finite[1:] + finite[:-1]) / 2
    values = torch.cat([finite, middles, middles * (1 + 2**-20), middles * (1 - 2**-20)])
    rounded = [library.emulate_rounding(x, is_bfloat16) for x in values.tolist()]
    wanted = values.to(dtype).view(torch.int16).int() & 0xFFFF
    assert torch.equal(torch.tensor(rounded, dtype=torch.int32), wanted)


@pytest.mark.parametrize(
    ("which", "words"),
    [
        (0, "lanes of a warp part ways"),
        (1, "a barrier that not all warps reach"),
        (2, "lanes of a warp part ways"),
        (3, "never waited"),
        (4, "a read of a slot that holds no token"),
        (5, "a read outside the tensors"),
        (6, "a read off its alignment"),
    ],
)
def test_emulator_tells_faults(library: ctypes.CDLL, which: int, words: str) -> None:
    assert library.emulate_fault(which) != 0
    assert words in library.emulate_failure().decode()


def test_emulator_lets_right_reads_pass(library: ctypes.CDLL) -> None:
    assert library.emulate_fault(7) == 0
