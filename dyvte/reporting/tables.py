"""Results as text tables."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from dyvte.evaluation.runner import PolicyResult
from dyvte.evaluation.scores import CostMetrics
from dyvte.formatting import Unit, flops_unit, markdown_table, name_some, number, percentage, significant


def results_table(results: Sequence[PolicyResult]) -> str:
    """One row per policy: score, same answer, exit layer, compute, time, memory."""
    unit = flops_unit(_prefill(result) for result in results)
    freezes = any_freezes(result.scores.cost for result in results)
    header = ["policy", results[0].scores.scores["benchmark"], "same answer", layers_head(freezes)]
    header += ["visual compute", f"prefill, {unit.name}", "first token", "KV, MB"]
    table = markdown_table(header, [_row(result, unit, freezes) for result in results])
    unanswered = {name for result in results for name in result.scores.unanswered}
    return f"{table}\n{unanswered_note(sorted(unanswered))}" if unanswered else table


def unanswered_note(ids: Collection[str]) -> str:
    """What became of questions that could not be asked."""
    return (
        f"{len(ids)} questions could not be asked and count as answered with nothing: {name_some(ids)}; "
        "exit layer, compute, times and same answer are of the others (scores.json says why)."
    )


def any_freezes(costs: Iterable[CostMetrics]) -> bool:
    """Is there a run that read visual tokens without updating them?"""
    return any(cost.mean_freeze_layer is not None for cost in costs)


def layers_head(freezes: bool) -> str:
    """What the column of layers is called."""
    return "layers updated / read" if freezes else "exit layer"


def layers_cell(cost: CostMetrics, freezes: bool) -> str:
    """Mean exit layer; beside another run that freezes, the layers that update and that read.

    Parameters
    ----------
    cost
        Of the run.
    freezes
        Does any run of the table freeze?
    """
    read = number(cost.mean_exit_layer)
    return f"{number(cost.mean_updated_layers)} / {read}" if freezes else read


def _row(result: PolicyResult, unit: Unit, freezes: bool) -> list[str]:
    scores, cost = result.scores, result.scores.cost
    return [
        result.name,
        scores.headline,
        percentage(scores.same_answer_as_never),
        layers_cell(cost, freezes),
        percentage(cost.visual_compute),
        unit.text(_prefill(result)),
        number(scores.timing and scores.timing.times.first_token_ratio),
        significant(cost.kv_bytes_per_question / 1e6),
    ]


def _prefill(result: PolicyResult) -> float:
    return 1e12 * result.scores.cost.prefill["vtw"].tflops
