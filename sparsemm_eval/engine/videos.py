"""A video as a value: frames drawn evenly from its file, and when each is shown."""

from __future__ import annotations

import hashlib
import stat
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsemm_eval.errors import UserError

if TYPE_CHECKING:  # what decodes videos is not needed for images
    from av.container import InputContainer
    from av.video.frame import VideoFrame

_BLOCK = 1 << 20


@dataclass(frozen=True, eq=False)
class Video:
    """Frames of a video file, as a model is to see them.

    Parameters
    ----------
    frames : ndarray
        [frames, height, width, 3] uint8, RGB.
    places : tuple of int
        The number of each in the file, ascending; one may be there more than once.
    count : int
        Frames that they were drawn from: the file's, or those of the part that was asked for.
    fps : float
        Frames a second, on average.
    source : str
        SHA-256 of the file and of the part that was asked for: alike however frames are drawn.
    """

    frames: np.ndarray
    places: tuple[int, ...]
    count: int
    fps: float
    source: str

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of a frame in pixels."""
        return self.frames.shape[2], self.frames.shape[1]

    @property
    def metadata(self) -> dict[str, Any]:
        """What transformers' processors count positions and times by."""
        width, height = self.size
        return {
            "total_num_frames": self.count, "fps": self.fps, "width": width, "height": height,
            "duration": self.count / self.fps, "frames_indices": list(self.places),
        }  # fmt: skip

    def hash(self) -> str:
        """SHA-256 of all that a model gets of it: pixels, size and times."""
        words = f"video {self.frames.shape} {self.places} {self.count} {self.fps!r} "
        digest = hashlib.sha256(words.encode())
        digest.update(self.frames)
        return digest.hexdigest()


def check_decoder() -> None:
    """Refuse videos where nothing is installed that decodes them.

    Raises
    ------
    UserError
        In one sentence.
    """
    if find_spec("av") is None:
        raise UserError(
            "videos are decoded by PyAV, which is not installed: pip install 'av<16', which "
            "lmms-eval wants, or choose tasks without videos"
        )


def check_regular(path: Path) -> None:
    """Raise OSError unless it is a regular file: a pipe would be waited for without end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(f"{path} is no file but a folder, a pipe or a device")


def read_video(
    path: Path,
    choose: Callable[[int], np.ndarray],
    start: float | None = None,
    end: float | None = None,
) -> Video:
    """Decode frames of a video file, each exactly, wherever it lies.

    Parameters
    ----------
    path : Path
        In any format that FFmpeg reads.
    choose : callable
        Given how many frames there are, the numbers of those that are wanted, ascending.
    start, end : float, optional
        Seconds from the video's begin: frames are drawn from those shown between.

    Raises
    ------
    UserError
        If PyAV is not installed.
    OSError, ValueError
        If it is no regular file, or no video that can be decoded; PyAV's errors are of these too.
    """
    check_decoder()
    check_regular(path)
    with _opened(path) as container:
        stream = container.streams.video[0]
        packets = [
            (packet.pts, packet.is_keyframe)
            for packet in container.demux(stream)
            if packet.pts is not None and not packet.is_discard
        ]
        second, rate = 1 / stream.time_base, stream.average_rate
    shown = sorted(time for time, _ in packets)
    if not shown:
        raise ValueError(f"{path.name} has no frames that say when they are shown")
    first = 0 if start is None else bisect_left(shown, shown[0] + start * second)
    last = len(shown) if end is None else bisect_right(shown, shown[0] + end * second)
    if first >= last:
        raise ValueError(f"{path.name} has no frames from {start} to {end} seconds")
    places = choose(last - first) + first
    wanted = sorted({shown[place] for place in places})
    keys = [shown[0], *sorted(time for time, is_key in packets if is_key)]
    decoded = _frames_at(path, wanted, keys) or _frames_at(path, wanted, keys[:1])
    if decoded is None:
        raise ValueError(f"{path.name} ends before its last frame")
    found = dict(zip(wanted, decoded, strict=True))
    frames = np.stack([found[shown[place]] for place in places])
    rate = rate or len(shown) * second / max(shown[-1] - shown[0], second)
    source = _file_hash(path, f"{start} {end}")
    return Video(frames, tuple(places.tolist()), last - first, float(rate), source)


@contextmanager
def _opened(path: Path) -> Iterator[InputContainer]:
    """The file as FFmpeg reads it, its frames decoded on several threads."""
    import av

    # Named as a file: FFmpeg takes other names for addresses, lists and devices.
    with av.open(f"file:{path}") as container:
        if not container.streams.video:
            raise ValueError(f"{path.name} has no video in it")
        container.streams.video[0].thread_type = "AUTO"
        yield container


def _frames_at(path: Path, times: Sequence[int], keys: Sequence[int]) -> list[np.ndarray] | None:
    """Decode the frames shown at some times.

    Some packets have no frame of their own, and what is shown at their time is the next one.

    Parameters
    ----------
    path : Path
        The file.
    times : sequence of int
        Ascending, in units of the stream's time base.
    keys : sequence of int
        Times of frames that decoding may start at; from one alone it is decoded all the way.

    Returns
    -------
    list of ndarray or None
        [height, width, 3] each; None if one is not found that way.
    """
    found = []
    with _opened(path) as container:
        stream = container.streams.video[0]
        frames = _timed(container)
        frame = next(frames, None)
        for time in times:
            key = keys[bisect_right(keys, time) - 1]
            if frame is not None and frame.pts < key:
                container.seek(key, stream=stream)
                frames = _timed(container)
                frame = next(frames, None)
                if frame is None or frame.pts > key:  # not all formats can be sought in
                    return None
            while frame is not None and frame.pts < time:
                frame = next(frames, None)
            if frame is None:
                return None
            found.append(frame.to_ndarray(format="rgb24"))
    return found


def _timed(container: InputContainer) -> Iterator[VideoFrame]:
    """Frames that say when they are shown, from where the container stands."""
    stream = container.streams.video[0]
    return (frame for frame in container.decode(stream) if frame.pts is not None)


def _file_hash(path: Path, part: str) -> str:
    digest = hashlib.sha256(f"{part} ".encode())
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
