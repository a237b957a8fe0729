"""Video files through a decoder: clips encoded here, frames held to transformers' own loader."""

from __future__ import annotations

import numpy as np
import pytest

from dyvte.errors import ConfigError, DataError
from dyvte.readers.videos import SAMPLINGS, Video, even_indices, read_frames
from tests.helpers.clips import shown_in, write_clip
from tests.helpers.mutations import mutated, seeded


def test_even_indices_are_transformers_own():
    video_utils = pytest.importorskip("transformers.video_utils")
    for there in (1, 2, 7, 30, 31, 100):
        for wanted in range(1, there + 1):
            metadata = video_utils.VideoMetadata(total_num_frames=there)
            expected = video_utils.default_sample_indices_fn(metadata, num_frames=wanted)
            assert even_indices(there, wanted) == expected.tolist()
    assert even_indices(3, 8) == [0, 1, 2]  # transformers refuses


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    pytest.importorskip("av")
    return write_clip(tmp_path_factory.mktemp("clips") / "a.mp4")


@pytest.mark.parametrize("num_frames", [1, 4, 7, 30])
def test_frames_are_those_of_transformers_loader(clip, num_frames):
    from transformers.video_utils import load_video

    expected, metadata = load_video(str(clip), num_frames=num_frames, backend="pyav")
    frames = read_frames(Video(clip), num_frames, "transformers")
    assert np.array_equal(np.stack([np.asarray(one) for one in frames]), expected)
    assert shown_in(frames) == list(metadata.frames_indices)


@pytest.mark.parametrize(("num_frames", "shown"), [(3, [0, 14, 29]), (1, [0]), (40, list(range(30)))])
def test_default_sampling_is_from_the_first_to_the_last_frame(clip, num_frames, shown):
    assert shown_in(read_frames(Video(clip), num_frames)) == shown
    assert shown == np.linspace(0, 29, min(num_frames, 30)).astype(int).tolist() or num_frames == 1


@pytest.mark.parametrize("name", ["a.mkv", "b.avi", "c.mov"])
def test_other_containers_and_codecs(tmp_path, clip, name):
    path = write_clip(tmp_path / name, 12, codec="mpeg4")
    assert shown_in(read_frames(Video(path), 3)) == [0, 5, 11]


def test_a_variable_rate_is_sampled_by_frames_and_cut_by_seconds(tmp_path, clip):
    seconds = [0.1 * n * (1 + n / 10) for n in range(20)]
    path = write_clip(tmp_path / "v.mp4", 20, seconds=seconds)
    assert shown_in(read_frames(Video(path), 4, "transformers")) == [0, 5, 10, 15]
    part = Video(path, (1.0, 3.0))
    meant = [n for n, second in enumerate(seconds) if 1.0 <= round(second, 3) <= 3.0]
    assert shown_in(read_frames(part, 50)) == meant
    with pytest.raises(DataError, match="no frame between 90 and 91 seconds"):
        read_frames(Video(path, (90, 91)), 2)


def test_a_clip_without_frames_or_without_video_is_named(tmp_path, clip):
    import av

    write_clip(tmp_path / "none.mp4", 0)
    with pytest.raises(DataError, match=r"none\.mp4"):
        read_frames(Video(tmp_path / "none.mp4"), 4)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(DataError, match=r"sound\.mp4 holds no video stream"):
        read_frames(Video(tmp_path / "sound.mp4"), 4)
    for name, content in (("empty.mp4", b""), ("text.mp4", b"not a video" * 30)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"cannot read video .*{name}"):
            read_frames(Video(tmp_path / name), 4)


def test_a_broken_tail_is_never_a_shorter_video(tmp_path, clip):
    import av

    whole = clip.read_bytes()
    with av.open(str(clip)) as container:
        ends = [packet.pos + packet.size for packet in container.demux(video=0) if packet.size]
    path = tmp_path / "tail.mp4"
    for end in (*ends[:-1:4], ends[7] - 3, ends[-1] - 1, 5 * len(whole) // 6):
        path.write_bytes(whole[:end])
        with pytest.raises(DataError, match=r"tail\.mp4 breaks off|cannot read video .*tail\.mp4"):
            read_frames(Video(path), 4)
    path.write_bytes(whole[: ends[-1]])
    assert shown_in(read_frames(Video(path), 3)) == [0, 14, 29]


def test_damaged_clips_are_frames_or_a_named_error(tmp_path, clip):
    draw, path, whole, refusals = seeded(20261129), tmp_path / "a.mp4", clip.read_bytes(), []
    for _ in range(60):
        path.write_bytes(mutated(whole, draw))
        try:
            assert read_frames(Video(path), 3)
        except DataError as error:
            refusals.append(str(error))
    assert 0 < len(refusals) < 60
    assert all(str(path) in text for text in refusals)


def test_an_unknown_sampling_names_the_nearest(clip):
    with pytest.raises(ConfigError, match="transformers"):
        read_frames(Video(clip), 3, "transformer")
    assert set(SAMPLINGS) == {"linspace", "transformers"}
