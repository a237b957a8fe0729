"""Frames out of video files: with PyAV (``pip install dyvte[video]``), or with decord.

A file is looked through without decoding first: that says how many frames there are and when each is shown.
Only frames up to the last wanted one are decoded then. A file that ends before what it promises is a defect,
never a shorter video.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dyvte.errors import DataError

Choose = Callable[[Sequence[float]], list[int]]
"""From the times of all frames, in seconds, to the indices of those that are wanted, rising."""
GIF_RATE = 25.0
"""Frames a second where a file does not say."""


def with_av(path: Path, choose: Choose) -> list[Any]:
    """RGB PIL images of the chosen frames.

    Parameters
    ----------
    path
        The file.
    choose
        Which frames.

    Raises
    ------
    DataError
        If the file holds no video, or breaks off. What the decoder raises is passed on.
    ImportError
        PyAV is not installed.
    """
    import av

    with av.open(str(path)) as container:
        times = _times(path, container)
        wanted = choose(times)
        container.seek(0)
        frames = _decoded(container, wanted)
    if len(frames) < len(set(wanted)):
        # Packets are not frames in some files: count what is decoded.
        with av.open(str(path)) as container:
            times = [_second(frame, n) for n, frame in enumerate(container.decode(video=0))]
            wanted = choose(times)
            container.seek(0)
            frames = _decoded(container, wanted)
    if len(frames) < len(set(wanted)):
        raise DataError(f"{path} breaks off: frame {max(wanted)} cannot be decoded")
    return [frames[index] for index in wanted]


def with_decord(path: Path, choose: Choose) -> list[Any]:
    """As `with_av`; decord itself knows how many frames there are."""
    import decord
    from PIL import Image

    reader = decord.VideoReader(str(path))
    rate = float(reader.get_avg_fps()) or GIF_RATE
    indices = choose([n / rate for n in range(len(reader))])
    return [Image.fromarray(frame) for frame in reader.get_batch(indices).asnumpy()]


def _times(path: Path, container: Any) -> list[float]:
    """When each frame is shown, from the packets alone."""
    if not container.streams.video:
        raise DataError(f"{path} holds no video stream")
    stream = container.streams.video[0]
    promised = len(stream.index_entries) if "mp4" in container.format.name else 0
    shown, packets = [], 0
    for packet in container.demux(stream):
        if not packet.size:
            continue  # the flush at the end
        packets += 1
        if packet.is_corrupt:
            raise DataError(f"{path} breaks off within frame {packets}")
        if not packet.is_discard:
            pts = packet.pts if packet.pts is not None else packet.dts
            shown.append(len(shown) / GIF_RATE if pts is None else float(pts * packet.time_base))
    if packets < promised:
        raise DataError(f"{path} breaks off: it promises {promised} frames and holds {packets}")
    return sorted(shown)


def _decoded(container: Any, wanted: Sequence[int]) -> dict[int, Any]:
    frames: dict[int, Any] = {}
    if not wanted:
        return frames
    last, needed = max(wanted), set(wanted)
    for index, frame in enumerate(container.decode(video=0)):
        if index in needed:
            frames[index] = frame.to_image()
        if index >= last:
            break
    return frames


def _second(frame: Any, index: int) -> float:
    return index / GIF_RATE if frame.time is None else float(frame.time)
