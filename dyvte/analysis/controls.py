"""VTW Table 2: the chosen exit beside its controls."""

from __future__ import annotations

from dyvte.analysis.findings import Findings
from dyvte.analysis.outcomes import outcome_table, outcomes_of, paint_outcomes
from dyvte.analysis.subject import Subject
from dyvte.evaluation.scores import FULL_MODEL
from dyvte.evaluation.settings import with_reductions

DEFINITION = (
    "VTW: all visual tokens leave behind layer K. Random K: K drawn for each question, uniform over a "
    "quarter of the layers on either side (the paper's 8..24 of 32 for K = 16). Random tokens: behind "
    "layer K as many random tokens of all kinds leave as there are visual ones (the last prompt token "
    "stays). FastV as the paper puts it beside."
)


def study(subject: Subject) -> Findings:
    """Score the full model, FastV, random tokens, random K and fixed K."""
    layer, reach = subject.layer, subject.num_layers // 4
    low, high = max(1, layer - reach), min(subject.num_layers - 1, layer + reach)
    never, fixed, drawn = subject.policies(FULL_MODEL, f"fixed:{layer}", f"random:{low}-{high}")
    (fastv,) = with_reductions([never], [subject.config.fastv])
    (tokens,) = with_reductions([never], [f"random_tokens:{layer}:{subject.config.seed}"])
    labels = {
        FULL_MODEL: "full model",
        fastv.name: f"FastV ({subject.config.fastv.partition(':')[2]})",
        tokens.name: f"random tokens (K = {layer})",
        drawn.name: f"VTW, K random in {low}..{high}",
        fixed.name: f"VTW, K = {layer}",
    }
    policies, notes = subject.servable([fastv, tokens, drawn, fixed])
    results = subject.ask(policies)
    outcomes = outcomes_of(subject, results, {n: label for n, label in labels.items() if n in results})
    return Findings(
        title=f"Withdrawal and its controls, K = {layer} of {subject.num_layers}",
        definition=DEFINITION,
        metrics={"layer": layer, "random_range": [low, high], "rows": [one.to_dict() for one in outcomes]},
        table=outcome_table(subject, outcomes),
        paint=paint_outcomes(outcomes),
        size=(6.4, 3.0),
        notes=tuple(notes),
    )
