"""Videos as values: the frames that are drawn are the file's own, and a file that is none fails."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from engine.family_checkpoints import build_qwen2
from engine.fixtures import ask, film, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BatchFeature

from sparsemm_eval.engine import videos
from sparsemm_eval.engine.answers import SampleFailures
from sparsemm_eval.engine.checkpoint import Checkpoint
from sparsemm_eval.engine.lmms import SparseMM
from sparsemm_eval.engine.requests import Video, read_chat, to_model
from sparsemm_eval.engine.videos import read_video
from sparsemm_eval.errors import UserError
from sparsemm_eval.families import find_family

COUNT, SIZE = 33, (48, 32)
KINDS = {
    "key frames, and frames between them": ("a.mp4", "mpeg4"),
    "in an old container": ("a.avi", "mpeg4"),
    "in one that cannot be sought in exactly": ("a.ts", "mpeg2video"),
    "in one that does not count frames": ("a.mkv", "mpeg4"),
}


def asking(url: object, **times: float) -> list[dict]:
    """A turn about a video."""
    content = [{"type": "video", "url": url, **times}, {"type": "text", "text": "What is it?"}]
    return [{"role": "user", "content": content}]


class _Template:
    """What is asked of a processor before the model's inputs are."""

    video_token = "<video>"

    def __init__(self, prompt: str = "<video>What is it?") -> None:
        self.prompt = prompt

    def apply_chat_template(self, *_: object, **__: object) -> str:
        return self.prompt


@pytest.fixture(scope="module", params=KINDS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name, codec = KINDS[request.param]
    return film(tmp_path_factory.mktemp("films") / name, COUNT, SIZE, codec=codec)


def every_frame(path: Path) -> np.ndarray:
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


@settings(max_examples=15, deadline=None)
@given(places=st.lists(st.integers(0, COUNT - 1), min_size=1, max_size=6).map(sorted))
def test_drawn_frames_are_those_of_the_file(path: Path, places: list[int]) -> None:
    read = read_video(path, lambda count: np.array(places))
    assert np.array_equal(read.frames, every_frame(path)[places])
    assert read.places == tuple(places)
    assert (read.count, read.fps, read.size) == (COUNT, pytest.approx(8), SIZE)


def test_frames_are_drawn_from_a_part(path: Path) -> None:
    read = read_video(path, np.arange, start=1, end=2)
    assert read.places == tuple(range(8, 17))
    assert np.array_equal(read.frames, every_frame(path)[8:17])
    assert read_video(path, np.arange, end=0.25).places == (0, 1, 2)
    assert read_video(path, np.arange, start=4).places == (32,)
    with pytest.raises(ValueError, match="no frames from 9 to 10 seconds"):
        read_video(path, np.arange, start=9, end=10)


def test_a_hash_is_of_all_that_a_model_gets(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", COUNT, SIZE)
    one, few, part = (
        read_video(path, lambda count, n=n: np.linspace(0, count - 1, n, dtype=int), end=end)
        for n, end in ((4, None), (3, None), (4, 2.0))
    )
    again = read_video(shutil.copy(path, tmp_path / "b.mp4"), lambda count: np.array(one.places))
    slower = Video(one.frames, one.places, one.count, one.fps / 2, one.source)
    hashes = [video.hash() for video in (one, few, part, slower)]
    assert len(set(hashes)) == 4
    assert again.hash() == one.hash()
    # What a document shows is no setting's matter.
    assert one.source == few.source == again.source != part.source


def test_how_many_frames_are_drawn() -> None:
    qwen, onevision = find_family("qwen2_5_vl"), find_family("llava_onevision")
    assert qwen().frame_places(1000).tolist()[:2] == [0, 32]
    assert len(qwen().frame_places(1000)) == len(onevision().frame_places(1000)) == 32
    # Two frames make a token of Qwen's; of a short video there are fewer.
    assert qwen(frames=7).frame_places(20).tolist() == [0, 4, 8, 11, 15, 19]
    assert qwen().frame_places(5).tolist() == [0, 1, 3, 4]
    assert qwen().frame_places(1).tolist() == [0, 0]
    # OneVision's are of one number, so that they can be read together.
    assert onevision(frames=6).frame_places(3).tolist() == [0, 0, 0, 1, 1, 2]
    with pytest.raises(UserError, match="frames=0: it must be an integer of at least 1"):
        qwen(frames=0)


def test_files_that_are_none(tmp_path: Path) -> None:
    whole = film(tmp_path / "whole.mp4", COUNT, SIZE).read_bytes()
    files = {"empty": b"", "text": b"no video", "cut off": whole[: len(whole) // 2]}
    for name, content in files.items():
        file = tmp_path / name
        file.write_bytes(content)
        with pytest.raises(ValueError, match="Invalid data"):
            read_video(file, np.arange)
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(OSError, match="is no file but a folder, a pipe or a device"):
            read_video(tmp_path / name, np.arange)
    with pytest.raises(FileNotFoundError):
        read_video(tmp_path / "nowhere.mp4", np.arange)
    with av.open(str(tmp_path / "sound.wav"), "w") as file:
        stream = file.add_stream("pcm_s16le", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        silence.sample_rate = 8000
        file.mux(stream.encode(silence))
    with pytest.raises(ValueError, match=r"sound\.wav has no video in it"):
        read_video(tmp_path / "sound.wav", np.arange)


def test_what_decodes_videos_may_be_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(videos, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="decoded by PyAV, which is not installed: pip install"):
        read_chat(None, asking(str(tmp_path / "a.mp4")), find_family("qwen2_vl")())


def test_a_family_without_videos_names_those_that_read_them() -> None:
    with pytest.raises(UserError, match="of a llava_next model only images and text are read"):
        read_chat(None, asking("a.mp4"), find_family("llava_next")())


def test_lmms_eval_may_say_where_a_part_begins(tmp_path: Path) -> None:
    """As a dict in the place of a path, out of doc_to_visual; or in fields, out of messages."""
    path = str(film(tmp_path / "a.mp4", COUNT, SIZE))
    family, processor = find_family("qwen2_vl")(frames=4), _Template()
    for url, times in (
        ({"type": "video", "path": path, "video_start": 1, "video_end": 2}, {}),
        (path, {"start_time": 1, "end_time": 2}),
    ):
        (video,) = read_chat(processor, asking(url, **times), family).visuals
        assert video.places == (8, 11, 13, 16)


def test_seconds_between_frames_stay_exact() -> None:
    """Positions are made of them: in half precision some would be another's."""
    seconds = torch.tensor([16 / 15])
    inputs = BatchFeature({"pixel_values_videos": torch.ones(2), "second_per_grid_ts": seconds})
    model = SimpleNamespace(device="cpu", dtype=torch.bfloat16)
    read = to_model(inputs, model)
    assert read["pixel_values_videos"].dtype == torch.bfloat16
    assert torch.equal(read["second_per_grid_ts"], seconds)


def test_a_chat_template_without_videos_is_named(tmp_path: Path) -> None:
    path = str(film(tmp_path / "a.mp4", COUNT, SIZE))
    with pytest.raises(UserError, match="the checkpoint's chat template leaves it out: mend"):
        read_chat(_Template("What is it?"), asking(path), find_family("qwen2_vl")())


def test_a_run_names_the_video_that_fails_and_keeps_the_others(tmp_path: Path) -> None:
    folder = build_qwen2(tmp_path / "model")
    checkpoint = Checkpoint(folder, dtype="float32")
    paths = [tmp_path / f"{number}.mp4" for number in range(3)]
    for number, path in enumerate(paths):
        film(path, COUNT, SIZE, seed=number)

    def run(frames: int = 4) -> list[str]:
        given = {"method": "fullkv", "answers": tmp_path / "answers", "frames": frames}
        model = SparseMM(checkpoint=checkpoint, batch_size=2, **given)
        return ask(model, [str(path) for path in paths], messages=asking)

    good = run()
    assert run() == good
    assert len(rows(tmp_path / "answers")) == 3  # found again
    run(frames=6)
    assert len(rows(tmp_path / "answers")) == 6
    paths[1].write_bytes(b"")
    with pytest.raises(SampleFailures, match=r"1 samples failed.*pages test 1: InvalidDataError"):
        run()
    # Another film of that name is another answer's.
    film(paths[1], COUNT, SIZE, seed=9)
    run()
    found = [row for row in rows(tmp_path / "answers") if row.error is None]
    assert len({row.key for row in found}) == len(found) == 7
