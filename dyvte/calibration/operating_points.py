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

from dyvte.calibration.path import Labels, at_pairs, traced_pairs
from dyvte.costs.schedules import schedule_compute
from dyvte.costs.visual import visual_compute
from dyvte.errors import DataError
from dyvte.gates import GateStack, HeadLogits, Schedules, select_features
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
    """Schedules of one rule on the same samples at several settings, visual compute not falling.

    Attributes
    ----------
    name : str
    settings_S : knob values, chosen on other data than these samples.
    exits_SB : (S, B) int64 exit layers.
    num_visual_B : (B,) visual tokens.
    num_layers : L.
    freezes_SB : (S, B) int64 layers that update the visual tokens; None: all that read them.
    kv_share : of the backbone, see `dyvte.costs.schedules.kv_share`; needed with freeze layers.
    """

    name: str
    settings_S: tuple[float, ...]
    exits_SB: Tensor
    num_visual_B: Tensor
    num_layers: int
    freezes_SB: Tensor | None = None
    kv_share: float = math.nan

    def __post_init__(self) -> None:
        if self.exits_SB.shape != (len(self.settings_S), len(self.num_visual_B)) or not self.settings_S:
            raise DataError(
                f"{self.name}: exit layers {tuple(self.exits_SB.shape)} do not fit {len(self.settings_S)} "
                f"settings and {len(self.num_visual_B)} samples"
            )

    @staticmethod
    def of_schedules(
        name: str,
        settings_S: Sequence[float],
        chosen_S: Sequence[Schedules],
        num_visual_B: Tensor,
        num_layers: int,
        kv_share: float,
    ) -> OperatingPoints:
        """Schedules of every setting, brought into the order of what they spend on these samples.

        Parameters
        ----------
        name
            Of the rule.
        settings_S
            Of its knob.
        chosen_S
            Its schedules at each.
        num_visual_B
            (B,) visual tokens.
        num_layers
            L.
        kv_share
            FLOPs of a frozen token's keys and values, as a share of its layer's.
        """
        exits_SB = torch.stack([chosen.exit_layers_B for chosen in chosen_S])
        freezes_SB = torch.stack([chosen.freeze_layers_B for chosen in chosen_S])
        order = np.argsort(_spent_S(freezes_SB, exits_SB, num_visual_B, num_layers, kv_share), kind="stable")
        return OperatingPoints(
            name,
            tuple(settings_S[i] for i in order),
            exits_SB[order],
            num_visual_B,
            num_layers,
            freezes_SB[order],
            kv_share,
        )

    def schedules(self, setting: int) -> Schedules:
        """The decisions at one of the settings."""
        exits_B = self.exits_SB[setting]
        return Schedules(exits_B if self.freezes_SB is None else self.freezes_SB[setting], exits_B)

    @property
    def compute_S(self) -> np.ndarray:
        """Visual compute of every setting, as a share of the full model's."""
        if self.freezes_SB is not None:
            parts = (self.freezes_SB, self.exits_SB, self.num_visual_B)
            return _spent_S(*parts, self.num_layers, self.kv_share)
        shares = [visual_compute(exits_B, self.num_visual_B, self.num_layers) for exits_B in self.exits_SB]
        return np.array(shares)

    def values_SB(self, values: Tensor | Labels) -> Tensor:
        """(S, B) float64 entries at every setting's schedules: of a trace's (B, L+1) column, or of the labels
        of all its schedules."""
        labels = values if isinstance(values, Labels) else Labels.of_exits(values)
        return torch.stack([labels.at(self.schedules(i)) for i in range(len(self.settings_S))]).double()

    def means_S(self, values: Tensor | Labels) -> np.ndarray:
        """Mean over samples of `values_SB`."""
        return self.values_SB(values).mean(1).numpy()

    def at_compute(self, budget: float) -> Mixture:
        """The mixture of two neighbours that spends ``budget``; the nearest end outside the curve's reach."""
        return mixture_at(self.compute_S, budget)

    def mixed_values(self, values: Tensor | Labels, mixture: Mixture) -> Tensor:
        """(B,) expected entry of `values_SB` for each sample under the mixture."""
        values_SB = self.values_SB(values)
        return torch.lerp(values_SB[mixture.lower], values_SB[mixture.upper], mixture.weight)

    def mixed_compute(self, mixture: Mixture) -> float:
        """Visual compute of the mixture."""
        return mixed(self.compute_S, mixture)

    def draw(self, mixture: Mixture, sample_ids: Sequence[str], seed: int = 0) -> Schedules:
        """Each sample assigned to one of the two settings by its id and the seed.

        Parameters
        ----------
        mixture
            Of two settings.
        sample_ids
            Of the B samples.
        seed
            Of the draw.
        """
        upper_B = torch.from_numpy(chosen_by_id(sample_ids, mixture.weight, seed))
        low, high = self.schedules(mixture.lower), self.schedules(mixture.upper)
        return Schedules(
            torch.where(upper_B, high.freeze_layers_B, low.freeze_layers_B),
            torch.where(upper_B, high.exit_layers_B, low.exit_layers_B),
        )


def _spent_S(
    freezes_SB: Tensor, exits_SB: Tensor, num_visual_B: Tensor, num_layers: int, kv_share: float
) -> np.ndarray:
    spent_SB = schedule_compute(freezes_SB.double(), exits_SB.double(), num_layers, kv_share)
    visual_B = num_visual_B.double()
    return ((spent_SB * visual_B).sum(1) / visual_B.sum()).numpy()


def mixture_at(compute_S: Sequence[float] | np.ndarray, budget: float) -> Mixture:
    """Neighbours around ``budget`` on a non-falling compute curve, and the share of the upper one.

    Outside the curve's reach: its nearest end alone.

    Parameters
    ----------
    compute_S
        Of every setting, rising.
    budget
        Share of the full model's visual compute.
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
    """Expected value of the mixture, from the values of every setting.

    Parameters
    ----------
    values_S
        Of every setting.
    mixture
        Of two settings.
    """
    lower, upper = values_S[mixture.lower], values_S[mixture.upper]
    return float(lower + mixture.weight * (upper - lower))


def chosen_by_id(sample_ids: Sequence[str], share: float, seed: int) -> np.ndarray:
    """(B,) bool: ``share`` of the samples, picked by a hash of id and seed: order does not matter.

    Parameters
    ----------
    sample_ids
        Of the B samples.
    share
        In [0, 1].
    seed
        Of the draw.
    """
    keys = [hashlib.sha256(f"{seed}:{i}".encode()).digest()[:8] for i in sample_ids]
    ranks = np.argsort(np.argsort(np.array([int.from_bytes(key, "big") for key in keys], dtype=np.uint64)))
    return ranks < round(share * len(sample_ids))


def lower_hull(compute_S: Sequence[float] | np.ndarray, values_S: Sequence[float] | np.ndarray) -> list[int]:
    """Corners of the lower convex hull of points (compute, value), as indices, cheapest first.

    A mixture of two neighbouring corners is the least mean value that any mixture of the points reaches at
    its compute. The one place where static rules are mixed: fixed K, static schedules and plans.

    Parameters
    ----------
    compute_S : in any order; of points that cost the same, the best counts.
    values_S : what should be small. Points without a value (nan: an exit that thinned traces do not label)
        are passed over.
    """
    cost_S = [round(float(compute), 12) for compute in compute_S]
    known = [index for index, value in enumerate(values_S) if not math.isnan(value)]
    corners: list[int] = []
    for index in sorted(known, key=lambda index: (cost_S[index], values_S[index])):
        if corners and cost_S[corners[-1]] == cost_S[index]:
            continue
        while len(corners) >= 2 and _above_chord(cost_S, values_S, *corners[-2:], index):
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


def static_points(
    calibration: Labels,
    num_visual_B: Tensor,
    kv_share: float,
    *,
    smaller_is_better: bool = True,
) -> OperatingPoints:
    """Static schedules (f, k) along the lower hull found on calibration samples, applied to other samples.

    Parameters
    ----------
    calibration : a measure of the calibration samples; its freeze layers, and f = k, are what is tried.
    num_visual_B : (B,) visual tokens of the samples that the schedules are applied to.
    kv_share : of the backbone.
    smaller_is_better : whether the measure should be small (risk) or large (same answer).

    Returns
    -------
    OperatingPoints
        Its settings are the freeze layers.
    """
    num_layers = calibration.values_BGL1.shape[2] - 1
    pairs = [(0, 0), *traced_pairs(num_layers, calibration.freeze_layers)]
    means_M = at_pairs(calibration, pairs).mean(0).numpy() * (1 if smaller_is_better else -1)
    compute_M = [float(schedule_compute(f, k, num_layers, kv_share)) for f, k in pairs]
    pairs = [pairs[corner] for corner in lower_hull(compute_M, means_M)]
    whole_B = torch.ones_like(num_visual_B)
    chosen_S = [Schedules(f * whole_B, k * whole_B) for f, k in pairs]
    settings_S = tuple(float(f) for f, _ in pairs)
    return OperatingPoints.of_schedules(
        "static schedule", settings_S, chosen_S, num_visual_B, num_layers, kv_share
    )


def compute_to_reach(compute_S: np.ndarray, value_S: np.ndarray, target: float) -> float:
    """Least visual compute at which a rule's curve reaches ``target``; nan if it never does.

    A rule may always spend less, so a point counts with the best value at or below its compute.

    Parameters
    ----------
    compute_S, value_S
        Of every setting.
    target
        A value.
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
