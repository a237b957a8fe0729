"""DyVTE Table 6: gates of another model of the same shape, used on this one."""

from __future__ import annotations

from typing import Any

from dyvte.analysis.findings import Findings
from dyvte.analysis.outcomes import outcome_table, outcomes_of, paint_outcomes
from dyvte.analysis.subject import Subject, gates_of
from dyvte.evaluation.scores import FULL_MODEL
from dyvte.evaluation.settings import with_options

DEFINITION = (
    "The same questions with each of the gates, own ones as well as those trained for another backbone of "
    "the same shape (allow_transfer), each with its stored threshold."
)


def study(subject: Subject) -> Findings:
    """Score the full model and each of the gates."""
    paths = gates_of(subject)
    labels, policies = {FULL_MODEL: "full model"}, []
    rows: dict[str, dict[str, Any]] = {FULL_MODEL: {}}
    for path, named in zip(paths, subject.policies(*paths.values()), strict=True):
        allowed = with_options(named, "transfer", allow_transfer=True)
        with allowed.exits()(subject.pipeline.model) as run:
            transferred = run.transferred
        used = allowed if transferred else named
        policies.append(used)
        labels[used.name] = f"{'transferred' if transferred else 'own'}: {path}"
        rows[used.name] = {"gates": path, "transferred": transferred}
    outcomes = outcomes_of(subject, subject.ask(policies), labels)
    for name, outcome in zip(labels, outcomes, strict=True):
        rows[name].update(outcome.to_dict())
    return Findings(
        title=f"Gates used on another backbone, {subject.num_layers} layers",
        definition=DEFINITION,
        metrics={"rows": rows},
        table=outcome_table(subject, outcomes, "gates"),
        paint=paint_outcomes(outcomes),
        size=(6.4, 2.4),
    )
