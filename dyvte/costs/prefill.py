"""FLOPs of the prefill, under the conventions of the published papers.

The papers count differently, so a number means nothing without its convention; :data:`CONVENTIONS` holds
three. All cover the language model's decoder layers in prefill: no vision tower, output head, gates, score
rows or decoding (those are separate functions). What is counted is the tokens that each layer processed,
text and visual, whoever made them fewer: a policy, a reduction, or both. Visual tokens that a layer reads but
does not update (they are frozen) cost it their keys and values, and the attention that others pay to them.

Shape letters: B samples, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyvte.backbones.sizes import DecoderShape
from dyvte.costs.layers import LayerMacs
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

        Parameters
        ----------
        name
            Of the factor.
        num_layers
            L.

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
    frozen_BL: Any = None,
) -> Tensor:
    """FLOPs of each sample's prefill in each layer, from the tokens which that layer processed.

    Parameters
    ----------
    shape : sizes of the decoder.
    text_BL, visual_BL : (B, L) tokens of each kind that the layer updates.
    convention : key of :data:`CONVENTIONS`.
    factors : what visual tokens that are updated cost beside the full model's.
    frozen_BL : (B, L) further visual tokens that the layer reads without updating them; None for none.

    Returns
    -------
    (B, L) float64 tensor

    Raises
    ------
    ConfigError
        There is no such convention, or the factors are of another number of layers.
    """
    how = _convention(convention)
    visual = torch.as_tensor(visual_BL, dtype=torch.float64)
    text = torch.as_tensor(text_BL, dtype=torch.float64)
    if how.visual_only:
        text = torch.zeros_like(visual)
    macs = LayerMacs.of(shape, how.ffn_matrices)
    of = {name: factors.of(name, shape.num_layers) for name in factors.__dataclass_fields__}
    projected = (text + of["projections_L"] * visual) * macs.projections
    per_token = projected + (text + of["ffn_L"] * visual) * macs.ffn_L
    pairs = text**2 + 2 * of["cross_scores_L"] * text * visual + of["visual_scores_L"] * visual**2
    if frozen_BL is not None:
        frozen = torch.as_tensor(frozen_BL, dtype=torch.float64)
        per_token = per_token + frozen * macs.key_value
        # They have keys but no queries.
        pairs = pairs + (text + visual) * frozen
    return how.flops_per_mac * (per_token + 2 * pairs * macs.width)


def _convention(name: str) -> Convention:
    if name not in CONVENTIONS:
        raise ConfigError(f"unknown FLOPs convention {name!r}; known: {', '.join(CONVENTIONS)}")
    return CONVENTIONS[name]


def prefill_flops(
    shape: DecoderShape,
    num_text_B: Any,
    num_visual_B: Any,
    exit_layers_B: Any,
    convention: str = "vtw",
    freeze_layers_B: Any = None,
) -> Tensor:
    """FLOPs of each sample's prefill where a freeze and an exit are all that happens.

    Parameters
    ----------
    shape : sizes of the decoder.
    num_text_B, num_visual_B : tokens of each kind.
    exit_layers_B : layers that read visual tokens, 0..L; -1 for a row without image. Fractions (a mean exit
        layer) interpolate between whole layers.
    convention : key of :data:`CONVENTIONS`.
    freeze_layers_B : layers that update visual tokens, 0..k; None: all that read them.

    Returns
    -------
    (B,) float64 tensor

    Raises
    ------
    ConfigError
        There is no such convention, or a freeze layer lies above its exit layer.
    """
    text_B, visual_B, exits_B, freezes_B = torch.broadcast_tensors(
        *(
            torch.as_tensor(values, dtype=torch.float64)
            for values in (
                num_text_B,
                num_visual_B,
                exit_layers_B,
                exit_layers_B if freeze_layers_B is None else freeze_layers_B,
            )
        )
    )
    check_freeze(freezes_B, exits_B.clamp(min=0))
    text_BL = text_B[:, None].expand(-1, shape.num_layers)
    visual_BL = visual_B[:, None].expand(-1, shape.num_layers)
    gone_BL = torch.zeros_like(visual_BL)
    without_BL = layer_flops(shape, text_BL, gone_BL, convention)
    with_BL = layer_flops(shape, text_BL, visual_BL, convention)
    found_BL = torch.lerp(without_BL, with_BL, _share_of_layers(freezes_B, shape.num_layers))
    if freeze_layers_B is not None:
        frozen_BL = layer_flops(shape, text_BL, gone_BL, convention, frozen_BL=visual_BL)
        read_BL = _share_of_layers(exits_B, shape.num_layers) - _share_of_layers(freezes_B, shape.num_layers)
        found_BL = found_BL + read_BL * (frozen_BL - without_BL)
    return found_BL.sum(1)


def _share_of_layers(layers_B: Tensor, num_layers: int) -> Tensor:
    """(B, L) how much of each layer lies below a (fractional) layer number."""
    return (layers_B[:, None] - torch.arange(num_layers)).clamp(0, 1)


def check_freeze(freeze_layers_B: Tensor, exit_layers_B: Tensor) -> None:
    """Raise ConfigError where a row freezes after it leaves.

    Parameters
    ----------
    freeze_layers_B, exit_layers_B
        (B,) int64.
    """
    late_B = freeze_layers_B > exit_layers_B
    if bool(late_B.any()):
        row = int(late_B.nonzero()[0])
        raise ConfigError(
            f"row {row}: freeze layer {float(freeze_layers_B[row]):g} above exit layer "
            f"{float(exit_layers_B[row]):g}; expected 0 <= freeze layer <= exit layer"
        )


@dataclass(frozen=True)
class PrefillCost:
    """Mean prefill of a sample under one convention.

    Attributes
    ----------
    tflops : as run.
    tflops_full : of the full model.
    ratio : of the two; nan where the full model's is 0.
    """

    tflops: float
    tflops_full: float
    ratio: float


def mean_prefill_costs(
    shape: DecoderShape,
    text_BL: Any,
    visual_BL: Any,
    num_text_B: Any,
    num_visual_B: Any,
    factors: VisualFactors = FULL_PRICE,
    frozen_BL: Any = None,
) -> dict[str, PrefillCost]:
    """Mean TFLOPs per sample under every convention, as run and for the full model, and their ratio.

    Parameters
    ----------
    shape : sizes of the decoder.
    text_BL, visual_BL : (B, L) tokens that each layer processed.
    num_text_B, num_visual_B : tokens of the prompt, all of which the full model processes in every layer.
    factors : what visual tokens cost beside the full model's.
    frozen_BL : (B, L) further visual tokens that each layer read without updating them; None for none.
    """
    result = {}
    for name in CONVENTIONS:
        run = layer_flops(shape, text_BL, visual_BL, name, factors, frozen_BL).sum(1).mean().item()
        everywhere_B = [shape.num_layers] * len(num_text_B)
        full = prefill_flops(shape, num_text_B, num_visual_B, everywhere_B, name).mean().item()
        result[name] = PrefillCost(run / 1e12, full / 1e12, run / full if full else float("nan"))
    return result


def score_row_flops(
    shape: DecoderShape, tokens_BL: Any, score_layers_B: Sequence[Sequence[int]]
) -> list[float]:
    """FLOPs (two per multiply-add) of the rows of attention that reductions had computed apart.

    In each of a sample's ``score_layers`` (1..L) its last prompt token is projected once more and attends to
    all tokens of the layer.

    Parameters
    ----------
    shape
        Of the decoder.
    tokens_BL
        (B, L) tokens that each layer processed.
    score_layers_B
        The layers, of each sample.
    """
    macs = LayerMacs.of(shape)
    tokens_BL = torch.as_tensor(tokens_BL, dtype=torch.float64)
    return [
        sum(2.0 * (macs.projections + 2 * macs.width * float(tokens_L[k - 1])) for k in layers)
        for tokens_L, layers in zip(tokens_BL, score_layers_B, strict=True)
    ]


def head_flops(shape: DecoderShape) -> int:
    """FLOPs (two per multiply-add) of the output head for one token."""
    return 2 * shape.hidden_size * shape.vocab_size
