"""How far a schedule drifts from the full model over a long answer: KL by position, first differing token.

Shape letters: B rows, A positions of the continuation, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dyvte.analysis.findings import Findings, Table
from dyvte.analysis.subject import Subject
from dyvte.backbones import generate_greedily
from dyvte.backbones.greedy import in_answer
from dyvte.evaluation.settings import NamedPolicy
from dyvte.formatting import percentage
from dyvte.plotting import COLORS, log_axis_with_zero, plain_axes
from dyvte.teacher.labels import append_answers
from dyvte.teacher.reduced import Turn, continued_logits

STRETCHES = ((1, 1), (2, 8), (9, 32), (33, 128), (129, 256))
"""Positions, both ends included, whose mean KL is tabulated; longer continuations have one stretch more."""
_POSITIONS_AT_ONCE = 32

DEFINITION = (
    "The full model's greedy continuation of each sampled question is made so many tokens long (its end "
    "tokens are suppressed) and forced on every schedule: prompt prefilled with the schedule, continuation "
    "on its cache. KL(full || schedule) in nats at every position, mean over questions. First differing "
    "token: the first position whose argmax is not the full model's; up to there a free greedy answer is the "
    "same. Same answer: none differs up to the token with which the full model, left free, would have ended. "
    "Exit layer: mean over questions. No paper prints this; the definitions are ours."
)


@dataclass
class Drift:
    """One schedule beside the full model on the same forced continuations.

    Attributes
    ----------
    kl_A
        Sums over questions of KL(full || schedule), nats.
    first
        First differing position of each question, from 1; None where none differs.
    same
        Whether the answer up to the full model's own end is the same.
    exits
        Exit layers.
    """

    kl_A: Tensor
    first: list[int | None] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)
    exits: list[int] = field(default_factory=list)

    def see(self, full_BAV: Tensor, reduced_BAV: Tensor, visual_ids: Sequence[int], ends_B: Tensor) -> None:
        """Add a batch.

        Parameters
        ----------
        full_BAV, reduced_BAV
            Next-token logits at every position.
        visual_ids
            Placeholders, which no answer holds.
        ends_B
            Position, from 1, of the last token of the full model's own answer; A where it does not end.
        """
        differs = []
        for start in range(0, full_BAV.shape[1], _POSITIONS_AT_ONCE):
            part = slice(start, start + _POSITIONS_AT_ONCE)
            full, reduced = full_BAV[:, part].double(), reduced_BAV[:, part].double()
            self.kl_A[part] += kl(full, reduced).sum(0).cpu()
            differs.append(_said(full, visual_ids) != _said(reduced, visual_ids))
        differs_BA = torch.cat(differs, 1).cpu()
        positions_A = torch.arange(1, differs_BA.shape[1] + 1)
        never = differs_BA.shape[1] + 1
        first_B = positions_A.expand_as(differs_BA).masked_fill(~differs_BA, never).amin(1)
        self.first += [None if p == never else p for p in first_B.tolist()]
        self.same += (first_B > ends_B.cpu()).tolist()

    def mean_kl(self) -> list[float]:
        """KL by position, mean over questions."""
        return (self.kl_A / len(self.first)).tolist()

    def survives(self, position: int) -> float:
        """Share of questions that no token up to ``position`` tells from the full model."""
        return sum(p is None or p > position for p in self.first) / len(self.first)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "kl": self.mean_kl(),
            "first_differing": self.first,
            "same_answer": sum(self.same) / len(self.same),
            "exit_layers": self.exits,
        }


def kl(full: Tensor, reduced: Tensor) -> Tensor:
    """KL(full || reduced) in nats over the last axis, of logits."""
    full, reduced = full.log_softmax(-1), reduced.log_softmax(-1)
    return (full.exp() * (full - reduced)).sum(-1).clamp(min=0)


def _said(logits: Tensor, visual_ids: Sequence[int]) -> Tensor:
    """Argmax over the vocabulary without the placeholders."""
    allowed = logits.clone()
    allowed[..., list(visual_ids)] = -torch.inf
    return allowed.argmax(-1)


def schedules_of(subject: Subject) -> list[NamedPolicy]:
    """The schedules asked for; else the exit at K, also with tokens frozen at half of it, and the gates."""
    k = subject.layer
    given = subject.config.schedules or (f"fixed:{k}", f"freeze:{k // 2}:{k}")
    return subject.policies(*given, *(f"gates:{path}" for path in subject.config.gates))


def study(subject: Subject) -> Findings:
    """Every schedule on the forced continuations of the sampled questions."""
    schedules, notes = subject.servable(schedules_of(subject))
    length = subject.config.tokens
    drifts = {named.name: Drift(torch.zeros(length, dtype=torch.float64)) for named in schedules}
    ends: list[int] = []
    for batch in subject.batches():
        turn = _forced(subject, batch.inputs, length)
        full_BAV = continued_logits(subject.pipeline.model, turn)
        visual_ids = subject.backbone.visual_token_ids
        # where the full model, left free, ends: its answer's tokens, the closing one included
        ends_B = in_answer(_said(full_BAV, visual_ids), subject.pipeline.model).sum(1)
        ends += ends_B.tolist()
        for named in schedules:
            with named.exits()(subject.pipeline.model) as run:
                run.sample_ids = batch.question_ids
                reduced_BAV = continued_logits(subject.pipeline.model, turn)
            drifts[named.name].see(full_BAV, reduced_BAV, visual_ids, ends_B)
            drifts[named.name].exits += run.exit_layers.tolist()
    stretches = _stretches(length)
    marks = [end for _, end in stretches[1:]]
    return Findings(
        title=f"Drift over {length} forced tokens, {subject.num_layers} layers",
        definition=DEFINITION,
        metrics={
            "tokens": length,
            "answer_tokens": ends,
            "schedules": {name: drift.to_dict() for name, drift in drifts.items()},
        },
        table=Table(
            ["schedule", "exit layer", "same answer"]
            + [f"KL {_range(*stretch)}" for stretch in stretches]
            + [f"same through {mark}" for mark in marks]
            + ["first differing, median"],
            [_row(name, drift, stretches, marks) for name, drift in drifts.items()],
        ),
        paint=lambda figure: _paint(figure, drifts),
        size=(8.4, 3.4),
        notes=tuple(notes),
    )


def _forced(subject: Subject, inputs: dict[str, Tensor], length: int) -> Turn:
    """The full model's greedy continuation, ``length`` tokens whatever it says."""
    model, prompt = subject.pipeline.model, inputs["input_ids"].shape[1]
    answer_BA = generate_greedily(model, inputs, length, min_new_tokens=length)[:, prompt:]
    return Turn.of(*append_answers(inputs, answer_BA, torch.ones_like(answer_BA, dtype=torch.bool)))


def _stretches(length: int) -> list[tuple[int, int]]:
    found = [(low, min(high, length)) for low, high in STRETCHES if low <= length]
    return [*found, (found[-1][1] + 1, length)] if found[-1][1] < length else found


def _range(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}-{high}"


def _row(name: str, drift: Drift, stretches: Sequence[tuple[int, int]], marks: Sequence[int]) -> list[str]:
    means = torch.tensor(drift.mean_kl(), dtype=torch.float64)
    told = [p for p in drift.first if p is not None]
    # the median over all questions: those that never differ lie behind all others
    later = [*sorted(told), *[float("inf")] * (len(drift.first) - len(told))]
    middle = median(later)
    return [
        name,
        f"{sum(drift.exits) / len(drift.exits):.2f}",
        percentage(sum(drift.same) / len(drift.same)),
        *(f"{float(means[low - 1 : high].mean()):.4f}" for low, high in stretches),
        *(percentage(drift.survives(mark)) for mark in marks),
        "none" if middle == float("inf") else f"{middle:g}",
    ]


def _paint(figure: Any, drifts: dict[str, Drift]) -> None:
    left, right = figure.subplots(1, 2)
    for number, (name, drift) in enumerate(drifts.items()):
        color = COLORS[number % len(COLORS)]
        positions = range(1, len(drift.kl_A) + 1)
        left.plot(positions, drift.mean_kl(), lw=1, color=color, label=name)
        right.plot(positions, [100 * drift.survives(p) for p in positions], lw=1.2, color=color, label=name)
    log_axis_with_zero(left, 1e-4)
    left.set_ylabel("KL(full || schedule), nats")
    right.set_ylabel("questions without a differing token, %")
    right.set_ylim(0, 101)
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.set_xlabel("token of the continuation")
        plain_axes(axes)
