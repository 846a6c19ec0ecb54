import pytest
from datasets import load_dataset

from sparsemm_eval.tiny import benchmarks
from sparsemm_eval.tiny.benchmarks import BENCHMARKS, build, docvqa, settings_key
from sparsemm_eval.tiny.documents import PAGE, Split, draw_document, stream

READ_BY_DOCVQA = {"image", "question", "answers", "questionId", "docId", "question_types"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets")
    return docvqa(folder, samples=3, seed=5)


def test_it_loads_as_docvqa_does(built, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    pages = load_dataset(str(built), name="DocVQA", split="validation", cache_dir=str(tmp_path))
    assert len(pages) == 3
    assert set(pages.column_names) >= READ_BY_DOCVQA
    for number, page in enumerate(pages):
        document = draw_document(stream(Split.BENCHMARK, 5, number), PAGE)
        assert page["image"].convert("RGB").tobytes() == document.image.tobytes()
        values = {f"?{entry.key}:": [entry.value] for entry in document.entries}
        assert page["answers"] == values[page["question"]]
        assert page["questionId"] == str(number)
        assert page["docId"] == number


def test_a_second_call_builds_nothing(built, monkeypatch):
    monkeypatch.setattr(benchmarks, "draw_document", None)
    assert docvqa(built.parent, samples=3, seed=5) == built
    assert [path.name for path in built.parent.iterdir()] == [built.name]


def test_the_key_depends_on_all_that_decides_the_content():
    drawn = BENCHMARKS["docvqa"]
    keys = {settings_key(drawn, 3, 5), settings_key(drawn, 4, 5), settings_key(drawn, 3, 6)}
    assert len(keys) == 3
    assert settings_key(drawn, 3, 5) == settings_key(drawn, 3, 5)


def test_a_build_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of ink")

    monkeypatch.setattr(benchmarks, "draw_document", fail)
    with pytest.raises(RuntimeError, match="out of ink"):
        docvqa(tmp_path, samples=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "samples", "seed"), [("nope", 1, 0), ("docvqa", 0, 0), ("docvqa", 1, -1)]
)
def test_bad_settings_are_refused(tmp_path, name, samples, seed):
    with pytest.raises(ValueError, match=r"no benchmark|samples"):
        build(name, tmp_path, samples, seed)
