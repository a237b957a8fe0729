"""Rows of the accuracy studies: what a policy scores beside the full model on the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dyvte.analysis.findings import Table
from dyvte.analysis.subject import Subject
from dyvte.comparison.bootstrap import PairedDifference, paired_bootstrap
from dyvte.evaluation.metrics import same_answer
from dyvte.evaluation.run_log import Answer, texts
from dyvte.evaluation.runner import PolicyResult
from dyvte.evaluation.scores import FULL_MODEL, CostMetrics
from dyvte.formatting import difference_text, number, percentage
from dyvte.plotting import COLORS, plain_axes
from dyvte.tasks.base import Predictions, Question


@dataclass(frozen=True)
class Outcome:
    """One row.

    ``correct`` is the share of right answers in percent; ``difference`` its difference to the full model in
    points, with a 95 % interval over images. ``exit_layer`` and ``visual_compute`` are None where the model
    was shown no image.
    """

    label: str
    headline: str
    correct: float
    difference: PairedDifference
    same_answer: float
    exit_layer: float | None
    visual_compute: float | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**vars(self), "difference": self.difference.to_dict()}


def outcome_of(
    subject: Subject,
    label: str,
    answers: Sequence[Answer],
    full: PolicyResult,
    cost: CostMetrics | None = None,
) -> Outcome:
    """The row of these answers to all questions.

    Parameters
    ----------
    subject : the backbone and its questions.
    label : of the row.
    answers : to all questions, in their order.
    full : the full model's run.
    cost : of the run; None where no image was shown.
    """
    given = Predictions(texts(answers))
    scores = subject.benchmark.score(subject.questions, given, subject.config.dialect)
    hits, full_hits = _hits(subject, given), _hits(subject, Predictions(texts(full.answers)))
    images = [question.image_id for question in subject.questions]
    difference = paired_bootstrap(hits, full_hits, images, seed=subject.config.seed)
    return Outcome(
        label=label,
        headline=subject.benchmark.headline(scores),
        correct=sum(hits) / len(hits),
        difference=difference,
        same_answer=same_answer(answers, full.answers),
        exit_layer=None if cost is None else cost.mean_exit_layer,
        visual_compute=None if cost is None else cost.visual_compute,
    )


def outcomes_of(
    subject: Subject, results: dict[str, PolicyResult], labels: dict[str, str] | None = None
) -> list[Outcome]:
    """Rows of runs on the subject's questions; ``labels`` by run name, and in that order where given.

    Parameters
    ----------
    subject
        Whose questions were answered.
    results
        By run name, the full model's among them.
    labels
        What rows are called.
    """
    labels = {name: name for name in results} if labels is None else labels
    full = results[FULL_MODEL]
    return [
        outcome_of(subject, label, results[name].answers, full, results[name].scores.cost)
        for name, label in labels.items()
    ]


def _hits(subject: Subject, given: Predictions) -> list[float]:
    right = subject.benchmark.correct(subject.questions, given, subject.config.dialect)
    return [100.0 * float(one) for one in right]


def outcome_table(subject: Subject, outcomes: Sequence[Outcome], first: str = "setting") -> Table:
    """The rows as a table.

    Parameters
    ----------
    subject
        Whose questions were answered.
    outcomes
        The rows.
    first
        Header of the first column.
    """
    header = [first, subject.benchmark.name, "right answers", "against the full model"]
    header += ["same answer", "mean exit layer", "visual compute"]
    rows = [
        [
            one.label,
            one.headline,
            f"{one.correct:.1f} %",
            difference_text(one.difference, 1),
            percentage(one.same_answer),
            number(one.exit_layer),
            percentage(one.visual_compute),
        ]
        for one in outcomes
    ]
    return Table(header, rows)


def paint_outcomes(outcomes: Sequence[Outcome], xlabel: str = "right answers, %") -> Any:
    """A painter of one bar for each row, with the interval of its difference from the full model.

    Parameters
    ----------
    outcomes
        The rows.
    xlabel
        Of the horizontal axis.
    """

    def paint(figure: Any) -> None:
        axes = figure.subplots()
        places = range(len(outcomes))
        axes.barh(places, [one.correct for one in outcomes], color=COLORS[2], height=0.6, alpha=0.8)
        for place, one in enumerate(outcomes):
            base = one.difference.mean_b
            ends = [base + one.difference.low, base + one.difference.high]
            axes.plot(ends, [place, place], "|-", color=COLORS[1], lw=1, ms=6)
            axes.annotate(f"{one.correct:.1f}", (104, place), va="center", fontsize=8)
        axes.set_yticks(places, [one.label for one in outcomes], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(xlabel)
        axes.set_xlim(0, 112)
        axes.set_xticks(range(0, 101, 20))
        plain_axes(axes)

    return paint


def without_images(questions: Sequence[Question]) -> list[Question]:
    """The same questions, nothing shown."""
    return [replace(question, image=None, more_images=(), video=None) for question in questions]
