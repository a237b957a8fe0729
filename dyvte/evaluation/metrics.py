"""Metrics of a run: exit layers, compute and memory, as means over its questions.

Shape letters: B questions, L decoder layers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from dyvte.backbones.sizes import decoder_shape
from dyvte.costs.prefill import head_flops, mean_prefill_costs, score_row_flops
from dyvte.costs.reductions import selection_flops, visual_factors
from dyvte.costs.vision import vision_tower_flops
from dyvte.costs.visual import visual_share
from dyvte.errors import DataError
from dyvte.evaluation.run_log import Answer, unpack_layers
from dyvte.evaluation.scores import CostMetrics
from dyvte.reductions import Reduction


def cost_metrics(config: Any, answers: Sequence[Answer], reductions: Sequence[Reduction] = ()) -> CostMetrics:
    """What a run cost.

    Parameters
    ----------
    config : the backbone's transformers config.
    answers : of all questions; those that were not asked cost nothing and are excluded.
    reductions : those of the run, accepted by the backbone: what they make cheaper is no count of tokens.

    Raises
    ------
    DataError
        No question had visual tokens.
    """
    answers = [answer for answer in answers if not answer.problem]
    seeing = [answer for answer in answers if answer.exit_layer >= 0]
    if not seeing:
        raise DataError("no question had visual tokens: nothing to exit from")
    shape = decoder_shape(config)
    visual_BL = [unpack_layers(answer.visual_tokens) for answer in answers]
    text_BL = [unpack_layers(answer.text_tokens) for answer in answers]
    num_visual_B, num_text_B = [a.num_visual for a in answers], [a.num_text for a in answers]
    frozen_BL = None
    if any(answer.frozen_tokens for answer in answers):
        none = ((0, shape.num_layers),)
        frozen_BL = [unpack_layers(answer.frozen_tokens or none) for answer in answers]
    tokens_BL = [[v + t for v, t in zip(*rows, strict=True)] for rows in zip(visual_BL, text_BL, strict=True)]
    score_flops_B = score_row_flops(shape, tokens_BL, [a.score_layers for a in answers])
    factors = visual_factors(reductions, shape, _mean([answer.num_visual for answer in seeing]))
    counts = Counter(answer.exit_layer for answer in answers)
    return CostMetrics(
        num_layers=shape.num_layers,
        mean_exit_layer=_mean([answer.exit_layer for answer in seeing]),
        exit_layer_counts={k: counts[k] for k in sorted(counts)},
        visual_compute=visual_share(shape, visual_BL, num_visual_B, factors, frozen_BL),
        visual_token_layers_per_question=_mean([answer.visual_token_layers for answer in answers]),
        prefill=mean_prefill_costs(shape, text_BL, visual_BL, num_text_B, num_visual_B, factors, frozen_BL),
        score_row_flops_per_question=_mean(score_flops_B),
        vision_tower_flops_per_image=_vision_tower(config, seeing),
        output_head_flops_per_token=head_flops(shape),
        kv_bytes_per_question=_mean([answer.kv_bytes for answer in answers]),
        mean_visual_tokens=_mean(num_visual_B),
        mean_text_tokens=_mean(num_text_B),
        mean_new_tokens=_mean([answer.num_new_tokens for answer in answers]),
        selection_flops_per_question=_mean(
            [selection_flops(reductions, n, shape.hidden_size) for n in num_visual_B]
        ),
        mean_freeze_layer=None if frozen_BL is None else _mean([a.updated_layers for a in seeing]),
    )


def _vision_tower(config: Any, answers: Sequence[Answer]) -> float | None:
    """FLOPs of the vision tower on one image, of the mean size where sizes differ."""
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return None
    merge = getattr(vision, "spatial_merge_size", None)
    if not isinstance(merge, int):
        return vision_tower_flops(vision)
    patches = round(_mean([answer.num_visual for answer in answers]) * merge**2)
    return vision_tower_flops(vision, patches)


def same_answer(answers: Sequence[Answer], reference: Sequence[Answer]) -> float:
    """Share of questions, of those that were asked, whose whole answer equals the reference's.

    Parameters
    ----------
    answers
        Of a run.
    reference
        Of the full model, to the same questions.
    """
    pairs = zip(answers, reference, strict=True)
    return _mean([a.prediction == b.prediction for a, b in pairs if not (a.problem or b.problem)])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
