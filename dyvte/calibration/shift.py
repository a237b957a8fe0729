"""Do questions look like those that were calibrated on? A classifier two-sample test on gate features.

A linear classifier learns to tell two samples apart; if it does better than chance on rows it has not seen,
they differ (Lopez-Paz and Oquab 2017, arXiv 1610.06545). The p-value is by permutation of the labels, so it
is exact at any size. The unit is the image: both samples hold one question of each image, drawn at random,
since questions about one image are dependent.

Shapes: I calibration images, J images at hand, N = I + J, Z dimensions, P permutations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dyvte.errors import CalibrationError

FOLDS = 5
RIDGE = 1.0
"""Penalty of the classifier, on standardised features."""


@dataclass(frozen=True, kw_only=True)
class ShiftTest:
    """Outcome of `two_sample_test`.

    Attributes
    ----------
    p_value
        Share of relabelled samples that are told apart at least as well, the given labels among them.
    auc
        Chance that a held-out question at hand gets a higher score than a held-out calibration question: 0.5
        where nothing tells them apart, 1 where everything does.
    num_calibration, num_at_hand
        I and J.
    permutations
        P.
    """

    p_value: float
    auc: float
    num_calibration: int
    num_at_hand: int
    permutations: int

    def describe(self, level: float = 0.05) -> str:
        """One sentence for people.

        Parameters
        ----------
        level
            Below it the samples are said to differ.
        """
        seen = (
            f"AUC {self.auc:.3f}, p = {self.p_value:.4g} ({self.num_at_hand} images at hand, "
            f"{self.num_calibration} of calibration, {self.permutations} permutations)"
        )
        if self.p_value <= level:
            return f"these questions do not look like those calibrated on: {seen}"
        return f"nothing tells these questions from those calibrated on: {seen}"


def two_sample_test(
    calibration_IZ: Tensor, at_hand_JZ: Tensor, *, permutations: int = 999, seed: int = 0
) -> ShiftTest:
    """Test whether two samples are of one distribution.

    Held-out scores of a ridge classifier, five folds; its predictions are linear in the labels, so all
    permutations share one factorisation of each fold.

    Parameters
    ----------
    calibration_IZ, at_hand_JZ
        Features, one row of each image.
    permutations
        Of the labels.
    seed
        Of folds and permutations.

    Raises
    ------
    CalibrationError
        If a sample has fewer rows than there are folds, or a feature is not finite.
    """
    both_NZ = torch.cat((calibration_IZ, at_hand_JZ)).double().cpu()
    count, num_at_hand = len(both_NZ), len(at_hand_JZ)
    if min(len(calibration_IZ), num_at_hand) < FOLDS:
        raise CalibrationError(
            f"{len(calibration_IZ)} calibration images and {num_at_hand} at hand: expected {FOLDS} of each "
            "or more"
        )
    if not bool(both_NZ.isfinite().all()):
        raise CalibrationError("a gate feature of the questions is not finite: they cannot be compared")
    generator = torch.Generator().manual_seed(seed)
    labels_N = torch.cat((torch.zeros(len(calibration_IZ)), torch.ones(num_at_hand))).double()
    shuffled_PN = torch.stack(
        [labels_N[torch.randperm(count, generator=generator)] for _ in range(permutations)]
    )
    labels_NP = torch.cat((labels_N[None], shuffled_PN)).T
    fold_N = torch.randperm(count, generator=generator) % FOLDS
    scores_NP = torch.empty_like(labels_NP)
    for fold in range(FOLDS):
        held_N = fold_N == fold
        train_TZ = both_NZ[~held_N]
        mean_Z, scale_Z = train_TZ.mean(0), train_TZ.std(0).clamp(min=1e-6)
        train_TZ, held_HZ = (train_TZ - mean_Z) / scale_Z, (both_NZ[held_N] - mean_Z) / scale_Z
        ridge_ZZ = train_TZ.T @ train_TZ + RIDGE * torch.eye(both_NZ.shape[1], dtype=torch.float64)
        targets_TP = labels_NP[~held_N]
        targets_TP = targets_TP - targets_TP.mean(0)
        scores_NP[held_N] = held_HZ @ torch.linalg.solve(ridge_ZZ, train_TZ.T @ targets_TP)
    auc_P = area_under_curve(scores_NP, labels_NP)
    as_good = int((auc_P[1:] >= auc_P[0] - 1e-12).sum())
    return ShiftTest(
        p_value=(1 + as_good) / (1 + permutations),
        auc=float(auc_P[0]),
        num_calibration=len(calibration_IZ),
        num_at_hand=num_at_hand,
        permutations=permutations,
    )


def area_under_curve(scores_NP: Tensor, labels_NP: Tensor) -> Tensor:
    """(P,) chance that a row labelled 1 has a higher score than one labelled 0; ties count half.

    Parameters
    ----------
    scores_NP, labels_NP
        Scores, and labels 0 or 1, of P tests.
    """
    ranks_NP = torch.empty_like(scores_NP)
    for column in range(scores_NP.shape[1]):
        _, inverse, counts = scores_NP[:, column].unique(return_inverse=True, return_counts=True)
        last = counts.cumsum(0)
        ranks_NP[:, column] = (last - (counts - 1) / 2)[inverse].to(scores_NP.dtype)
    ones_P = labels_NP.sum(0)
    zeros_P = len(labels_NP) - ones_P
    return ((ranks_NP * labels_NP).sum(0) - ones_P * (ones_P + 1) / 2) / (ones_P * zeros_P)
