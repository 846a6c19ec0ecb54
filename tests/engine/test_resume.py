"""Runs that end early, fail in part or come again: nothing is lost, nothing is done twice."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from engine.fixtures import SHORT, ask, log, pages, photo, rows, sentence, to_messages
from lmms_eval.models.model_utils.gen_metrics import get_logged_metrics_history
from PIL import Image, ImageFile, UnidentifiedImageError

from sparsemm_eval.engine.answers import AnswerStore, SampleFailures
from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.lmms import Qwen2VLSparseMM
from sparsemm_eval.tiny import default_checkpoint

MakeQwen = Callable[..., Qwen2VLSparseMM]


def own_model(answers: Path, **settings: Any) -> Qwen2VLSparseMM:
    """A model with a checkpoint of its own, as the command line makes it."""
    given = {"pretrained": str(default_checkpoint()), "dtype": "float32", "answers": str(answers)}
    return Qwen2VLSparseMM(**given | {"method": "fullkv"} | settings)


def cut_off(image: Image.Image, folder: Path) -> Image.Image:
    """The image as a PNG file that ends in the middle: it opens, and breaks when read."""
    assert ImageFile.LOAD_TRUNCATED_IMAGES, "lmms-eval has such images filled up"
    file = io.BytesIO()
    image.save(file, "PNG")
    return Image.open(io.BytesIO(file.getvalue()[: file.tell() // 2]))


def cut_off_file(image: Image.Image, folder: Path) -> str:
    """Path of a JPEG file that ends in the middle."""
    path = folder / "page.jpg"
    image.convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return str(path)


def garbage(image: Image.Image, folder: Path) -> str:
    """Path of a file that is no image."""
    path = folder / "page.png"
    path.write_bytes(image.tobytes()[:500])
    return str(path)


def missing(image: Image.Image, folder: Path) -> str:
    """Path of a file that is not there."""
    return str(folder / "nowhere.png")


def failed(answers: Path) -> list[str]:
    """Documents with a stored error and no text."""
    return [row.doc_id for row in rows(answers) if row.text is None]


# --- again --------------------------------------------------------------------------------------


def test_a_rerun_computes_nothing_and_says_so(
    answers: Path, request: pytest.FixtureRequest
) -> None:
    documents = pages(4)
    first = ask(own_model(answers, batch_size=2), documents)
    stored = rows(answers)
    assert len(stored) == 4
    request.getfixturevalue("unloaded")
    with log() as lines:
        assert ask(own_model(answers, batch_size=3), documents) == first
    assert rows(answers) == stored
    assert [line for line in lines if line.startswith("INFO") and "4 answers of this cell" in line]
    metrics = get_logged_metrics_history()[-1]
    assert (metrics["samples"], metrics["samples_found"]) == (4, 4)
    assert (metrics["total_gen_tokens"], metrics["total_elapsed_time"]) == (0, 0)


def test_more_documents_compute_only_what_is_new(qwen: MakeQwen, answers: Path) -> None:
    documents = pages(5)
    first = ask(qwen(batch_size=2), documents[:3])
    assert ask(qwen(batch_size=2), documents)[:3] == first
    assert [row.doc_id for row in rows(answers)] == [f"test {n}" for n in range(5)]
    assert get_logged_metrics_history()[-1]["samples_found"] == 3


def test_a_changed_setting_computes_anew(qwen: MakeQwen, answers: Path) -> None:
    documents = pages(2)
    ask(qwen(method="snapkv", budget=64, window=8), documents)
    with log() as lines:
        ask(qwen(method="snapkv", budget=96, window=8), documents)
    assert not [line for line in lines if "answers of this cell" in line]
    assert len({row.key for row in rows(answers)}) == len(rows(answers)) == 4


def test_a_batch_is_on_disk_before_the_next_is_read(qwen: MakeQwen, answers: Path) -> None:
    """A run that is interrupted leaves every batch that was done."""

    class Interrupted(list):
        def __getitem__(self, number: int) -> Any:
            if number == 4:
                raise KeyboardInterrupt
            return super().__getitem__(number)

    with pytest.raises(KeyboardInterrupt):
        ask(qwen(batch_size=2), Interrupted(pages(6)))
    assert [row.doc_id for row in rows(answers)] == [f"test {n}" for n in range(4)]


def test_what_was_measured_is_reported(qwen: MakeQwen, answers: Path) -> None:
    ask(qwen(method="snapkv", budget=300, window=8, batch_size=4), pages(4))
    records = [row.record for row in rows(answers)]
    metrics = get_logged_metrics_history()[-1]
    assert metrics["nominal_tokens_per_head"] == 300
    assert metrics["share_uncompressed"] == 0.25
    for name, stored in (
        ("kept_tokens_per_head", "kept_per_head"),
        ("kept_kv_bytes", "kept_bytes"),
        ("prompt_tokens", "prompt_tokens"),
    ):
        assert metrics[name] == pytest.approx(sum(record[stored] for record in records) / 4)
    assert metrics["total_gen_tokens"] == sum(record["new_tokens"] for record in records)


def test_weights_are_given_back_unless_they_are_shared(
    qwen: MakeQwen, reader: Checkpoint, answers: Path
) -> None:
    own = own_model(answers)
    shared = qwen()
    for model in (own, shared):
        before = ask(model, pages(1))
        weights = model.runner.checkpoint.model
        model.clean()
        assert (model.runner.checkpoint.model is weights) == (model is shared)
        assert ask(model, pages(1)) == before


def test_no_request_at_all(qwen: MakeQwen) -> None:
    assert ask(qwen(), []) == []


# --- one bad sample -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (cut_off, "OSError: "),
        (cut_off_file, "OSError: image file is truncated"),
        (garbage, "UnidentifiedImageError: cannot identify image file"),
        (missing, "FileNotFoundError: "),
    ],
)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_broken_image_fails_alone(
    qwen: MakeQwen,
    answers: Path,
    tmp_path: Path,
    spoil: Callable[..., Any],
    cause: str,
    batch_size: int,
) -> None:
    documents = pages(6)
    broken = [dict(document) for document in documents]
    broken[2]["images"] = [spoil(documents[2]["images"][0], tmp_path)]
    with pytest.raises(SampleFailures, match="1 samples failed") as caught, log() as lines:
        ask(qwen(batch_size=batch_size), broken)
    assert f"pages test 2: {cause}" in sentence(caught)
    assert str(answers) in sentence(caught)
    assert [line for line in lines if line.startswith("ERROR") and "test 2" in line]
    assert failed(answers) == ["test 2"]
    (error,) = (row.error for row in rows(answers) if row.error)
    assert error.startswith(cause)
    before = [row for row in rows(answers) if row.text is not None]
    assert len(before) == 5
    said = ask(qwen(batch_size=batch_size), documents)
    after = [row for row in rows(answers) if row not in before and row.text is not None]
    assert [row.doc_id for row in after] == ["test 2"]
    by_document = {row.doc_id: row.text for row in [*before, *after]}
    assert said == [by_document[f"test {n}"] for n in range(6)]


def test_a_document_that_cannot_be_read_fails_alone(qwen: MakeQwen, answers: Path) -> None:
    """The data set itself raises, as where it decodes its images on access."""

    class Broken(list):
        def __getitem__(self, number: int) -> Any:
            if number == 1:
                raise UnidentifiedImageError("cannot\nidentify image file")
            return super().__getitem__(number)

    with pytest.raises(SampleFailures) as caught:
        ask(qwen(batch_size=2), Broken(pages(4)))
    assert "pages test 1: UnidentifiedImageError: cannot identify image file" in sentence(caught)
    assert failed(answers) == ["test 1"]
    assert len(rows(answers)) == 4
    ask(qwen(batch_size=2), pages(4))
    assert len(rows(answers)) == 5


@pytest.mark.parametrize("culprit", [0, 5, 7])
def test_a_batch_that_fails_is_halved_until_the_culprit_stands_alone(
    qwen: MakeQwen, answers: Path, tmp_path: Path, culprit: int
) -> None:
    """Qwen2-VL's own image processor refuses an image that is 256 times as wide as high."""
    documents = pages(8)
    expected = ask(qwen(batch_size=8, answers=tmp_path / "undisturbed"), documents)
    broken = [dict(document) for document in documents]
    broken[culprit]["images"] = [photo(4096, 16)]
    with pytest.raises(SampleFailures, match="1 samples failed") as caught:
        ask(qwen(batch_size=8), broken)
    assert f"pages test {culprit}: ValueError: absolute aspect ratio" in sentence(caught)
    assert failed(answers) == [f"test {culprit}"]
    assert {row.doc_id: row.text for row in rows(answers)} == {
        f"test {n}": None if n == culprit else text for n, text in enumerate(expected)
    }
    with pytest.raises(SampleFailures):
        ask(qwen(batch_size=8), broken)
    assert len({row.key for row in rows(answers)}) == 8
    assert len(failed(answers)) == 2


def test_two_culprits_in_a_batch(qwen: MakeQwen, answers: Path) -> None:
    broken = pages(5)
    for culprit in (1, 2):
        broken[culprit]["images"] = [photo(4096, 16)]
    with pytest.raises(SampleFailures, match="2 samples failed"):
        ask(qwen(batch_size=5), broken)
    assert sorted(failed(answers)) == ["test 1", "test 2"]
    assert len(rows(answers)) == 5


def test_a_failure_that_is_asked_for_twice_is_one(qwen: MakeQwen, answers: Path) -> None:
    """As where lmms-eval clones a request to fill up a rank."""
    broken = pages(2)
    broken[1]["images"] = ["nowhere.png"]
    with pytest.raises(SampleFailures, match="1 samples failed"):
        ask(qwen(), broken, repeats=2)
    assert failed(answers) == ["test 1"]


def test_sound_is_refused(qwen: MakeQwen) -> None:
    def with_media(document: Mapping[str, Any]) -> list[dict[str, Any]]:
        (message,) = to_messages(document)
        return [message | {"content": [*message["content"], {"type": "audio", "url": "song.wav"}]}]

    with pytest.raises(SampleFailures, match="no sound") as caught:
        ask(qwen(), pages(1), messages=with_media)
    sentence(caught)
    # A task of nothing else ends the run, in one sentence.
    with pytest.raises(ValueError, match=r"^pages: images, videos and text are read, no sound"):
        ask(qwen(), pages(9), messages=with_media)


# --- no sample's fault --------------------------------------------------------------------------


def test_weights_that_cannot_be_loaded_end_the_run(answers: Path) -> None:
    with pytest.raises(ValueError, match="attn_implementation") as caught:
        ask(own_model(answers, attn_implementation="nonsense", batch_size=4), pages(6))
    sentence(caught)
    assert rows(answers) == []


def test_a_full_disk_ends_the_run(
    qwen: MakeQwen, answers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is not taken for the error of a sample."""
    write = AnswerStore.write

    def full(store: AnswerStore, batch: list) -> None:
        if rows(answers):
            raise OSError("an answer could not be written")
        write(store, batch)

    documents = pages(5)
    with monkeypatch.context() as patch:
        patch.setattr(AnswerStore, "write", full)
        with pytest.raises(OSError, match="could not be written"):
            ask(qwen(batch_size=2), documents)
    assert [row.doc_id for row in rows(answers)] == ["test 0", "test 1"]
    ask(qwen(batch_size=2), documents, SHORT)
    assert [row.doc_id for row in rows(answers)] == [f"test {n}" for n in range(5)]


def test_a_broken_answers_file_is_computed_again(qwen: MakeQwen, answers: Path) -> None:
    first = ask(qwen(), pages(2))
    (path,) = answers.iterdir()
    path.write_bytes(path.read_bytes()[:9000])
    with log() as lines:
        assert ask(qwen(), pages(2)) == first
    assert [line for line in lines if str(path) in line and "is set aside" in line]
    assert path.with_name(f"{path.name}.broken").exists()
    assert [row.doc_id for row in rows(answers)] == ["test 0", "test 1"]
