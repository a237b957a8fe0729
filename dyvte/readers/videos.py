"""Videos as frames: uniformly sampled from a video file, a GIF, or a folder of pre-extracted frames."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dyvte.data import load_image
from dyvte.data.defects import is_of_sample, problem_text
from dyvte.errors import ConfigError, DataError
from dyvte.readers.rows import Row, shown

VIDEO_EXTENSIONS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif")
FOLDER_RATE, GIF_RATE = 3.0, 25.0
"""Frames a second that MVBench takes for granted where a folder or a GIF does not say."""
FRAME_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Video:
    """A video file, or a folder of frames in the order of the numbers in their names.

    Attributes
    ----------
    path : Path
    span : (float, float), optional
        Only the frames between these seconds are meant.
    """

    path: Path
    span: tuple[float, float] | None = None

    @property
    def name(self) -> str:
        """File or folder name."""
        return self.path.name


def find_video(row: Row, folders: Sequence[Path], name: str) -> Video:
    """The first there is of ``<folder>/<name>/`` (frames) and ``<folder>/<name>.<extension>``; where there is
    none, a video whose path does not exist.

    Raises
    ------
    DataError
        The name, which ``row`` gives, leads out of the folders.
    """
    if not name or "/" in name or "\\" in name or name in (".", ".."):
        raise row.error(f"{shown(name)} is no video name: expected a name without folders")
    try:
        for folder in folders:
            if (folder / name).is_dir():
                return Video(folder / name)
            for extension in VIDEO_EXTENSIONS:
                for candidate in (folder / f"{name}{extension}", folder / f"{name}{extension.upper()}"):
                    if candidate.is_file():
                        return Video(candidate)
    except OSError as error:
        raise row.error(f"{shown(name)} is no video name: {error.strerror or error}") from error
    return Video(folders[0] / name)


def uniform_indices(num_there: int, num_wanted: int) -> list[int]:
    """Indices of ``num_wanted`` frames from the first to the last at equal steps, rounded down, as
    Video-LLaVA and lmms-eval sample (``linspace(0, n - 1, wanted)``); all frames where there are fewer.

    Parameters
    ----------
    num_there
        Frames of the video.
    num_wanted
        Frames to choose.
    """
    if num_there <= num_wanted:
        return list(range(num_there))
    if num_wanted == 1:
        return [0]
    return [i * (num_there - 1) // (num_wanted - 1) for i in range(num_wanted)]


def read_frames(video: Video, num_frames: int) -> list[Any]:
    """RGB PIL images, at most ``num_frames`` of them.

    Raises
    ------
    DataError
        No frame, or unreadable.
    ConfigError
        A video file, and no decoder is installed.
    """
    if video.path.is_dir():
        frames = _from_folder(video, num_frames)
    elif video.path.suffix.lower() == ".gif":
        frames = _from_gif(video, num_frames)
    else:
        frames = _from_file(video, num_frames)
    if not frames:
        raise DataError(f"{video.path} holds no frame{_said(video.span)}")
    return frames


def _said(span: tuple[float, float] | None) -> str:
    return "" if span is None else f" between {span[0]:g} and {span[1]:g} seconds"


def _wanted(times: Sequence[float], span: tuple[float, float] | None, num_frames: int) -> list[int]:
    """Which frames are taken of those that are shown at these times, in seconds."""
    meant = [n for n, time in enumerate(times) if span is None or span[0] <= time <= span[1]]
    return [meant[n] for n in uniform_indices(len(meant), num_frames)]


def _from_folder(video: Video, num_frames: int) -> list[Any]:
    files = [path for path in video.path.iterdir() if path.suffix.lower() in FRAME_EXTENSIONS]
    files.sort(key=lambda path: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", path.name)])
    times = [n / FOLDER_RATE for n in range(len(files))]
    return [load_image(files[i]) for i in _wanted(times, video.span, num_frames)]


def _from_gif(video: Video, num_frames: int) -> list[Any]:
    from PIL import Image

    try:
        with Image.open(video.path) as gif:
            frames = []
            times = [n / GIF_RATE for n in range(getattr(gif, "n_frames", 1))]
            for index in _wanted(times, video.span, num_frames):
                gif.seek(index)
                frames.append(gif.convert("RGB"))
            return frames
    except Exception as error:  # what a damaged file makes its decoder raise is beyond listing
        if not is_of_sample(error):
            raise
        raise DataError(f"cannot read {video.path}: {problem_text(error)}") from error


def _from_file(video: Video, num_frames: int) -> list[Any]:
    path = video.path
    for decode in (_with_av, _with_decord):
        try:
            return decode(path, video.span, num_frames)
        except ImportError:
            continue
        except Exception as error:
            if not is_of_sample(error):
                raise
            raise DataError(f"cannot read video {path}: {problem_text(error)}") from error
    raise ConfigError(
        f"reading {path} needs a video decoder: pip install av (or decord). Or extract frames beforehand "
        f"into a folder of images named {path.stem}/, in the same place"
    )


def _with_av(path: Path, span: tuple[float, float] | None, num_frames: int) -> list[Any]:
    import av

    with av.open(str(path)) as container:
        times = [frame.time or 0.0 for frame in container.decode(video=0)]
    wanted = set(_wanted(times, span, num_frames))
    with av.open(str(path)) as container:
        return _chosen((frame.to_image() for frame in container.decode(video=0)), wanted)


def _chosen(frames: Iterable[Any], wanted: set[int]) -> list[Any]:
    return [frame for index, frame in enumerate(frames) if index in wanted]


def _with_decord(path: Path, span: tuple[float, float] | None, num_frames: int) -> list[Any]:
    import decord
    from PIL import Image

    reader = decord.VideoReader(str(path))
    rate = float(reader.get_avg_fps()) or GIF_RATE
    indices = _wanted([n / rate for n in range(len(reader))], span, num_frames)
    return [Image.fromarray(frame) for frame in reader.get_batch(indices).asnumpy()]
