"""Results as text tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dyvte.evaluation.runner import PolicyResult


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose source is aligned too."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def percentage(share: float | None) -> str:
    """A share in percent with one decimal; a dash where there is none."""
    return "-" if share is None or math.isnan(share) else f"{100 * share:.1f} %"


def number(value: float | None, digits: int = 2) -> str:
    """A figure with fixed decimals; a dash where there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def results_table(results: Sequence[PolicyResult]) -> str:
    """One row per policy: score, same answer, exit layer, compute, time, memory."""
    benchmark = results[0].scores["scores"]["benchmark"]
    header = ["policy", benchmark, "same answer", "mean exit layer", "visual compute"]
    header += ["TFLOPs", "time to first token", "KV MB per question"]
    return markdown_table(header, [_row(result) for result in results])


def _row(result: PolicyResult) -> list[str]:
    scores = result.scores
    timing = scores["timing"] or {}
    return [
        result.name,
        scores["headline"],
        percentage(scores["same_answer_as_never"]),
        number(scores["mean_exit_layer"]),
        percentage(scores["visual_compute"]),
        f"{scores['prefill']['vtw']['tflops']:.4g}",
        number(timing.get("first_token_ratio")),
        f"{scores['kv_bytes_per_question'] / 1e6:.3g}",
    ]
