"""Lists of facts, one of which is asked for: data and score of the tasks beside this file.

``python tests/real/tasks/facts.py 36 10 1 > FILE`` writes ten lists of 36 facts, drawn with seed 1,
as lines that ``sparsemm-eval sensitivity --data FILE`` reads. Lists that are scored have seed 0.
"""

from __future__ import annotations

import json
import random
import re
import sys
from typing import Any

from sparsemm_eval.paths import cache_folder, write_whole

SCORED_SEED, LISTS = 0, 100
ATTRIBUTES = (
    "weight", "height", "price", "age", "length", "width", "depth", "speed", "phone number",
    "room number", "serial number", "postal code",
)  # fmt: skip
THINGS, OWNERS, CITIES = (
    names.split()
    for names in (
        """
    museum library hospital bakery castle harbor airport stadium theater factory temple school hotel
    bridge tower garden market station farm prison palace cinema church laboratory lighthouse
    monastery restaurant pharmacy university aquarium embassy warehouse brewery windmill observatory
    cathedral fortress shipyard sawmill quarry vineyard orchard nursery zoo casino gallery workshop
    studio garage kiosk chapel barracks courthouse arena mill mine dock pier villa cottage
        """,
        """
    Alice Boris Clara David Elena Felix Greta Henry Irene Jacob Karen Louis Maria Nadia Oscar Paula
    Ralph Sofia Tomas Wanda Agnes Bruno Carla Diego Edith Frank Gloria Hugo Ivana Julia Klaus Laura
    Mario Nora Otto Petra Quinn Rosa Simon Teresa Adam Bella Cyrus Doris Ethan Fiona George Hannah
    Isaac Janet Kevin Linda Martin Nancy Oliver Peter Rachel Samuel Tanya Victor
        """,
        """
    Paris London Berlin Madrid Rome Vienna Prague Dublin Oslo Lisbon Athens Warsaw Moscow Cairo
    Tokyo Boston Chicago Denver Dallas Miami
        """,
    )
)


def draw(facts: int, number: int, seed: int) -> dict[str, str]:
    """One list: ``question``, the facts and what is asked; ``answer``, the number asked for.

    Every fact is of another thing; values are 000-000-0000 without leading zeros.
    """
    rng = random.Random(f"{facts} {number} {seed}")
    attributes = [ATTRIBUTES[place % len(ATTRIBUTES)] for place in range(facts)]
    rng.shuffle(attributes)
    known = [
        (f"{attribute} of the {thing} of {rng.choice(OWNERS)} in {rng.choice(CITIES)}", value(rng))
        for attribute, thing in zip(attributes, rng.sample(THINGS, facts), strict=True)
    ]
    asked, answer = rng.choice(known)
    lines = "\n".join(f"The {what} is {number}." for what, number in known)
    question = f"Here is a list of facts.\n\n{lines}\n\nWhat is the {asked}?"
    return {"question": question, "answer": answer}


def value(rng: random.Random) -> str:
    return f"{rng.randint(100, 999)}-{rng.randint(100, 999)}-{rng.randint(1000, 9999)}"


def __getattr__(name: str) -> str:
    """The file of a task's lists, by the task's name."""
    kind, _, facts = name.partition("_")
    if kind != "facts" or not facts.isdecimal():
        raise AttributeError(name)
    path = cache_folder() / "facts" / f"{name}.jsonl"
    rows = (draw(int(facts), number, SCORED_SEED) for number in range(LISTS))
    text = "".join(json.dumps(row) + "\n" for row in rows)
    # Known to `datasets` by its time: written again only if it says something else.
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    return str(path)


def visual(document: dict[str, Any]) -> list:
    """No image."""
    return []


def score(document: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """1 if the answer's number is the one asked for, to the digit."""
    found = re.findall(r"\d[\d-]*", answers[0])
    return {"exact": float(found == [document["answer"]])}


if __name__ == "__main__":
    facts, lists, seed = map(int, sys.argv[1:])
    for number in range(lists):
        print(json.dumps({"question": draw(facts, number, seed)["question"], "kind": "facts"}))
