"""Results as text tables."""

from __future__ import annotations

from collections.abc import Sequence

from dyvte.evaluation.runner import PolicyResult
from dyvte.formatting import markdown_table, number, percentage


def results_table(results: Sequence[PolicyResult]) -> str:
    """One row per policy: score, same answer, exit layer, compute, time, memory."""
    benchmark = results[0].scores.scores["benchmark"]
    header = ["policy", benchmark, "same answer", "mean exit layer", "visual compute"]
    header += ["TFLOPs", "time to first token", "KV MB per question"]
    return markdown_table(header, [_row(result) for result in results])


def _row(result: PolicyResult) -> list[str]:
    scores, cost = result.scores, result.scores.cost
    return [
        result.name,
        scores.headline,
        percentage(scores.same_answer_as_never),
        number(cost.mean_exit_layer),
        percentage(cost.visual_compute),
        f"{cost.prefill['vtw'].tflops:.4g}",
        number(scores.timing and scores.timing.times.first_token_ratio),
        f"{cost.kv_bytes_per_question / 1e6:.3g}",
    ]
