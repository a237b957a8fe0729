"""Images of every mode as 8-bit RGB: PIL's own conversion, and more than 8 bits scaled, not clipped."""

from __future__ import annotations

import struct
import warnings
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dyvte.data import EmbeddedImage, load_image
from dyvte.data.images import as_rgb
from dyvte.errors import DataError

RAMP = np.linspace(0, 1, 64 * 48).reshape(48, 64)
GREY = np.rint(RAMP * 255).astype(np.uint8)


def saved(image: Image.Image, kind: str, **options) -> EmbeddedImage:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return EmbeddedImage(stream.getvalue())


def channel(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    values = np.asarray(image)
    assert (values == values[..., :1]).all()
    return values[..., 0]


def plain_pgm(samples: np.ndarray, most: int) -> EmbeddedImage:
    head = f"P5 {samples.shape[1]} {samples.shape[0]} {most}\n".encode()
    return EmbeddedImage(head + samples.astype(">u2").tobytes())


def tiff(samples: np.ndarray, *, big_endian: bool, kind: int = 1) -> EmbeddedImage:
    """A TIFF of one strip, written by hand; ``kind`` is its SampleFormat (1 unsigned, 2 signed, 3 float)."""
    order = ">" if big_endian else "<"
    data = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    height, width = samples.shape
    tags = [(256, width), (257, height), (258, 8 * samples.dtype.itemsize), (259, 1), (262, 1), (273, 8)]
    tags += [(277, 1), (278, height), (279, len(data)), (339, kind)]
    listed = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    head = struct.pack(f"{order}2sHI", b"MM" if big_endian else b"II", 42, 8 + len(data))
    return EmbeddedImage(head + data + struct.pack(f"{order}H", len(tags)) + listed + bytes(4))


SIXTEEN = np.rint(RAMP * 65535).astype(np.uint16)


@pytest.mark.parametrize(
    "picture",
    [
        saved(Image.fromarray(SIXTEEN), "PNG"),
        saved(Image.fromarray(SIXTEEN), "TIFF"),
        saved(Image.fromarray(SIXTEEN), "TIFF", compression="tiff_lzw"),
        tiff(SIXTEEN, big_endian=False),
        tiff(SIXTEEN, big_endian=True),
        plain_pgm(SIXTEEN, 65535),
    ],
    ids=["png", "tiff", "lzw", "little", "big", "pgm"],
)
def test_sixteen_bits_are_divided_by_257(picture: EmbeddedImage) -> None:
    assert np.array_equal(channel(load_image(picture)), np.rint(SIXTEEN / 257).astype(np.uint8))


def test_every_grey_survives_widening() -> None:
    grey = np.arange(256, dtype=np.uint16)[None]
    assert np.array_equal(channel(as_rgb(Image.fromarray(grey * 257))), grey.astype(np.uint8))


def test_twelve_bits_of_a_pgm_are_scaled_by_its_own_white() -> None:
    most = 4095
    samples = np.rint(RAMP * most).astype(np.uint16)
    assert np.abs(channel(load_image(plain_pgm(samples, most))) - RAMP * 255).max() <= 1


def test_colors_of_sixteen_bits_are_pils_high_bytes() -> None:
    """PIL opens them as 8 bits itself: within one level of the division."""
    color = np.stack([SIXTEEN, SIXTEEN[::-1], SIXTEEN.T.reshape(SIXTEEN.shape)], -1)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in color)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 64, 48, 16, 2, 0, 0, 0)
    png = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    found = np.asarray(load_image(EmbeddedImage(png)))
    assert np.abs(found - color / 257).max() <= 1


@pytest.mark.parametrize(("scale", "dtype"), [(1, np.float32), (255, np.float32), (255, np.int32)])
def test_ranges_that_speak_for_themselves_are_read(scale: int, dtype: type) -> None:
    samples = (RAMP * scale).astype(dtype) if dtype is np.float32 else GREY.astype(dtype)
    assert np.array_equal(channel(load_image(saved(Image.fromarray(samples), "TIFF"))), GREY)


def test_a_mask_of_zeros_and_ones_is_black_and_white() -> None:
    mask = (RAMP > 0.5).astype(np.int32)
    assert np.array_equal(channel(as_rgb(Image.fromarray(mask))), mask * 255)


@pytest.mark.parametrize(
    ("samples", "problem"),
    [
        ((RAMP * 65535).astype(np.int32), "32-bit integer samples from 0 to 65535"),
        ((RAMP * 300).astype(np.float32), "floating-point samples from 0 to 300"),
        ((RAMP - 0.5).astype(np.float32), "floating-point samples from -0.5 to 0.5"),
        (np.where(RAMP > 0.5, np.nan, RAMP).astype(np.float32), "floating-point samples from nan"),
        (np.where(RAMP > 0.5, np.inf, RAMP).astype(np.float32), "floating-point samples from 0 to inf"),
    ],
)
def test_ranges_that_cannot_be_told_are_refused_by_name(samples, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.tif"
    Image.fromarray(samples).save(path)
    with pytest.raises(DataError, match=rf"odd\.tif cannot be read as an image: {problem}"):
        load_image(path)


def test_signed_sixteen_bits_are_refused_where_they_leave_the_range() -> None:
    with pytest.raises(DataError, match="32-bit integer samples from -32768"):
        load_image(tiff((RAMP * 65535 - 32768).astype(np.int16), big_endian=False, kind=2))


COLOR = Image.fromarray(np.stack([GREY, GREY[::-1], 255 - GREY], -1))
ALPHA = Image.fromarray(GREY.T.reshape(GREY.shape))


def transparent_palette() -> EmbeddedImage:
    return saved(COLOR.convert("P"), "PNG", transparency=bytes(range(256)))


PIL_DOES = {
    "L": saved(COLOR.convert("L"), "PNG"),
    "1": saved(COLOR.convert("1"), "PNG"),
    "LA": saved(Image.merge("LA", (COLOR.convert("L"), ALPHA)), "PNG"),
    "P": saved(COLOR.convert("P"), "PNG"),
    "P, transparent": transparent_palette(),
    "RGBA": saved(Image.merge("RGBA", (*COLOR.split(), ALPHA)), "PNG"),
    "CMYK, JPEG": saved(COLOR.convert("CMYK"), "JPEG"),
    "CMYK, TIFF": saved(COLOR.convert("CMYK"), "TIFF"),
    "YCbCr": saved(COLOR.convert("YCbCr"), "JPEG"),
    "GIF, animated": saved(COLOR, "GIF", save_all=True, append_images=[COLOR.rotate(90)]),
    "WEBP, animated": saved(COLOR, "WEBP", save_all=True, append_images=[COLOR.rotate(90)], lossless=True),
    "PNG, animated": saved(COLOR, "PNG", save_all=True, append_images=[COLOR.rotate(90)]),
    "LAB, TIFF": saved(Image.merge("LAB", COLOR.split()), "TIFF"),
    "TIFF, two pages": saved(COLOR, "TIFF", save_all=True, append_images=[COLOR.rotate(90)]),
}


@pytest.mark.parametrize("name", PIL_DOES)
def test_other_modes_are_pils_own_conversion(name: str) -> None:
    picture = PIL_DOES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's own, about transparent palettes
        expected = Image.open(BytesIO(picture.data)).convert("RGB")
        found = load_image(picture)
    assert found.mode == "RGB"
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "quality": 95}])
def test_the_quick_check_of_an_image_finds_what_reading_it_finds(options: dict) -> None:
    """A JPEG cut at any place, and with any byte changed, is refused by both or by neither."""
    from dyvte.data.images import check_image

    rng = np.random.default_rng(0)
    stream = BytesIO()
    Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8)).save(stream, "JPEG", **options)
    whole = stream.getvalue()
    changed = []
    for _ in range(60):
        place = int(rng.integers(2, len(whole)))
        changed += [whole[:place], whole[:place] + bytes([int(rng.integers(256))]) + whole[place + 1 :]]

    def refused(read, data: bytes) -> bool:
        try:
            read(EmbeddedImage(data, "cut"))
        except DataError:
            return True
        return False

    verdicts = [(refused(load_image, data), refused(check_image, data)) for data in [whole, *changed]]
    assert verdicts[0] == (False, False)
    assert sum(full for full, _ in verdicts) > 50
    assert all(full == quick for full, quick in verdicts)
