"""Results as text tables."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from dyvte.evaluation.runner import PolicyResult
from dyvte.formatting import Unit, flops_unit, markdown_table, name_some, number, percentage, significant


def results_table(results: Sequence[PolicyResult]) -> str:
    """One row per policy: score, same answer, exit layer, compute, time, memory."""
    unit = flops_unit(_prefill(result) for result in results)
    header = ["policy", results[0].scores.scores["benchmark"], "same answer", "exit layer", "visual compute"]
    header += [f"prefill, {unit.name}", "first token", "KV, MB"]
    table = markdown_table(header, [_row(result, unit) for result in results])
    unanswered = {name for result in results for name in result.scores.unanswered}
    return f"{table}\n{unanswered_note(sorted(unanswered))}" if unanswered else table


def unanswered_note(ids: Collection[str]) -> str:
    """What became of questions that could not be asked."""
    return (
        f"{len(ids)} questions could not be asked and count as answered with nothing: {name_some(ids)}; "
        "exit layer, compute, times and same answer are of the others (scores.json says why)."
    )


def _row(result: PolicyResult, unit: Unit) -> list[str]:
    scores, cost = result.scores, result.scores.cost
    return [
        result.name,
        scores.headline,
        percentage(scores.same_answer_as_never),
        number(cost.mean_exit_layer),
        percentage(cost.visual_compute),
        unit.text(_prefill(result)),
        number(scores.timing and scores.timing.times.first_token_ratio),
        significant(cost.kv_bytes_per_question / 1e6),
    ]


def _prefill(result: PolicyResult) -> float:
    return 1e12 * result.scores.cost.prefill["vtw"].tflops
