"""Every fixed exit against the un-adapted full model, before and after: for the log, the summary, the docs.

Shape letters: B samples, K = L+1 exit layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyvte.backbones import describe
from dyvte.teacher import TeacherConfig
from dyvte.teacher.batches import batches_of
from dyvte.teacher.exits import positions_before, trace_checked
from dyvte.teacher.plain import predicted_logits
from dyvte.training.lora.labels import Labelled

TARGETS = (0.98, 0.99)
"""Shares of same answers for which the first exit that reaches them is named."""


@dataclass(frozen=True, kw_only=True)
class ExitRow:
    """How a fixed exit fares against the un-adapted full model, as means, before and after the training."""

    exit_layer: int
    same_answer_before: float
    same_answer_after: float
    risk_before: float
    risk_after: float


def exit_columns(
    model: Any, data: Labelled, teacher: TeacherConfig, *, adapted: bool = True
) -> dict[str, Tensor]:
    """(B, K) risk and same answer of every exit, against the full model without its adapter.

    Columns of exits that ``teacher.exit_layers`` or ``exit_every`` leaves out are NaN, as in a trace.

    Parameters
    ----------
    model:
        With its adapter.
    data:
        Samples and what the un-adapted model answered.
    teacher:
        How batches are made, and which exits are judged.
    adapted:
        False: the exits too are those of the model without its adapter.
    """
    parts, order = [], []
    exits = teacher.schedules(describe(model).num_layers).exits
    place = {sample.id: row for row, sample in enumerate(data.samples)}
    for batch in batches_of(data.samples, teacher, by_length=False):
        rows = [place[sample.id] for sample in batch]
        order += rows
        inputs, answer_BN, ids = data.inputs(rows)
        with torch.no_grad(), model.disable_adapter():
            full_BAV, _ = predicted_logits(model, inputs, positions_before(answer_BN, ids))
            if not adapted:
                parts.append(_trace(model, inputs, answer_BN, ids, full_BAV, teacher, exits))
        if adapted:
            parts.append(_trace(model, inputs, answer_BN, ids, full_BAV, teacher, exits))
    back = torch.tensor(order).argsort()
    return {
        name: torch.cat([getattr(part, name) for part in parts])[back].double()
        for name in ("risk", "same_answer")
    }


def _trace(model, inputs, answer_BN, ids, full_BAV, teacher: TeacherConfig, exits: Sequence[int]) -> Any:
    options = {
        "sample_ids": ids,
        "exits": exits,
        "exits_per_chunk": teacher.exits_per_chunk,
        "share_images": teacher.share_images,
        "reference_BAV": full_BAV,
    }
    return trace_checked(model, inputs, answer_BN, **options).trace.to("cpu")


def first_reaching(same_answer_K: Tensor, target: float) -> int:
    """The smallest exit layer whose share of same answers is at least ``target``; L+1 if none is.

    Parameters
    ----------
    same_answer_K
        (K,) shares by exit layer, NaN where an exit was not judged.
    target
        In [0, 1].
    """
    reached = (same_answer_K >= target).nonzero().flatten()
    return int(reached[0]) if len(reached) else len(same_answer_K)


def exit_rows(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[ExitRow]:
    """One row per exit layer that was judged: means before and after."""
    return [
        ExitRow(
            exit_layer=k,
            same_answer_before=float(before["same_answer"][:, k].mean()),
            same_answer_after=float(after["same_answer"][:, k].mean()),
            risk_before=float(before["risk"][:, k].mean()),
            risk_after=float(after["risk"][:, k].mean()),
        )
        for k in range(before["risk"].shape[1])
        if not bool(before["risk"][:, k].isnan().any())
    ]


def exit_table(rows: Sequence[ExitRow]) -> str:
    """The rows as aligned text, and the first exits that reach the targets."""
    head = "exit layer | same answer: before   after | risk: before    after"
    lines = [head, "-" * len(head)]
    for row in rows:
        lines.append(
            f"{row.exit_layer:10d} | {row.same_answer_before:19.1%} {row.same_answer_after:7.1%} | "
            f"{row.risk_before:12.4f} {row.risk_after:8.4f}"
        )
    for target in TARGETS:
        found = []
        for shares in ([row.same_answer_before for row in rows], [row.same_answer_after for row in rows]):
            place = first_reaching(torch.tensor(shares), target)
            found.append(str(rows[place].exit_layer) if place < len(rows) else "none")
        lines.append(
            f"first exit with at least {target:.0%} same answer: {found[0]} before, {found[1]} after"
        )
    return "\n".join(lines)
