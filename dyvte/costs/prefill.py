"""FLOPs of the prefill, under the conventions of the published papers.

The papers count differently, so a figure means nothing without its convention; :data:`CONVENTIONS` holds
three. All cover the language model's decoder layers in prefill: no vision tower, output head, gates, score
rows or decoding (those are separate functions here). What is counted is the tokens that each layer processed,
text and visual, whoever made them fewer: a policy, a reduction, or both.

Shape letters: B samples, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyvte.backbones.sizes import DecoderShape, decoder_shape
from dyvte.errors import ConfigError

__all__ = [
    "CONVENTIONS",
    "Convention",
    "DecoderShape",
    "VisualFactors",
    "decoder_shape",
    "head_flops",
    "layer_flops",
    "mean_prefill_tflops",
    "prefill_flops",
    "score_row_flops",
    "vision_tower_flops",
    "visual_share",
]


@dataclass(frozen=True)
class Convention:
    """One way to count: multiply-adds as 1 or 2, matrices per FFN, which tokens.

    ``4nd^2 + 2n^2d + ffn_matrices * ndm`` per layer, times ``flops_per_mac``; with grouped-query heads the
    first term counts the projections as they are.
    """

    flops_per_mac: int
    ffn_matrices: int
    visual_only: bool
    used_by: str


CONVENTIONS = {
    "vtw": Convention(2, 3, False, "VTW and DyVTE: two per multiply-add, gated FFN, all prompt tokens"),
    "fastv": Convention(
        1, 2, False, "FastV and VisionZip: one per multiply-add, two FFN matrices, all tokens"
    ),
    "pyramiddrop": Convention(1, 3, True, "PyramidDrop (YOPO: twice that): gated FFN, visual tokens alone"),
}


@dataclass(frozen=True)
class VisualFactors:
    """What a visual token costs in each layer, as shares of what it costs in the full model.

    For reductions that make visual tokens cheaper instead of fewer (YOPO). Each field is (L,) or None, which
    means 1 everywhere.

    Attributes
    ----------
    projections_L : its query, key, value and output projections.
    ffn_L : its FFN.
    visual_scores_L : attention between visual tokens.
    cross_scores_L : attention between visual tokens and text, either way.
    """

    projections_L: Sequence[float] | None = None
    ffn_L: Sequence[float] | None = None
    visual_scores_L: Sequence[float] | None = None
    cross_scores_L: Sequence[float] | None = None

    def of(self, name: str, num_layers: int) -> Tensor:
        """(L,) float64 factors under that name.

        Raises
        ------
        ConfigError
            There are more or fewer than the layers.
        """
        given = getattr(self, name)
        factors_L = torch.ones(num_layers) if given is None else torch.as_tensor(given, dtype=torch.float64)
        if factors_L.shape != (num_layers,):
            raise ConfigError(f"{name} holds {len(factors_L)} factors, the backbone has {num_layers} layers")
        return factors_L.double()


FULL_PRICE = VisualFactors()


def layer_flops(
    shape: DecoderShape,
    text_BL: Any,
    visual_BL: Any,
    convention: str = "vtw",
    factors: VisualFactors = FULL_PRICE,
) -> Tensor:
    """FLOPs of each sample's prefill in each layer, from the tokens which that layer processed.

    Parameters
    ----------
    text_BL, visual_BL : (B, L) tokens of each kind.
    convention : key of :data:`CONVENTIONS`.
    factors : what visual tokens cost beside the full model's.

    Returns
    -------
    (B, L) float64 tensor
    """
    how = _convention(convention)
    visual = torch.as_tensor(visual_BL, dtype=torch.float64)
    text = torch.as_tensor(text_BL, dtype=torch.float64)
    if how.visual_only:
        text = torch.zeros_like(visual)
    projections, ffn_L, width = _weights(shape, how.ffn_matrices)
    of = {name: factors.of(name, shape.num_layers) for name in factors.__dataclass_fields__}
    per_token = (text + of["projections_L"] * visual) * projections + (text + of["ffn_L"] * visual) * ffn_L
    pairs = text**2 + 2 * of["cross_scores_L"] * text * visual + of["visual_scores_L"] * visual**2
    return how.flops_per_mac * (per_token + 2 * pairs * width)


def _convention(name: str) -> Convention:
    if name not in CONVENTIONS:
        raise ConfigError(f"unknown FLOPs convention {name!r}; known: {', '.join(CONVENTIONS)}")
    return CONVENTIONS[name]


def _weights(shape: DecoderShape, ffn_matrices: int) -> tuple[int, Tensor, int]:
    """Multiply-adds per token: of the projections, (L,) of the FFN, and of either product with one key."""
    width = shape.num_heads * shape.head_dim
    projections = 2 * shape.hidden_size * (width + shape.num_kv_heads * shape.head_dim)
    ffn_L = ffn_matrices * shape.hidden_size * torch.tensor(shape.ffn_sizes_L, dtype=torch.float64)
    return projections, ffn_L, width


def prefill_flops(
    shape: DecoderShape,
    num_text_B: Any,
    num_visual_B: Any,
    exit_layers_B: Any,
    convention: str = "vtw",
) -> Tensor:
    """FLOPs of each sample's prefill where an exit is all that happens.

    Parameters
    ----------
    num_text_B, num_visual_B : tokens of each kind.
    exit_layers_B : layers that process visual tokens, 0..L; -1 for a row without image. Fractions (a mean
        exit layer) interpolate between whole layers.
    convention : key of :data:`CONVENTIONS`.

    Returns
    -------
    (B,) float64 tensor
    """
    text_B, visual_B, exits_B = torch.broadcast_tensors(
        *(
            torch.as_tensor(values, dtype=torch.float64)
            for values in (num_text_B, num_visual_B, exit_layers_B)
        )
    )
    text_BL = text_B[:, None].expand(-1, shape.num_layers)
    visual_BL = visual_B[:, None].expand(-1, shape.num_layers)
    with_BL = layer_flops(shape, text_BL, visual_BL, convention)
    without_BL = layer_flops(shape, text_BL, torch.zeros_like(visual_BL), convention)
    share_BL = (exits_B[:, None] - torch.arange(shape.num_layers)).clamp(0, 1)
    return torch.lerp(without_BL, with_BL, share_BL).sum(1)


def mean_prefill_tflops(
    shape: DecoderShape,
    text_BL: Any,
    visual_BL: Any,
    num_text_B: Any,
    num_visual_B: Any,
    factors: VisualFactors = FULL_PRICE,
) -> dict[str, dict[str, float]]:
    """Mean TFLOPs per sample under every convention, as run and for the full model, and their ratio.

    Parameters
    ----------
    text_BL, visual_BL : (B, L) tokens that each layer processed.
    num_text_B, num_visual_B : tokens of the prompt, all of which the full model processes in every layer.
    factors : what visual tokens cost beside the full model's.
    """
    result = {}
    for name in CONVENTIONS:
        run = layer_flops(shape, text_BL, visual_BL, name, factors).sum(1).mean().item()
        everywhere_B = [shape.num_layers] * len(num_text_B)
        full = prefill_flops(shape, num_text_B, num_visual_B, everywhere_B, name).mean().item()
        ratio = run / full if full else float("nan")
        result[name] = {"tflops": run / 1e12, "tflops_full": full / 1e12, "ratio": ratio}
    return result


def visual_share(
    shape: DecoderShape, visual_BL: Any, num_visual_B: Any, factors: VisualFactors = FULL_PRICE
) -> float:
    """Visual compute: what is spent on visual rows, as a share of the full model's.

    Each visual token's pass through a layer counts as the share of its FLOPs there that is really spent;
    every layer counts alike. For exits alone that is sum n_i k_i / (L sum n_i); a reduction that drops tokens
    counts with the layers which they are spared, one that makes them cheaper with its ``factors``.

    Parameters
    ----------
    visual_BL : (B, L) visual tokens that each layer processed.
    num_visual_B : visual tokens of the prompt.
    factors : what visual tokens cost beside the full model's.

    Returns
    -------
    float
        nan where there is no visual token.
    """
    visual_BL = torch.as_tensor(visual_BL, dtype=torch.float64)
    num_visual_B1 = torch.as_tensor(num_visual_B, dtype=torch.float64)[:, None]
    projections, ffn_L, width = _weights(shape, ffn_matrices=3)
    scores_B1 = 2 * width * num_visual_B1
    of = {name: factors.of(name, shape.num_layers) for name in factors.__dataclass_fields__}
    spent_BL = of["projections_L"] * projections + of["ffn_L"] * ffn_L + of["visual_scores_L"] * scores_B1
    price_BL = spent_BL / (projections + ffn_L + scores_B1)
    full = shape.num_layers * num_visual_B1.sum()
    return float((visual_BL * price_BL).sum() / full) if full > 0 else float("nan")


def score_row_flops(
    shape: DecoderShape, tokens_BL: Any, score_layers_B: Sequence[Sequence[int]]
) -> list[float]:
    """FLOPs (two per multiply-add) of the rows of attention that reductions had computed apart.

    In each of a sample's ``score_layers`` (1..L) its last prompt token is projected once more and attends to
    all tokens of the layer.
    """
    projections, _, width = _weights(shape, ffn_matrices=3)
    tokens_BL = torch.as_tensor(tokens_BL, dtype=torch.float64)
    return [
        sum(2.0 * (projections + 2 * width * float(tokens_L[k - 1])) for k in layers)
        for tokens_L, layers in zip(tokens_BL, score_layers_B, strict=True)
    ]


def head_flops(shape: DecoderShape) -> int:
    """FLOPs (two per multiply-add) of the output head for one token."""
    return 2 * shape.hidden_size * shape.vocab_size


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
