"""How transformers' torchvision image processors differ from its PIL ones, family by family, on photographs.

Photographs are scikit-learn's two and six of scikit-image's. Both processors of a family are made from the
same settings, those of its usual checkpoint. Needs torchvision and scikit-image: ``experiments/README.md``
says how they are put beside a torch for the CPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "retina.jpg",
    "hubble_deep_field.jpg",
)
SQUARE_336 = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llava": ("clip", "CLIPImageProcessor", SQUARE_336),
    "llava, padded": ("llava", "LlavaImageProcessor", {**SQUARE_336, "do_pad": True}),
    "llava_next": (
        "llava_next",
        "LlavaNextImageProcessor",
        {**SQUARE_336, "image_grid_pinpoints": PINPOINTS},
    ),
    "llava_onevision": ("llava_onevision", "LlavaOnevisionImageProcessor", {}),
    "internvl": (
        "got_ocr2",
        "GotOcr2ImageProcessor",
        {"size": {"height": 448, "width": 448}, "crop_to_patches": True, "min_patches": 1, "max_patches": 12},
    ),
    "qwen2_vl": ("qwen2_vl", "Qwen2VLImageProcessor", {}),
    "idefics3": ("idefics3", "Idefics3ImageProcessor", {}),
    "smolvlm": ("smolvlm", "SmolVLMImageProcessor", {}),
    "mistral3": ("pixtral", "PixtralImageProcessor", {}),
    "gemma3": ("gemma3", "Gemma3ImageProcessor", {"size": {"height": 896, "width": 896}}),
    "paligemma": ("siglip", "SiglipImageProcessor", {"size": {"height": 448, "width": 448}}),
}
"""Module of the image processor, its class, and settings of the usual checkpoint."""


def processors(family: str) -> tuple[Any, Any]:
    """The PIL and the torchvision processor of a family."""
    module, name, settings = FAMILIES[family]
    made = []
    for part, ending in ((f"image_processing_pil_{module}", "Pil"), (f"image_processing_{module}", "")):
        kind = getattr(importlib.import_module(f"transformers.models.{module}.{part}"), name + ending)
        made.append(kind(**settings))
    return made[0], made[1]


def photographs() -> dict[str, Any]:
    """RGB PIL images by name."""
    import skimage
    from PIL import Image
    from sklearn.datasets import load_sample_image

    found = {name: Image.fromarray(load_sample_image(f"{name}.jpg")) for name in ("china", "flower")}
    folder = Path(skimage.__file__).parent / "data"
    return found | {Path(name).stem: Image.open(folder / name).convert("RGB") for name in PHOTOGRAPHS}


def arrays(processor: Any, image: Any) -> dict[str, np.ndarray]:
    """What a processor gives for an image, all of it as arrays."""
    given = processor(images=[image], return_tensors="np")
    return {name: np.asarray(value, dtype=np.float64) for name, value in given.items()}


def compared(family: str, images: dict[str, Any]) -> dict[str, Any]:
    """Differences of the two processors over all images; pixels in levels of 0..255."""
    pil, torchvision = processors(family)
    spread = 255 * float(np.mean(pil.image_std)) if getattr(pil, "do_normalize", True) else 255.0
    largest, means, off, shapes, seconds = 0.0, [], [], True, [0.0, 0.0]
    for image in images.values():
        found = []
        for index, processor in enumerate((pil, torchvision)):
            start = time.perf_counter()
            found.append(arrays(processor, image))
            seconds[index] += time.perf_counter() - start
        one, other = found
        shapes &= one.keys() == other.keys() and all(one[name].shape == other[name].shape for name in one)
        if not shapes:
            break
        levels = spread * np.abs(one["pixel_values"] - other["pixel_values"])
        largest = max(largest, float(levels.max()))
        means.append(float(levels.mean()))
        off.append(float((levels > 1.5).mean()))
        shapes &= all(np.array_equal(one[name], other[name]) for name in one if name != "pixel_values")
    return {
        "same_shapes": bool(shapes),
        "largest": largest,
        "mean": float(np.mean(means)) if means else None,
        "share_over_one": float(np.mean(off)) if off else None,
        "pil_seconds": seconds[0],
        "torchvision_seconds": seconds[1],
    }


def main(arguments: list[str] | None = None) -> int:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("families", nargs="*", default=list(FAMILIES), help="all by default")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(arguments)
    images = photographs()
    found = {family: compared(family, images) for family in args.families}
    if args.json:
        print(json.dumps(found))
        return 0
    print("| family | same shapes | mean difference, levels of 255 | largest | off by more than 1.5 |")
    print("|---|---|---|---|---|")
    for family, one in found.items():
        share = f"{100 * one['share_over_one']:.2f} %"
        print(f"| {family} | {one['same_shapes']} | {one['mean']:.3f} | {one['largest']:.1f} | {share} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
