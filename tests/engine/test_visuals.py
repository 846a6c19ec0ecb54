"""Images of a task's documents, for the report."""

import pytest
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
