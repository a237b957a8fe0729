"""What a stack of gates does on held-out samples: for the log while training, and the table at the end.

Shape letters: B samples, L decoder layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyvte.calibration import ThresholdPath, at_schedule, threshold_for_budget
from dyvte.calibration.operating_points import fixed_points
from dyvte.errors import CalibrationError
from dyvte.gates import HeadLogits, Schedules, schedules
from dyvte.teacher.trace import Trace

BUDGETS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
FREEZE_BUDGETS = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)


@dataclass(frozen=True, kw_only=True)
class BudgetRow:
    """Gates beside fixed K at one budget, on the judged samples.

    Attributes
    ----------
    budget : of visual compute, met on the training samples.
    threshold : that meets it.
    visual_compute : what the gates spent, as a share of the full model's.
    risk, same_answer : of the gates, as means.
    fixed_risk, fixed_same_answer : of the best mixture of two fixed K that spends the same.
    """

    budget: float
    threshold: float
    visual_compute: float
    risk: float
    same_answer: float
    fixed_risk: float
    fixed_same_answer: float


def validation_metrics(logits: Tensor | HeadLogits, trace: Trace, threshold: float) -> dict[str, Any]:
    """Decisions at one threshold (of both heads); ``exit_rate`` has L+1 entries, the share of samples leaving
    at each layer.

    Parameters
    ----------
    logits
        (B, L), or those of both heads.
    trace
        Of the held-out samples.
    threshold
        Of exiting.
    """
    path = path_of(logits, trace)
    chosen = schedules(logits, threshold)
    metrics: dict[str, Any] = {
        f"validation/{name}": float(_at(trace, name, path, chosen).mean())
        for name in ("risk", "agreement", "same_answer")
    }
    metrics |= {
        "validation/visual_compute": path.compute(chosen),
        "validation/mean_exit_layer": float(chosen.exit_layers_B.double().mean()),
        "validation/exit_rate": exit_rate(chosen.exit_layers_B, trace.num_layers),
    }
    if path.freezes:
        metrics["validation/mean_freeze_layer"] = float(chosen.freeze_layers_B.double().mean())
    return metrics


def path_of(logits: Tensor | HeadLogits, trace: Trace) -> ThresholdPath:
    """Decisions at any threshold, the same for both heads.

    Parameters
    ----------
    logits
        (B, L), or those of both heads.
    trace
        Of the same samples.
    """
    share = trace.grid.kv_share if trace.grid is not None else math.nan
    return ThresholdPath(logits, trace.num_visual, kv_share=share)


def _at(trace: Trace, name: str, path: ThresholdPath, chosen: Schedules) -> Tensor:
    """(B,) a measure at each sample's schedule."""
    labels_BGL1 = trace.labels(name) if path.freezes else getattr(trace, name)[:, None]
    return at_schedule(labels_BGL1, path.freezes, chosen)


def exit_rate(exits_B: Tensor, num_layers: int) -> list[float]:
    """Share of samples leaving at each exit layer 0..L.

    Parameters
    ----------
    exits_B
        (B,) int64 exit layers.
    num_layers
        L.
    """
    return (torch.bincount(exits_B, minlength=num_layers + 1).double() / len(exits_B)).tolist()


def budget_rows(
    train_logits: Tensor | HeadLogits,
    train: Trace,
    logits: Tensor | HeadLogits,
    trace: Trace,
    budgets: Sequence[float] | None = None,
) -> list[BudgetRow]:
    """Gates beside fixed K at several budgets: thresholds and K chosen on training samples, judged on others.

    Fixed K at a budget is the mixture of two K on the lower convex hull (of the training samples' risk) that
    spends exactly what the gates spent on the judged samples. Budgets that the gates cannot meet are
    omitted. ``budgets`` None: `BUDGETS`, or `FREEZE_BUDGETS` for gates with a freeze head.

    Parameters
    ----------
    train_logits, train
        Of the samples that thresholds are chosen on.
    logits, trace
        Of those that are judged.
    budgets
        Shares of the full model's visual compute.
    """
    rows, path = [], path_of(train_logits, train)
    if budgets is None:
        budgets = FREEZE_BUDGETS if path.freezes else BUDGETS
    for budget in budgets:
        try:
            threshold = threshold_for_budget(path, budget)
        except CalibrationError:
            continue
        chosen = schedules(logits, threshold)
        spent = path_of(logits, trace).compute(chosen)
        rows.append(
            BudgetRow(
                budget=budget,
                threshold=threshold,
                visual_compute=spent,
                risk=float(_at(trace, "risk", path, chosen).mean()),
                same_answer=float(_at(trace, "same_answer", path, chosen).mean()),
                fixed_risk=fixed_at(train.risk, trace.risk, spent),
                fixed_same_answer=fixed_at(-train.same_answer, trace.same_answer, spent),
            )
        )
    return rows


def fixed_at(chosen_on_BL1: Tensor, judged_BL1: Tensor, compute: float) -> float:
    """Mean judged value of the best mixture of two fixed K that spends ``compute`` of the full model.

    Parameters
    ----------
    chosen_on_BL1
        (B, L+1) values by exit layer, less is better.
    judged_BL1
        (B, L+1) values by exit layer, of other samples.
    compute
        Share of the full model's.
    """
    points = fixed_points(chosen_on_BL1, torch.ones(len(judged_BL1)))
    return float(points.mixed_values(judged_BL1, points.at_compute(compute)).mean())


def budget_table(rows: Sequence[BudgetRow]) -> str:
    """The rows as aligned text."""
    head = "visual compute | gates: risk  same answer | fixed K: risk  same answer"
    lines = [head, "-" * len(head)]
    for row in rows:
        lines.append(
            f"{row.visual_compute:14.1%} | {row.risk:11.4f}  {row.same_answer:11.1%} | "
            f"{row.fixed_risk:13.4f}  {row.fixed_same_answer:11.1%}"
        )
    return "\n".join(lines)
