"""Exit rules compared on traced test scenes: no generation, every exit layer known for every sample.

Shape letters: B samples, L decoder layers, S settings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dyvte.calibration.operating_points import OperatingPoints, compute_to_reach, fixed_points, gate_logits
from dyvte.comparison.baselines import GateContender, RouterContender
from dyvte.comparison.bootstrap import paired_bootstrap
from dyvte.comparison.router import oracle_exits, oracle_points, within_wording_share
from dyvte.comparison.scenes import TracedScenes, distinct_share

# metric -> whether less is better
METRICS = {"risk": True, "same_answer": False, "agreement": False}
ORACLE_LAMS = tuple(float(x) for x in np.geomspace(1e-4, 30.0, 41))
SAME_ANSWER_TARGETS = (0.90, 0.95, 0.98, 0.99)


@dataclass(frozen=True)
class Pair:
    """Gates of one seed and the router tuned like them."""

    gates: GateContender
    router: RouterContender


Points = Callable[[str], OperatingPoints]
"""Operating points of a rule for a metric (fixed K has another hull for each)."""


def compare_on_traces(
    calibration: TracedScenes,
    test: TracedScenes,
    pairs: Sequence[Pair],
    *,
    num_draws: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Curves, differences at equal visual compute, and compute at equal same-answer rate; JSON-ready."""
    fixed = {
        metric: fixed_points(
            getattr(calibration.trace, metric), test.trace.num_visual, smaller_is_better=less
        )
        for metric, less in METRICS.items()
    }
    oracle = oracle_points(test.trace.risk, test.trace.num_visual, ORACLE_LAMS)
    seeds = [_one_seed(test, pair, fixed, oracle, num_draws, seed) for pair in pairs]
    return {
        "num_samples": len(test.questions),
        "num_images": len(set(test.image_ids)),
        "num_layers": test.num_layers,
        "distinct_wordings": distinct_share(test.questions),
        "within_wording_share": _wording_shares(test, pairs),
        "curves": {
            "fixed": _all_fixed(test),
            "oracle": _curve(lambda metric: oracle, test),
            "gates": {pair.gates.name: one["_gates_curve"] for pair, one in zip(pairs, seeds)},
            "router": {pair.gates.name: one["_router_curve"] for pair, one in zip(pairs, seeds)},
        },
        "seeds": {
            pair.gates.name: {k: v for k, v in one.items() if k[0] != "_"} for pair, one in zip(pairs, seeds)
        },
        "over_seeds": _over_seeds(test, seeds, num_draws, seed),
    }


def _one_seed(
    test: TracedScenes,
    pair: Pair,
    fixed: dict[str, OperatingPoints],
    oracle: OperatingPoints,
    num_draws: int,
    seed: int,
) -> dict[str, Any]:
    num_visual_B = test.trace.num_visual
    logits_BL = gate_logits(pair.gates.gates, test.trace, test.features)
    gates_curve = pair.gates.points(logits_BL, num_visual_B)
    router_curve = pair.router.points(test.questions, num_visual_B)
    at = pair.gates.operating_point(logits_BL, num_visual_B)
    compute = float(at.compute_S[0])
    rules: dict[str, Points] = {
        "fixed": lambda metric: fixed[metric],
        "router": lambda metric: router_curve,
        "oracle": lambda metric: oracle,
    }
    values = {"gates": {m: at.values_SB(getattr(test.trace, m))[0] for m in METRICS}}
    for name, points in rules.items():
        values[name] = {
            metric: _values_at(points(metric), getattr(test.trace, metric), compute) for metric in METRICS
        }

    def needed(target: float) -> dict[str, float]:
        return _compute_row(target, test, gates_curve, router_curve, fixed["same_answer"])

    return {
        "threshold": pair.gates.threshold,
        "visual_compute": compute,
        "mean_exit_layer": float(at.exits_SB[0].double().mean()),
        "router": {"kind": pair.router.kind, "learning_rate": pair.router.settings.learning_rate},
        "at_equal_compute": {
            name: {metric: float(column.mean()) for metric, column in columns.items()}
            for name, columns in values.items()
        },
        "gates_minus": {
            name: {
                metric: paired_bootstrap(
                    values["gates"][metric],
                    values[name][metric],
                    test.image_ids,
                    num_draws=num_draws,
                    seed=seed,
                ).to_dict()
                for metric in METRICS
            }
            for name in ("fixed", "router")
        },
        "compute_at_the_gates_same_answer": needed(float(values["gates"]["same_answer"].mean())),
        "compute_at_equal_same_answer": [needed(target) for target in SAME_ANSWER_TARGETS],
        "_gates_curve": _curve(lambda metric: gates_curve, test),
        "_router_curve": _curve(lambda metric: router_curve, test),
        "_values": values,
    }


def _values_at(points: OperatingPoints, values_BL1: Tensor, compute: float) -> Tensor:
    return points.mixed_values(values_BL1, points.at_compute(compute))


def _compute_row(
    target: float,
    test: TracedScenes,
    gates: OperatingPoints,
    router: OperatingPoints,
    fixed: OperatingPoints,
) -> dict[str, float]:
    needed = {
        name: compute_to_reach(points.compute_S, points.means_S(test.trace.same_answer), target)
        for name, points in (("gates", gates), ("router", router), ("fixed", fixed))
    }
    return {
        "same_answer": target,
        **needed,
        "router_over_gates": needed["router"] / needed["gates"],
        "fixed_over_gates": needed["fixed"] / needed["gates"],
    }


def _over_seeds(
    test: TracedScenes, seeds: Sequence[dict[str, Any]], num_draws: int, seed: int
) -> dict[str, Any]:
    """Means over seeds with their spread; intervals over images of the seed means."""
    names = ("gates", "fixed", "router", "oracle")
    mean = {
        name: {m: torch.stack([one["_values"][name][m] for one in seeds]).mean(0) for m in METRICS}
        for name in names
    }
    own = [one["compute_at_the_gates_same_answer"] for one in seeds]
    return {
        "visual_compute": spread([one["visual_compute"] for one in seeds]),
        "mean_exit_layer": spread([one["mean_exit_layer"] for one in seeds]),
        "at_equal_compute": {
            name: {m: spread([one["at_equal_compute"][name][m] for one in seeds]) for m in METRICS}
            for name in names
        },
        "gates_minus": {
            name: {
                m: paired_bootstrap(
                    mean["gates"][m], mean[name][m], test.image_ids, num_draws=num_draws, seed=seed
                ).to_dict()
                for m in METRICS
            }
            for name in ("fixed", "router")
        },
        "router_over_gates": spread([row["router_over_gates"] for row in own]),
        "fixed_over_gates": spread([row["fixed_over_gates"] for row in own]),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation (over n - 1; 0 for one value), least and most."""
    column = np.asarray(values, dtype=np.float64)
    deviation = float(column.std(ddof=1)) if len(column) > 1 else 0.0
    return {
        "mean": float(column.mean()),
        "std": deviation,
        "min": float(column.min()),
        "max": float(column.max()),
    }


def _curve(points: Points, test: TracedScenes) -> dict[str, list[float]]:
    any_points = points("risk")
    curve = {"setting": list(any_points.settings_S), "compute": any_points.compute_S.tolist()}
    for metric in METRICS:
        curve[metric] = points(metric).means_S(getattr(test.trace, metric)).tolist()
    return curve


def _all_fixed(test: TracedScenes) -> dict[str, list[float]]:
    """Every fixed K, hull or not."""
    num_layers = test.num_layers
    curve: dict[str, list[float]] = {
        "setting": [float(k) for k in range(num_layers + 1)],
        "compute": [k / num_layers for k in range(num_layers + 1)],
    }
    for metric in METRICS:
        curve[metric] = getattr(test.trace, metric).double().mean(0).tolist()
    return curve


def _wording_shares(test: TracedScenes, pairs: Sequence[Pair]) -> dict[str, float]:
    """Within-wording share of the variance of oracle layers, for each lam the gates were trained with."""
    shares = {}
    for lam in sorted({pair.router.settings.lam for pair in pairs}):
        exits_B = oracle_exits(test.trace.risk, lam)
        shares[f"oracle(lambda={lam:g})"] = within_wording_share(exits_B, test.questions)
    shares["first layer with the same answer from there on"] = within_wording_share(
        first_safe_layer(test.trace.same_answer), test.questions
    )
    return shares


def first_safe_layer(same_answer_BL1: Tensor) -> Tensor:
    """(B,) smallest k >= 1 such that every exit from k on gives the full model's answer."""
    safe_BL = same_answer_BL1[:, 1:].flip(1).cumprod(1).flip(1)
    return same_answer_BL1.shape[1] - safe_BL.sum(1).long()
