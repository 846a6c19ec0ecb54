"""Pages from drawn documents, synthdog, COCO and JSONL; and what is said of bad ones."""

import json
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.errors import UserError
from sparsemm_eval.heads.pages import Chunk, Page, drawn_pages, pages_for, read_pages
from sparsemm_eval.tiny import embedded_checkpoints
from sparsemm_eval.tiny.documents import PAGE


def picture(width: int = 60, height: int = 40, shade: int = 200) -> Image.Image:
    return Image.new("RGB", (width, height), (shade, 90, 10))


def saved(folder: Path, features: datasets.Features | None = None, **columns: list) -> Path:
    """A folder as a data set on the hub is laid out."""
    (folder / "data").mkdir(parents=True)
    table = datasets.Dataset.from_dict(columns, features=features)
    split = "val" if "objects" in columns else "train"
    table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


SYNTHDOG = datasets.Features({
    "image": datasets.Image(),
    "2_coord": datasets.List({
        "chunk": datasets.Value("string"),
        "coord": datasets.List(datasets.List(datasets.Value("float64"))),
    }),
})  # fmt: skip


def test_synthdog_gives_chunks_and_boxes(tmp_path: Path) -> None:
    rows = [
        [{"chunk": "two corners", "coord": [[1.0, 2.0], [30.0, 9.5]]},
         {"chunk": "polygon", "coord": [[5.0, 20.0], [50.0, 18.0], [51.0, 30.0], [4.0, 31.0]]}],
        [{"chunk": "over the edge", "coord": [[-3.0, 5.0], [70.0, 12.0]]},
         {"chunk": "outside", "coord": [[61.0, 5.0], [70.0, 12.0]]},
         {"chunk": " ", "coord": [[1.0, 1.0], [9.0, 9.0]]}],
        [],
    ]  # fmt: skip
    images = [picture(shade=shade) for shade in (10, 20, 30)]
    folder = saved(tmp_path / "sd", SYNTHDOG, image=images, **{"2_coord": rows})
    first, second, third = read_pages(f"synthdog:{folder}", 5)
    assert first.prompt == "Provide all the OCR results of this image."
    assert first.chunks == (
        Chunk("two corners", (1, 2, 30, 9.5)),
        Chunk("polygon", (4, 18, 51, 31)),
    )
    assert second.chunks == (Chunk("over the edge", (0, 5, 60, 12)),)
    assert third.chunks == ()
    assert np.array_equal(np.asarray(first.image), np.asarray(images[0]))
    assert len(list(read_pages(f"synthdog:{folder}", 2))) == 2


def test_four_plain_numbers_are_a_box_too(tmp_path: Path) -> None:
    row = [{"chunk": "flat", "coord": [1.0, 2.0, 30.0, 9.0]}]
    folder = saved(tmp_path / "sd", image=[{"bytes": _png(), "path": None}], **{"2_coord": [row]})
    (page,) = read_pages(f"synthdog:{folder}", 1)
    assert page.chunks == (Chunk("flat", (1, 2, 30, 9)),)


def test_coco_names_its_categories(tmp_path: Path) -> None:
    features = datasets.Features({
        "image": datasets.Image(),
        "objects": {
            "bbox": datasets.List(datasets.List(datasets.Value("float64"))),
            "category": datasets.List(datasets.ClassLabel(names=["person", "dog"])),
        },
    })  # fmt: skip
    objects = [{"bbox": [[0, 0, 9, 9], [2.5, 3, 30, 20]], "category": [1, 0]}]
    folder = saved(tmp_path / "coco", features, image=[picture()], objects=objects)
    (page,) = read_pages(f"coco:{folder}", 1)
    assert page.chunks == (Chunk("dog", (0, 0, 9, 9)), Chunk("person", (2.5, 3, 30, 20)))
    assert page.shortest == 3


def coco_files(folder: Path, **changes: Any) -> Path:
    table = {
        "categories": [{"id": 7, "name": "dog"}, {"id": 9, "name": "cat"}],
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
        "annotations": [
            {"image_id": 1, "category_id": 7, "bbox": [1, 2, 10, 20], "iscrowd": 0},
            {"image_id": 2, "category_id": 9, "bbox": [50, 30, 20, 20], "iscrowd": 0},
            {"image_id": 1, "category_id": 9, "bbox": [0, 0, 60, 40], "iscrowd": 1},
        ],
    }
    (folder / "annotations").mkdir(parents=True)
    (folder / "val2017").mkdir()
    (folder / "annotations" / "instances_val2017.json").write_text(json.dumps(table | changes))
    for name in ("a.png", "b.png"):
        picture().save(folder / "val2017" / name)
    return folder


def test_coco_is_read_from_its_own_files(tmp_path: Path) -> None:
    one, two = read_pages(f"coco:{coco_files(tmp_path)}", 5)
    assert one.chunks == (Chunk("dog", (1, 2, 11, 22)),)
    assert two.chunks == (Chunk("cat", (50, 30, 60, 40)),)


def test_jsonl_is_read_line_by_line(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    picture().save(tmp_path / "images" / "a.png")
    lines = [
        {"image": "images/a.png", "chunks": [{"text": "AB", "box": [0, 0, 8.5, 9]}]},
        {"image": "images/a.png", "chunks": [], "prompt": "What?"},
    ]
    path = tmp_path / "pages.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    one, two = read_pages(str(path), 5)
    assert one.chunks == (Chunk("AB", (0, 0, 8.5, 9)),)
    assert (two.prompt, two.chunks) == ("What?", ())
    assert len(list(read_pages(str(path), 1))) == 1


GOOD = {"image": "a.png", "chunks": [{"text": "A", "box": [0, 0, 8, 9]}]}


@pytest.mark.parametrize(("line", "words"), [
    ("{", "no JSON, or was cut off"),
    ({"image": "a.png"}, "chunks: Field required"),
    (GOOD | {"boxes": []}, "boxes: Extra inputs"),
    (GOOD | {"image": "b.png"}, "No such file"),
    (GOOD | {"image": "pages.jsonl"}, "cannot identify image"),
    (GOOD | {"chunks": [{"text": "A", "box": [0, 0, 8]}]}, "chunks.0.box"),
    (GOOD | {"chunks": [{"text": "A", "box": [0, 0, 61, 9]}]}, "'A' is empty or outside its image"),
    (GOOD | {"chunks": [{"text": "A", "box": [9, 0, 9, 9]}]}, "'A' is empty or outside its image"),
    (GOOD | {"chunks": [{"text": "", "box": [0, 0, 8, 9]}]}, "has no text"),
])  # fmt: skip
def test_a_faulty_line_is_named_before_the_first_page(
    line: Any, words: str, tmp_path: Path
) -> None:
    picture().save(tmp_path / "a.png")
    path = tmp_path / "pages.jsonl"
    text = line if isinstance(line, str) else json.dumps(line)
    path.write_text(f"{json.dumps(GOOD)}\n{text}\n")
    with pytest.raises(ValueError, match=words) as caught:
        next(read_pages(str(path), 5))
    assert str(caught.value).startswith(f"{path}:2: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("data", "words"), [
    ("books", "data='books': it must be drawn, synthdog, coco,"),
    ("synthdog:NOWHERE", "cannot be read"),
    ("coco:NOWHERE", "0 instances"),
    ("synthdog:OTHER", "no column 2_coord, but image, text"),
    ("coco:BROKEN", "not a COCO instances file"),
    ("coco:MISSING", "image c.png is not in"),
])  # fmt: skip
def test_data_that_cannot_be_read_is_one_sentence(data: str, words: str, tmp_path: Path) -> None:
    saved(tmp_path / "OTHER", image=["x"], text=["y"])
    coco_files(tmp_path / "BROKEN", categories=[{"name": "dog"}])
    coco_files(tmp_path / "MISSING", images=[{"id": n, "file_name": "c.png"} for n in (1, 2)])
    name, colon, folder = data.partition(":")
    with pytest.raises(ValueError, match=words) as caught:
        next(read_pages(f"{name}{colon}{tmp_path / folder}" if colon else data, 5))
    assert "\n" not in str(caught.value)


def test_drawn_pages_are_characters_or_entries() -> None:
    (letters,), (entries,) = drawn_pages(1), drawn_pages(1, known_text=False)
    assert letters.aligned
    assert all(len(chunk.text) == 1 for chunk in letters.chunks)
    assert letters.text.split("\n") == [chunk.text for chunk in entries.chunks]
    boxes = [chunk.box for chunk in letters.chunks[: len(entries.chunks[0].text)]]
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    assert entries.chunks[0].box == (min(x0), min(y0), max(x1), max(y1))


@pytest.mark.parametrize("name", embedded_checkpoints())
def test_an_embedded_model_is_fed_the_known_text_of_a_whole_page(name: str) -> None:
    page = next(pages_for(Checkpoint(embedded_checkpoints()[name]), "drawn", 1))
    assert page.aligned
    assert page.image.size == PAGE.size


def test_a_page_is_known_by_all_that_is_in_it() -> None:
    chunk = Chunk("A", (0, 0, 8, 9))
    pages = [
        Page(picture(), "x", (chunk,)),
        Page(picture(shade=3), "x", (chunk,)),
        Page(picture(), "y", (chunk,)),
        Page(picture(), "x", (Chunk("A", (0, 0, 8, 8)),)),
        Page(picture(), "x", (chunk,), aligned=True),
        Page(picture(), "x", (chunk,), shortest=3),
    ]
    assert len({page.digest for page in pages}) == len(pages)
    assert Page(picture(), "x", (chunk,)).digest == pages[0].digest


def _png() -> bytes:
    from io import BytesIO

    file = BytesIO()
    picture().save(file, "PNG")
    return file.getvalue()


def test_an_image_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    line = {"image": "pipe.png", "chunks": []}
    (tmp_path / "pages.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match="is no file but a folder, a pipe"):
        list(read_pages(str(tmp_path / "pages.jsonl"), 1))
