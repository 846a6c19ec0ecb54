"""A sweep killed without warning ends with the tables of one that was not."""

from pathlib import Path

from sweep.kills import run_kills


def test_killed_sweeps_end_with_the_same_tables(tmp_path: Path) -> None:
    done = run_kills(tmp_path, kills=3, samples=8, batch_size=2)
    assert len(done["moments"]) == 3
    assert sum(sweep["kills"] for sweep in done["sweeps"]) == 3
    for sweep in done["sweeps"]:
        assert sweep["tables_identical"]
        assert sweep["answers_identical"]
        assert sweep["computed_twice"] == 0
