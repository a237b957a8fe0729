"""Tables of the comparison of three-state gates (`freezing.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dyvte.calibration.frozen_sets import RULES
from dyvte.comparison.budgets import TARGET
from dyvte.comparison.records import Spread
from dyvte.comparison.static_sets import HullComparison
from dyvte.formatting import difference_text, markdown_table, percentage, spread_text


def certified_table(found: Mapping[str, Mapping[str, Spread]], alpha: float) -> str:
    """What is spent and kept at the certified thresholds."""
    rows = [
        [
            name,
            *(
                f"{spread_text(one[part], 1, scale=100.0)} %"
                for part in ("same_answer", "compute", "prefill")
            ),
            spread_text(one["updated"]),
            spread_text(one["read"]),
        ]
        for name, one in found.items()
    ]
    head = ["gates", "same answer", "visual compute", "prefill FLOPs", "layers updated", "layers read"]
    return f"Certified at {1 - alpha:.0%} same answer:\n\n{markdown_table(head, rows)}"


def target_table(found: Any, at_99: Mapping[str, Mapping[str, Spread]]) -> str:
    """Visual compute and prefill FLOPs at equal fidelity."""
    spent = found.compute_at_same_answer.rules
    rows = [
        [
            name,
            f"{spread_text(spent[name], 1, scale=100.0)} %",
            f"{spread_text(one['prefill'], 1, scale=100.0)} %",
        ]
        for name, one in at_99.items()
    ]
    return (
        f"At {TARGET:.0%} same answer:\n\n{markdown_table(['rule', 'visual compute', 'prefill FLOPs'], rows)}"
    )


def lengths_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Same answer by length."""
    names = list(rows[0]["same_answer"])
    head = ["words in the answer", "samples", *names, *(f"minus {name}" for name in rows[0]["minus"])]
    return markdown_table(
        head,
        [
            [
                row["words"],
                str(row["samples"]),
                *(percentage(row["same_answer"][name].mean) for name in names),
                *(difference_text(one, 1, scale=100.0) for one in row["minus"].values()),
            ]
            for row in rows
        ],
    )


def hulls_table(found: Sequence[HullComparison], prefill: Mapping[str, float]) -> str:
    """Mixtures of sets of frozen layers beside the gates; ``prefill``: their FLOPs at the target."""
    head = ["sets", "visual compute", "risk", "gates minus it", "same answer, %", "gates minus it, points"]
    rows = [
        [
            RULES[one.rule],
            percentage(budget),
            f"{one.risk[i]:.4f}",
            difference_text(one.risk_minus[i], 4),
            f"{100 * one.same_answer[i]:.2f}",
            difference_text(one.same_answer_minus[i], scale=100.0),
        ]
        for one in found
        for i, budget in enumerate(one.budgets)
    ]
    verdicts = [
        f"{RULES[one.rule]}: {TARGET:.0%} same answer at {percentage(one.compute_at_target)} visual compute, "
        f"{percentage(prefill[one.rule])} of the prefill FLOPs; the gates are strictly better at "
        f"{one.verdict.strictly_better} of {one.verdict.budgets} budgets, "
        f"{'never' if one.verdict.never_worse else 'sometimes'} worse."
        for one in found
        if one.verdict is not None
    ]
    return "\n\n".join(
        ["Sets of frozen layers, mixed to spend a budget:", markdown_table(head, rows), *verdicts]
    )
