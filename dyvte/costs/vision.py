"""FLOPs of the vision tower, which no convention of the prefill holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_VISION_NAMES = {
    "hidden": ("embed_dim", "hidden_size"),  # Qwen2-VL's hidden_size is what it projects to
    "layers": ("num_hidden_layers", "depth", "num_layers"),
}


def vision_tower_flops(vision_config: Any, num_patches: int | None = None) -> float | None:
    """FLOPs (two per multiply-add) of a ViT on one image; None when the config lacks a size.

    Parameters
    ----------
    num_patches : patches of the image, for towers that take any size; None: those of the config's
        ``image_size``.

    Notes
    -----
    Attention is counted over all patches of the image, also in layers that look at windows only. A class
    token is counted where the config is CLIP's or InternVL's.
    """
    sizes = {key: _first_int(vision_config, names) for key, names in _VISION_NAMES.items()}
    hidden, layers = sizes["hidden"], sizes["layers"]
    patch = _side(getattr(vision_config, "patch_size", None))
    image = _side(getattr(vision_config, "image_size", None))
    ffn = _first_int(vision_config, ("intermediate_size",))
    ratio = getattr(vision_config, "mlp_ratio", None)
    if ffn is None and hidden is not None and isinstance(ratio, int | float):
        ffn = int(hidden * ratio)
    if num_patches is None and image is not None and patch is not None:
        num_patches = (image // patch) ** 2
    if None in (hidden, layers, ffn, patch, num_patches):
        return None
    kind = str(getattr(vision_config, "model_type", "clip"))
    tokens = num_patches + (kind.startswith(("clip", "internvl")))
    # A gated FFN has a third matrix.
    ffn_matrices = 3 if getattr(vision_config, "hidden_act", "") == "silu" or kind == "pixtral" else 2
    per_layer = tokens * (4 * hidden**2 + ffn_matrices * hidden * ffn) + 2 * tokens**2 * hidden
    frames = _first_int(vision_config, ("temporal_patch_size",)) or 1
    embedding = num_patches * 3 * frames * patch**2 * hidden
    return 2.0 * (layers * per_layer + embedding)


def _first_int(config: Any, names: Sequence[str]) -> int | None:
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int)), None)


def _side(size: Any) -> int | None:
    """The side of a square given as a number or as a pair."""
    if isinstance(size, list | tuple) and len(set(size)) == 1:
        size = size[0]
    return size if isinstance(size, int) else None
