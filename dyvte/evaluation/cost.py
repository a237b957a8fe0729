"""FLOPs of the prefill, under the conventions of the published papers.

The papers count differently, so a figure means nothing without its convention; :data:`CONVENTIONS` holds
three. All cover the language model's decoder layers in prefill: no vision tower, output head, gates or
decoding (those are separate functions here). A sample's visual tokens go through its first ``exit_layer``
layers, its text through all.

Shape letters: B batch, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dyvte.backbones.sizes import DecoderShape
from dyvte.errors import ConfigError


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


def _convention(name: str) -> Convention:
    if name not in CONVENTIONS:
        raise ConfigError(f"unknown FLOPs convention {name!r}; known: {', '.join(CONVENTIONS)}")
    return CONVENTIONS[name]


def _layer_flops(
    shape: DecoderShape, ffn_size: int, num_tokens_B: torch.Tensor, how: Convention
) -> torch.Tensor:
    width = shape.num_heads * shape.head_dim
    projections = 2 * shape.hidden_size * (width + shape.num_kv_heads * shape.head_dim)
    per_token = projections + how.ffn_matrices * shape.hidden_size * ffn_size
    return how.flops_per_mac * (num_tokens_B * per_token + 2 * num_tokens_B**2 * width)


def prefill_flops(
    shape: DecoderShape,
    num_text_B: torch.Tensor | Sequence[float],
    num_visual_B: torch.Tensor | Sequence[float],
    exit_layers_B: torch.Tensor | Sequence[float],
    convention: str = "vtw",
) -> torch.Tensor:
    """FLOPs of each sample's prefill.

    Parameters
    ----------
    num_text_B, num_visual_B : tokens of each kind.
    exit_layers_B : layers that process visual tokens, 0..L; -1 for a row without image. Fractions (a mean
    exit
        layer) interpolate between whole layers.
    convention : key of :data:`CONVENTIONS`.

    Returns
    -------
    (B,) float64 tensor
    """
    how = _convention(convention)
    text, visual, exits = (
        torch.as_tensor(values, dtype=torch.float64) for values in (num_text_B, num_visual_B, exit_layers_B)
    )
    exits = torch.where(exits < 0, torch.zeros_like(exits), exits)
    before = visual if how.visual_only else text + visual
    after = torch.zeros_like(text) if how.visual_only else text
    total = torch.zeros_like(before + exits)
    for layer, ffn_size in enumerate(shape.ffn_sizes_L):
        with_visual = (exits - layer).clamp(0, 1)
        total += with_visual * _layer_flops(shape, ffn_size, before, how)
        total += (1 - with_visual) * _layer_flops(shape, ffn_size, after, how)
    return total


def mean_prefill_tflops(
    shape: DecoderShape, num_text_B: Any, num_visual_B: Any, exit_layers_B: Any
) -> dict[str, dict[str, float]]:
    """Mean TFLOPs per sample under every convention, as run and for the full model, and their ratio."""
    full_B = torch.full_like(torch.as_tensor(exit_layers_B, dtype=torch.float64), shape.num_layers)
    result = {}
    for name in CONVENTIONS:
        run = prefill_flops(shape, num_text_B, num_visual_B, exit_layers_B, name).mean().item()
        full = prefill_flops(shape, num_text_B, num_visual_B, full_B, name).mean().item()
        ratio = run / full if full else float("nan")
        result[name] = {"tflops": run / 1e12, "tflops_full": full / 1e12, "ratio": ratio}
    return result


def head_flops(shape: DecoderShape) -> int:
    """FLOPs (two per multiply-add) of the output head for one token."""
    return 2 * shape.hidden_size * shape.vocab_size


def vision_tower_flops(vision_config: Any) -> float | None:
    """FLOPs (two per multiply-add) of a ViT on one image; None when the config lacks a size."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "image_size", "patch_size")
    values = [getattr(vision_config, name, None) for name in names]
    if not all(isinstance(value, int) for value in values):
        return None
    hidden, ffn, layers, image, patch = values
    tokens = (image // patch) ** 2 + 1
    per_layer = tokens * (4 * hidden**2 + 2 * hidden * ffn) + 2 * tokens**2 * hidden
    embedding = (tokens - 1) * 3 * patch**2 * hidden
    return 2.0 * (layers * per_layer + embedding)
