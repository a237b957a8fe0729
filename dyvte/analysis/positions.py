"""VTW Table 6: do the tokens behind the exit keep their position ids?"""

from __future__ import annotations

from dyvte.analysis.findings import Findings
from dyvte.analysis.outcomes import outcome_table, outcomes_of, paint_outcomes
from dyvte.analysis.subject import Subject
from dyvte.evaluation.scores import FULL_MODEL
from dyvte.evaluation.settings import with_options

DEFINITION = (
    "Keep: text keeps its position ids behind the exit. Rearrange: behind the exit text counts on without "
    "a gap, in decoding as well."
)


def study(subject: Subject) -> Findings:
    """Score the full model and both ways to number tokens."""
    layer = subject.layer
    (keep,) = subject.policies(f"fixed:{layer}")
    rearrange = with_options(keep, "rearrange", positions="rearrange")
    labels = {FULL_MODEL: "full model", rearrange.name: "rearrange", keep.name: "keep"}
    policies, notes = subject.servable([rearrange, keep])
    results = subject.ask(policies)
    outcomes = outcomes_of(subject, results, {n: label for n, label in labels.items() if n in results})
    return Findings(
        title=f"Positions behind the exit, K = {layer} of {subject.num_layers}",
        definition=DEFINITION,
        metrics={"layer": layer, "rows": {one.label: one.to_dict() for one in outcomes}},
        table=outcome_table(subject, outcomes, "positions"),
        paint=paint_outcomes(outcomes),
        size=(6.4, 2.2),
        notes=tuple(notes),
    )
