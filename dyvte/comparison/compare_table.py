"""The table of a comparison and its text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dyvte.comparison.baselines import VtwChoice
from dyvte.comparison.runs import BenchmarkRuns, gates_name, mixture_name, router_name
from dyvte.comparison.traces import Pair
from dyvte.evaluation.latency import PrefillTimes
from dyvte.evaluation.scores import CostMetrics
from dyvte.formatting import markdown_table, number, percentage


@dataclass(frozen=True)
class Row:
    """One policy over all benchmarks; means over seeds where there are several."""

    policy: str
    gqa: str
    mme: str
    same_answer: float | None
    mean_exit_layer: float | None
    visual_compute: float | None
    prefill_ratio: float | None

    def cells(self) -> list[str]:
        """Text of the table's columns."""
        return [
            self.policy,
            self.gqa,
            self.mme,
            percentage(self.same_answer),
            number(self.mean_exit_layer),
            percentage(self.visual_compute),
            number(self.prefill_ratio),
        ]


HEADER = (
    "policy",
    "mini-GQA",
    "mini-MME (perception / cognition)",
    "same answer",
    "mean exit layer",
    "visual compute",
    "prefill time",
)


def table_rows(
    runs: Sequence[BenchmarkRuns],
    pairs: Sequence[Pair],
    vtw: VtwChoice,
    timing: Mapping[str, PrefillTimes],
) -> list[Row]:
    """Rows in the order people read them: the full model, VTW, the router, the gates."""
    rows = [_row("full model", runs, ["never"], timing, full=True)]
    by_kl = f"VTW, K by KL (eta {vtw.eta:g})"
    if vtw.k is None:
        rows.append(Row(f"{by_kl}: none qualifies", "-", "-", None, None, None, None))
    else:
        rows.append(_row(f"{by_kl}: K = {vtw.k}", runs, [f"fixed-{vtw.k}"], timing))
    if vtw.calibrated_k is not None:
        label = f"VTW, eta {vtw.calibrated_eta:.3g} chosen on calibration: K = {vtw.calibrated_k}"
        rows.append(_row(label, runs, [f"fixed-{vtw.calibrated_k}"], timing))
    rows.append(
        _row("VTW at the gates' budget (mixture of two K)", runs, list(map(mixture_name, pairs)), timing)
    )
    rows.append(_row("question-only router", runs, list(map(router_name, pairs)), timing))
    rows.append(_row("DyVTE gates", runs, list(map(gates_name, pairs)), timing))
    return rows


def _row(
    label: str,
    runs: Sequence[BenchmarkRuns],
    names: Sequence[str],
    timing: Mapping[str, PrefillTimes],
    *,
    full: bool = False,
) -> Row:
    by_benchmark = {run.benchmark.name: run for run in runs}
    questions = np.array([len(run.questions) for run in runs], dtype=np.float64)

    def pooled(metric: Callable[[CostMetrics], float]) -> float:
        per_run = [np.mean([metric(run.results[name].scores.cost) for name in names]) for run in runs]
        return float(np.average(per_run, weights=questions))

    same = [np.mean([run.same_B(name).mean() for name in names]) for run in runs]
    timed = timing.get(names[0])
    return Row(
        policy=label,
        gqa=_score_cell(by_benchmark.get("gqa"), names, ("accuracy",)),
        mme=_score_cell(by_benchmark.get("mme"), names, ("perception", "cognition")),
        same_answer=float(np.average(same, weights=questions)),
        mean_exit_layer=pooled(lambda cost: cost.mean_exit_layer),
        visual_compute=pooled(lambda cost: cost.visual_compute),
        prefill_ratio=1.0 if full else timed and timed.prefill_ratio,
    )


def _score_cell(run: BenchmarkRuns | None, names: Sequence[str], figures: Sequence[str]) -> str:
    if run is None:
        return "-"
    cells = []
    for figure in figures:
        values = [run.results[name].scores.scores[figure] for name in names]
        deviation = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
        cells.append(f"{np.mean(values):.1f}{deviation}")
    return " / ".join(cells)


def comparison_markdown(result: dict[str, Any], rows: Sequence[Row]) -> str:
    """The report of a comparison."""
    parts = ["# Comparison of exit rules", ""]
    if rows:
        parts += [markdown_table(HEADER, [row.cells() for row in rows]), ""]
        parts += [_table_notes(result), ""]
    parts += ["## On traced test scenes", "", *_trace_lines(result["traces"]), ""]
    if result["benchmarks"]:
        parts += ["## Benchmarks: gates minus rival, paired bootstrap over images", ""]
        parts += [_benchmark_differences(result["benchmarks"]), ""]
    parts += ["![accuracy and risk over visual compute](comparison.png)", ""]
    return "\n".join(parts)


def _table_notes(result: dict[str, Any]) -> str:
    where = result["settings"]["machine"]
    seeds = len(result["gates"])
    return (
        f"Gates, router and mixture: mean over {seeds} seed{'s' if seeds > 1 else ''} (± deviation). "
        "The router and the mixture spend what the gates of that seed spent on the same questions. "
        "Same answer: the whole answer equals the full model's. Prefill time: relative to the full model, "
        "taken in turns, vision tower included "
        f"({where['gpu'] or where['processor']}, {where['torch_threads']} threads)."
    )


def _trace_lines(traces: dict[str, Any]) -> list[str]:
    over = traces["over_seeds"]
    lines = [
        f"{traces['num_samples']} samples about {traces['num_images']} images. The gates spend "
        f"{percentage(over['visual_compute']['mean'])} of the visual compute; rivals at the same:",
        "",
    ]
    rows = []
    for name in ("gates", "router", "fixed", "oracle"):
        figures = over["at_equal_compute"][name]
        label = {"fixed": "fixed K (mixture of two)", "router": "question-only router"}.get(name, name)
        rows.append([label, *(_spread_cell(figures[m], m) for m in ("risk", "same_answer", "agreement"))])
    lines += [markdown_table(["rule", "risk (nats)", "same answer", "agreement"], rows), ""]
    lines += ["Gates minus rival (95 % interval over images, mean of the seeds):", ""]
    lines += [_difference_table(over["gates_minus"]), ""]
    lines.append(
        "Visual compute needed to keep as many answers as the gates: question-only router "
        f"{number(over['router_over_gates']['mean'])} x theirs, "
        f"fixed K {number(over['fixed_over_gates']['mean'])} x."
    )
    shares = ", ".join(
        f"{name} {percentage(share)}" for name, share in traces["within_wording_share"].items()
    )
    lines.append(f"Variance of the needed layer within identical wordings: {shares}.")
    return lines


def _spread_cell(figures: dict[str, float], metric: str) -> str:
    scale, digits = (1.0, 4) if metric == "risk" else (100.0, 2)
    text = f"{scale * figures['mean']:.{digits}f}"
    return text if figures["min"] == figures["max"] else f"{text} ± {scale * figures['std']:.{digits}f}"


def _difference_table(differences: dict[str, dict[str, dict[str, float]]]) -> str:
    rows = []
    for rival, metrics in differences.items():
        for metric, d in metrics.items():
            scale, unit, digits = (1.0, " nats", 4) if metric == "risk" else (100.0, " points", 2)
            rows.append([rival, metric.replace("_", " "), *_interval(d, scale, unit, digits)])
    return markdown_table(["rival", "figure", "difference", "interval"], rows)


def _interval(d: dict[str, float], scale: float, unit: str, digits: int) -> list[str]:
    low, high = scale * d["low"], scale * d["high"]
    return [f"{scale * d['difference']:+.{digits}f}{unit}", f"[{low:+.{digits}f}, {high:+.{digits}f}]"]


def _benchmark_differences(benchmarks: dict[str, Any]) -> str:
    rows = []
    for name, benchmark in benchmarks.items():
        for rival, d in benchmark["gates_minus"].items():
            rows.append([f"mini-{name.upper()}", rival.replace("_", " "), *_interval(d, 1.0, "", 2)])
    return markdown_table(["benchmark", "rival", "difference", "interval"], rows)
