"""What reductions leave of the price of visual tokens, for the cost model.

Shapes: B samples, N tokens, L decoder layers, H query heads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dyvte.backbones.sizes import DecoderShape
from dyvte.costs.prefill import FULL_PRICE, VisualFactors
from dyvte.reductions import Neighbourhood, Reduction, TokenRows, VisualWork, merged
from dyvte.spans import find_spans


def tokens_left(reductions: Sequence[Reduction], visual_BL: Tensor) -> Tensor:
    """(B, L) visual tokens that each layer processes once the reductions have taken theirs.

    Parameters
    ----------
    reductions
        In any order.
    visual_BL
        (B, L) visual tokens that the exits leave to each layer.
    """
    for reduction in reductions:
        visual_BL = reduction.tokens_left(visual_BL)
    return visual_BL


def selection_flops(reductions: Sequence[Reduction], num_visual: int, hidden_size: int) -> float:
    """FLOPs (two per multiply-add) of what reductions compute of a sample to choose tokens before the first
    layer; none of the decoder's own."""
    total = 0.0
    left = torch.tensor([[num_visual]])
    for reduction in reductions:
        total += reduction.selection_flops(int(left), hidden_size)
        left = reduction.tokens_left(left)
    return total


def visual_factors(reductions: Sequence[Reduction], shape: DecoderShape, num_visual: float) -> VisualFactors:
    """What a visual token costs in each layer under the reductions, beside the full model's.

    Parameters
    ----------
    reductions
        Those of the backbone.
    num_visual
        Visual tokens of a sample: of those on one square image, neighbours are a share.
    """
    works = _works(reductions, shape.num_layers)
    if all(work.is_stock for work in works):
        return FULL_PRICE
    heads_L = [_heads(work) for work in works]
    # Keys and values are computed for all heads: text attends to them.
    for_queries, for_keys = shape.num_heads, shape.num_kv_heads
    return VisualFactors(
        projections_L=[(share * for_queries + for_keys) / (for_queries + for_keys) for share in heads_L],
        ffn_L=[_neurons(work, size) for work, size in zip(works, shape.ffn_sizes_L, strict=True)],
        visual_scores_L=[
            share * window_share(work.window, num_visual) for share, work in zip(heads_L, works, strict=True)
        ],
        # Half of these pairs are text's queries, which see all visual tokens in all heads.
        cross_scores_L=[(1 + share) / 2 for share in heads_L],
    )


def window_share(window: Neighbourhood | None, num_visual: float) -> float:
    """Share of all pairs of visual tokens on a square image that a neighbourhood leaves.

    Parameters
    ----------
    window
        How far tokens see; None: all pairs.
    num_visual
        Tokens of an image.
    """
    if window is None or num_visual <= 0:
        return 1.0
    side = max(1, round(num_visual**0.5))
    near = sum(abs(a - b) <= window.radius for a in range(side) for b in range(side))
    share = near**2 / side**4
    # The diagonal stays whole.
    return (share + 1 / side**2) / 2 if window.causal else share


def frozen_by(reductions: Sequence[Reduction], num_layers: int) -> Tensor:
    """(L,) bool: layers in which the reductions let no visual token be updated."""
    return torch.tensor([work.frozen for work in _works(reductions, num_layers)])


def _works(reductions: Sequence[Reduction], num_layers: int) -> list[VisualWork]:
    """What each layer does for visual tokens."""
    nothing = find_spans(torch.zeros(1, 2, dtype=torch.long), ())
    plans = [one.start(TokenRows(num_layers, nothing, ["cost"])) for one in reductions]
    return [merged([plan.visual_work(k) for plan in plans]) for k in range(1, num_layers + 1)]


def _heads(work: VisualWork) -> float:
    if work.frozen:
        return 0.0
    return 1.0 if work.heads is None else float(work.heads.double().mean())


def _neurons(work: VisualWork, size: int) -> float:
    if work.frozen:
        return 0.0
    if work.neurons is None:
        return 1.0
    neurons = work.neurons.of(size)
    return (neurons if isinstance(neurons, int) else len(neurons)) / size
