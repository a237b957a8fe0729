"""Small video files, encoded here: each frame is of one grey, so that a decoded one tells which it is."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

STEP = 8
"""Grey levels from one frame to the next."""


def write_clip(
    path: Path,
    frames: int = 30,
    *,
    size: int = 32,
    seconds: Sequence[float] | None = None,
    codec: str = "libx264",
    images: Sequence[np.ndarray] | None = None,
) -> Path:
    """An mp4 (or what the name says) whose index stands in front of its frames.

    Parameters
    ----------
    seconds
        When each frame is shown; None: ten a second.
    images
        (H, W, 3) uint8 frames in place of the grey ones.
    """
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    if images is None:
        images = [np.full((size, size, 3), n * STEP % 256, np.uint8) for n in range(frames)]
    options = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = size, size, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for n, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts = round(1000 * (seconds[n] if seconds is not None else n / 10))
            frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def shown_in(frames: Sequence[object]) -> list[int]:
    """Which of `write_clip`'s grey frames these are."""
    return [round(float(np.asarray(frame).mean()) / STEP) for frame in frames]
