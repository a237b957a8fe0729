"""Static sets of frozen layers (ShortV) at what they cost, beside gates that spend the same.

Visual tokens never leave there: a set is one point, and two of a rule's sets can be mixed as static schedules
are. Effects on the test samples are what ``dyvte search-frozen --held-out-path`` measured on them.

Shape letters: B samples, S sets, R seeds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dyvte.backbones.sizes import DecoderShape
from dyvte.calibration.frozen_sets import RULES, Effect
from dyvte.calibration.operating_points import Mixture, compute_to_reach, lower_hull, mixture_at
from dyvte.comparison.bootstrap import PairedDifference, paired_bootstrap
from dyvte.comparison.budgets import TARGET, Verdict, verdict
from dyvte.comparison.records import Spread
from dyvte.costs.visual import frozen_share
from dyvte.errors import DataError
from dyvte.reductions.frozen import parse_layers
from dyvte.tracing.frozen_search import HELD_OUT_FILE, RECORD_FILE

SET_METRICS = ("risk", "same_answer")


@dataclass(frozen=True)
class StaticSet:
    """A set of frozen layers on B test samples.

    Attributes
    ----------
    rule : how it was chosen, a key of `dyvte.calibration.frozen_sets.RULES`.
    layers : counted from 0.
    compute : its visual compute.
    values : (B,) by metric.
    searched_risk : mean risk on the samples that it was chosen on, nats.
    """

    rule: str
    layers: tuple[int, ...]
    compute: float
    values: Mapping[str, Tensor]
    searched_risk: float = math.nan


@dataclass(frozen=True)
class SetComparison:
    """A set beside the gates at its visual compute.

    Attributes
    ----------
    rule, layers, visual_compute : of the set.
    metrics : means of the set.
    gates : means of the gates, over seeds.
    gates_minus : differences, of the seeds' means, intervals over images.
    """

    rule: str
    layers: tuple[int, ...]
    visual_compute: float
    metrics: Mapping[str, float]
    gates: Mapping[str, Spread]
    gates_minus: Mapping[str, PairedDifference]


def read_static_sets(
    folder: Path, shape: DecoderShape, num_samples: int, fingerprint: Mapping[str, str]
) -> list[StaticSet]:
    """The sets of a search, with their effects on the samples that were held out.

    Parameters
    ----------
    folder : that ``dyvte search-frozen --output`` wrote.
    shape : sizes of the decoder.
    num_samples : how many test samples there are.
    fingerprint : of the test samples' traces; the held-out samples must be the same.

    Raises
    ------
    DataError
        The folder holds no such search, or one that was judged on other samples.
    """
    try:
        record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
        held_out = json.loads((folder / HELD_OUT_FILE).read_text(encoding="utf-8"))
        effects = {one.layers: one for one in map(Effect.of_dict, held_out["effects"])}
        chosen = [
            (rule, parse_layers(row["reduction"].removeprefix("frozen:")), float(row["risk"]))
            for rule in RULES
            if rule != "last" and rule in record["sets"]  # the last layers: static schedules, among others
            for row in record["sets"][rule]
        ]
        found = [
            StaticSet(rule, of, frozen_share(shape, of), _values(effects[of]), risk)
            for rule, of, risk in chosen
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder}: no search for frozen layers that was judged on held-out samples ({error!r}); make "
            "one with dyvte search-frozen --held-out-path TEST.json"
        ) from error
    differing = [
        name for name in ("data", "backbone_weights") if held_out["of"].get(name) != fingerprint.get(name)
    ]
    if differing or any(len(one.values["risk"]) != num_samples for one in found):
        raise DataError(
            f"{folder}: its sets were judged on other samples or another backbone than the test traces "
            f"({', '.join(differing) or 'their number differs'}): give --held-out-path the test data"
        )
    return found


def _values(effect: Effect) -> dict[str, Tensor]:
    return {"risk": effect.risk_B.double(), "same_answer": effect.same_answer_B.double()}


def compare_sets(
    sets: Sequence[StaticSet],
    gates_at: Callable[[str, float], Tensor],
    image_ids: Sequence[str],
    *,
    num_draws: int = 2000,
    seed: int = 0,
) -> tuple[SetComparison, ...]:
    """Every set beside the gates at its cost.

    Parameters
    ----------
    sets : on the test samples.
    gates_at : from metric and visual compute to the gates' (R, B) expected values, one row per seed.
    image_ids : the image of each sample.
    num_draws, seed : of the paired bootstrap.
    """
    found = []
    for one in sets:
        gates = {metric: gates_at(metric, one.compute) for metric in SET_METRICS}
        found.append(
            SetComparison(
                rule=one.rule,
                layers=one.layers,
                visual_compute=one.compute,
                metrics={metric: float(one.values[metric].mean()) for metric in SET_METRICS},
                gates={m: Spread.of(values_RB.mean(1).tolist()) for m, values_RB in gates.items()},
                gates_minus={
                    metric: paired_bootstrap(
                        values_RB.mean(0),
                        one.values[metric],
                        image_ids,
                        num_draws=num_draws,
                        seed=seed,
                    )
                    for metric, values_RB in gates.items()
                },
            )
        )
    return tuple(found)


@dataclass(frozen=True)
class SetHull:
    """The sets of one rule as a rule of their own: any compute between two of them is met by mixing them.

    Attributes
    ----------
    rule : how the sets were chosen.
    layers_S : along the lower hull of risk over compute where they were searched; the last freezes nothing.
    compute_S : visual compute of each, rising.
    values : (S, B) on test samples, by metric.
    """

    rule: str
    layers_S: tuple[tuple[int, ...], ...]
    compute_S: np.ndarray
    values: Mapping[str, Tensor]

    @staticmethod
    def of(sets: Sequence[StaticSet]) -> SetHull:
        """Of all sets of one rule.

        Parameters
        ----------
        sets
            On the same test samples.
        """
        full = {name: torch.full_like(sets[0].values[name], name != "risk") for name in SET_METRICS}
        tried = [*sets, StaticSet(sets[0].rule, (), 1.0, full, 0.0)]
        corners = lower_hull([one.compute for one in tried], [one.searched_risk for one in tried])
        chosen = [tried[corner] for corner in corners]
        return SetHull(
            sets[0].rule,
            tuple(one.layers for one in chosen),
            np.array([one.compute for one in chosen]),
            {name: torch.stack([one.values[name] for one in chosen]) for name in SET_METRICS},
        )

    def at_compute(self, budget: float) -> Mixture:
        """The mixture of two neighbours that spends ``budget``."""
        return mixture_at(self.compute_S, budget)

    def mixed_values(self, metric: str, budget: float) -> Tensor:
        """(B,) expected values on the test samples where ``budget`` is spent."""
        values_SB, mixture = self.values[metric], self.at_compute(budget)
        return torch.lerp(values_SB[mixture.lower], values_SB[mixture.upper], mixture.weight)

    def compute_at(self, same_answer: float) -> float:
        """Visual compute that keeps a share of the test samples' answers."""
        return compute_to_reach(self.compute_S, self.values["same_answer"].mean(1).numpy(), same_answer)


@dataclass(frozen=True)
class HullComparison:
    """Mixtures of a rule's sets beside the gates, at the budgets that its cheapest set meets.

    Attributes
    ----------
    rule : how the sets were chosen.
    budgets : shares of the full model's visual compute.
    risk, same_answer : means of the mixtures, by budget.
    risk_minus, same_answer_minus : the gates', less the mixtures', of the seeds' means, intervals over
        images.
    verdict : by risk, over these budgets; None where there is none.
    compute_at_target : where the mixtures keep `dyvte.comparison.budgets.TARGET` of the answers.
    """

    rule: str
    budgets: tuple[float, ...]
    risk: tuple[float, ...]
    same_answer: tuple[float, ...]
    risk_minus: tuple[PairedDifference, ...]
    same_answer_minus: tuple[PairedDifference, ...]
    verdict: Verdict | None
    compute_at_target: float


def compare_hulls(
    sets: Sequence[StaticSet],
    gates_at: Callable[[str, float], Tensor],
    image_ids: Sequence[str],
    budgets: Sequence[float],
    *,
    num_draws: int = 2000,
    seed: int = 0,
) -> tuple[HullComparison, ...]:
    """Each rule's sets, mixed to spend each budget, beside gates that spend the same.

    Parameters
    ----------
    sets : of all rules, on the test samples.
    gates_at : from metric and visual compute to the gates' (R, B) expected values, one row per seed.
    image_ids : the image of each sample.
    budgets : shares of the full model's visual compute; those below a rule's cheapest set are omitted.
    num_draws, seed : of the paired bootstrap.
    """
    found, draws = [], {"num_draws": num_draws, "seed": seed}
    for rule in dict.fromkeys(one.rule for one in sets):
        hull = SetHull.of([one for one in sets if one.rule == rule])
        met = tuple(budget for budget in budgets if budget >= hull.compute_S[0] - 1e-9)
        means, minus = {}, {}
        for metric in SET_METRICS:
            columns = [hull.mixed_values(metric, budget) for budget in met]
            means[metric] = tuple(float(values_B.mean()) for values_B in columns)
            minus[metric] = tuple(
                paired_bootstrap(gates_at(metric, budget).mean(0), values_B, image_ids, **draws)
                for budget, values_B in zip(met, columns, strict=True)
            )
        found.append(
            HullComparison(
                rule=rule,
                budgets=met,
                risk=means["risk"],
                same_answer=means["same_answer"],
                risk_minus=minus["risk"],
                same_answer_minus=minus["same_answer"],
                verdict=verdict(minus["risk"]) if met else None,
                compute_at_target=hull.compute_at(TARGET),
            )
        )
    return tuple(found)
