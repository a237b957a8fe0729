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

from dyvte.calibration.path import ThresholdPath, at_schedule, threshold_at
from dyvte.calibration.pvalues import P_VALUES, smallest_alpha

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

    Attributes
    ----------
    threshold:
        Of exiting; 1 where none was certified.
    certified:
        Whether ``threshold`` bounds the loss.
    alpha, delta, method:
        As they were asked for.
    num_images, num_samples:
        How many images, the unit that is exchangeable, and questions about them.
    mean_loss:
        Of decisions at ``threshold`` on the calibration samples.
    mean_exit_layer, mean_freeze_layer:
        Of the same decisions, in layers; the second None without a freeze head.
    smallest_alpha:
        What so many images could certify at best.
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
    freeze_threshold: float | None = None
    """Of the freeze head, where there is one: it goes with ``threshold``."""
    mean_freeze_layer: float | None = None

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
    """`certified_threshold` of gates without freeze head: (B, L) logits, (B, L+1) loss at every exit.

    Parameters
    ----------
    logits_BL
        Of the gates.
    loss_BL1
        In [0, 1].
    image_ids
        Of the B samples.
    alpha
        Bound on the mean loss.
    delta
        Chance of being wrong.
    method
        "betting" or "bentkus".
    levels
        The grid in logits, strictly falling.
    min_layer
        First layer that may be an exit.
    seed
        Of the order of the images.
    """
    path = ThresholdPath(logits_BL, torch.ones(len(logits_BL)), min_layer)
    return certified_threshold(
        path, loss_BL1[:, None], image_ids, alpha, delta, method=method, levels=levels, seed=seed
    )


def certified_threshold(
    path: ThresholdPath,
    loss_BGL1: Tensor,
    image_ids: Sequence[str],
    alpha: float,
    delta: float = 0.1,
    *,
    method: str = "betting",
    levels: Sequence[float] = DEFAULT_LEVELS,
    seed: int = 0,
) -> RiskThreshold:
    """Earliest threshold on a path whose mean loss is bounded by ``alpha`` with confidence 1 - ``delta``.

    The grid is tested from its latest decisions down, each threshold at the full ``delta``, stopping at the
    first that fails; what was passed before is certified. That holds for any path that was fixed beforehand,
    of one head or of both: nothing is assumed of how the loss or the cost moves along it. Questions about one
    image are dependent, so the unit is the image, with the mean loss of its questions; images must be
    independent draws of the kind met later, and neither the gates, nor the path, nor the grid may have been
    chosen on them.

    Parameters
    ----------
    path:
        The gates' decisions on B samples.
    loss_BGL1:
        (B, G, L+1) loss in [0, 1] of every traced schedule (:func:`dyvte.objectives.answer_loss`), for
        example 1 - same answer, or min(KL, c) / c.
    image_ids:
        B ids; equal ids share an image.
    alpha:
        Bound on the mean loss, in (0, 1).
    delta:
        Chance that the bound fails, in (0, 1).
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
    known = loss_BGL1[~loss_BGL1.isnan()]
    if known.min() < 0 or known.max() > 1:
        raise ValueError("the loss must lie in [0, 1]; divide it by its bound and state the bound")
    p_value = P_VALUES[method]
    chosen_G = [path.at(level) for level in levels]
    losses_BG = torch.stack(
        [at_schedule(loss_BGL1.cpu(), path.freezes, chosen) for chosen in chosen_G], dim=1
    )
    losses_IG = image_means(losses_BG, image_ids)
    order = torch.randperm(len(losses_IG), generator=torch.Generator().manual_seed(seed))
    passed = fixed_sequence(p_value(losses_IG[order], alpha, delta), delta)
    certified = passed >= 0
    num_layers, has_freezes = float(path.num_layers), bool(path.freezes)
    chosen = chosen_G[passed] if certified else None
    freeze_at = threshold_at(levels[passed] + path.gap) if certified else NEVER
    mean_freeze = float(chosen.freeze_layers_B.double().mean()) if chosen is not None else num_layers
    return RiskThreshold(
        threshold=threshold_at(levels[passed]) if certified else NEVER,
        certified=certified,
        alpha=alpha,
        delta=delta,
        method=method,
        grid=(levels[0], levels[-1], len(levels)),
        num_images=len(losses_IG),
        num_samples=len(losses_BG),
        mean_loss=float(losses_IG[:, passed].mean()) if certified else float(loss_BGL1[:, -1, -1].mean()),
        mean_exit_layer=float(chosen.exit_layers_B.double().mean()) if chosen is not None else num_layers,
        smallest_alpha=smallest_alpha(len(losses_IG), delta, p_value),
        freeze_threshold=freeze_at if has_freezes else None,
        mean_freeze_layer=mean_freeze if has_freezes else None,
    )


def fixed_sequence(p_values_G: Tensor, delta: float) -> int:
    """Index of the last threshold before the first failure; -1 if the first one already fails.

    Parameters
    ----------
    p_values_G
        (G,) in the order of testing.
    delta
        Each is tested at.
    """
    return int((p_values_G <= delta).long().cumprod(0).sum()) - 1


def image_means(values_BG: Tensor, image_ids: Sequence[str]) -> Tensor:
    """(I, G) float64 means over the samples of each image, images in order of first appearance.

    Parameters
    ----------
    values_BG
        (B, G) of every sample.
    image_ids
        Of the B samples.
    """
    index: dict[str, int] = {}
    rows_B = torch.tensor([index.setdefault(image_id, len(index)) for image_id in image_ids])
    sums_IG = torch.zeros(len(index), values_BG.shape[1], dtype=torch.float64)
    sums_IG.index_add_(0, rows_B, values_BG.double())
    return sums_IG / torch.bincount(rows_B, minlength=len(index))[:, None]
