"""Videos as frames: uniformly sampled from a video file, a GIF, or a folder of pre-extracted frames."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dyvte.data import load_image
from dyvte.data.defects import is_of_sample, problem_text
from dyvte.errors import ConfigError, DataError
from dyvte.readers.decoding import GIF_RATE, Choose, with_av, with_decord
from dyvte.readers.rows import Row, shown
from dyvte.registry import unknown

VIDEO_EXTENSIONS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif")
FOLDER_RATE = 3.0
"""Frames a second of a folder of frames, as MVBench takes for granted; of a GIF `GIF_RATE`."""
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


def even_indices(num_there: int, num_wanted: int) -> list[int]:
    """The first frame of each of ``num_wanted`` equal parts, as transformers' ``default_sample_indices_fn``
    samples (``arange(wanted) * n // wanted``); all frames where there are fewer, which is an error there.

    Parameters
    ----------
    num_there
        Frames of the video.
    num_wanted
        Frames to choose.
    """
    if num_there <= num_wanted:
        return list(range(num_there))
    return [i * num_there // num_wanted for i in range(num_wanted)]


SAMPLINGS: dict[str, Callable[[int, int], list[int]]] = {
    "linspace": uniform_indices,
    "transformers": even_indices,
}
"""Ways to choose frames, by name."""


def read_frames(video: Video, num_frames: int, sampling: str = "linspace") -> list[Any]:
    """RGB PIL images, at most ``num_frames`` of them.

    Parameters
    ----------
    video
        What is read.
    num_frames
        Frames to choose.
    sampling
        How, by its name in `SAMPLINGS`. It counts frames, also where they are shown for unequal times.

    Raises
    ------
    DataError
        No frame, or unreadable.
    ConfigError
        A video file, and no decoder is installed.
    """
    if sampling not in SAMPLINGS:
        raise ConfigError(unknown("frame sampling", sampling, SAMPLINGS))

    def choose(times: Sequence[float]) -> list[int]:
        span = video.span
        meant = [n for n, time in enumerate(times) if span is None or span[0] <= time <= span[1]]
        return [meant[n] for n in SAMPLINGS[sampling](len(meant), num_frames)]

    if video.path.is_dir():
        frames = _from_folder(video.path, choose)
    elif video.path.suffix.lower() == ".gif":
        frames = _from_gif(video.path, choose)
    else:
        frames = _from_file(video.path, choose)
    if not frames:
        raise DataError(f"{video.path} holds no frame{_said(video.span)}")
    return frames


def _said(span: tuple[float, float] | None) -> str:
    return "" if span is None else f" between {span[0]:g} and {span[1]:g} seconds"


def _from_folder(folder: Path, choose: Choose) -> list[Any]:
    files = [path for path in folder.iterdir() if path.suffix.lower() in FRAME_EXTENSIONS]
    files.sort(key=lambda path: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", path.name)])
    times = [n / FOLDER_RATE for n in range(len(files))]
    return [load_image(files[i]) for i in choose(times)]


def _from_gif(path: Path, choose: Choose) -> list[Any]:
    from PIL import Image

    try:
        with Image.open(path) as gif:
            frames = []
            times = [n / GIF_RATE for n in range(getattr(gif, "n_frames", 1))]
            for index in choose(times):
                gif.seek(index)
                frames.append(gif.convert("RGB"))
            return frames
    except Exception as error:  # what a damaged file makes its decoder raise is beyond listing
        if not is_of_sample(error):
            raise
        raise DataError(f"cannot read {path}: {problem_text(error)}") from error


def _from_file(path: Path, choose: Choose) -> list[Any]:
    for decode in (with_av, with_decord):
        try:
            return decode(path, choose)
        except ImportError:
            continue
        except DataError:
            raise
        except Exception as error:
            if not is_of_sample(error):
                raise
            raise DataError(f"cannot read video {path}: {problem_text(error)}") from error
    raise ConfigError(
        f"reading {path} needs a video decoder: pip install av (or decord). Or extract frames beforehand "
        f"into a folder of images named {path.stem}/, in the same place"
    )
