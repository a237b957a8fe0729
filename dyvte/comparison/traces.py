"""Rules compared on traced test samples: no generation, every traced schedule known for every sample.

Shape letters: B samples, L decoder layers, S settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyvte.calibration import gate_logits
from dyvte.calibration.operating_points import (
    OperatingPoints,
    compute_to_reach,
    fixed_points,
    static_points,
)
from dyvte.calibration.path import Labels, at_pairs, traced_pairs
from dyvte.comparison.bootstrap import PairedDifference, paired_bootstrap
from dyvte.comparison.oracle import (
    first_safe_layer,
    first_safe_schedule,
    oracle_exits,
    oracle_points,
    schedule_oracle_points,
    within_wording_share,
)
from dyvte.comparison.records import METRICS, Curve, RuleCurves, Spread, on_every_metric, plain
from dyvte.comparison.scenes import TracedScenes, distinct_share
from dyvte.comparison.tuned_gates import TunedGates
from dyvte.comparison.tuned_router import TunedRouter
from dyvte.costs.schedules import schedule_compute

BASELINES = ("fixed", "static", "router")
"""Rules that the gates are compared with; static schedules where the gates choose schedules."""
SAME_ANSWER_TARGETS = (0.90, 0.95, 0.98, 0.99)

Points = Mapping[str, OperatingPoints]
"""Operating points of a rule, by metric (fixed K has another hull for each)."""
ByMetric = dict[str, PairedDifference]


@dataclass(frozen=True)
class Pair:
    """Gates of one seed and the router tuned like them.

    Attributes
    ----------
    gates : trained gates.
    router : the candidate with the least risk at the gates' own budget, on calibration samples.
    candidates : all of them; another budget may have another best one.
    """

    gates: TunedGates
    router: TunedRouter
    candidates: tuple[TunedRouter, ...] = ()

    @property
    def name(self) -> str:
        """Of the seed."""
        return self.gates.name


@dataclass(frozen=True)
class ComputeNeeded:
    """Visual compute at which each rule keeps a share of the answers; nan where it never does.

    Attributes
    ----------
    same_answer : that share.
    spent : visual compute by rule.
    """

    same_answer: float
    spent: Mapping[str, float]

    @property
    def over_gates(self) -> dict[str, float]:
        """How many times the gates' compute each other rule needs."""
        return {rule: one / self.spent["gates"] for rule, one in self.spent.items() if rule != "gates"}

    def to_dict(self) -> dict[str, float]:
        """JSON-ready, ratios included."""
        ratios = {f"{rule}_over_gates": one for rule, one in self.over_gates.items()}
        return {"same_answer": self.same_answer, **self.spent, **ratios}


@dataclass(frozen=True)
class SeedComparison:
    """The gates of one seed at their stored threshold, and every rule at the same visual compute.

    Attributes
    ----------
    threshold, visual_compute, mean_exit_layer, mean_freeze_layer : of the gates on the test samples.
    router_kind, router_learning_rate : what was chosen for the router.
    at_equal_compute : means, by rule and metric.
    gates_minus : differences, by baseline and metric.
    compute_at_the_gates_same_answer : what each rule needs to keep as many answers as the gates.
    compute_at_equal_same_answer : what each needs to keep given shares of them.
    """

    threshold: float
    visual_compute: float
    mean_exit_layer: float
    mean_freeze_layer: float
    router_kind: str
    router_learning_rate: float
    at_equal_compute: dict[str, dict[str, float]]
    gates_minus: dict[str, ByMetric]
    compute_at_the_gates_same_answer: ComputeNeeded
    compute_at_equal_same_answer: tuple[ComputeNeeded, ...]


@dataclass(frozen=True)
class OverSeeds:
    """Means over seeds with their spread; differences are of the seeds' means, intervals over images."""

    visual_compute: Spread
    mean_exit_layer: Spread
    mean_freeze_layer: Spread
    at_equal_compute: dict[str, dict[str, Spread]]
    gates_minus: dict[str, ByMetric]
    over_gates: dict[str, Spread]
    """Compute that a rule needs to keep as many answers as the gates, over theirs."""


@dataclass(frozen=True)
class TraceComparison:
    """Outcome of `compare_on_traces`.

    Attributes
    ----------
    num_samples, num_images, num_layers : of the test samples' trace.
    distinct_wordings : distinct questions as a share of all.
    within_wording_share : of the variance of the layers that are needed, by what "needed" means.
    curves : of every rule.
    seeds : by the seed's name.
    over_seeds : all seeds together.
    """

    num_samples: int
    num_images: int
    num_layers: int
    distinct_wordings: float
    within_wording_share: dict[str, float]
    curves: RuleCurves
    seeds: dict[str, SeedComparison]
    over_seeds: OverSeeds

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {name: plain(value) for name, value in vars(self).items()}


def compare_on_traces(
    calibration: TracedScenes,
    test: TracedScenes,
    pairs: Sequence[Pair],
    *,
    num_draws: int = 2000,
    seed: int = 0,
) -> TraceComparison:
    """Curves, differences at equal visual compute, and compute at equal same-answer rate.

    Parameters
    ----------
    calibration : what the hull of fixed K is chosen on.
    test : what all rules are judged on.
    pairs : gates of every seed with their routers.
    num_draws, seed : of the paired bootstrap.
    """
    trace, visual_B = test.trace, test.trace.num_visual
    bounds = {"oracle": on_every_metric(oracle_points(trace.risk, visual_B))}
    shared: dict[str, Points] = {
        "fixed": {
            metric: fixed_points(getattr(calibration.trace, metric), visual_B, smaller_is_better=less)
            for metric, less in METRICS.items()
        }
    }
    if pairs[0].gates.freezes:
        share = calibration.trace.grid.kv_share
        shared["static"] = {
            metric: static_points(
                Labels.of(calibration.trace, metric), visual_B, share, smaller_is_better=less
            )
            for metric, less in METRICS.items()
        }
        found = schedule_oracle_points(Labels.of(trace, "risk"), visual_B, share)
        bounds["schedule_oracle"] = on_every_metric(found)
    judged = [_OneSeed(test, pair, shared, bounds) for pair in pairs]
    curves = {rule: Curve.on_trace(points, trace) for rule, points in bounds.items()}
    if "static" in shared:
        curves["static"] = _every_schedule(test)
    return TraceComparison(
        num_samples=len(test.questions),
        num_images=len(set(test.image_ids)),
        num_layers=test.num_layers,
        distinct_wordings=distinct_share(test.questions),
        within_wording_share=_wording_shares(test, pairs),
        curves=RuleCurves(
            gates={one.pair.name: one.curve("gates") for one in judged},
            router={one.pair.name: one.curve("router") for one in judged},
            fixed=_every_layer(test),
            **curves,
        ),
        seeds={one.pair.name: one.compared(num_draws, seed) for one in judged},
        over_seeds=_over_seeds(judged, num_draws, seed),
    )


class _OneSeed:
    """Every rule on the test samples, at the visual compute of one seed's gates.

    ``values`` holds (B,) expected values by rule and metric.
    """

    def __init__(
        self,
        test: TracedScenes,
        pair: Pair,
        shared: Mapping[str, Points],
        bounds: Mapping[str, Points],
    ) -> None:
        self.test, self.pair = test, pair
        visual_B = test.trace.num_visual
        logits = gate_logits(pair.gates.gates, test.trace, test.features)
        self.own = pair.gates.operating_point(logits, visual_B)
        self.compute = float(self.own.compute_S[0])
        self.labels = {metric: Labels.of(test.trace, metric) for metric in METRICS}
        self.points: dict[str, Points] = {
            "gates": on_every_metric(pair.gates.points(logits, visual_B)),
            "router": on_every_metric(pair.router.points(test.questions, visual_B)),
            **shared,
            **bounds,
        }
        self.values = {
            rule: {metric: self._at_compute(points[metric], metric) for metric in METRICS}
            for rule, points in self.points.items()
        }
        self.values["gates"] = {m: self.own.values_SB(self.labels[m])[0] for m in METRICS}

    def _at_compute(self, points: OperatingPoints, metric: str) -> Tensor:
        return points.mixed_values(self.labels[metric], points.at_compute(self.compute))

    def curve(self, rule: str) -> Curve:
        """Of a rule's settings."""
        return Curve.on_trace(self.points[rule], self.test.trace)

    @property
    def mean_exit_layer(self) -> float:
        """Of the gates."""
        return float(self.own.schedules(0).exit_layers_B.double().mean())

    @property
    def mean_freeze_layer(self) -> float:
        """Of the gates: layers that update the visual tokens."""
        return float(self.own.schedules(0).freeze_layers_B.double().mean())

    def means(self) -> dict[str, dict[str, float]]:
        """By rule and metric."""
        return {
            rule: {m: float(column.mean()) for m, column in columns.items()}
            for rule, columns in self.values.items()
        }

    def needed(self, target: float) -> ComputeNeeded:
        """What the rules spend to keep a share of the answers."""
        metric, spent = "same_answer", {}
        for rule, points in self.points.items():
            if rule == "gates" or rule in BASELINES or rule == "schedule_oracle":
                means_S = points[metric].means_S(self.labels[metric])
                spent[rule] = compute_to_reach(points[metric].compute_S, means_S, target)
        return ComputeNeeded(target, spent)

    def needed_for_own(self) -> ComputeNeeded:
        """What the rules spend to keep as many answers as the gates at their threshold."""
        return self.needed(float(self.values["gates"]["same_answer"].mean()))

    def compared(self, num_draws: int, seed: int) -> SeedComparison:
        """The record."""
        return SeedComparison(
            threshold=self.pair.gates.threshold,
            visual_compute=self.compute,
            mean_exit_layer=self.mean_exit_layer,
            mean_freeze_layer=self.mean_freeze_layer,
            router_kind=self.pair.router.kind,
            router_learning_rate=self.pair.router.settings.learning_rate,
            at_equal_compute=self.means(),
            gates_minus=_differences(self.values, self.test, num_draws, seed),
            compute_at_the_gates_same_answer=self.needed_for_own(),
            compute_at_equal_same_answer=tuple(map(self.needed, SAME_ANSWER_TARGETS)),
        )


def _differences(
    values: Mapping[str, Mapping[str, Tensor]], test: TracedScenes, num_draws: int, seed: int
) -> dict[str, ByMetric]:
    """Gates minus each baseline."""
    return {
        name: {
            metric: paired_bootstrap(
                values["gates"][metric], values[name][metric], test.image_ids, num_draws=num_draws, seed=seed
            )
            for metric in METRICS
        }
        for name in BASELINES
        if name in values
    }


def _over_seeds(judged: Sequence[_OneSeed], num_draws: int, seed: int) -> OverSeeds:
    rules = judged[0].values
    mean = {
        rule: {m: torch.stack([one.values[rule][m] for one in judged]).mean(0) for m in METRICS}
        for rule in rules
    }
    means, needed = [one.means() for one in judged], [one.needed_for_own() for one in judged]
    return OverSeeds(
        visual_compute=Spread.of([one.compute for one in judged]),
        mean_exit_layer=Spread.of([one.mean_exit_layer for one in judged]),
        mean_freeze_layer=Spread.of([one.mean_freeze_layer for one in judged]),
        at_equal_compute={
            rule: {m: Spread.of([one[rule][m] for one in means]) for m in METRICS} for rule in rules
        },
        gates_minus=_differences(mean, judged[0].test, num_draws, seed),
        over_gates={
            rule: Spread.of([one.over_gates[rule] for one in needed]) for rule in needed[0].over_gates
        },
    )


def _every_layer(test: TracedScenes) -> Curve:
    """Every traced fixed K, hull or not."""
    layers = list(test.trace.exits)
    means = {metric: getattr(test.trace, metric)[:, layers].double().mean(0).tolist() for metric in METRICS}
    return Curve(
        tuple(map(float, layers)),
        tuple(k / test.num_layers for k in layers),
        {metric: tuple(values) for metric, values in means.items()},
    )


def _every_schedule(test: TracedScenes) -> Curve:
    """Every traced static schedule, hull or not, cheapest first; its settings are the freeze layers."""
    pairs, share = traced_pairs(test.num_layers, test.trace.freezes), test.trace.grid.kv_share
    pairs = [pair for pair in pairs if pair[1] in test.trace.exits]
    pairs.sort(key=lambda pair: schedule_compute(*pair, test.num_layers, share))
    means = {metric: at_pairs(Labels.of(test.trace, metric), pairs).mean(0).tolist() for metric in METRICS}
    return Curve(
        tuple(float(f) for f, _ in pairs),
        tuple(float(schedule_compute(f, k, test.num_layers, share)) for f, k in pairs),
        {metric: tuple(values) for metric, values in means.items()},
    )


def _wording_shares(test: TracedScenes, pairs: Sequence[Pair]) -> dict[str, float]:
    """Within-wording share of the variance of oracle layers, for each lam the gates were trained with."""
    shares = {}
    for lam in sorted({pair.router.settings.lam for pair in pairs}):
        exits_B = oracle_exits(test.trace.risk, lam)
        shares[f"oracle(lambda={lam:g})"] = within_wording_share(exits_B, test.questions)
    shares["first layer with the same answer from there on"] = within_wording_share(
        first_safe_layer(test.trace.same_answer), test.questions
    )
    if pairs[0].gates.freezes:
        safe = first_safe_schedule(Labels.of(test.trace, "same_answer"), test.trace.grid.kv_share)
        shares["freeze layer of the cheapest schedule with the same answer from there on"] = (
            within_wording_share(safe.freeze_layers_B, test.questions)
        )
    return shares
