"""Tables of a report: what runs score, what they cost, and all benchmarks at a glance."""

from __future__ import annotations

from collections.abc import Sequence

from dyvte.evaluation.scores import CostMetrics
from dyvte.formatting import Unit, difference_text, flops_unit, number, percentage, significant
from dyvte.reporting.page import Table
from dyvte.reporting.sections import ReportedRun, Section
from dyvte.reporting.tables import any_freezes, layers_cell, layers_head

MOST_BENCHMARKS = 4
"""In one table of a summary; more would not fit a page."""


def summary_tables(sections: Sequence[Section]) -> list[Table]:
    """Policies by benchmarks: score, and its share of the full model's; then means of costs."""
    names = list(dict.fromkeys(run.name for section in sections for run in section.runs))
    tables = []
    for start in range(0, len(sections), MOST_BENCHMARKS):
        shown = sections[start : start + MOST_BENCHMARKS]
        rows = [[name, *(_score_and_share(section, name) for section in shown)] for name in names]
        tables.append(Table(["policy", *(section.title for section in shown)], rows))
    costs = [_mean_costs(name, sections) for name in names]
    return [*tables, Table(["policy", "visual compute", "prefill FLOPs", "first token"], costs)]


def _score_and_share(section: Section, name: str) -> str:
    run, against = section.run(name), section.against.get(name)
    if run is None:
        return "-"
    kept = None if against is None or run.is_full else against.kept
    return run.scores.headline if kept is None else f"{run.scores.headline} ({percentage(kept)})"


def _mean_costs(name: str, sections: Sequence[Section]) -> list[str]:
    found = [run.scores for section in sections if (run := section.run(name)) is not None]
    times = [scores.timing.times.first_token_ratio for scores in found if scores.timing]
    return [
        name,
        percentage(_mean([scores.cost.visual_compute for scores in found])),
        percentage(_mean([scores.cost.prefill["vtw"].ratio for scores in found])),
        number(_mean(times)),
    ]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def score_table(section: Section) -> Table:
    """One row per policy and reduction: score, what is kept, agreement with the full model."""
    header = ["policy", section.title, "kept", "difference [95 %]", "same answer", "lost", "won"]
    return Table(header, [_score_row(section, run) for run in section.runs])


def _score_row(section: Section, run: ReportedRun) -> list[str]:
    against = section.against.get(run.name)
    if against is None:
        return [run.name, run.scores.headline, *["-"] * 5]
    compared = not run.is_full and against.difference is not None
    return [
        run.name,
        run.scores.headline,
        percentage(against.kept),
        difference_text(against.difference) if compared else "-",
        percentage(against.same_answer),
        *("-" if count is None or run.is_full else str(count) for count in (against.lost, against.won)),
    ]


def cost_table(section: Section) -> Table:
    """One row per policy and reduction: compute, time, memory."""
    units = [
        flops_unit(_flops(run.scores.cost, how) for run in section.runs) for how in ("vtw", "pyramiddrop")
    ]
    freezes = any_freezes(run.scores.cost for run in section.runs)
    header = ["policy", layers_head(freezes), "visual compute", f"prefill, {units[0].name}"]
    header += [f"visual alone, {units[1].name}", "first token, ms", "ratio", "per token, ms", "KV, MB"]
    return Table(header, [_cost_row(run, units, freezes) for run in section.runs])


def _cost_row(run: ReportedRun, units: Sequence[Unit], freezes: bool) -> list[str]:
    cost, timing = run.scores.cost, run.scores.timing
    times = timing and timing.times
    return [
        run.name,
        layers_cell(cost, freezes),
        percentage(cost.visual_compute),
        units[0].text(_flops(cost, "vtw")),
        units[1].text(_flops(cost, "pyramiddrop")),
        number(times and times.time_to_first_token_ms, 1),
        number(times and times.first_token_ratio),
        number(times and times.time_per_token_ms, 1),
        significant(cost.kv_bytes_per_question / 1e6),
    ]


def _flops(cost: CostMetrics, convention: str) -> float:
    return 1e12 * cost.prefill[convention].tflops
