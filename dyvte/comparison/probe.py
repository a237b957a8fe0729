"""What several sets of gates would say to the same prompts, from prefills that no token leaves.

Shape letters: B rows, L decoder layers, F features, H sets of gates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dyvte.evaluation.generation import Pipeline, encoded_batches, plan_batches, shown_by
from dyvte.gates import FEATURES, GateStack, HeadLogits, select_features
from dyvte.policies import Plan, Policy, Rows
from dyvte.runtime import VisualExit
from dyvte.tasks.base import Question


class ProbePolicy(Policy):
    """Keep every row to the end and note every gate's logit after every layer.

    Parameters
    ----------
    stacks
        The gates.
    freeze_layer
        Layers that update the visual tokens; None: all.

    Attributes
    ----------
    noted, noted_freezes
        Per prefill (H, B, L): logits of the exit heads, column k-1 after layer k, and of the freeze heads,
        column j after layer j; nan where a set has none, and for gate L, which is never asked.
    """

    name = "probe"

    def __init__(self, stacks: Sequence[GateStack], freeze_layer: int | None = None) -> None:
        self.stacks, self.freeze_layer = list(stacks), freeze_layer
        self.may_freeze = freeze_layer is not None
        self.noted: list[Tensor] = []
        self.noted_freezes: list[Tensor] = []

    def to(self, device: torch.device) -> None:
        """Bring the gates to the backbone's device."""
        for stack in self.stacks:
            stack.to(device)

    def start(self, rows: Rows) -> Plan:
        """A plan that asks after every layer and never lets go."""
        shape = (len(self.stacks), len(rows.num_visual_B), rows.num_layers)
        for kept in (self.noted, self.noted_freezes):
            kept.append(torch.full(shape, float("nan")))
        return _ProbePlan(self, rows)


class _ProbePlan(Plan):
    def __init__(self, policy: ProbePolicy, rows: Rows) -> None:
        count, last = len(rows.num_visual_B), rows.num_layers
        freeze = policy.freeze_layer
        super().__init__(torch.full((count,), last), None if freeze is None else torch.full((count,), freeze))
        self.policy, self.num_layers = policy, last
        self.first = 0 if any(stack.freezes is not None for stack in policy.stacks) else 1
        # All parts that any of the gates reads; each takes its own of them.
        read = {name for stack in policy.stacks for name in stack.config.features}
        self.features = tuple(name for name in FEATURES if name in read)

    def asks(self, k: int) -> bool:
        return self.first <= k < self.num_layers

    def asking_rows(self) -> Tensor:
        return torch.ones_like(self.exit_layers_B, dtype=torch.bool)

    def logits(self, k: int, features_BF: Tensor) -> Tensor:
        exits, freezes = self.policy.noted[-1], self.policy.noted_freezes[-1]
        for number, stack in enumerate(self.policy.stacks):
            own_BF = select_features(features_BF, self.features, stack.config.features)
            if stack.freezes is not None:
                exit_B, freezes[number, :, k] = stack.heads(k, own_BF).float().cpu()
            elif k > 0:
                exit_B = stack.gate(k, own_BF).float().cpu()
            if k > 0:
                exits[number, :, k - 1] = exit_B
        return features_BF.new_zeros(len(features_BF))

    def step(self, k: int, logits_B: Tensor) -> None:
        pass


@torch.inference_mode()
def probe_gates(
    pipeline: Pipeline,
    questions: Sequence[Question],
    prompts: Sequence[str],
    stacks: Sequence[GateStack],
    batch_size: int,
) -> list[Tensor | HeadLogits]:
    """Logits of every set of gates, rows in the order of the questions; those of gate L are nan.

    (B, L) each; of gates with a freeze head those of both heads, one prefill for every layer after which some
    set can freeze.

    Parameters
    ----------
    pipeline
        The backbone and how it answers.
    questions, prompts
        All, in one order.
    stacks
        Gates of the backbone.
    batch_size
        Questions of a batch.
    """
    freezes = tuple(sorted({f for stack in stacks for f in stack.config.open_freezes}))
    streams = [ProbePolicy(stacks, f) for f in (*freezes, None)]
    plan = plan_batches(pipeline, prompts, batch_size, shown_by(questions))
    for batch in encoded_batches(pipeline, questions, prompts, plan, range(len(plan))):
        for policy in streams:
            with VisualExit.from_policy(policy)(pipeline.model, images=pipeline.images):
                pipeline.model(**batch.inputs, use_cache=False, logits_to_keep=1)
    order = torch.tensor([row for rows in plan for row in rows]).argsort()
    exits_GHBL = torch.stack([torch.cat(policy.noted, 1) for policy in streams])[:, :, order].clone()
    freezes_HBL = torch.cat(streams[-1].noted_freezes, 1)[:, order].clone()
    return [
        exits_GHBL[-1, number]
        if stack.freezes is None
        else HeadLogits(exits_GHBL[:, number].transpose(0, 1), freezes_HBL[number], freezes)
        for number, stack in enumerate(stacks)
    ]
