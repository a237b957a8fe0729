"""Square padding against LLaVA's published rule (llava/mm_utils.py), pixel for pixel."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from dyvte.backbones import image_padding, load_backbone, set_image_padding
from dyvte.backbones.padding import check_image_padding
from dyvte.data import load_image
from dyvte.errors import ConfigError, GateMismatchError
from tests.helpers.models import tiny_llava, tiny_processor

MEAN = (0.48145466, 0.4578275, 0.40821073)


def padded(image: Image.Image, mean: tuple[float, ...]) -> Image.Image:
    """The rule, written on arrays: a square of int(255 mean), the picture at (longer - shorter) // 2."""
    pixels = np.asarray(image)
    height, width, _ = pixels.shape
    side = max(height, width)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = [int(255 * x) for x in mean]
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = pixels
    return Image.fromarray(square)


def clip_like(image: Image.Image, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """CLIP preprocessing of a square picture by PIL and NumPy: bicubic resize, scale, normalise."""
    resized = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC), np.float64)
    return ((resized / 255 - mean) / std).transpose(2, 0, 1)


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    if mode == "RGBA":
        image.putalpha(Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)))
        return image
    return image.convert(mode)


def llava_processor(size: int = 28, **settings):
    processor = tiny_processor()
    processor.image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, **settings
    )
    return processor


def test_the_background_is_the_published_colour():
    assert tuple(int(255 * x) for x in MEAN) == (122, 116, 104)
    assert tuple(CLIPImageProcessorPil().image_mean) == MEAN


@pytest.mark.parametrize(
    "size", [(40, 40), (41, 20), (20, 41), (41, 21), (64, 3), (1, 30), (33, 34), (30, 29)]
)
def test_square_padding_is_the_originals(size):
    processor = llava_processor()
    set_image_padding(processor, "auto", "llava")
    images = processor.image_processor
    image = noise(*size)
    found = images(image, return_tensors="np")["pixel_values"][0]
    expected = clip_like(padded(image, MEAN), 28, MEAN, tuple(images.image_std))
    assert np.abs(found - expected).max() < 1e-6
    cropped = llava_processor().image_processor(image, return_tensors="np")["pixel_values"][0]
    if max(size) > 2 * min(size):
        assert np.abs(cropped - expected).max() > 0.1  # the crop is really something else


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "RGB"])
def test_modes_are_padded_after_conversion(tmp_path: Path, mode):
    """LLaVA converts to RGB before it pads."""
    noise(31, 18, mode).save(tmp_path / "image.png")
    processor = llava_processor()
    set_image_padding(processor, "square", "llava")
    found = processor.image_processor(load_image(tmp_path / "image.png"), return_tensors="np")[
        "pixel_values"
    ][0]
    rgb = Image.open(tmp_path / "image.png").convert("RGB")
    expected = clip_like(padded(rgb, MEAN), 28, MEAN, tuple(processor.image_processor.image_std))
    assert np.abs(found - expected).max() < 1e-6


def test_siglip_images_are_padded_with_their_own_mean():
    processor = tiny_processor()
    processor.image_processor = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    set_image_padding(processor, "auto", "llava")
    assert image_padding(processor) == "none"
    set_image_padding(processor, "square", "llava")
    image = noise(40, 17)
    found = processor.image_processor(image, return_tensors="np")["pixel_values"][0]
    expected = clip_like(padded(image, (0.5,) * 3), 28, (0.5,) * 3, (0.5,) * 3)
    assert np.abs(found - expected).max() < 1e-6


@pytest.mark.parametrize(
    ("model_type", "made", "expected"),
    [
        ("llava", llava_processor, "square"),
        ("vipllava", llava_processor, "square"),
        ("llava_next", llava_processor, "none"),
        ("llava", lambda: llava_processor(do_center_crop=False), "none"),
        ("llava", tiny_processor, "none"),  # the embedded backbone's kind: squashed, not cropped
    ],
)
def test_auto_pads_for_llava_1_5(model_type, made, expected):
    processor = made()
    before = processor.image_processor
    set_image_padding(processor, "auto", model_type)
    assert image_padding(processor) == expected
    if expected == "none":
        assert processor.image_processor is before


def test_a_llava_image_processor_is_taken_at_its_word():
    for do_pad in (True, False):
        processor = tiny_processor()
        processor.image_processor = LlavaImageProcessorPil(do_pad=do_pad)
        set_image_padding(processor, "auto", "llava")
        assert image_padding(processor) == ("square" if do_pad else "none")
        set_image_padding(processor, "none", "llava")
        assert image_padding(processor) == "none"
        set_image_padding(processor, "square", "llava")
        assert image_padding(processor) == "square"


def test_what_cannot_be_padded_is_refused():
    class TilingProcessor:
        pass

    processor = tiny_processor()
    processor.image_processor = TilingProcessor()
    set_image_padding(processor, "auto", "llava")
    set_image_padding(processor, "none", "llava")
    with pytest.raises(ConfigError, match="TilingProcessor"):
        set_image_padding(processor, "square", "llava")
    with pytest.raises(ConfigError, match="expected one of auto, square, none"):
        set_image_padding(processor, "pad", "llava")


def test_load_backbone_pads_and_saves_it(tmp_path: Path):
    model, _ = tiny_llava(2, 32)
    model.save_pretrained(tmp_path / "model")
    llava_processor(16).save_pretrained(tmp_path / "model")
    wide = noise(40, 10)
    seen = {}
    for padding, found in [("auto", "square"), ("square", "square"), ("none", "none")]:
        _, processor = load_backbone(tmp_path / "model", image_padding=padding)
        assert image_padding(processor) == found
        seen[padding] = processor(text="<image> what", images=wide, return_tensors="np")
    assert np.array_equal(seen["auto"]["pixel_values"], seen["square"]["pixel_values"])
    assert not np.allclose(seen["auto"]["pixel_values"], seen["none"]["pixel_values"])
    assert np.array_equal(seen["auto"]["input_ids"], seen["none"]["input_ids"])  # as many visual tokens

    _, processor = load_backbone(tmp_path / "model")
    processor.save_pretrained(tmp_path / "again")
    (tmp_path / "again" / "config.json").write_text((tmp_path / "model" / "config.json").read_text())
    model.save_pretrained(tmp_path / "again")
    _, again = load_backbone(tmp_path / "again")
    assert image_padding(again) == "square"


def test_a_mismatch_with_the_gates_is_named():
    check_image_padding("square", "square", "here")
    check_image_padding(None, "square", "gates of an earlier version")
    with pytest.raises(GateMismatchError, match=r"policy a: .*'none'.*trained with 'square'.*image_padding"):
        check_image_padding("square", "none", "policy a")


def test_the_trace_fingerprint_names_it():
    from dyvte.teacher import Teacher, TeacherConfig

    model, processor = tiny_llava(2, 32)
    plain = Teacher(model, processor, TeacherConfig()).fingerprint("x")
    set_image_padding(processor, "square", "llava")
    square = Teacher(model, processor, TeacherConfig()).fingerprint("x")
    assert plain["images"].startswith("none ")
    assert square["images"].startswith("square ")
    assert {k for k in plain if plain[k] != square[k]} == {"images"}
    json.dumps(square)
