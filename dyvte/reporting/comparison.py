"""The report of a comparison: comparison.json, comparison.md, and its plots."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from dyvte.calibration.frozen_sets import RULES
from dyvte.comparison.bootstrap import PairedDifference
from dyvte.comparison.compare import Comparison
from dyvte.comparison.runs import BenchmarkComparison
from dyvte.comparison.static_sets import SetComparison
from dyvte.comparison.table import PolicyRow
from dyvte.comparison.traces import TraceComparison
from dyvte.errors import ConfigError
from dyvte.files import write_atomically
from dyvte.formatting import difference_text, markdown_table, name_some, number, percentage, spread_text
from dyvte.reductions.frozen import as_ranges
from dyvte.reporting.budgets import budget_markdown, plot_budgets
from dyvte.reporting.comparison_plots import plot_comparison, plot_schedules
from dyvte.reporting.hard import HARD_HEADER, hard_note, hard_rows
from dyvte.reporting.plans import plan_markdown, plot_plans
from dyvte.tasks.base import get_benchmark

BASELINE_LABELS = {
    "fixed": "fixed K (mixture of two)",
    "static": "static schedule (mixture of two)",
    "router": "question-only router",
    "vtw_mixture": "VTW, mixture of two K",
    "full": "full model",
    "schedule_oracle": "schedule oracle",
}


def write_comparison(found: Comparison, output: Path) -> Path:
    """Write comparison.json, comparison.md and the plots.

    Parameters
    ----------
    found : the comparison.
    output : an existing folder.

    Returns
    -------
    Path
        Of comparison.md.

    Raises
    ------
    ConfigError
        The folder cannot be written, or matplotlib is not installed.
    """
    page = output / "comparison.md"
    try:
        write_atomically(output / "comparison.json", json.dumps(found.to_dict(), indent=2) + "\n")
        write_atomically(page, comparison_markdown(found))
        plot_comparison(found, output)
        plot_schedules(found, output / "schedules.png")
        if found.budgets is not None:
            plot_budgets(found.budgets, output / "budgets.png")
        if found.plans is not None:
            plot_plans(found.plans, output / "plans.png")
    except OSError as error:
        raise ConfigError(f"cannot write to {output}: {error.strerror or error}") from error
    return page


def comparison_markdown(found: Comparison) -> str:
    """The comparison as text."""
    parts = ["# Comparison of exit rules"]
    if found.rows:
        parts += [comparison_table(found), _table_notes(found)]
        parts += [note for note in (_unaskable_note(found.benchmarks),) if note]
    parts += ["## On traced test samples", *_trace_parts(found.traces)]
    if found.benchmarks:
        parts.append("## Benchmarks: gates minus baseline, paired bootstrap")
        parts.append(_benchmark_differences(found.benchmarks))
    for title, one in found.benchmarks.items():
        for hard in one.hard:
            parts += [f"### {title}: the hard subset", markdown_table(HARD_HEADER, hard_rows(hard))]
            parts.append(hard_note(hard, one.unit))
    parts.append("![scores and risk over visual compute](comparison.png)")
    if any(one.kinds for one in found.benchmarks.values()):
        parts.append("![layers that update and read visual tokens, by question type](schedules.png)")
    if found.budgets is not None:
        parts += ["## At given budgets", budget_markdown(found.budgets), "![rules at budgets](budgets.png)"]
    if found.sets:
        parts += ["## Static sets of frozen layers, at what they cost", sets_table(found.sets)]
    if found.plans is not None:
        parts += ["## Plans", plan_markdown(found.plans), "![plans over visual compute](plans.png)"]
    return "\n\n".join(parts) + "\n"


def comparison_table(found: Comparison) -> str:
    """Markdown: one row per rule."""
    header = ["policy"]
    for title, one in found.benchmarks.items():
        metrics = get_benchmark(one.benchmark).headline_metrics
        header.append(title if len(metrics) == 1 else f"{title} ({' / '.join(metrics)})")
    freezes = _freezes(found)
    layers = ["layers updated", "layers read"] if freezes else ["exit layer"]
    flops = ["prefill FLOPs"] if freezes else []
    header += ["same answer", *layers, "visual compute", *flops, "prefill time"]
    return markdown_table(header, [_cells(row, found.benchmarks, freezes) for row in found.rows])


def sets_table(sets: Sequence[SetComparison]) -> str:
    """Markdown: one row per set, the gates that spend the same beside it."""
    head = [
        "chosen by",
        "frozen layers",
        "visual compute",
        "same answer, %",
        "gates",
        "gates minus set, points",
        "risk, nats",
        "gates",
        "gates minus set",
    ]
    rows = [
        [
            RULES[one.rule],
            as_ranges(one.layers),
            percentage(one.visual_compute),
            f"{100 * one.metrics['same_answer']:.2f}",
            spread_text(one.gates["same_answer"], scale=100.0),
            difference_text(one.gates_minus["same_answer"], scale=100.0),
            f"{one.metrics['risk']:.4f}",
            spread_text(one.gates["risk"], 4),
            difference_text(one.gates_minus["risk"], 4),
        ]
        for one in sets
    ]
    return markdown_table(head, rows)


def _freezes(found: Comparison) -> bool:
    """Do the gates choose schedules?"""
    return found.traces.curves.static is not None


def _cells(row: PolicyRow, benchmarks: Mapping[str, BenchmarkComparison], freezes: bool) -> list[str]:
    scores = [" / ".join(spread_text(one, 1) for one in row.scores.get(title, ())) for title in benchmarks]
    return [
        row.policy,
        *(cell or "-" for cell in scores),
        percentage(row.same_answer),
        *([number(row.mean_freeze_layer)] if freezes else []),
        number(row.mean_exit_layer),
        percentage(row.visual_compute),
        *([percentage(row.prefill_flops)] if freezes else []),
        number(row.prefill_ratio),
    ]


def _table_notes(found: Comparison) -> str:
    seeds = len(found.gates)
    layers = "Exit layer: mean"
    if _freezes(found):
        layers = (
            "Layers updated: mean number of layers that update the visual tokens; read: that text can read "
            "them in. Prefill FLOPs: of all tokens, two per multiply-add, over the full model's"
        )
    return (
        f"Gates, router and mixtures: mean over {seeds} seed{'s' if seeds > 1 else ''} (± deviation). "
        "The router and the mixtures spend what the gates of that seed spent on the same questions. "
        f"Same answer: the whole answer equals the full model's. {layers}. Prefill time: relative to "
        f"the full model, taken in turns, vision tower included ({found.machine})."
    )


def _unaskable_note(benchmarks: Mapping[str, BenchmarkComparison]) -> str:
    """Which questions are in no number; empty where all are."""
    return " ".join(
        f"{title}: {len(one.unaskable)} questions that cannot be asked ({name_some(one.unaskable)}) are "
        "excluded, and all others about their images."
        for title, one in benchmarks.items()
        if one.unaskable
    )


def _trace_parts(traces: TraceComparison) -> list[str]:
    over = traces.over_seeds
    rows = []
    for rule in ("gates", "router", "fixed", "static", "oracle", "schedule_oracle"):
        if (means := over.at_equal_compute.get(rule)) is None:
            continue
        cells = [spread_text(means["risk"], 4)]
        cells += [spread_text(means[metric], scale=100.0) for metric in ("same_answer", "agreement")]
        rows.append([BASELINE_LABELS.get(rule, rule), *cells])
    names = {"router": "question-only router", "fixed": "fixed K", "static": "static schedule"}
    needed = ", ".join(
        f"{name} {number(over.over_gates[rule].mean)} x" + (" theirs" if rule == "router" else "")
        for rule, name in names.items()
        if rule in over.over_gates
    )
    shares = ", ".join(f"{name} {percentage(share)}" for name, share in traces.within_wording_share.items())
    return [
        f"{traces.num_samples} samples about {traces.num_images} images. The gates spend "
        f"{percentage(over.visual_compute.mean)} of the visual compute; baselines at the same:",
        markdown_table(["rule", "risk (nats)", "same answer, %", "agreement, %"], rows),
        "Gates minus baseline (95 % interval over images, mean of the seeds):",
        _difference_table(over.gates_minus),
        f"Visual compute needed to keep as many answers as the gates: {needed}.\n"
        f"Variance of the needed layer within identical wordings: {shares}.",
    ]


def _difference_table(differences: Mapping[str, Mapping[str, PairedDifference]]) -> str:
    rows = []
    for baseline, metrics in differences.items():
        for metric, found in metrics.items():
            nats = metric == "risk"
            text = difference_text(found, 4) if nats else difference_text(found, scale=100.0)
            unit = "nats" if nats else "points"
            rows.append([BASELINE_LABELS[baseline], f"{metric.replace('_', ' ')}, {unit}", text])
    return markdown_table(["baseline", "metric", "difference [95 %]"], rows)


def _benchmark_differences(benchmarks: Mapping[str, BenchmarkComparison]) -> str:
    rows = []
    for title, one in benchmarks.items():
        if not one.gates_minus:
            rows.append([title, "not graded here", "-", "-", "-"])
        for baseline, found in one.gates_minus.items():
            rows.append([title, BASELINE_LABELS[baseline], one.score_name, difference_text(found), one.unit])
    return markdown_table(["benchmark", "baseline", "score", "difference [95 %]", "resampled"], rows)
