"""Decision rules on traced samples: their decisions, what these cost and keep, rules at equal compute.

A rule with a knob (a threshold, K) gives a few operating points; drawing each sample from one of two
neighbouring points meets any compute between them, and its expected metrics lie on the straight line between
theirs. The one place of this arithmetic, for training, calibration and comparison alike.

Shape letters: B samples, L decoder layers, S settings of the knob.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dyvte.costs.visual import visual_compute
from dyvte.errors import DataError
from dyvte.gates import GateStack, HeadLogits, select_features
from dyvte.teacher.trace import Trace

_SAMPLES_AT_ONCE = 1024


@torch.no_grad()
def gate_logits(gates: GateStack, trace: Trace, stored: Sequence[str] | None = None) -> Tensor | HeadLogits:
    """Logits of all gates on a trace's features.

    Parameters
    ----------
    gates : on any device; the features are brought there, a part of the samples at a time.
    trace : traced samples.
    stored : names of the parts of the trace's features (`Manifest.features`), where it may hold more
        than the gates read; None: exactly what they read.

    Returns
    -------
    (B, L) float32 tensor on the CPU; with a freeze head the logits of both, on the streams of the trace

    Raises
    ------
    ConfigError
        The trace lacks a part that the gates read, or the grid that a freeze head needs.
    """
    wanted = gates.config.features
    stored = stored or wanted
    if not gates.config.freeze_head:
        parts = [
            gates(select_features(part, stored, wanted).to(gates.device)).float().cpu()
            for part in trace.features.split(_SAMPLES_AT_ONCE)
        ]
        return torch.cat(parts)
    both = []
    for index in torch.arange(len(trace)).split(_SAMPLES_AT_ONCE):
        part = trace.rows(index).select(stored, wanted)
        both.append(gates.logits(**part.to(gates.device).gate_inputs()).cpu())
    return HeadLogits.cat(both)


def at_exit(values_BL1: Tensor, exit_layers_B: Tensor) -> Tensor:
    """What a trace's column holds at each row's exit layer.

    Parameters
    ----------
    values_BL1 : (B, L+1) values, column k = exit layer k.
    exit_layers_B : (B,) exit layers, 0..L; -1 for a row without an image.

    Returns
    -------
    (B,) tensor, float32 or float64 as the values are; nan where the row has no image
    """
    values_BL1 = values_BL1 if values_BL1.dtype == torch.float64 else values_BL1.float()
    values_B = values_BL1.gather(1, exit_layers_B.clamp(min=0)[:, None]).squeeze(1)
    return values_B.masked_fill(exit_layers_B < 0, math.nan)


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
        """(S, B) float64 entries of a trace's (B, L+1) column at every setting's exits."""
        return torch.stack([at_exit(values_BL1, exits_B) for exits_B in self.exits_SB]).double()

    def means_S(self, values_BL1: Tensor) -> np.ndarray:
        """Mean over samples of a trace's (B, L+1) column at every setting."""
        return self.values_SB(values_BL1).mean(1).numpy()

    def at_compute(self, budget: float) -> Mixture:
        """The mixture of two neighbours that spends ``budget``; the nearest end outside the curve's reach."""
        return mixture_at(self.compute_S, budget)

    def mixed_values(self, values_BL1: Tensor, mixture: Mixture) -> Tensor:
        """(B,) expected entry of a trace's (B, L+1) column for each sample under the mixture."""
        values_SB = self.values_SB(values_BL1)
        return torch.lerp(values_SB[mixture.lower], values_SB[mixture.upper], mixture.weight)

    def mixed_compute(self, mixture: Mixture) -> float:
        """Visual compute of the mixture."""
        return mixed(self.compute_S, mixture)

    def draw(self, mixture: Mixture, sample_ids: Sequence[str], seed: int = 0) -> Tensor:
        """(B,) exit layers, each sample assigned to one of the two settings by its id and the seed."""
        upper_B = torch.from_numpy(chosen_by_id(sample_ids, mixture.weight, seed))
        return torch.where(upper_B, self.exits_SB[mixture.upper], self.exits_SB[mixture.lower])


def mixture_at(compute_S: Sequence[float] | np.ndarray, budget: float) -> Mixture:
    """Neighbours around ``budget`` on a non-falling compute curve, and the share of the upper one.

    Outside the curve's reach: its nearest end alone.
    """
    if budget <= compute_S[0]:
        return Mixture(0, 0, 0.0)
    if budget >= compute_S[-1]:
        last = len(compute_S) - 1
        return Mixture(last, last, 0.0)
    upper = int(np.searchsorted(compute_S, budget, side="right"))
    lower = upper - 1
    weight = (budget - compute_S[lower]) / (compute_S[upper] - compute_S[lower])
    return Mixture(lower, upper, float(weight))


def mixed(values_S: Sequence[float] | np.ndarray, mixture: Mixture) -> float:
    """Expected value of the mixture, from the values of every setting."""
    lower, upper = values_S[mixture.lower], values_S[mixture.upper]
    return float(lower + mixture.weight * (upper - lower))


def chosen_by_id(sample_ids: Sequence[str], share: float, seed: int) -> np.ndarray:
    """(B,) bool: ``share`` of the samples, picked by a hash of id and seed: order does not matter."""
    keys = [hashlib.sha256(f"{seed}:{i}".encode()).digest()[:8] for i in sample_ids]
    ranks = np.argsort(np.argsort(np.array([int.from_bytes(key, "big") for key in keys], dtype=np.uint64)))
    return ranks < round(share * len(sample_ids))


def lower_hull(compute_S: Sequence[float] | np.ndarray, values_S: Sequence[float] | np.ndarray) -> list[int]:
    """Corners of the lower convex hull of points (compute, value), as indices; both ends are corners.

    A mixture of two neighbouring corners is the least mean value that any mixture of the points reaches at
    its compute.

    Parameters
    ----------
    compute_S : strictly rising.
    values_S : what should be small. Points without a value (nan: an exit that thinned traces do not label)
        are passed over.
    """
    corners: list[int] = []
    for index in range(len(values_S)):
        if math.isnan(values_S[index]):
            continue
        while len(corners) >= 2 and _above_chord(compute_S, values_S, *corners[-2:], index):
            corners.pop()
        corners.append(index)
    return corners


def _above_chord(
    compute_S: Sequence[float] | np.ndarray,
    values_S: Sequence[float] | np.ndarray,
    left: int,
    middle: int,
    right: int,
) -> bool:
    way = (compute_S[middle] - compute_S[left]) / (compute_S[right] - compute_S[left])
    return bool(values_S[middle] >= values_S[left] + way * (values_S[right] - values_S[left]))


def fixed_points(
    calibration_values_BL1: Tensor, num_visual_B: Tensor, *, smaller_is_better: bool = True
) -> OperatingPoints:
    """Fixed K along the lower hull found on calibration samples, applied to other samples.

    Parameters
    ----------
    calibration_values_BL1 : (B', L+1) a column of the calibration samples' trace.
    num_visual_B : (B,) visual tokens of the samples that the fixed layers are applied to.
    smaller_is_better : whether the column's values should be small (risk) or large (same answer).
    """
    means_L1 = calibration_values_BL1.double().mean(0).numpy()
    corners = lower_hull(range(len(means_L1)), means_L1 if smaller_is_better else -means_L1)
    exits_SB = torch.tensor(corners)[:, None].expand(len(corners), len(num_visual_B))
    num_layers = calibration_values_BL1.shape[1] - 1
    return OperatingPoints("fixed K", tuple(map(float, corners)), exits_SB, num_visual_B, num_layers)


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
