"""Exit rules as curves: what a rule keeps over the visual compute it spends; rules at equal compute.

A rule with a knob (a threshold, K) gives a few operating points; drawing each sample from one of two
neighbouring points meets any compute between them, and its expected figures lie on the straight line between
theirs.

Shape letters: B samples, L decoder layers, S settings of the knob.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dyvte.calibration.decisions import visual_compute
from dyvte.errors import DataError


@dataclass(frozen=True)
class Mixture:
    """Draw from setting ``upper`` with probability ``weight``, else from ``lower`` (indices into S)."""

    lower: int
    upper: int
    weight: float


@dataclass(frozen=True)
class OperatingPoints:
    """Exit layers of one rule on the same samples at several settings, visual compute not falling.

    Attributes
    ----------
    name : str
    settings_S : knob values, chosen on other data than these samples.
    exits_SB : (S, B) int64 exit layers.
    num_visual_B : (B,) visual tokens.
    num_layers : L.
    """

    name: str
    settings_S: tuple[float, ...]
    exits_SB: Tensor
    num_visual_B: Tensor
    num_layers: int

    def __post_init__(self) -> None:
        if self.exits_SB.shape != (len(self.settings_S), len(self.num_visual_B)) or not self.settings_S:
            raise DataError(
                f"{self.name}: exit layers {tuple(self.exits_SB.shape)} do not fit {len(self.settings_S)} "
                f"settings and {len(self.num_visual_B)} samples"
            )

    @property
    def compute_S(self) -> np.ndarray:
        """Visual compute of every setting, as a share of the full model's."""
        shares = [visual_compute(exits_B, self.num_visual_B, self.num_layers) for exits_B in self.exits_SB]
        return np.array(shares)

    def values_SB(self, values_BL1: Tensor) -> Tensor:
        """(S, B) entries of a trace's column at every setting's exits."""
        rows_SB = torch.arange(values_BL1.shape[0]).expand_as(self.exits_SB)
        return values_BL1.double()[rows_SB, self.exits_SB]

    def means_S(self, values_BL1: Tensor) -> np.ndarray:
        """Mean over samples at every setting."""
        return self.values_SB(values_BL1).mean(1).numpy()

    def at_compute(self, budget: float) -> Mixture:
        """The mixture of two neighbours that spends ``budget``; the nearest end outside the curve's reach."""
        return mixture_at(self.compute_S, budget)

    def mixed_values(self, values_BL1: Tensor, mixture: Mixture) -> Tensor:
        """(B,) expected value of each sample under the mixture."""
        values_SB = self.values_SB(values_BL1)
        return torch.lerp(values_SB[mixture.lower], values_SB[mixture.upper], mixture.weight)

    def mixed_compute(self, mixture: Mixture) -> float:
        """Visual compute of the mixture."""
        compute_S = self.compute_S
        lower, upper = compute_S[mixture.lower], compute_S[mixture.upper]
        return float(lower + mixture.weight * (upper - lower))

    def draw(self, mixture: Mixture, sample_ids: Sequence[str], seed: int = 0) -> Tensor:
        """(B,) exit layers, each sample assigned to one of the two settings by its id and the seed."""
        upper_B = torch.from_numpy(chosen_by_id(sample_ids, mixture.weight, seed))
        return torch.where(upper_B, self.exits_SB[mixture.upper], self.exits_SB[mixture.lower])


def mixture_at(compute_S: np.ndarray, budget: float) -> Mixture:
    """Neighbours around ``budget`` on a non-falling compute curve, and the share of the upper one."""
    if budget <= compute_S[0]:
        return Mixture(0, 0, 0.0)
    if budget >= compute_S[-1]:
        last = len(compute_S) - 1
        return Mixture(last, last, 0.0)
    upper = int(np.searchsorted(compute_S, budget, side="right"))
    lower = upper - 1
    weight = (budget - compute_S[lower]) / (compute_S[upper] - compute_S[lower])
    return Mixture(lower, upper, float(weight))


def chosen_by_id(sample_ids: Sequence[str], share: float, seed: int) -> np.ndarray:
    """(B,) bool: ``share`` of the samples, picked by a hash of id and seed: order does not matter."""
    keys = [hashlib.sha256(f"{seed}:{i}".encode()).digest()[:8] for i in sample_ids]
    ranks = np.argsort(np.argsort(np.array([int.from_bytes(key, "big") for key in keys], dtype=np.uint64)))
    return ranks < round(share * len(sample_ids))


def compute_to_reach(compute_S: np.ndarray, value_S: np.ndarray, target: float) -> float:
    """Least visual compute at which a rule's curve reaches ``target``; nan if it never does.

    A rule may always spend less, so a point counts with the best value at or below its compute.
    """
    best_S = np.maximum.accumulate(value_S)
    reached = np.flatnonzero(best_S >= target - 1e-12)
    if len(reached) == 0:
        return float("nan")
    at = int(reached[0])
    if at == 0 or best_S[at] == best_S[at - 1]:
        return float(compute_S[at])
    share = (target - best_S[at - 1]) / (best_S[at] - best_S[at - 1])
    return float(compute_S[at - 1] + share * (compute_S[at] - compute_S[at - 1]))
