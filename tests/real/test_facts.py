"""Lists of facts: each asks for one value that stands in it once, and seeds share nothing."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from real.tasks import facts

FACT = re.compile(r"^The (.+) is (\d{3}-\d{3}-\d{4})\.$", re.M)


@given(st.sampled_from([36, 60]), st.integers(0, 99), st.integers(0, 5))
@settings(max_examples=30)
def test_what_is_asked_stands_there_once(count: int, number: int, seed: int) -> None:
    document = facts.draw(count, number, seed)
    known = FACT.findall(document["question"])
    assert len(known) == len({what for what, _ in known}) == count
    asked = re.search(r"\n\nWhat is the (.+)\?$", document["question"])[1]
    assert dict(known)[asked] == document["answer"]
    assert document == facts.draw(count, number, seed)


def test_calibration_lists_are_none_of_those_scored() -> None:
    scored = {facts.draw(36, number, facts.SCORED_SEED)["question"] for number in range(100)}
    script = Path(facts.__file__)
    made = subprocess.run(
        [sys.executable, script, "36", "100", "1"], capture_output=True, text=True, check=True
    )
    lines = [json.loads(line) for line in made.stdout.splitlines()]
    assert all(set(line) == {"question", "kind"} for line in lines)
    assert len({line["question"] for line in lines} | scored) == 200


@pytest.mark.parametrize(
    ("said", "right"),
    [
        ("The weight of the villa of Peter in Dallas is 492-824-4777.", 1.0),
        ("492-824-4777", 1.0),
        ("The weight of the villa of Peter in Dallas is 492-824-4778.", 0.0),
        ("492-824-4777 or 111-222-3333", 0.0),
        ("492-824-47", 0.0),
        ("", 0.0),
    ],
)
def test_the_number_must_be_right_to_the_digit(said: str, right: float) -> None:
    assert facts.score({"answer": "492-824-4777"}, [said]) == {"exact": right}
