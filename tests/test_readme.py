"""README's Python runs, and its tables name what there is."""

import inspect
import re
import shlex
from pathlib import Path

import pytest
import torch
import typer

from sparsemm_eval.cli import app
from sparsemm_eval.families import find_family
from sparsemm_eval.families import registry as family_registry
from sparsemm_eval.methods import ModelShape, make_method, method_names, registry

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "tasks/README.md")),
    *(ROOT / name for name in ("tasks/PROTOCOLS.md", "results/README.md", "cuda_ext/README.md")),
    *sorted((ROOT / "sparsemm_eval").glob("*/README.md")),
]


def block(word: str) -> str:
    """README's Python that holds a word."""
    (found,) = [text for text in BLOCKS if word in text]
    return found


def test_the_tensor_example_runs() -> None:
    names: dict = {}
    exec(block("method.keep("), names)
    assert names["mask"].shape == (1, 8, 1000)
    assert names["mask"].sum(-1).tolist() == [[256] * 8]


def test_the_method_of_ones_own_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file: a dataclass must be found where it says it is from."""
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))
    exec(compile(block("register_method("), "README.md", "exec"), {"__name__": __name__})
    shape = ModelShape(layers=4, query_heads=4, kv_heads=2)
    for allocation in ("paper", "exact"):
        early = make_method("early", shape, budget=20, window=4, share=0.75, allocation=allocation)
        query, key = torch.randn(1, 4, 100, 8), torch.randn(1, 2, 100, 8)
        kept = [early.keep(query, key, layer).sum(-1).tolist() for layer in range(4)]
        assert kept == [[[28, 28]], [[28, 28]], [[12, 12]], [[12, 12]]]
    with pytest.raises(ValueError, match="share"):
        make_method("early", shape, budget=20, shares=1)


def test_the_family_of_ones_own_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family_registry, "_registry", dict(family_registry._registry))
    exec(compile(block("@register_family"), "README.md", "exec"), {"__name__": __name__})
    family = find_family("llava")
    assert (family.lmms_name, family().keyed) == ("llava15_sparsemm", {})


def budget_tables(text: str) -> list[dict[tuple[str, str], str]]:
    """What tables of one budget hold, by row and column."""
    found = []
    for table in re.findall(r"^\| budget 32 .*\n(?:\|.*\n)+", text, re.MULTILINE):
        head, _, *rows = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()]
        found.append(
            {(row[1], name): cell for row in rows for name, cell in zip(head, row, strict=True)}
        )
    return found


def test_the_demos_tables_are_of_the_committed_run() -> None:
    """Some of its methods: what stands there is what came out."""
    made = (ROOT / "results/demo/table.md").read_text(encoding="utf-8")
    shown, whole = budget_tables(README), budget_tables(made)
    assert len(shown) == len(whole) == 2
    for part, table in zip(shown, whole, strict=True):
        assert len(part) > 80
        assert part.items() <= table.items()


def commands() -> list[list[str]]:
    """Words behind ./run_eval.sh, of all pages' commands that are sparsemm-eval's."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    lines = text.replace("\\\n", " ").splitlines()
    given = [shlex.split(line, comments=True) for line in lines if line.startswith("./run_eval.sh")]
    return [words[1:] for words in given if words[1:] and words[1] not in ("test", "--")]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_are_taken_as_they_stand(words: list[str]) -> None:
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):  # a group; whose click it is depends on typer's version
        command = command.commands[words[0]]
        words = words[1:]
    command.make_context("sparsemm-eval", list(words))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    for link in links:
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_every_method_is_in_the_table() -> None:
    for name in method_names():
        assert f"| `{name}` |" in README


def test_settings_of_the_table_are_known() -> None:
    from sparsemm_eval.engine.cell import model_settings
    from sparsemm_eval.engine.lmms import SparseMM

    section = README.split("### Settings")[1].split("###")[0]
    rows = re.findall(r"^\| ([a-z0-9_, ]+) \| .+ \| .+ \|$", section, re.MULTILINE)
    names = {name for row in rows for name in row.split(", ")} - {"setting", "method"}
    known = set(inspect.signature(SparseMM.__init__).parameters)
    methods = {s for name in method_names() for s in registry.method_settings(name)}
    assert names <= known | methods | {*model_settings(), "answers"}
    assert methods <= names
