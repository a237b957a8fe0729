"""The table of a comparison: one row per rule, over all benchmarks.

Shape letters: B questions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dyvte.comparison.records import Spread, plain
from dyvte.comparison.runs import BenchmarkRuns, gates_name, mixture_name, router_name, static_name
from dyvte.comparison.traces import Pair
from dyvte.comparison.vtw import VtwChoice
from dyvte.evaluation.latency import PrefillTimes
from dyvte.evaluation.scores import FULL_MODEL, CostMetrics


@dataclass(frozen=True)
class PolicyRow:
    """One rule over all benchmarks, pooled over questions; means over seeds where there are several.

    Attributes
    ----------
    policy : what the row is called.
    scores : by the benchmark's title, its headline metrics over seeds; empty where nothing was run or graded.
    same_answer : share of questions with the full model's whole answer.
    mean_exit_layer, mean_freeze_layer : layers that read, and that update, visual tokens; of the questions.
    visual_compute, prefill_flops : over the full model's; the latter by the convention "vtw".
    prefill_ratio : time of the prefill over the full model's.
    """

    policy: str
    scores: Mapping[str, tuple[Spread, ...]] = field(default_factory=dict)
    same_answer: float | None = None
    mean_exit_layer: float | None = None
    mean_freeze_layer: float | None = None
    visual_compute: float | None = None
    prefill_flops: float | None = None
    prefill_ratio: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {name: plain(value) for name, value in vars(self).items()}


def table_rows(
    runs: Sequence[BenchmarkRuns],
    pairs: Sequence[Pair],
    vtw: VtwChoice,
    timing: Mapping[str, PrefillTimes],
) -> list[PolicyRow]:
    """Rows in the order people read them: the full model, VTW, controls, the router, the gates.

    Parameters
    ----------
    runs : of every benchmark.
    pairs : gates and routers of every seed.
    vtw : VTW's K.
    timing : of the prefill, by run name; those of the first seed stand for all.
    """
    rows = [_row("full model", runs, [FULL_MODEL], timing, full=True)]
    by_kl = f"VTW, K by KL (eta {vtw.eta:g})"
    if vtw.k is None:
        rows.append(PolicyRow(f"{by_kl}: none qualifies"))
    else:
        rows.append(_row(f"{by_kl}: K = {vtw.k}", runs, [f"fixed-{vtw.k}"], timing))
    if vtw.calibrated_k is not None:
        label = f"VTW, eta {vtw.calibrated_eta:.3g} chosen on calibration: K = {vtw.calibrated_k}"
        rows.append(_row(label, runs, [f"fixed-{vtw.calibrated_k}"], timing))
    controls = [named for named in runs[0].policies.values() if named.reductions]
    rows += [_row(f"control {named.reduction}", runs, [named.name], timing) for named in controls]
    mixtures = list(map(mixture_name, pairs))
    rows.append(_row("VTW at the gates' budget (mixture of two K)", runs, mixtures, timing))
    if pairs[0].gates.freezes:
        statics = list(map(static_name, pairs))
        rows.append(_row("static schedule at the gates' budget (mixture of two)", runs, statics, timing))
    rows.append(_row("question-only router", runs, list(map(router_name, pairs)), timing))
    ours = "three-state gates" if pairs[0].gates.freezes else "DyVTE gates"
    rows.append(_row(ours, runs, list(map(gates_name, pairs)), timing))
    return rows


def _row(
    label: str,
    runs: Sequence[BenchmarkRuns],
    names: Sequence[str],
    timing: Mapping[str, PrefillTimes],
    *,
    full: bool = False,
) -> PolicyRow:
    questions = np.array([len(run.questions) for run in runs], dtype=np.float64)

    def pooled(metric: Callable[[CostMetrics], float]) -> float:
        per_run = [np.mean([metric(run.results[name].scores.cost) for name in names]) for run in runs]
        return float(np.average(per_run, weights=questions))

    same = [np.mean([run.same_B(name).mean() for name in names]) for run in runs]
    timed = timing.get(names[0])
    return PolicyRow(
        policy=label,
        scores={run.title: found for run in runs if (found := _headline(run, names))},
        same_answer=float(np.average(same, weights=questions)),
        mean_exit_layer=pooled(lambda cost: cost.mean_exit_layer),
        mean_freeze_layer=pooled(lambda cost: cost.mean_updated_layers),
        visual_compute=pooled(lambda cost: cost.visual_compute),
        prefill_flops=pooled(lambda cost: cost.prefill["vtw"].ratio),
        prefill_ratio=1.0 if full else timed and timed.prefill_ratio,
    )


def _headline(run: BenchmarkRuns, names: Sequence[str]) -> tuple[Spread, ...]:
    """The benchmark's headline metrics over seeds; empty where nothing can be graded here."""
    found = [run.results[name].scores.scores for name in names]
    metrics = run.benchmark.headline_metrics
    if any(metric not in scores for scores in found for metric in metrics):
        return ()
    return tuple(Spread.of([float(scores[metric]) for scores in found]) for metric in metrics)
