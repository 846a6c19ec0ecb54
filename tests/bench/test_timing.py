"""Measures in turn, and what is told of their times."""

from itertools import count

from sparsemm_eval.bench.timing import in_turn, quartiles


def test_entries_take_turns() -> None:
    """Round by round; who has enough, or took long enough after three rounds, is left alone."""
    turns = []

    def measure_once(name: str) -> list[float]:
        turns.append(name)
        return [float(next(numbers))]

    numbers = count()
    found = in_turn({n: lambda n=n: measure_once(n) for n in "ab"}, repeats=4, seconds=9.0)
    assert turns == list("ab") * 4
    assert found["a"] == [0, 2, 4, 6]
    assert quartiles(found["a"]) == (1.5, 3.0, 4.5)
    turns.clear()
    in_turn({n: lambda n=n: measure_once(n) for n in "ab"}, repeats=4, seconds=0.0)
    assert turns == list("ab") * 3


def test_quartiles_of_one_time_are_that_time() -> None:
    assert quartiles([5.0]) == (5.0, 5.0, 5.0)
