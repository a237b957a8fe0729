"""Gates with thresholds by group: do these questions look like those they were calibrated on, and what then?

Shapes: B rows, J images at hand, Z projected dimensions, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dyvte.analysis.findings import Findings, Table
from dyvte.analysis.outcomes import Outcome, outcomes_of
from dyvte.analysis.subject import Subject, gates_of
from dyvte.calibration.finder import one_of_each
from dyvte.calibration.shift import ShiftTest, two_sample_test
from dyvte.errors import ConfigError
from dyvte.evaluation.settings import NamedPolicy
from dyvte.formatting import number, percentage
from dyvte.gates import NOT_ASKED, UNLIKE, FoundGroups
from dyvte.plotting import COLORS, plain_axes
from dyvte.policies import LearnedPolicy

DEFINITION = (
    "Groups are told by the gates' features, as at run time. The test: a classifier learns to tell one "
    "question of each image at hand from one of each calibration image; AUC on held-out ones, p-value by "
    "permutation. "
    "Answers with one threshold for all, which was certified on the same calibration images, and with the "
    "thresholds of each question's group: full depth for groups without certificate and questions like none."
)


@dataclass(frozen=True)
class _Looked:
    """What one checkpoint says of the questions."""

    path: str
    test: ShiftTest
    shares: dict[str, tuple[float, float]]
    """Share of each group among the questions tested in calibration, and at hand."""
    unlike: tuple[float, float]
    certified: float
    """Share of the questions at hand whose group has a certificate."""


def study(subject: Subject) -> Findings:
    """Test each checkpoint, and answer with one threshold and with those of the groups."""
    looked, policies, labels = [], [], {"never": "full model"}
    for path, text in gates_of(subject).items():
        named = subject.policies(text)[0]
        policy = _by_group(named, path)
        looked.append(_look(subject, named, policy, path))
        one = subject.policies(f"{text}@{policy.threshold!r}")[0]
        policies += [one, named]
        labels |= {one.name: f"{path}: one threshold", named.name: f"{path}: by group"}
    outcomes = outcomes_of(subject, subject.ask(policies), labels)
    rows = [
        {**asdict(one.test), "gates": one.path, "groups": one.shares, "unlike": one.unlike} for one in looked
    ]
    answers = [{"rule": outcome.label, **outcome.to_dict()} for outcome in outcomes]
    return Findings(
        title=f"Like those calibrated on? {subject.benchmark.name}",
        definition=DEFINITION + " " + " ".join(f"{one.path}: {one.test.describe()}." for one in looked),
        metrics={"tests": rows, "answers": answers},
        table=_table(subject, outcomes, looked),
        paint=lambda figure: _paint(figure, looked),
        size=(6.4, 1.6 + 0.28 * max(len(one.shares) + 1 for one in looked)),
    )


def _by_group(named: NamedPolicy, path: str) -> LearnedPolicy:
    policy = named.policy
    if not isinstance(policy, LearnedPolicy) or not policy.by_group:
        raise ConfigError(
            f"{path} has no thresholds by group, so nothing to hold questions against; use dyvte calibrate "
            "--groups"
        )
    return policy


def _look(subject: Subject, named: NamedPolicy, policy: LearnedPolicy, path: str) -> _Looked:
    finder, config = policy.gates.finder, policy.gates.config
    found = found_groups(subject, named)
    asked_B = found.groups_B != NOT_ASKED
    if not bool(asked_B.any()):
        raise ConfigError(
            "none of these questions has an image and text after it: there is nothing to look at"
        )
    shown = [repr((question.images, question.video)) for question in subject.questions]
    rows = asked_B.nonzero().flatten().tolist()
    drawn = one_of_each([shown[row] for row in rows], subject.config.seed)
    at_hand_JZ = found.projected_BZ[asked_B][drawn]
    test = two_sample_test(finder.reference_IZ.cpu(), at_hand_JZ, seed=subject.config.seed)
    groups_B = found.groups_B[asked_B]
    record = config.calibration
    total = max(1, int(record["num_samples"]))
    counted = {one["name"]: one["num_samples"] / total for one in record["groups"]}
    names = config.groups.names
    return _Looked(
        path=path,
        test=test,
        shares={name: (counted.get(name, 0.0), _share(groups_B, g)) for g, name in enumerate(names)},
        unlike=(float(record["unlike"]), _share(groups_B, UNLIKE)),
        certified=sum(_share(groups_B, g) for g, t in enumerate(config.groups.thresholds) if t < 1),
    )


@torch.no_grad()
def found_groups(subject: Subject, named: NamedPolicy) -> FoundGroups:
    """What is found of every question, in their order; one pass over each prompt, without an answer.

    Parameters
    ----------
    subject
        Whose questions.
    named
        Gates with thresholds by group.
    """
    place = {question.id: n for n, question in enumerate(subject.questions)}
    size = named.policy.gates.finder.size
    whole = FoundGroups.none(len(place), size)
    model = subject.pipeline.model
    with named.exits()(model, images=subject.pipeline.images) as run:
        for batch in subject.batches(subject.questions):
            before = len(run.records)
            model(**batch.inputs, use_cache=False, logits_to_keep=1)
            if len(run.records) == before:
                continue  # no image in the batch
            found = run.records[-1].found
            rows = torch.tensor([place[question_id] for question_id in batch.question_ids])
            whole.groups_B[rows] = found.groups_B
            whole.distances_B[rows] = found.distances_B
            whole.projected_BZ[rows] = found.projected_BZ
    return whole


def _share(groups_B: Tensor, group: int) -> float:
    return float((groups_B == group).double().mean())


def _table(subject: Subject, outcomes: Sequence[Outcome], looked: Sequence[_Looked]) -> Table:
    header = ["rule", subject.benchmark.name, "same answer", "mean exit layer", "visual compute"]
    header += ["certified group", "like none", "p-value"]
    rows = []
    for place, outcome in enumerate(outcomes):
        cells = [outcome.label, outcome.headline, percentage(outcome.same_answer), number(outcome.exit_layer)]
        cells.append(percentage(outcome.visual_compute))
        if place and place % 2 == 0:
            one = looked[place // 2 - 1]
            cells += [percentage(one.certified), percentage(one.unlike[1]), f"{one.test.p_value:.4g}"]
        rows.append(cells + [""] * (len(header) - len(cells)))
    return Table(header, rows)


def _paint(figure: Any, looked: Sequence[_Looked]) -> None:
    all_axes = figure.subplots(1, len(looked), squeeze=False)[0]
    for axes, one in zip(all_axes, looked, strict=True):
        bars = [*one.shares.items(), ("like none", one.unlike)]
        for place, (_, (before, here)) in enumerate(bars):
            axes.barh(
                place - 0.2, before, height=0.38, color=COLORS[2], label=None if place else "calibration"
            )
            axes.barh(place + 0.2, here, height=0.38, color=COLORS[0], label=None if place else "at hand")
        axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel("share of the questions")
        axes.legend(fontsize=7)
        plain_axes(axes)
