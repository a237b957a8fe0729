"""VTW Figure 8 and DyVTE Figure 3: accuracy and KL over a fixed exit layer K."""

from __future__ import annotations

from typing import Any

from dyvte.analysis.findings import Findings, Table
from dyvte.analysis.outcomes import Outcome, difference_text, outcomes_of
from dyvte.analysis.subject import Subject
from dyvte.evaluation.scores import FULL_MODEL
from dyvte.formatting import percentage
from dyvte.plotting import COLORS, plain_axes

DEFINITION = (
    "Every question leaves behind layer K; K = 0: no layer sees the image, K = L: the full model. KL is "
    "KL(exit || full) at the last prompt position, in nats, mean over the sampled questions."
)


def study(subject: Subject) -> Findings:
    """Accuracy at every K of the curve, and the KL curve from one pass."""
    found = subject.search()
    layers = [k for k in subject.layers if k < subject.num_layers]
    results = subject.ask(subject.policies(*(f"fixed:{k}" for k in layers)))
    labels = {**{f"fixed-{k}": str(k) for k in layers}, FULL_MODEL: str(subject.num_layers)}
    outcomes = outcomes_of(subject, results, labels)
    curve = [
        {"k": k, "kl": float(found.kl[k]), **one.to_dict()}
        for k, one in zip([*layers, subject.num_layers], outcomes, strict=True)
    ]
    rows = [
        [
            one.label,
            f"{float(found.kl[int(one.label)]):.5f}",
            one.headline,
            f"{one.correct:.1f} %",
            difference_text(one.difference),
            percentage(one.same_answer),
        ]
        for one in outcomes
    ]
    header = ["K", "KL (nats)", subject.benchmark.name, "right answers", "against the full model"]
    return Findings(
        title=f"Accuracy and KL over K, {subject.num_layers} layers",
        definition=DEFINITION,
        metrics={"kl": found.kl.tolist(), "num_samples": found.num_samples, "curve": curve},
        table=Table([*header, "same answer"], rows),
        paint=lambda figure: _paint(figure, found.kl.tolist(), outcomes),
        size=(8.4, 3.4),
    )


def _paint(figure: Any, kl: list[float], outcomes: list[Outcome]) -> None:
    left, right = figure.subplots(1, 2)
    layers = [int(one.label) for one in outcomes]
    left.plot(layers, [one.correct for one in outcomes], "o-", color=COLORS[0], ms=4, label="right answers")
    same = [100 * one.same_answer for one in outcomes]
    left.plot(layers, same, "s--", color=COLORS[2], ms=3, lw=1, label="same answer as the full model")
    left.set_ylabel("%")
    left.legend(frameon=False, fontsize=8)
    right.plot(range(len(kl)), kl, "o-", color=COLORS[1], ms=4)
    right.set_yscale("symlog", linthresh=1e-4)  # the KL at K = L is exactly 0
    right.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    right.set_ylim(bottom=0)
    right.set_ylabel("KL(exit || full), nats")
    for axes in (left, right):
        axes.set_xlabel("K: layers that see the image")
        plain_axes(axes)
