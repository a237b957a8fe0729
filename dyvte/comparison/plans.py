"""Plans: an exit policy together with reductions, judged on traces and chosen for a budget of visual compute.

One set of traces per combination of reductions holds every fixed layer and every threshold of the gates, so a
candidate costs no pass of its own.

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
from dyvte.calibration import at_exit, gate_logits
from dyvte.costs.reductions import tokens_left, visual_factors
from dyvte.costs.visual import visual_share
from dyvte.errors import CalibrationError
from dyvte.gates import GateStack, exit_layers
from dyvte.reductions import Reduction, parse_reductions
from dyvte.teacher import Trace, TraceStore


@dataclass(frozen=True)
class Plan:
    """What `--policy` and `--reduction` say.

    ``threshold`` is that of learned gates, else None; ``exit_layer`` that of a fixed exit, else None.
    """

    reduction: str
    exit_layer: int | None = None
    threshold: float | None = None

    @property
    def policy(self) -> str:
        """As the command line knows it, with GATES in place of the gates' folder."""
        if self.threshold is not None:
            return f"gates:GATES@{self.threshold:.6g}"
        return "never" if self.exit_layer is None else f"fixed:{self.exit_layer}"

    @property
    def kind(self) -> str:
        """Which method it is on its own; "combined" where it is more than one."""
        exits = "gates" if self.threshold is not None else "fixed"
        if self.reduction == "none":
            return "never" if self.policy == "never" else exits
        names = {part.partition(":")[0] for part in self.reduction.split("+")}
        of = "FastV" if names == {"fastv"} else "combined" if "fastv" in names else "YOPO"
        if self.policy == "never":
            return of
        # YOPO's lazy layer dropping is a fixed exit.
        return "YOPO" if of == "YOPO" and exits == "fixed" else "combined"

    def __str__(self) -> str:
        return f"{self.policy} with {self.reduction}"


@dataclass(frozen=True)
class JudgedPlan:
    """A plan on some samples: (B,) risk in nats and same answer, and its visual compute."""

    plan: Plan
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
        Their logits come from the traces' features; None: fixed exits alone.
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
        self._logits_BL, self._min_layer = None, 1
        if gates is not None:
            self._min_layer = gates.config.min_layer
            self._logits_BL = gate_logits(gates, trace, stored)
            # As in training: gates at exits that the traces do not label stay closed.
            closed = sorted(set(range(1, trace.num_layers)) - set(trace.exits))
            self._logits_BL[:, [k - 1 for k in closed]] = -torch.inf

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
        """Every labelled fixed layer; the last of them is "never"."""
        full = self.trace.num_layers
        return [self.judge(Plan(self.text, k if k < full else None)) for k in self.trace.exits if k > 0]

    def learned(self, count: int = 80) -> list[JudgedPlan]:
        """Thresholds spread over what the gates say on these samples; none without gates."""
        if self._logits_BL is None:
            return []
        logits = self._logits_BL[:, :-1][torch.isfinite(self._logits_BL[:, :-1])]
        if not len(logits):
            return []
        cuts = torch.quantile(logits.double(), torch.linspace(0.001, 0.999, count, dtype=torch.double))
        thresholds = sorted({float(f"{t:.6g}") for t in torch.sigmoid(cuts).tolist() if 0 < t < 1})
        return [self.judge(Plan(self.text, threshold=threshold)) for threshold in thresholds]

    def judge(self, plan: Plan) -> JudgedPlan:
        """The plan's metrics on these samples."""
        exits_B = self._exits(plan)
        has_image_B = self.trace.num_visual > 0
        layer_L = torch.arange(self.shape.num_layers)
        visual_BL = self.trace.num_visual[:, None] * (layer_L < exits_B[:, None])
        left_BL = tokens_left(self.reductions, visual_BL)
        share = visual_share(
            self.shape, left_BL[has_image_B], self.trace.num_visual[has_image_B], self._factors
        )
        return JudgedPlan(
            plan, share, at_exit(self.trace.risk, exits_B), at_exit(self.trace.same_answer, exits_B)
        )

    def _exits(self, plan: Plan) -> Tensor:
        full = self.trace.num_layers
        if plan.threshold is None:
            k = full if plan.exit_layer is None else plan.exit_layer
            exits_B = torch.full((len(self.trace),), k)
        else:
            if self._logits_BL is None:
                raise CalibrationError(f"{plan} needs gates: give them")
            exits_B = exit_layers(self._logits_BL, plan.threshold, self._min_layer)
        self.trace.check_labelled(exits_B.tolist(), str(plan))
        return exits_B


def front(judged: Sequence[JudgedPlan]) -> list[JudgedPlan]:
    """Plans that no other beats in both compute and risk, cheapest first."""
    best, found = np.inf, []
    for one in sorted(judged, key=lambda one: (one.compute, one.risk)):
        if one.risk < best:
            best = one.risk
            found.append(one)
    return found


def choose(judged: Sequence[JudgedPlan], budget: float) -> JudgedPlan | None:
    """The plan of least risk within the budget; None where none is cheap enough."""
    within = [one for one in judged if one.compute <= budget + 1e-9]
    return min(within, key=lambda one: (one.risk, one.compute)) if within else None


def folder_name(reduction: str) -> str:
    """A combination of reductions as the name of a folder."""
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in reduction.replace("+", "--"))


def traces_of(root: Path, reduction: str) -> Path:
    """Where a search keeps its traces of one combination."""
    return root / "traces" / folder_name(reduction)
