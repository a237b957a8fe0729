"""Static sets of frozen layers (ShortV) at what they cost, beside gates that spend the same.

Visual tokens never leave there: a set is one point. Its effects on the test samples are what
``dyvte search-frozen --held-out-path`` measured on them.

Shape letters: B samples.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dyvte.backbones.sizes import DecoderShape
from dyvte.calibration.frozen_sets import RULES, Effect
from dyvte.comparison.bootstrap import PairedDifference, paired_bootstrap
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
    """

    rule: str
    layers: tuple[int, ...]
    compute: float
    values: Mapping[str, Tensor]


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
            (rule, parse_layers(row["reduction"].removeprefix("frozen:")))
            for rule in RULES
            if rule != "last"  # static schedules, among others
            for row in record["sets"][rule]
        ]
        found = [StaticSet(rule, of, frozen_share(shape, of), _values(effects[of])) for rule, of in chosen]
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
