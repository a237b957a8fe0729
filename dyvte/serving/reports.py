"""What a prefill's record says of one row, as a request's reply has it.

Shapes: B rows, L decoder layers.
"""

from __future__ import annotations

import math
from dataclasses import asdict

import torch
from torch import Tensor

from dyvte.gates.groups import NEVER
from dyvte.policies import LearnedPolicy
from dyvte.runtime.records import PrefillRecord
from dyvte.serving.answerer import Answerer
from dyvte.serving.jobs import ExitReport
from dyvte.serving.schedules import ServedSchedule


def report_row(
    answerer: Answerer, record: PrefillRecord | None, row: int, num_prompt: int, schedule: ServedSchedule
) -> ExitReport:
    """The report of one row.

    Parameters
    ----------
    record
        Of its prefill; None where no row had an image.
    num_prompt
        Its prompt's tokens.
    """
    shape = answerer.shape
    width = 2 * shape.num_kv_heads * shape.head_dim * answerer.pipeline.model.dtype.itemsize
    num_layers = shape.num_layers
    has_image = record is not None and int(record.num_visual_B[row]) > 0
    if not has_image:
        return ExitReport(
            schedule=schedule.text,
            freeze_layer=-1,
            exit_layer=-1,
            num_layers=num_layers,
            visual_tokens=0,
            visual_compute=None,
            kv_bytes=num_prompt * num_layers * width,
            gate_probabilities=(None,) * num_layers,
            freeze_probabilities=(),
            threshold=None,
            certified=None,
            not_certified=None,
        )
    policy = schedule.policy
    group = int(record.found.groups_B[row]) if record.found is not None else None
    proof = schedule.proof_of(group)
    kept_L = (record.visual_tokens_BL + record.frozen_tokens_BL + record.text_tokens_BL)[row]
    is_learned = isinstance(policy, LearnedPolicy)
    return ExitReport(
        schedule=schedule.text,
        freeze_layer=int(record.freeze_layers_B[row]),
        exit_layer=int(record.exit_layers_B[row]),
        num_layers=num_layers,
        visual_tokens=int(record.num_visual_B[row]),
        visual_compute=_compute(answerer, record, row),
        kv_bytes=int(kept_L.sum()) * width,
        gate_probabilities=_probabilities(record.gate_logits_BL[row]),
        freeze_probabilities=_probabilities(record.freeze_logits_BL[row])
        if is_learned and policy.may_freeze
        else (),
        threshold=_threshold(policy, group) if is_learned else None,
        certified=None if proof.certificate is None else asdict(proof.certificate),
        not_certified=proof.reason,
    )


def _threshold(policy: LearnedPolicy, group: int | None) -> float:
    """That of a row; of gates that decide by group, its group's."""
    if not policy.by_group:
        return policy.threshold
    return policy.gates.config.groups.thresholds[group] if group is not None and group >= 0 else NEVER


def _compute(answerer: Answerer, record: PrefillRecord, row: int) -> float:
    visual_L, frozen_L = record.visual_tokens_BL[row].tolist(), record.frozen_tokens_BL[row].tolist()
    return answerer.visual_compute(int(record.num_visual_B[row]), tuple(visual_L), tuple(frozen_L))


def _probabilities(logits_L: Tensor) -> tuple[float | None, ...]:
    return tuple(
        None if math.isnan(logit) else float(torch.tensor(logit, dtype=torch.float64).sigmoid())
        for logit in logits_L.tolist()
    )
