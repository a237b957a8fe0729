"""One path of thresholds: a single number, from careful to early, that drives every head of a stack.

Shape letters: B samples, L decoder layers, G streams (frozen after each traced layer, and the plain one), M
schedules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dyvte.costs.schedules import schedule_compute
from dyvte.costs.visual import visual_compute
from dyvte.errors import CalibrationError
from dyvte.gates import GateConfig, HeadLogits, Schedules, logit_threshold, schedules
from dyvte.teacher.trace import Trace


@dataclass(frozen=True)
class ThresholdPath:
    """Decisions of gates on the same samples at any level: a level is the logit of the exit threshold.

    The freeze threshold follows at a constant distance, so one number decides for both heads, and a lower
    level is earlier for both. What is tested along it (a budget, a bounded risk) is tested for the pair.

    Attributes
    ----------
    logits
        (B, L) of gates without freeze head, or those of both heads.
    num_visual_B
        (B,) visual tokens of each sample.
    min_layer
        Of the decision rule.
    gap
        Level of the freeze head minus that of the exit head; chosen on other data.
    kv_share
        Of the backbone, see `dyvte.costs.schedules.kv_share`; read with a freeze head only.
    """

    logits: Tensor | HeadLogits
    num_visual_B: Tensor
    min_layer: int = 1
    gap: float = 0.0
    kv_share: float = math.nan
    _spent: dict[float, tuple[float, float]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @staticmethod
    def of(logits: Tensor | HeadLogits, trace: Trace, config: GateConfig) -> ThresholdPath:
        """That of a checkpoint's settings on a trace: the gap is that of its two thresholds.

        Parameters
        ----------
        logits
            (B, L), or those of both heads.
        trace
            Of the same samples.
        config
            Of the gates.
        """
        gap, share = 0.0, math.nan
        if isinstance(logits, HeadLogits) and trace.grid is not None:
            share = trace.grid.kv_share
            gap = logit_threshold(config.freeze_threshold) - logit_threshold(config.threshold)
            gap = gap if math.isfinite(gap) else 0.0
        return ThresholdPath(logits, trace.num_visual, config.min_layer, gap, share)

    @property
    def num_layers(self) -> int:
        """L, the number of decoder layers."""
        return self.logits.num_layers if isinstance(self.logits, HeadLogits) else self.logits.shape[1]

    @property
    def freezes(self) -> tuple[int, ...]:
        """Freeze layers of the streams; none without a freeze head."""
        return self.logits.freeze_layers if isinstance(self.logits, HeadLogits) else ()

    def at(self, level: float) -> Schedules:
        """Where each sample freezes and leaves at a level.

        Parameters
        ----------
        level
            The exit threshold as a logit; that of freezing keeps its distance.
        """
        return self.by(threshold_at(level), threshold_at(level + self.gap))

    def by(self, threshold: float, freeze_threshold: float | None = None) -> Schedules:
        """Where each sample freezes and leaves at these thresholds.

        Parameters
        ----------
        threshold
            Of exiting, a probability.
        freeze_threshold
            Of freezing; None: that of exiting.
        """
        return schedules(self.logits, threshold, self.min_layer, freeze_threshold=freeze_threshold)

    def rows(self, index: Tensor) -> ThresholdPath:
        """The path of some of the samples.

        Parameters
        ----------
        index
            (R,) which of them.
        """
        logits = self.logits.rows(index) if isinstance(self.logits, HeadLogits) else self.logits[index]
        return replace(self, logits=logits, num_visual_B=self.num_visual_B[index])

    def compute(self, chosen: Schedules) -> float:
        """Visual compute of these schedules, as a share of the full model's.

        Parameters
        ----------
        chosen
            Of the B samples of this path; those without an image weigh nothing.
        """
        if not isinstance(self.logits, HeadLogits):
            return visual_compute(chosen.exit_layers_B, self.num_visual_B, self.num_layers)
        freezes_B, exits_B = chosen.freeze_layers_B.double(), chosen.exit_layers_B.double()
        spent_B = schedule_compute(freezes_B, exits_B, self.num_layers, self.kv_share)
        visual_B = self.num_visual_B.double()
        return float((spent_B * visual_B).sum() / visual_B.sum())

    def memory(self, chosen: Schedules) -> float:
        """Bytes of the visual tokens' keys and values, as a share of the full model's.

        Parameters
        ----------
        chosen
            Of the B samples of this path; freezing saves none.
        """
        return visual_compute(chosen.exit_layers_B, self.num_visual_B, self.num_layers)

    def spent(self, level: float) -> tuple[float, float]:
        """`compute` and `memory` at a level; remembered, as the searches for several budgets meet there.

        Parameters
        ----------
        level
            The exit threshold as a logit.
        """
        if level not in self._spent:
            chosen = self.at(level)
            self._spent[level] = self.compute(chosen), self.memory(chosen)
        return self._spent[level]

    def levels(self) -> Tensor:
        """(n,) float64, ascending: where some decision can change.

        Raises
        ------
        CalibrationError
            If a logit is not finite.
        """
        asked = slice(self.min_layer - 1, self.num_layers - 1)
        if isinstance(self.logits, HeadLogits):
            freezes = self.logits.freeze_BL[:, list(self.freezes)].double() - self.gap
            parts = [self.logits.exit_BGL[..., asked].double().flatten(), freezes.flatten()]
        else:
            parts = [self.logits[:, asked].double().flatten()]
        found = torch.cat(parts).unique()
        if not bool(found.isfinite().all()):
            raise CalibrationError(
                "a gate logit of the calibration samples is not finite; train the gates again"
            )
        return found


@dataclass(frozen=True)
class Labels:
    """One measure of every traced schedule of some samples.

    Attributes
    ----------
    values_BGL1
        (B, G, L+1), in the order of `Trace.labels`: the streams that are frozen, and the plain one last.
    freeze_layers
        Of the frozen streams.
    """

    values_BGL1: Tensor
    freeze_layers: tuple[int, ...] = ()

    @staticmethod
    def of(trace: Trace, name: str) -> Labels:
        """A trace's column by its name, such as "risk"."""
        return Labels(trace.labels(name), trace.freezes)

    @staticmethod
    def of_exits(values_BL1: Tensor) -> Labels:
        """A column of exits alone, (B, L+1)."""
        return Labels(values_BL1[:, None])

    def at(self, chosen: Schedules) -> Tensor:
        """(B,) entries at each row's schedule, see `at_schedule`."""
        return at_schedule(self.values_BGL1, self.freeze_layers, chosen)


def threshold_at(level: float) -> float:
    """The probability threshold t whose logit, log(t / (1 - t)), is ``level``.

    Parameters
    ----------
    level
        A logit; the path of thresholds is walked along it.
    """
    if level >= 0:
        return 1.0 / (1.0 + math.exp(-level))
    return math.exp(level) / (1.0 + math.exp(level))


def at_schedule(values_BGL1: Tensor, freeze_layers: tuple[int, ...], chosen: Schedules) -> Tensor:
    """(B,) entries of a trace's labels (`Trace.labels`) at each row's schedule.

    nan where the row has no image (exit layer -1). A row that is not frozen before it leaves is on the plain
    stream, the last.

    Parameters
    ----------
    values_BGL1
        (B, G, L+1), the plain stream last.
    freeze_layers
        Of the other streams.
    chosen
        Schedule of each row.

    Raises
    ------
    CalibrationError
        If a row is frozen after a layer that is not among ``freeze_layers``.
    """
    exits_B, freezes_B = chosen.exit_layers_B, chosen.freeze_layers_B
    streams_B = torch.full_like(exits_B, len(freeze_layers))
    frozen_B = freezes_B < exits_B
    for i, f in enumerate(freeze_layers):
        streams_B[frozen_B & (freezes_B == f)] = i
    if unknown := sorted(set(freezes_B[frozen_B & (streams_B == len(freeze_layers))].tolist())):
        raise CalibrationError(f"rows freeze after layers {unknown}, traced are {freeze_layers}")
    values_BGL1 = values_BGL1 if values_BGL1.dtype == torch.float64 else values_BGL1.float()
    rows_B = torch.arange(len(exits_B), device=values_BGL1.device)
    values_B = values_BGL1[rows_B, streams_B, exits_B.clamp(min=0)]
    return values_B.masked_fill(exits_B < 0, math.nan)


def traced_pairs(num_layers: int, freeze_layers: Sequence[int]) -> list[tuple[int, int]]:
    """(f, k) of the M traced schedules that read the visual tokens in some layer: f = k first.

    Parameters
    ----------
    num_layers
        L.
    freeze_layers
        That were traced.
    """
    frozen = [(f, k) for f in freeze_layers for k in range(f + 1, num_layers + 1)]
    return [*((k, k) for k in range(1, num_layers + 1)), *frozen]


def at_pairs(labels: Labels, pairs: Sequence[tuple[int, int]]) -> Tensor:
    """(B, M) float64 entries at the pairs.

    Parameters
    ----------
    labels
        Of every traced schedule.
    pairs
        (f, k) each.
    """
    streams = [labels.freeze_layers.index(f) if f < k else len(labels.freeze_layers) for f, k in pairs]
    return labels.values_BGL1[:, streams, [k for _, k in pairs]].double()
