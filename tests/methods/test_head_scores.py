"""Head scores: what is accepted, how files are read and written, sums over groups."""

import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sparsemm_eval.errors import UserError
from sparsemm_eval.methods import HeadScores, ModelShape


def write(path: Path, content: Any) -> Path:
    """Write JSON as Python does, NaN and infinities included."""
    path.write_text(json.dumps(content))
    return path


def full(layers: int, heads: int) -> dict[str, Any]:
    """Make file content with a different score for each head: layer + head / 100 + 1."""
    return {f"{la}-{he}": 1 + la + he / 100 for la in range(layers) for he in range(heads)}


@pytest.fixture(name="file")
def _file(tmp_path: Path) -> Path:
    return tmp_path / "some_scores.json"


# --- arrays -------------------------------------------------------------------------------------


def test_values_are_float64() -> None:
    for kind in (np.int64, np.float32, np.float64):
        values = HeadScores(np.array([[1, 2], [3, 0]], dtype=kind)).values
        assert isinstance(values, np.ndarray)
        assert values.dtype == np.float64
        assert values.tolist() == [[1, 2], [3, 0]]


def test_values_do_not_follow_the_callers_array() -> None:
    mine = np.ones((2, 2))
    scores = HeadScores(mine)
    mine[0, 0] = -1
    assert scores.values.min() == 1


@pytest.mark.parametrize(
    ("value", "shown"), [(np.nan, "nan"), (np.inf, "inf"), (-np.inf, "-inf"), (-0.25, "-0.25")]
)
def test_bad_values_are_named_with_their_place(value: float, shown: str) -> None:
    values = np.ones((3, 4))
    values[2, 1] = value
    with pytest.raises(ValueError, match=r"2-1|2, 1") as caught:
        HeadScores(values)
    assert shown in str(caught.value)


def test_all_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"zero|0"):
        HeadScores(np.zeros((2, 3)))
    HeadScores(np.array([[0, 0], [0, 1e-300]]))


@pytest.mark.parametrize("shape", [(), (4,), (2, 2, 2)])
def test_wrong_number_of_dimensions_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(str(shape)) + f"|{len(shape)}"):
        HeadScores(np.ones(shape))


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_no_heads_at_all_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="0"):
        HeadScores(np.ones(shape))


# --- groups -------------------------------------------------------------------------------------


def test_neighbouring_query_heads_are_summed() -> None:
    scores = HeadScores(np.array([[1, 2, 3, 4, 5, 6], [10, 20, 30, 40, 50, 60]]))
    assert scores.per_kv_head(2).tolist() == [[6, 15], [60, 150]]
    assert scores.per_kv_head(3).tolist() == [[3, 7, 11], [30, 70, 110]]
    assert scores.per_kv_head(6).tolist() == scores.values.tolist()
    assert scores.per_kv_head(1).tolist() == [[21], [210]]


def test_groups_must_come_out_even() -> None:
    with pytest.raises(ValueError, match="6") as caught:
        HeadScores(np.ones((2, 6))).per_kv_head(4)
    assert "4" in str(caught.value)


# --- files --------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(
    arrays(
        np.float64,
        st.tuples(st.integers(1, 12), st.integers(1, 12)),
        elements=st.floats(0, 1e300, allow_subnormal=True),
    ).filter(np.any)
)
def test_what_is_written_is_read_again_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, values: np.ndarray
) -> None:
    path = tmp_path_factory.getbasetemp() / "round_trip.json"
    HeadScores(values).write(path)
    assert np.array_equal(HeadScores.read(path).values, values)
    assert set(json.loads(path.read_text())) == set(full(*values.shape))


def test_heads_are_read_by_key_not_by_order(file: Path) -> None:
    """Neither the file's order nor the keys' alphabet, that puts 10 before 2."""
    content = full(12, 11)
    in_order = HeadScores.read(write(file, content)).values
    assert in_order[10, 2] == 11.02
    assert in_order[2, 10] == 3.1
    turned = dict(reversed(content.items()))
    assert np.array_equal(HeadScores.read(write(file, turned)).values, in_order)
    assert np.array_equal(
        HeadScores.read(write(file, dict(sorted(content.items())))).values, in_order
    )


def test_a_list_counts_by_its_mean(file: Path) -> None:
    content = {"0-0": [1, 2, 6], "0-1": [0.5], "1-0": 0, "1-1": [0, 0]}
    assert HeadScores.read(write(file, content)).values.tolist() == [[3, 0.5], [0, 0]]


def test_a_file_of_the_size_that_was_published(file: Path) -> None:
    """Qwen2-VL's: a value an image of each of 28 x 28 heads, 4.7 MB."""
    values = [0.0] * 990 + [0.1 / number for number in range(1, 11)]
    heads = {f"{layer}-{head}": values for layer in range(28) for head in range(28)}
    scores = HeadScores.read(write(file, heads), ModelShape(28, 28, 4))
    assert scores.values == pytest.approx(np.full((28, 28), np.mean(values)))


def test_a_path_may_be_a_string(file: Path) -> None:
    HeadScores(np.ones((2, 2))).write(str(file))
    assert HeadScores.read(str(file)).values.shape == (2, 2)


def test_a_missing_file_is_not_found(file: Path) -> None:
    with pytest.raises(FileNotFoundError, match=file.name):
        HeadScores.read(file)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (float("-inf"), "-inf"),
        (-0.25, "-0.25"),
        ([1, float("nan")], "nan"),
        ([float("inf"), 2], "inf"),
        ([-3, 1], "-"),
        ([3, -0.5], "-0.5"),
        ([], r"\[\]|no value|empty"),
        ("much", "much"),
        (None, "None|null"),
        (True, "(?i)true"),
        ({"a": 1}, "a"),
        ([[1, 2]], "1, 2"),
        (["much"], "much"),
    ],
)
def test_bad_values_are_named_with_file_and_key(file: Path, value: Any, shown: str) -> None:
    content = full(2, 4) | {"1-2": value}
    with pytest.raises(ValueError, match=re.escape(file.name)) as caught:
        HeadScores.read(write(file, content))
    assert "1-2" in str(caught.value)
    assert re.search(shown, str(caught.value))


def test_all_zero_is_named_with_its_file(file: Path) -> None:
    content = dict.fromkeys(full(2, 4), 0)
    with pytest.raises(ValueError, match=re.escape(file.name)) as caught:
        HeadScores.read(write(file, content))
    assert re.search("zero|0", str(caught.value))


@pytest.mark.parametrize("key", ["one-two", "3", "1-2-3", "-1-2", "1-", "1.0-2", ""])
def test_bad_keys_are_named_with_their_file(file: Path, key: str) -> None:
    with pytest.raises(ValueError, match=re.escape(file.name)) as caught:
        HeadScores.read(write(file, full(2, 4) | {key: 7.5}))
    assert repr(key).strip("'") in str(caught.value)


def test_a_hole_is_named_with_its_file(file: Path) -> None:
    content = full(3, 4)
    del content["1-2"]
    for shape in (None, ModelShape(3, 4, 2)):
        with pytest.raises(ValueError, match=re.escape(file.name)) as caught:
            HeadScores.read(write(file, content), shape=shape)
        assert "1-2" in str(caught.value)


@pytest.mark.parametrize("content", [[], {}, 3, [[1, 2], [3, 4]], "scores"])
def test_anything_but_heads_is_refused_with_the_file(file: Path, content: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(file.name)):
        HeadScores.read(write(file, content))


@pytest.mark.parametrize("text", ["", '{"0-0": 1', "0-0: 1"])
def test_broken_json_is_refused_with_the_file(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(file.name)):
        HeadScores.read(file)


def test_the_models_shape_is_accepted(file: Path) -> None:
    assert HeadScores.read(write(file, full(3, 4)), shape=ModelShape(3, 4, 2)).values.shape == (
        3,
        4,
    )


@pytest.mark.parametrize(
    ("shape", "key"),
    [
        ((3, 8, 2), "0-4"),  # the file lacks heads
        ((4, 4, 2), "3-0"),  # and layers
        ((3, 2, 2), "0-2"),  # the file has heads too many
        ((2, 4, 2), "2-0"),  # and layers
    ],
)
def test_another_models_scores_are_refused(
    file: Path, shape: tuple[int, int, int], key: str
) -> None:
    """The message names the file, the first key at fault and the shape that fits."""
    with pytest.raises(ValueError, match=re.escape(file.name)) as caught:
        HeadScores.read(write(file, full(3, 4)), shape=ModelShape(*shape))
    message = str(caught.value)
    assert key in message
    assert str(shape[0]) in message
    assert str(shape[1]) in message


@pytest.mark.parametrize("text", ['{"0-0": 1, "0-1": 2, "00-1": 5}', '{"0-0": 1, "0-0": 2}'])
def test_a_head_named_twice_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "twice.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"twice\.json: .*0+-\d'? is there twice"):
        HeadScores.read(path)


def test_a_number_beyond_float_is_named_with_its_key(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    path.write_text('{"0-0": 1, "0-1": 1' + 400 * "0" + "}")
    with pytest.raises(ValueError, match=r"huge\.json: .*1000.* 401 digits"):
        HeadScores.read(path)


def test_scores_whose_sum_overflows_are_refused() -> None:
    with pytest.raises(ValueError, match="too large"):
        HeadScores([[1e308, 1e308, 1e308, 0]])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"0-0": 1, "99999-99999": 1}', "no score for head 0-1 (9999999998 are missing)"),
        ('{"0-0": 1, "999999-0": 1}', "no score for head 1-0 (999998 are missing)"),
        (f'{{"{"9" * 5000}-0": 1}}', 'is not "layer-head"'),
        (f'{{"0-0": {"[" * 5000}', "not a score file"),
        ('{"0-0": [1.7e308, 1.7e308, 1.7e308]}', "0-0 is 1.7e+308"),
        ('{"0-0": [[[[[[]]]]]]}', "0-0 is ["),
        ('{"\u0661-0": 1}', 'is not "layer-head"'),
    ],
)
def test_a_small_file_never_takes_much_memory(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "small.json"
    path.write_text(text)
    tracemalloc.start()
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        HeadScores.read(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert len(str(caught.value)) < 300
