"""What a stack of gates does on held-out samples: for the log while training, and the table at the end.

Shape letters: B samples, L decoder layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dyvte.calibration import at_exit, threshold_for_compute, visual_compute
from dyvte.calibration.operating_points import fixed_points
from dyvte.errors import CalibrationError
from dyvte.gates import exit_layers
from dyvte.teacher.trace import Trace

BUDGETS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


def validation_metrics(logits_BL: Tensor, trace: Trace, threshold: float) -> dict[str, Any]:
    """Decisions at one threshold; ``exit_rate`` has L+1 entries, the share of samples leaving at each
    layer."""
    exits_B = exit_layers(logits_BL, threshold)
    return {
        "validation/risk": float(at_exit(trace.risk, exits_B).mean()),
        "validation/agreement": float(at_exit(trace.agreement, exits_B).mean()),
        "validation/same_answer": float(at_exit(trace.same_answer, exits_B).mean()),
        "validation/visual_compute": visual_compute(exits_B, trace.num_visual, trace.num_layers),
        "validation/mean_exit_layer": float(exits_B.double().mean()),
        "validation/exit_rate": exit_rate(exits_B, trace.num_layers),
    }


def exit_rate(exits_B: Tensor, num_layers: int) -> list[float]:
    """Share of samples leaving at each exit layer 0..L."""
    return (torch.bincount(exits_B, minlength=num_layers + 1).double() / len(exits_B)).tolist()


def budget_rows(
    train_logits_BL: Tensor,
    train: Trace,
    logits_BL: Tensor,
    trace: Trace,
    budgets: Sequence[float] = BUDGETS,
) -> list[dict[str, float]]:
    """Gates beside fixed K at several budgets: thresholds and K chosen on training samples, judged on others.

    Fixed K at a budget is the mixture of two K on the lower convex hull (of the training samples' risk) that
    spends exactly what the gates spent on the judged samples. Budgets that the gates cannot meet are left
    out.
    """
    rows = []
    for budget in budgets:
        try:
            threshold = threshold_for_compute(train_logits_BL, train.num_visual, budget)
        except CalibrationError:
            continue
        exits_B = exit_layers(logits_BL, threshold)
        spent = visual_compute(exits_B, trace.num_visual, trace.num_layers)
        rows.append(
            {
                "budget": budget,
                "threshold": threshold,
                "visual_compute": spent,
                "risk": float(at_exit(trace.risk, exits_B).mean()),
                "same_answer": float(at_exit(trace.same_answer, exits_B).mean()),
                "fixed_risk": fixed_at(train.risk, trace.risk, spent),
                "fixed_same_answer": fixed_at(-train.same_answer, trace.same_answer, spent),
            }
        )
    return rows


def fixed_at(chosen_on_BL1: Tensor, judged_BL1: Tensor, compute: float) -> float:
    """Mean judged value of the best mixture of two fixed K that spends ``compute`` of the full model."""
    points = fixed_points(chosen_on_BL1, torch.ones(len(judged_BL1)))
    return float(points.mixed_values(judged_BL1, points.at_compute(compute)).mean())


def budget_table(rows: Sequence[dict[str, float]]) -> str:
    """The rows as aligned text."""
    head = "visual compute | gates: risk  same answer | fixed K: risk  same answer"
    lines = [head, "-" * len(head)]
    for row in rows:
        lines.append(
            f"{row['visual_compute']:14.1%} | {row['risk']:11.4f}  {row['same_answer']:11.1%} | "
            f"{row['fixed_risk']:13.4f}  {row['fixed_same_answer']:11.1%}"
        )
    return "\n".join(lines)
