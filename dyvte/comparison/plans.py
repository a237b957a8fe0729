"""Plans: a policy together with reductions, judged on traces and chosen for a budget of visual compute.

One set of traces per combination of reductions holds every static schedule (freeze and exit layer) and every
threshold of the gates, so a candidate costs no pass of its own.

Shapes: B samples, L decoder layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dyvte.backbones import Backbone
from dyvte.backbones.sizes import DecoderShape, decoder_shape
from dyvte.calibration import ThresholdPath, gate_logits
from dyvte.calibration.path import Labels, traced_pairs
from dyvte.costs.reductions import frozen_by, tokens_left, visual_factors
from dyvte.costs.visual import visual_share
from dyvte.errors import CalibrationError
from dyvte.gates import CLOSED, GateStack, HeadLogits, Schedules, logit_threshold
from dyvte.reductions import Reduction, parse_reductions
from dyvte.teacher import Trace, TraceStore


@dataclass(frozen=True)
class PolicyAndReduction:
    """What `--policy` and `--reduction` say: a plan of a search.

    Attributes
    ----------
    reduction : str
        The combination of reductions, as the command line knows it; "none".
    exit_layer : int or None
        Of a static schedule; None where visual tokens never leave.
    threshold : float or None
        Of learned gates, else None.
    freeze_layer : int or None
        How many layers update visual tokens; None: all that read them.
    """

    reduction: str
    exit_layer: int | None = None
    threshold: float | None = None
    freeze_layer: int | None = None

    @property
    def policy(self) -> str:
        """As the command line knows it, with GATES in place of the gates' folder."""
        if self.threshold is not None:
            return f"gates:GATES@{self.threshold:.6g}"
        if self.freeze_layer is not None:
            return f"freeze:{self.freeze_layer}" + ("" if self.exit_layer is None else f":{self.exit_layer}")
        return "never" if self.exit_layer is None else f"fixed:{self.exit_layer}"

    @property
    def kind(self) -> str:
        """Which method it is on its own; "combined" where it is more than one."""
        exits = self.policy.partition(":")[0]
        if self.reduction == "none":
            return exits
        names = {part.partition(":")[0] for part in self.reduction.split("+")}
        alone = {"fastv": "FastV", "frozen": "ShortV"}
        of = "combined" if names & alone.keys() else "YOPO"
        if len(names) == 1:
            of = alone.get(*names, "YOPO")
        if exits == "never":
            return of
        # YOPO's lazy layer dropping is a fixed exit.
        return "YOPO" if of == "YOPO" and exits == "fixed" else "combined"

    def __str__(self) -> str:
        return f"{self.policy} with {self.reduction}"


@dataclass(frozen=True)
class JudgedPlan:
    """A plan on some samples: (B,) risk in nats and same answer, and its visual compute."""

    plan: PolicyAndReduction
    compute: float
    risk_B: Tensor
    same_answer_B: Tensor

    @property
    def risk(self) -> float:
        """Mean risk in nats."""
        return float(self.risk_B.mean())

    def row(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "policy": self.plan.policy,
            "reduction": self.plan.reduction,
            "kind": self.plan.kind,
            "visual_compute": self.compute,
            "risk": self.risk,
            "same_answer": float(self.same_answer_B.mean()),
        }


class PlanJudge:
    """Judges plans with one combination of reductions on the traces of the backbone reduced by them.

    Parameters
    ----------
    text
        The combination, as the command line knows it.
    reductions
        The same, accepted by the backbone.
    trace
        Traces of the reduced backbone.
    shape
        Sizes of its decoder.
    gates
        Their logits come from the traces' features; None: static schedules alone.
    stored
        Names of the traces' features.
    """

    def __init__(
        self,
        text: str,
        reductions: Sequence[Reduction],
        trace: Trace,
        shape: DecoderShape,
        gates: GateStack | None = None,
        stored: Sequence[str] = (),
    ) -> None:
        self.text, self.trace, self.shape, self.reductions = text, trace, shape, reductions
        self.stored = tuple(stored)
        mean_visual = float(trace.num_visual[trace.num_visual > 0].double().mean())
        self._factors = visual_factors(reductions, shape, mean_visual)
        self._frozen_L = frozen_by(reductions, shape.num_layers)
        self._path: ThresholdPath | None = None
        if gates is not None:
            # As in training: gates at exits that the traces do not label stay closed.
            closed = sorted(set(range(1, trace.num_layers)) - set(trace.exits))
            logits = _closed(gate_logits(gates, trace, stored), [k - 1 for k in closed])
            self._path = ThresholdPath.of(logits, trace, gates.config)

    @staticmethod
    def on_store(
        backbone: Backbone, text: str, store: TraceStore, gates: GateStack | None = None
    ) -> PlanJudge:
        """The judge of a combination on the traces of a backbone reduced by it.

        Parameters
        ----------
        backbone
            The un-pruned one; it must accept the reductions.
        text
            The combination, as the command line knows it.
        store
            The traces.
        gates
            See the class.
        """
        accepted = parse_reductions(text)
        for reduction in accepted:
            reduction.check(backbone.num_layers)
            reduction.check_backbone(backbone)
        shape = decoder_shape(backbone.model.config)
        return PlanJudge(text, accepted, store.trace(), shape, gates, store.manifest.features)

    def with_gates(self, gates: GateStack) -> PlanJudge:
        """The judge of the same combination with these gates."""
        return PlanJudge(self.text, self.reductions, self.trace, self.shape, gates, self.stored)

    def fixed(self) -> list[JudgedPlan]:
        """Every labelled static schedule: fixed layers, the last of them "never", then those that freeze."""
        full, found = self.trace.num_layers, []
        for f, k in traced_pairs(full, self.trace.freezes):
            if k in self.trace.exits:
                where = {"exit_layer": k if k < full else None, "freeze_layer": f if f < k else None}
                found.append(self.judge(PolicyAndReduction(self.text, **where)))
        return found

    def learned(self, count: int = 80) -> list[JudgedPlan]:
        """Thresholds spread over what the gates say on these samples; none without gates."""
        if self._path is None:
            return []
        logits = self._path.levels()
        logits = logits[logits > CLOSED / 2]
        if not len(logits):
            return []
        cuts = torch.quantile(logits, torch.linspace(0.001, 0.999, count, dtype=torch.double))
        thresholds = sorted({float(f"{t:.6g}") for t in torch.sigmoid(cuts).tolist() if 0 < t < 1})
        return [self.judge(PolicyAndReduction(self.text, threshold=threshold)) for threshold in thresholds]

    def judge(self, plan: PolicyAndReduction) -> JudgedPlan:
        """The plan's metrics on these samples."""
        chosen = self._schedules(plan)
        has_image_B = self.trace.num_visual > 0
        layer_L = torch.arange(self.shape.num_layers)
        read_BL = self.trace.num_visual[:, None] * (layer_L < chosen.exit_layers_B[:, None])
        left_BL = tokens_left(self.reductions, read_BL)[has_image_B]
        updated_BL = left_BL * (layer_L < chosen.freeze_layers_B[has_image_B, None]) * ~self._frozen_L
        # Without freezes layers count alike, as they do for exits everywhere.
        freezes = self.trace.grid is not None or bool(self._frozen_L.any())
        frozen_BL = left_BL - updated_BL if freezes else None
        num_visual_B = self.trace.num_visual[has_image_B]
        share = visual_share(self.shape, updated_BL, num_visual_B, self._factors, frozen_BL)
        risk_B, same_B = (Labels.of(self.trace, name).at(chosen) for name in ("risk", "same_answer"))
        return JudgedPlan(plan, share, risk_B, same_B)

    def _schedules(self, plan: PolicyAndReduction) -> Schedules:
        full = self.trace.num_layers
        if plan.threshold is None:
            exits_B = torch.full((len(self.trace),), full if plan.exit_layer is None else plan.exit_layer)
            freezes_B = exits_B
            if plan.freeze_layer is not None:
                freezes_B = torch.full_like(exits_B, plan.freeze_layer)
            chosen = Schedules(freezes_B, exits_B)
        else:
            if self._path is None:
                raise CalibrationError(f"{plan} needs gates: give them")
            chosen = self._path.at(logit_threshold(plan.threshold))
        self.trace.check_labelled(chosen.exit_layers_B.tolist(), str(plan))
        return chosen


def _closed(logits: Tensor | HeadLogits, columns: list[int]) -> Tensor | HeadLogits:
    """The logits with these exit gates closed, and the freeze head at layers whose streams are not traced."""
    if not isinstance(logits, HeadLogits):
        return logits.index_fill(1, torch.tensor(columns, dtype=torch.long), CLOSED)
    exit_BGL = logits.exit_BGL.index_fill(2, torch.tensor(columns, dtype=torch.long), CLOSED)
    return HeadLogits(exit_BGL, logits.freeze_BL, logits.freeze_layers).closed_elsewhere()


def front(judged: Sequence[JudgedPlan]) -> list[JudgedPlan]:
    """Plans that no other beats in both compute and risk, cheapest first."""
    best, found = np.inf, []
    for one in sorted(judged, key=lambda one: (one.compute, one.risk)):
        if one.risk < best:
            best = one.risk
            found.append(one)
    return found


def choose(judged: Sequence[JudgedPlan], budget: float) -> JudgedPlan | None:
    """The plan of least risk within the budget; None where none is cheap enough.

    Parameters
    ----------
    judged
        Plans, on the samples they are chosen on.
    budget
        Share of the full model's visual compute.
    """
    within = [one for one in judged if one.compute <= budget + 1e-9]
    return min(within, key=lambda one: (one.risk, one.compute)) if within else None


def folder_name(reduction: str) -> str:
    """A combination of reductions as the name of a folder."""
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in reduction.replace("+", "--"))


def traces_of(root: Path, reduction: str) -> Path:
    """Where a search keeps its traces of one combination.

    Parameters
    ----------
    root
        Of the search.
    reduction
        As the command line says it.
    """
    return root / "traces" / folder_name(reduction)
