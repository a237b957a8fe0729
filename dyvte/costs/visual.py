"""Visual compute: what is spent on visual tokens, as a share of what the full model spends on them.

Shape letters: B samples, L decoder layers.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from dyvte.backbones.sizes import DecoderShape
from dyvte.costs.layers import LayerMacs
from dyvte.costs.prefill import FULL_PRICE, VisualFactors, check_freeze
from dyvte.errors import ConfigError


def visual_compute(
    exit_layers_B: Tensor,
    num_visual_B: Tensor,
    num_layers: int,
    freeze_layers_B: Tensor | None = None,
    shape: DecoderShape | None = None,
) -> float:
    """Share of the full model's work on visual tokens that these decisions spend.

    For exits alone, layer passes: sum n_i k_i / (L sum n_i). With freeze layers, linear work: a row spends
    (sum over l <= f of F_l + sum over f < l <= k of KV_l) / sum over l of F_l, where F_l is all linear work
    of a visual token in layer l and KV_l that of its key and value; rows weigh by their visual tokens. For
    f = k the two are the same where all layers are equally wide; where they are not (experts in some layers),
    the first counts layers alike, the second by their work.

    Parameters
    ----------
    exit_layers_B : (B,) exit layers k, 0..L; -1 for a row without an image.
    num_visual_B : (B,) visual tokens n.
    num_layers : L.
    freeze_layers_B : (B,) layers f that update the visual tokens, 0..k; None: all that read them.
    shape : sizes of the decoder; needed with freeze layers.

    Returns
    -------
    float
        Rows without an image are excluded; nan if no row is left.

    Raises
    ------
    ConfigError
        A freeze layer lies above its exit layer, or ``shape`` is missing or of another number of layers.
    """
    has_image_B = exit_layers_B >= 0
    num_visual_B = num_visual_B[has_image_B].double()
    exits_B = exit_layers_B[has_image_B]
    if freeze_layers_B is None:
        spent_B, whole = exits_B.double(), num_layers
    else:
        if shape is None or shape.num_layers != num_layers:
            found = "none" if shape is None else f"one of {shape.num_layers} layers"
            raise ConfigError(
                f"freeze layers need the shape of the decoder of {num_layers} layers, found {found}"
            )
        spent_B, whole = _spent(exits_B, freeze_layers_B[has_image_B], shape)
    full = whole * num_visual_B.sum()
    return float((num_visual_B * spent_B).sum() / full) if full > 0 else float("nan")


def _spent(exits_B: Tensor, freezes_B: Tensor, shape: DecoderShape) -> tuple[Tensor, float]:
    """(B,) linear work of a visual token under each row's decision, and that of the full model.

    In units of the greatest common divisor: the sums stay small whole numbers, so that f = k gives the very
    number that counting layer passes does.
    """
    check_freeze(freezes_B, exits_B)
    macs = LayerMacs.of(shape)
    updated_L, read_L = macs.linear_L, torch.full_like(macs.linear_L, macs.key_value)
    unit = math.gcd(macs.key_value, *(int(work) for work in updated_L))
    # Entry l: work of the first l layers.
    updated, read = (torch.cat([work[:1] * 0, work.cumsum(0)]) / unit for work in (updated_L, read_L))
    exits_B, freezes_B = exits_B.long(), freezes_B.long()
    return updated[freezes_B] + read[exits_B] - read[freezes_B], float(updated[-1])


def visual_share(
    shape: DecoderShape,
    visual_BL: Any,
    num_visual_B: Any,
    factors: VisualFactors = FULL_PRICE,
    frozen_BL: Any = None,
) -> float:
    """Visual compute of a run, from the visual tokens that each layer processed.

    Each visual token's pass through a layer counts as the share of its FLOPs there that is really spent. For
    exits alone that is sum n_i k_i / (L sum n_i); a reduction that drops tokens counts with the layers which
    they are spared, one that makes them cheaper with its ``factors``. Layers count alike, unless there are
    frozen tokens: then by their linear work, as in `visual_compute`.

    Parameters
    ----------
    shape : sizes of the decoder.
    visual_BL : (B, L) visual tokens that each layer updated.
    num_visual_B : visual tokens of the prompt.
    factors : what visual tokens that are updated cost beside the full model's.
    frozen_BL : (B, L) further visual tokens that each layer read without updating them; None for none.

    Returns
    -------
    float
        nan where there is no visual token.
    """
    visual_BL = torch.as_tensor(visual_BL, dtype=torch.float64)
    num_visual_B1 = torch.as_tensor(num_visual_B, dtype=torch.float64)[:, None]
    macs = LayerMacs.of(shape)
    scores_B1 = 2 * macs.width * num_visual_B1
    of = {name: factors.of(name, shape.num_layers) for name in factors.__dataclass_fields__}
    spent_BL = of["projections_L"] * macs.projections + of["ffn_L"] * macs.ffn_L
    spent_BL = spent_BL + of["visual_scores_L"] * scores_B1
    price_BL = spent_BL / (macs.projections + macs.ffn_L + scores_B1)
    if frozen_BL is None:
        spent, whole = (visual_BL * price_BL).sum(), shape.num_layers
    else:
        frozen_BL = torch.as_tensor(frozen_BL, dtype=torch.float64)
        spent = (visual_BL * price_BL * macs.linear_L + frozen_BL * macs.key_value).sum()
        whole = macs.linear_L.sum()
    full = whole * num_visual_B1.sum()
    return float(spent / full) if full > 0 else float("nan")


def frozen_share(shape: DecoderShape, layers: Collection[int]) -> float:
    """Visual compute with a static set of layers frozen and nothing else: linear work, as `visual_compute`.

    Parameters
    ----------
    shape : sizes of the decoder.
    layers : those that read visual tokens without updating them, counted from 0.
    """
    frozen_1L = torch.tensor([[index in layers for index in range(shape.num_layers)]])
    return visual_share(shape, ~frozen_1L, [1], frozen_BL=frozen_1L)
