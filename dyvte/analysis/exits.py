"""DyVTE Figure 7: where the questions leave.

Shape letters: L decoder layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from dyvte.analysis.findings import Findings, Table
from dyvte.analysis.outcomes import outcomes_of
from dyvte.analysis.subject import Subject, gates_of
from dyvte.plotting import COLORS, plain_axes

DEFINITION = (
    "Share of the questions that leave behind each layer, with the gates' stored rule; L: never. Over all "
    "questions, and by question type."
)


def study(subject: Subject) -> Findings:
    """Answer with each of the gates."""
    paths = gates_of(subject)
    policies = subject.policies(*paths.values())
    results = subject.ask(policies)
    kinds = [question.kind for question in subject.questions]
    found, rows, labels = {}, [], []
    for path, named in zip(paths, policies, strict=True):
        answers = results[named.name].answers
        exits = [answer.exit_layer for answer in answers]
        (outcome,) = outcomes_of(subject, results, {named.name: named.name})
        by_kind = {
            kind: shares([k for k, own in zip(exits, kinds, strict=True) if own == kind], subject.num_layers)
            for kind in sorted(set(kinds))
        }
        overall = shares(exits, subject.num_layers)
        found[named.name] = {"gates": path, "shares": overall, "by_kind": by_kind, **outcome.to_dict()}
        labels.append(named.name)
        rows.append([named.name, *(f"{100 * share:.1f} %" for share in overall)])
        rows += [[kind, *(f"{100 * share:.1f} %" for share in own)] for kind, own in by_kind.items()]
    return Findings(
        title=f"Exit layers on {subject.benchmark.name}, {subject.num_layers} layers",
        definition=DEFINITION,
        metrics={"gates": found},
        table=Table(["questions", *(str(k) for k in range(subject.num_layers + 1))], rows),
        paint=lambda figure: _paint(figure, {name: found[name]["shares"] for name in labels}),
        size=(6.4, 2.2 + 1.2 * (len(labels) - 1)),
    )


def shares(exits: Sequence[int], num_layers: int) -> list[float]:
    """Share of the exits at each layer 0..L; rows without an image are no exits.

    Parameters
    ----------
    exits
        Exit layer of each row; -1 without an image.
    num_layers
        L.
    """
    counts = Counter(k for k in exits if k >= 0)
    return [counts[k] / max(1, counts.total()) for k in range(num_layers + 1)]


def _paint(figure: Any, found: dict[str, list[float]]) -> None:
    panels = figure.subplots(len(found), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, overall) in zip(panels, found.items(), strict=True):
        axes.bar(range(len(overall)), [100 * share for share in overall], color=COLORS[0], width=0.8)
        axes.set_title(name, fontsize=8)
        axes.set_ylabel("questions, %")
        plain_axes(axes)
    panels[-1].set_xlabel("exit layer (the last: never)")
