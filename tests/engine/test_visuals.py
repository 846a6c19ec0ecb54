"""Images of a task's documents, for the report."""

from pathlib import Path

import av
import numpy as np
import pytest
from engine.fixtures import film, photo
from PIL import Image

from sparsemm_eval.engine.tasks import visuals
from sparsemm_eval.errors import UserError


def test_they_are_those_of_the_documents_asked_for() -> None:
    two, one = visuals("docvqa_mini", [3, 7]), visuals("docvqa_mini", [7])
    assert list(two) == [3, 7]
    assert all(isinstance(image, Image.Image) for images in two.values() for image in images)
    assert [len(images) for images in two.values()] == [1, 1]
    assert two[7][0].tobytes() == one[7][0].tobytes()
    assert two[7][0].tobytes() != two[3][0].tobytes()


def test_of_a_video_it_is_one_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "song.wav").write_text("no video")
    shown = [str(film(tmp_path / "film.mp4", 9, (64, 48))), str(tmp_path / "song.wav"), 7]
    monkeypatch.setattr(
        "lmms_eval.api.task.ConfigurableTask.doc_to_visual", lambda *_: [*shown, photo(8, 8)]
    )
    still, image = visuals("docvqa_mini", [3])[3]
    with av.open(shown[0]) as file:
        fifth = list(file.decode(video=0))[4]
    assert np.array_equal(np.asarray(still), fifth.to_ndarray(format="rgb24"))
    assert image.size == (8, 8)


@pytest.mark.parametrize(("task", "docs", "words"), [
    ("no_such_task", [0], "there is no task no_such_task"),
    ("docvqa_mini", [200], "docvqa_mini has 200 documents, and none is number 200"),
])  # fmt: skip
def test_what_is_not_there_is_said(task: str, docs: list[int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        visuals(task, docs)


def test_a_document_that_the_task_cannot_show_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AttributeError("'NoneType' object has no attribute 'convert'")

    monkeypatch.setattr("lmms_eval.api.task.ConfigurableTask.doc_to_visual", fail)
    with pytest.raises(UserError, match=r"document 3 cannot be shown \(AttributeError"):
        visuals("docvqa_mini", [3])
