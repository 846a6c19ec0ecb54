"""The page in a real browser, headless: what a reader does with it."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright
from report.result_files import TARGETS, write_cell, write_grid

from sparsemm_eval.report.page import write_page
from sparsemm_eval.report.results import gather

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason=f"needs one of {', '.join(NAMES)}")
HOSTILE = "<script>document.title='taken'</script><img src=x onerror=alert(1)></script>&amp;\"'"


@dataclass
class Opened:
    """A page, and what the browser said and asked for on its way."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as play:
        started = play.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS])
        yield started
        started.close()


def pictures(task: str, doc_ids: Sequence[int]) -> dict[int, list[Image.Image]]:
    """An image a document, 600 pixels wide; a data set of its own has none."""
    if task == "textvqa_val":
        raise ValueError("its data cannot be loaded (no network)")
    return {doc: [Image.new("RGB", (600, 300), (40 * doc, 90, 160))] for doc in doc_ids}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    write_grid(folder / "results")
    (folder / "results" / "cut_results.json").write_text('{"results": ')
    return write_page(gather([str(folder / "results")]), folder / "out", visuals=pictures)


def open_page(browser: Browser, path: Path, width: int = 1400, fragment: str = "") -> Opened:
    opened = Opened(browser.new_page(viewport={"width": width, "height": 900}))
    page = opened.page
    page.on("console", lambda message: opened.complaints.append(f"{message.type} {message.text}"))
    page.on("pageerror", lambda error: opened.complaints.append(str(error)))
    page.on("dialog", lambda dialog: opened.complaints.append(dialog.message))
    page.on("request", lambda request: opened.requests.append(request.url))
    page.goto(path.as_uri() + fragment)
    return opened


@pytest.fixture
def opened(browser: Browser, written: Path) -> Iterator[Opened]:
    """Whatever a test does, the page complains of nothing and asks for nothing but itself."""
    found = open_page(browser, written)
    yield found
    asked = [url for url in found.requests if not url.startswith("data:image/")]
    found.page.close()
    assert found.complaints == []
    assert asked == [written.as_uri()]


def column(page: Page, title: str) -> list[str]:
    """What the rows that are shown say in a column, in their order."""
    titles = [text.strip() for text in page.locator("#cells thead th").all_inner_texts()]
    place = titles.index(title)
    rows = page.locator("#cells tbody tr:not([hidden])")
    return [row.locator("td").nth(place).inner_text() for row in rows.all()]


def test_a_click_on_a_title_sorts_and_another_turns_it_round(opened: Opened) -> None:
    page = opened.page
    title = page.get_by_role("columnheader", name="score")
    title.get_by_role("button").click()
    down = [float(text) for text in column(page, "score")]
    assert title.get_attribute("aria-sort") == "descending"
    assert down == sorted(down, reverse=True)
    assert len(set(down)) > 2
    title.get_by_role("button").click()
    assert title.get_attribute("aria-sort") == "ascending"
    assert [float(text) for text in column(page, "score")] == sorted(down)
    page.get_by_role("columnheader", name="method").get_by_role("button").click()
    assert title.get_attribute("aria-sort") is None
    methods = column(page, "method")
    assert methods == sorted(methods)


def test_what_has_no_number_comes_last_either_way(opened: Opened) -> None:
    button = opened.page.get_by_role("columnheader", name="difference").get_by_role("button")
    for _ in range(2):
        button.click()
        texts = column(opened.page, "difference")
        assert [bool(text) for text in texts] == sorted(map(bool, texts), reverse=True)
        assert not texts[-1]


@pytest.mark.parametrize(("name", "value", "rows"), [
    ("model", "small", 10), ("benchmark", "DocVQA", 10), ("method", "SparseMM", 8),
    ("budget", "64", 8), ("budget", "all", 4),
])  # fmt: skip
def test_each_filter_leaves_its_rows(opened: Opened, name: str, value: str, rows: int) -> None:
    page = opened.page
    assert len(column(page, name)) == 20
    page.locator(f"#filters [name={name}]").select_option(value)
    texts = column(page, name)
    assert len(texts) == rows
    assert all(text.startswith(value) for text in texts)
    assert page.locator("#shown").inner_text() == f"{rows} of 20 cells"
    page.get_by_role("button", name="Show all").click()
    expect(page.locator("#shown")).to_have_text("20 of 20 cells")


def test_filters_and_search_narrow_each_other(opened: Opened) -> None:
    page = opened.page
    page.locator("#filters [name=model]").select_option("large")
    page.get_by_role("searchbox").fill("textvqa SNAPKV")
    assert column(page, "method") == ["SnapKV", "SnapKV"]
    assert set(column(page, "model")) == {"large"}
    page.get_by_role("searchbox").fill("no such words")
    assert column(page, "model") == []
    assert page.locator("#shown").inner_text() == "0 of 20 cells"


def test_a_chosen_cell_shows_its_samples(opened: Opened) -> None:
    page = opened.page
    for name, value in (
        ("model", "small"), ("benchmark", "DocVQA"), ("method", "SnapKV"), ("budget", "64"),
    ):  # fmt: skip
        page.locator(f"#choice [name={name}]").select_option(value)
    assert "3 of 4 answers are not full KV's" in page.locator("#differing").inner_text()
    items = page.locator("#answers > li")
    assert items.count() == 3
    first = items.first
    assert first.locator("dd").all_inner_texts() == [
        "Which year?", "1998", "1998 score 1.000", "no score 0.000",
    ]  # fmt: skip
    image = first.get_by_role("img")
    image.scroll_into_view_if_needed()
    size = image.evaluate("async (i) => { await i.decode(); return [i.naturalWidth, i.alt]; }")
    assert size == [384, "Image of sample 1"]


def test_a_choice_that_another_model_lacks_gives_way(opened: Opened) -> None:
    page = opened.page
    page.locator("#choice [name=benchmark]").select_option("TextVQA")
    page.locator("#choice [name=method]").select_option("SnapKV")
    page.locator("#choice [name=budget]").select_option("64")
    page.locator("#choice [name=method]").select_option("SparseMM")
    assert page.locator("#choice [name=benchmark]").input_value() == "TextVQA"
    assert page.locator("#choice [name=budget]").input_value() == "64"
    # At 256 SparseMM answered as full KV did: there is nothing to look at.
    assert page.locator("#choice [name=budget] option").all_inner_texts() == ["64"]
    assert page.locator("#answers img").count() == 0
    assert "textvqa_val is shown without images: its data cannot be loaded" in (
        page.locator("#samples").inner_text()
    )


def test_a_row_leads_to_its_samples_and_to_its_run(opened: Opened) -> None:
    page = opened.page
    row = page.locator("#cells tbody tr", has_text="TextVQA").filter(has_text="SnapKV").last
    row.get_by_role("link", name="3", exact=True).click()
    assert "small, TextVQA, SnapKV, budget 64" in page.locator("#differing").inner_text()
    expect(page.locator("#differing")).to_be_in_viewport()
    page.locator("#choice [name=model]").select_option("large")
    row.get_by_role("link", name="3", exact=True).click()  # the address is the same
    assert "small, TextVQA, SnapKV, budget 64" in page.locator("#differing").inner_text()
    link = row.get_by_role("link").last
    number = link.inner_text()
    link.click()
    run = page.locator(f"#run-{number}")
    assert page.evaluate("document.querySelector(':target').id") == f"run-{number}"
    expect(run).to_be_in_viewport()
    title = page.locator("#files thead").bounding_box()
    assert run.bounding_box()["y"] >= title["y"] + title["height"]
    assert "textvqa_val-small-snapkv-64_results.json" in run.inner_text()
    assert "abc1234" in run.inner_text()
    run.get_by_role("link").click()
    assert page.evaluate("document.querySelector(':target').id").startswith("made-")


def test_all_of_it_is_reached_by_keyboard(opened: Opened) -> None:
    page = opened.page
    page.get_by_role("columnheader", name="score").get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert column(page, "score")[0] == "1.000"
    page.locator("#filters [name=model]").focus()
    page.keyboard.press("ArrowDown")
    assert set(column(page, "model")) == {"large"}


@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_never_scrolls_sideways(
    browser: Browser, written: Path, width: int, scheme: str
) -> None:
    opened = open_page(browser, written, width)
    opened.page.emulate_media(color_scheme=scheme)
    opened.page.locator("details").evaluate_all("all => all.forEach(each => each.open = true)")
    wide = opened.page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    opened.page.close()
    assert wide[0] <= wide[1] == width
    assert opened.complaints == []


def test_what_could_not_be_read_is_said_at_the_top(opened: Opened) -> None:
    assert "cut_results.json" in opened.page.locator("header #unreadable").inner_text()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every text that comes from outside tries to be more than text."""
    folder = tmp_path_factory.mktemp("hostile")
    made = {"model": "small", "entry": {"schema": 1, "command": HOSTILE, "model": HOSTILE}}
    write_cell(folder / "r", "fullkv", None, [HOSTILE, *TARGETS[1:]], **made)
    write_cell(folder / "r", "snapkv", 64, [HOSTILE + "\ud83d", *TARGETS[1:]], **made)
    return write_page(gather([str(folder / "r")]), folder / "out", title=HOSTILE, visuals=pictures)


def test_hostile_text_is_shown_as_text(browser: Browser, hostile: Path) -> None:
    opened = open_page(browser, hostile)
    page = opened.page
    assert page.title() == " ".join(HOSTILE.split())
    assert page.locator("h1").inner_text() == HOSTILE
    assert column(page, "model") == [HOSTILE, HOSTILE]
    assert page.locator("#filters [name=model] option").last.inner_text() == HOSTILE
    answers = page.locator("#answers .answer").all_inner_texts()
    assert answers[0] == HOSTILE
    assert answers[1].startswith(HOSTILE)
    assert HOSTILE in page.locator(".made code").first.inner_text()
    assert page.locator("script[src], img[src=x], [onerror]").count() == 0
    assert page.locator("script").count() == 3
    page.close()
    assert opened.complaints == []
    assert [url for url in opened.requests if not url.startswith("data:")] == [hostile.as_uri()]


def test_no_other_script_or_style_runs(browser: Browser, written: Path) -> None:
    """Even where one got into the page past all escaping."""
    text = written.read_text(encoding="utf-8")
    path = written.with_name("taken.html")
    strange = (
        "<script>document.title = 'taken'</script><style>h1 { display: none }</style>"
        "<img src='data:,' onerror=\"document.title = 'taken'\">"
    )
    path.write_text(text.replace("<main>", f"{strange}<main>"), encoding="utf-8")
    found = open_page(browser, path)
    found.page.locator("h1").first.wait_for(state="visible")
    assert found.page.title() != "taken"
    assert sum("Content Security Policy" in line for line in found.complaints) == 3
    # The page's own still run.
    titles = found.page.get_by_role("columnheader", name="score")
    titles.get_by_role("button").click()
    assert titles.get_attribute("aria-sort") == "descending"
    found.page.close()
