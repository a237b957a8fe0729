"""Prefill FLOPs of the rules in the comparison of three-state gates (`freezing.py`).

Shape letters: B samples, S settings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dyvte.backbones.sizes import decoder_shape
from dyvte.calibration.operating_points import OperatingPoints, compute_to_reach
from dyvte.calibration.path import Labels
from dyvte.comparison.budgets import TARGET, Rule
from dyvte.comparison.records import Spread
from dyvte.comparison.scenes import TracedScenes
from dyvte.comparison.static_sets import SetHull, StaticSet
from dyvte.costs.prefill import prefill_flops
from dyvte.evaluation.generation import Pipeline


def text_tokens(pipeline: Pipeline, questions: Sequence[str]) -> Tensor:
    """(B,) text tokens of the prompts."""
    tokenizer, known = pipeline.processor.tokenizer, {}
    for question in questions:
        if question not in known:
            text = pipeline.template.render(question).text
            known[question] = len(tokenizer(text, add_special_tokens=False).input_ids) - 1  # one placeholder
    return torch.tensor([known[question] for question in questions])


def prefill_ratios(
    points: OperatingPoints, test: TracedScenes, num_text_B: Tensor, pipeline: Pipeline
) -> Tensor:
    """(S,) prefill FLOPs of all tokens over the full model's, by VTW's convention."""
    shape = decoder_shape(pipeline.model.config)
    visual_B = test.trace.num_visual
    full = prefill_flops(shape, num_text_B, visual_B, torch.full_like(visual_B, shape.num_layers)).sum()
    found = []
    for setting in range(len(points.settings_S)):
        chosen = points.schedules(setting)
        layers = (chosen.exit_layers_B, "vtw", chosen.freeze_layers_B)
        found.append(prefill_flops(shape, num_text_B, visual_B, *layers).sum() / full)
    return torch.stack(found)


def at_target(rule: Rule, test: TracedScenes, num_text_B: Tensor, pipeline: Pipeline) -> dict[str, Spread]:
    """Prefill FLOPs where each seed of a rule first keeps 99 % of the answers, between two settings."""
    flops = []
    for points_at in rule.for_target or rule.seeds:
        points = points_at(TARGET)
        needed = compute_to_reach(
            points.compute_S, points.means_S(Labels.of(test.trace, "same_answer")), TARGET
        )
        ratios_S, mixture = prefill_ratios(points, test, num_text_B, pipeline), points.at_compute(needed)
        low, high = ratios_S[mixture.lower], ratios_S[mixture.upper]
        flops.append(float(low + mixture.weight * (high - low)))
    return {"prefill": Spread.of(flops)}


def sets_at_target(
    known: Sequence[StaticSet], test: TracedScenes, num_text_B: Tensor, pipeline: Pipeline
) -> dict[str, float]:
    """Prefill FLOPs where each rule's mixture of sets first keeps 99 % of the answers."""
    shape, visual_B, found = decoder_shape(pipeline.model.config), test.trace.num_visual, {}
    whole_B = torch.full_like(visual_B, shape.num_layers)
    full = prefill_flops(shape, num_text_B, visual_B, whole_B).sum()
    for rule in dict.fromkeys(one.rule for one in known):
        hull = SetHull.of([one for one in known if one.rule == rule])
        mixture = hull.at_compute(hull.compute_at(TARGET))
        low, high = (
            # frozen layers cost what they cost wherever they are
            float(
                prefill_flops(shape, num_text_B, visual_B, whole_B, "vtw", whole_B - len(layers)).sum() / full
            )
            for layers in (hull.layers_S[mixture.lower], hull.layers_S[mixture.upper])
        )
        found[rule] = low + mixture.weight * (high - low)
    return found
