"""The page as a file: what is in it, before any browser reads it."""

import io
import json
import re
from base64 import b64decode
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from report.result_files import QUESTIONS, TARGETS, write_cell, write_grid
from typer.testing import CliRunner

from sparsemm_eval.cli import app
from sparsemm_eval.report.page import write_page
from sparsemm_eval.report.page.samples import Images, target
from sparsemm_eval.report.results import gather

WRONG = ["no"] * 4


class Reader(HTMLParser):
    """Ids, links and addresses of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        if "id" in found:
            self.ids.append(found["id"] or "")
        if tag == "a":
            self.links.append(found["href"] or "")
        self.sources += [found[name] or "" for name in ("src", "srcset") if name in found]


def page(folder: Path, **options: Any) -> str:
    path = write_page(gather([str(folder)]), folder / "out", **options)
    return path.read_text(encoding="utf-8")


def embedded(text: str, name: str) -> Any:
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', text, re.S)
    return json.loads(found[1])


def picture(task: str, doc_ids: Sequence[int]) -> dict[int, list[Image.Image]]:
    """One image for all documents of a task."""
    shade = 200 if task.startswith("doc") else 90
    return {doc: [Image.new("L", (90, 60), shade)] for doc in doc_ids}


def test_every_link_leads_to_something_on_the_page(tmp_path: Path) -> None:
    write_grid(tmp_path)
    text = page(tmp_path)
    read = Reader(text)
    assert len(read.ids) == len(set(read.ids))
    cells = {f"#samples-{cell['cell']}" for cell in embedded(text, "samples-data")["cells"]}
    assert cells == {link for link in read.links if re.match(r"#samples-\d", link)}
    others = {link for link in read.links if not re.match(r"#samples-\d", link)}
    assert others <= {f"#{name}" for name in read.ids}
    assert {f"#run-{number}" for number in range(1, 21)} <= others


def test_nothing_is_loaded_from_elsewhere(tmp_path: Path) -> None:
    write_grid(tmp_path)
    text = page(tmp_path, visuals=picture)
    assert all(source.startswith("data:image/") for source in Reader(text).sources)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)[1]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http:" not in policy


def test_samples_stand_in_order_of_how_much_scores_differ(tmp_path: Path) -> None:
    write_cell(tmp_path, "fullkv", None, ["wrong", *TARGETS[1:]])
    write_cell(tmp_path, "snapkv", 64, ["also wrong", TARGETS[1], "no", "no"])
    cell = embedded(page(tmp_path), "samples-data")["cells"][0]
    # Document 1 was answered alike, 0 wrong in two ways.
    assert [row[0] for row in cell["samples"]] == [2, 3, 0]
    assert [row[2:] for row in cell["samples"]] == [[0.0, 1.0], [0.0, 1.0], [0.0, 0.0]]
    assert (cell["differ"], cell["of"]) == (3, 4)


def test_at_most_so_many_samples_are_shown_and_all_are_counted(tmp_path: Path) -> None:
    write_cell(tmp_path, "fullkv", None, TARGETS)
    write_cell(tmp_path, "snapkv", 64, WRONG)
    data = embedded(page(tmp_path, samples=2), "samples-data")
    assert len(data["cells"][0]["samples"]) == 2
    assert data["cells"][0]["differ"] == 4
    assert list(data["documents"][0]) == ["0", "1"]
    assert data["documents"][0]["1"][:3] == [QUESTIONS[1], TARGETS[1], TARGETS[1]]


def test_equal_images_are_there_once(tmp_path: Path) -> None:
    write_grid(tmp_path)
    text = page(tmp_path, visuals=picture)
    assert len(embedded(text, "images-data")) == 2
    places = {
        place
        for documents in embedded(text, "samples-data")["documents"]
        for document in documents.values()
        for place in document[3]
    }
    assert places == {0, 1}


def test_seeds_are_one_row_that_names_all_their_files(tmp_path: Path) -> None:
    write_cell(tmp_path, "fullkv", None, TARGETS)
    for seed, answers in enumerate((TARGETS, [*TARGETS[:3], "no"], [*TARGETS[:2], "no", "no"])):
        write_cell(tmp_path, "random", 64, answers, seed=seed)
    text = page(tmp_path)
    row = re.search(r'<tr data-model="small"[^>]*data-method="Random".*?</tr>', text, re.S)[0]
    assert "0.750 \N{PLUS-MINUS SIGN} 0.250" in row
    assert re.findall(r"#run-(\d)", row) == ["2", "3", "4"]
    assert text.count('data-method="Random"') == 1
    assert "3 of 12" in row
    assert {cell["method"] for cell in embedded(text, "samples-data")["cells"]} == {
        "Random (seed=1)", "Random (seed=2)",
    }  # fmt: skip


def test_without_samples_files_the_page_says_what_it_takes(tmp_path: Path) -> None:
    for method, budget in (("fullkv", None), ("snapkv", 64)):
        write_cell(tmp_path, method, budget, TARGETS, samples_file=False)
    text = page(tmp_path)
    assert "There is nothing to compare" in text
    assert 'id="choice"' not in text


def test_a_samples_file_that_was_cut_off_is_named(tmp_path: Path) -> None:
    write_cell(tmp_path, "fullkv", None, TARGETS)
    path = write_cell(tmp_path, "snapkv", 64, WRONG)
    samples = next(tmp_path.glob(f"{path.name.removesuffix('_results.json')}_samples_*"))
    samples.write_text(samples.read_text()[:-9])
    assert f"Not compared: {samples}: line 4" in page(tmp_path)


def test_the_page_begins_with_which_method_is_best(tmp_path: Path) -> None:
    write_grid(tmp_path)
    section = re.search(r'<section id="ranking".*?</section>', page(tmp_path), re.S)[0]
    sentence = (
        r"At 64 tokens \(1 MiB a prompt\) SparseMM keeps 0\.500 \[0\.\d+, 0\.\d+\] of full "
        r"KV&#39;s score over 2 tasks; SnapKV ties with it\."
    )
    assert len(re.findall(sentence, section)) == 2
    assert section.count("data:image/svg+xml") == 1
    assert "not corrected for their number" in section
    assert "<caption><strong>Best at equal bytes" in section
    for path in tmp_path.glob("*fullkv*"):
        path.unlink()
    section = re.search(r'<section id="ranking".*?</section>', page(tmp_path), re.S)[0]
    assert "there is no full KV of it" in section
    assert "<table" not in section
    assert "<img" not in section


def test_the_papers_numbers_alone_make_a_page(tmp_path: Path) -> None:
    text = write_page(gather(["paper"]), tmp_path).read_text(encoding="utf-8")
    assert "No results file was read." in text
    assert "paper, table3" in text
    assert text.count("<table") > 3
    assert 'id="ranking"' not in text


def test_runs_say_how_they_were_made_each_once(tmp_path: Path) -> None:
    entry = {
        "schema": 1, "command": "sparsemm-eval sweep demo", "commit": "0123456789ab+",
        "python": "3.11.2", "versions": {"torch": "2.15"}, "hardware": {"cpu_cores": 64},
    }  # fmt: skip
    write_cell(tmp_path, "fullkv", None, TARGETS, entry=entry)
    write_cell(tmp_path, "snapkv", 64, WRONG, entry=entry)
    text = page(tmp_path)
    assert text.count("<code>sparsemm-eval sweep demo</code>") == 1
    for words in ("0123456789ab+", "python: 3.11.2", "torch: 2.15", "cpu cores: 64"):
        assert words in text
    assert text.count('href="#made-1"') == 2


def test_the_command_writes_it_and_says_what_was_not_read(tmp_path: Path) -> None:
    write_grid(tmp_path / "results")
    (tmp_path / "results" / "bad_results.json").write_text("[]")
    out = str(tmp_path / "out")
    arguments = ["report", str(tmp_path / "results"), "-o", out, "--no-images", "--title", "Mine"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert f"wrote {tmp_path / 'out' / 'index.html'}" in done.output
    assert "not read:" in done.output
    text = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "<h1>Mine</h1>" in text
    assert "Images were left out." in text


@pytest.mark.parametrize(("arguments", "words"), [
    (["/no/such/place"], "/no/such/place"),
    (["{results}", "--against", "h2o"], "against=h2o"),
])  # fmt: skip
def test_bad_input_is_one_sentence(tmp_path: Path, arguments: list[str], words: str) -> None:
    write_grid(tmp_path / "results")
    given = [word.format(results=tmp_path / "results") for word in arguments]
    done = CliRunner().invoke(app, ["report", *given, "-o", str(tmp_path / "out"), "--no-images"])
    assert done.exit_code == 1
    assert words in done.output
    assert len(done.output.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@given(
    width=st.integers(1, 900),
    height=st.integers(1, 900),
    mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"]),
)
def test_images_become_small_ones_that_can_be_read_again(
    width: int, height: int, mode: str
) -> None:
    images = Images()
    assert images.add(Image.new(mode, (width, height))) == 0
    uri, *size = images.kept[0]
    head, _, body = uri.partition(",")
    assert head in ("data:image/webp;base64", "data:image/png;base64")
    with Image.open(io.BytesIO(b64decode(body))) as read:
        assert list(read.size) == size
    assert max(size) == min(384, max(width, height))
    assert min(size) >= 1


def test_what_is_transparent_is_white() -> None:
    images = Images()
    images.add(Image.new("RGBA", (4, 4), (0, 0, 0, 0)))
    with Image.open(io.BytesIO(b64decode(images.kept[0][0].partition(",")[2]))) as read:
        assert read.convert("L").getextrema() == (255, 255)


@pytest.mark.parametrize(("stated", "shown"), [
    ("12", "12"), ("['a', 'b', 'a']", "a\nb"), ("[1, 2", "[1, 2"), ("[]", ""),
    ("[os.system('x')]", "[os.system('x')]"),
])  # fmt: skip
def test_a_target_is_read_as_text_or_as_a_list(stated: str, shown: str) -> None:
    assert target({"target": stated}) == shown
