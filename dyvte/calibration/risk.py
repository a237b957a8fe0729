"""The threshold that bounds a risk with stated confidence: fixed-sequence learn-then-test over images.

Angelopoulos et al., "Learn then Test" (2021). Shape letters: B samples, L decoder layers, I images, G
thresholds.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dyvte.calibration.compute import threshold_at
from dyvte.calibration.operating_points import at_exit
from dyvte.calibration.pvalues import P_VALUES, smallest_alpha
from dyvte.gates import exit_layers

# Fixed before any data is seen, from "hardly ever" to "at once". A fixed sequence pays nothing for its
# length, and gates trained for a range of prices spread their decisions over as many logits.
DEFAULT_LEVELS = tuple(round(20.0 - 0.1 * step, 1) for step in range(401))
NEVER = 1.0


@dataclass(frozen=True, kw_only=True)
class RiskThreshold:
    """Outcome of :func:`threshold_for_risk`.

    With probability at least 1 - ``delta`` over the draw of the calibration images, the mean loss of
    decisions at ``threshold`` on further images of the same kind is at most ``alpha``. ``certified`` False
    means that no threshold was certified: ``threshold`` is 1.0, never exit, and ``smallest_alpha`` is what
    this number of images could certify at best, with no loss at all among them.
    """

    threshold: float
    certified: bool
    alpha: float
    delta: float
    method: str
    grid: tuple[float, float, int]
    """First and last logit of the grid, and how many."""
    num_images: int
    num_samples: int
    mean_loss: float
    mean_exit_layer: float
    smallest_alpha: float

    def describe(self) -> str:
        """One sentence for people."""
        if self.certified:
            return (
                f"threshold {self.threshold:.10g}: mean loss at most {self.alpha:g} with probability "
                f"{1 - self.delta:g} ({self.num_images} images, seen {self.mean_loss:.4f})"
            )
        return (
            f"no threshold is certified at alpha {self.alpha:g}, delta {self.delta:g}: visual tokens never "
            f"leave. {self.num_images} images without any loss could certify alpha "
            f"{self.smallest_alpha:.4g} at best"
        )


def threshold_for_risk(
    logits_BL: Tensor,
    loss_BL1: Tensor,
    image_ids: Sequence[str],
    alpha: float,
    delta: float = 0.1,
    *,
    method: str = "betting",
    levels: Sequence[float] = DEFAULT_LEVELS,
    min_layer: int = 1,
    seed: int = 0,
) -> RiskThreshold:
    """Earliest-leaving threshold whose mean loss is bounded by ``alpha`` with confidence 1 - ``delta``.

    The grid is tested from its latest exit down, each threshold at the full ``delta``, stopping at the first
    that fails; what was passed before is certified. Questions about one image are dependent, so the unit is
    the image, with the mean loss of its questions; images must be independent draws of the kind met later,
    and neither the gates nor the grid may have been chosen on them.

    Parameters
    ----------
    logits_BL:
        (B, L) gate logits.
    loss_BL1:
        (B, L+1) loss in [0, 1] at every exit layer, for example 1 - same answer, or min(KL, c) / c.
    image_ids:
        B ids; equal ids share an image.
    method:
        "betting" or "bentkus", see :mod:`dyvte.calibration.pvalues`.
    levels:
        The grid in logits, strictly falling, chosen beforehand.
    seed:
        Order in which images are bet on; independent of their content.
    """
    if not 0 < alpha < 1 or not 0 < delta < 1:
        raise ValueError(f"alpha and delta must lie in (0, 1), found {alpha} and {delta}")
    if any(later >= earlier for earlier, later in itertools.pairwise(levels)):
        raise ValueError("the levels of the grid must be strictly falling: latest exits first")
    if loss_BL1.min() < 0 or loss_BL1.max() > 1:
        raise ValueError("the loss must lie in [0, 1]; divide it by its bound and state the bound")
    p_value = P_VALUES[method]
    exits_BG = torch.stack(
        [exit_layers(logits_BL, threshold_at(level), min_layer) for level in levels], dim=1
    )
    losses_BG = torch.stack([at_exit(loss_BL1.cpu(), exits_B) for exits_B in exits_BG.unbind(1)], dim=1)
    losses_IG = image_means(losses_BG, image_ids)
    order = torch.randperm(len(losses_IG), generator=torch.Generator().manual_seed(seed))
    passed = fixed_sequence(p_value(losses_IG[order], alpha, delta), delta)
    certified = passed >= 0
    num_layers = logits_BL.shape[1]
    return RiskThreshold(
        threshold=threshold_at(levels[passed]) if certified else NEVER,
        certified=certified,
        alpha=alpha,
        delta=delta,
        method=method,
        grid=(levels[0], levels[-1], len(levels)),
        num_images=len(losses_IG),
        num_samples=len(losses_BG),
        mean_loss=float(losses_IG[:, passed].mean()) if certified else float(loss_BL1[:, -1].mean()),
        mean_exit_layer=float(exits_BG[:, passed].double().mean()) if certified else float(num_layers),
        smallest_alpha=smallest_alpha(len(losses_IG), delta, p_value),
    )


def fixed_sequence(p_values_G: Tensor, delta: float) -> int:
    """Index of the last threshold before the first failure; -1 if the first one already fails."""
    return int((p_values_G <= delta).long().cumprod(0).sum()) - 1


def image_means(values_BG: Tensor, image_ids: Sequence[str]) -> Tensor:
    """(I, G) float64 means over the samples of each image, images in order of first appearance."""
    index: dict[str, int] = {}
    rows_B = torch.tensor([index.setdefault(image_id, len(index)) for image_id in image_ids])
    sums_IG = torch.zeros(len(index), values_BG.shape[1], dtype=torch.float64)
    sums_IG.index_add_(0, rows_B, values_BG.double())
    return sums_IG / torch.bincount(rows_B, minlength=len(index))[:, None]
