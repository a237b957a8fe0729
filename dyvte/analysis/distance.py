"""YOPO Figure 2: attention between visual tokens over their distance on the image.

Shape letters: B rows, N tokens, V visual tokens of a row, L decoder layers, D distances.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dyvte.analysis.findings import Findings, Table
from dyvte.analysis.subject import Subject
from dyvte.analysis.watching import Watched, Watcher, watch
from dyvte.plotting import COLORS, plain_axes

DEFINITION = (
    "Distance d of two visual tokens of one image: the larger of the differences of their rows and "
    "columns (Chebyshev; YOPO's windows are squares), 0 for the token itself. For each layer: the mean "
    "attention weight of a pair at distance d, over heads, over all pairs of which the first may attend "
    "to the second (causal: tokens before it and itself), and over the sampled questions; and the share "
    "of the attention between visual tokens that stays within d. The paper draws randomly chosen tokens; "
    "all of them count here."
)


class Distances(Watcher):
    """Sums over pairs of visual tokens, by layer and distance."""

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.sums_LD = torch.zeros(num_layers, 0, dtype=torch.float64)
        self.pairs_LD = torch.zeros(num_layers, 0, dtype=torch.float64)

    def see(self, batch: Watched, index: int, weights_BNN: Tensor) -> None:
        """Add a layer of a batch."""
        for row, visual_N in enumerate(batch.spans.visual_BN):
            at_V = visual_N.nonzero().flatten()
            places_V3 = batch.places_BN3[row, at_V]
            weights_VV = weights_BNN[row][at_V][:, at_V]
            # Causal pairs count whatever their weight; families that look both ways show it by weight.
            may_VV = torch.ones_like(weights_VV).tril().bool() | (weights_VV > 0)
            same_VV = places_V3[:, None, 0] == places_V3[None, :, 0]
            counted_VV = may_VV & same_VV
            apart_VV = (places_V3[:, None, 1:] - places_V3[None, :, 1:]).abs().amax(-1)
            self._add(index, apart_VV[counted_VV], weights_VV[counted_VV].double())

    def _add(self, index: int, apart_P: Tensor, weights_P: Tensor) -> None:
        wanted = int(apart_P.max()) + 1 - self.sums_LD.shape[1]
        if wanted > 0:
            more = torch.zeros(self.num_layers, wanted, dtype=torch.float64)
            self.sums_LD, self.pairs_LD = (torch.cat([one, more], 1) for one in (self.sums_LD, self.pairs_LD))
        self.sums_LD[index].index_add_(0, apart_P, weights_P)
        self.pairs_LD[index].index_add_(0, apart_P, torch.ones_like(weights_P))

    def mean_LD(self) -> Tensor:
        """Mean weight of a pair."""
        return self.sums_LD / self.pairs_LD.clamp(min=1)

    def within_LD(self) -> Tensor:
        """Share of the attention between visual tokens that stays within d."""
        return self.sums_LD.cumsum(1) / self.sums_LD.sum(1, keepdim=True)


def study(subject: Subject) -> Findings:
    """One pass with attention."""
    found = Distances(subject.num_layers)
    watch(subject, found.see)
    mean_LD, within_LD = found.mean_LD(), found.within_LD()
    uniform_D = (found.pairs_LD[0].cumsum(0) / found.pairs_LD[0].sum()).tolist()
    shown = [d for d in (0, 1, 2, 3, 5, 8) if d < within_LD.shape[1]]
    rows = [
        [str(k + 1), *(f"{100 * row[d]:.1f} %" for d in shown)] for k, row in enumerate(within_LD.tolist())
    ]
    rows.append(["pairs within d", *(f"{100 * uniform_D[d]:.1f} %" for d in shown)])
    return Findings(
        title=f"Attention between visual tokens over distance, {subject.num_layers} layers",
        definition=DEFINITION,
        metrics={
            "mean_weight": mean_LD.tolist(),
            "share_within": within_LD.tolist(),
            "pairs": found.pairs_LD[0].tolist(),
        },
        table=Table(["layer", *(f"within {d}" for d in shown)], rows),
        paint=lambda figure: _paint(figure, mean_LD, within_LD, uniform_D),
        size=(8.4, 3.6),
    )


def _paint(figure: Any, mean_LD: Tensor, within_LD: Tensor, uniform_D: list[float]) -> None:
    import matplotlib

    left, right = figure.subplots(1, 2)
    colors = matplotlib.colormaps["viridis"]
    for k, (mean_D, within_D) in enumerate(zip(mean_LD.numpy(), within_LD.numpy(), strict=True)):
        color = colors(k / max(1, len(mean_LD) - 1))
        left.plot(mean_D, "o-", ms=2.5, lw=1, color=color, label=f"layer {k + 1}")
        right.plot(100 * within_D, "-", lw=1, color=color)
    right.plot([100 * share for share in uniform_D], "--", lw=1, color=COLORS[0], label="share of the pairs")
    left.set_ylim(bottom=0)
    left.set_ylabel("mean attention weight of a pair")
    right.set_ylabel("attention within the distance, %")
    for axes in (left, right):
        axes.set_xlabel("distance on the grid")
        plain_axes(axes)
    right.legend(frameon=False, fontsize=8)
    shade = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(1, len(mean_LD)), colors)
    figure.colorbar(shade, ax=right, label="layer")
