"""What several sets of gates would say to the same prompts, from one prefill that no token leaves.

Shape letters: B rows, L decoder layers, F features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dyvte.evaluation.generation import Pipeline, encoded_batches, plan_batches
from dyvte.gates import FEATURES, GateStack, select_features
from dyvte.policies import Plan, Policy, Rows
from dyvte.runtime import VisualExit
from dyvte.tasks.base import Question


class ProbePolicy(Policy):
    """Keep every row to the end and note every gate's logit after every layer."""

    name = "probe"

    def __init__(self, stacks: Sequence[GateStack]) -> None:
        self.stacks = list(stacks)
        self.noted: list[Tensor] = []

    def to(self, device: torch.device) -> None:
        """Bring the gates to the backbone's device."""
        for stack in self.stacks:
            stack.to(device)

    def start(self, rows: Rows) -> Plan:
        """A plan that asks after every layer and never lets go."""
        shape = (len(self.stacks), len(rows.num_visual_B), rows.num_layers)
        self.noted.append(torch.full(shape, float("nan")))
        return _ProbePlan(self, rows)


class _ProbePlan(Plan):
    def __init__(self, policy: ProbePolicy, rows: Rows) -> None:
        super().__init__(torch.full((len(rows.num_visual_B),), rows.num_layers))
        self.policy, self.num_layers = policy, rows.num_layers
        # All parts that any of the gates reads; each takes its own of them.
        read = {name for stack in policy.stacks for name in stack.config.features}
        self.features = tuple(name for name in FEATURES if name in read)

    def asks(self, k: int) -> bool:
        return 0 < k < self.num_layers

    def asking_rows(self) -> Tensor:
        return torch.ones_like(self.exit_layers_B, dtype=torch.bool)

    def logits(self, k: int, features_BF: Tensor) -> Tensor:
        for number, stack in enumerate(self.policy.stacks):
            own_BF = select_features(features_BF, self.features, stack.config.features)
            self.policy.noted[-1][number, :, k - 1] = stack.gate(k, own_BF).float().cpu()
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
) -> list[Tensor]:
    """(B, L) logits of every set of gates, rows in the order of the questions; column L is nan."""
    policy = ProbePolicy(stacks)
    plan = plan_batches(pipeline, prompts, batch_size)
    with VisualExit.from_policy(policy)(pipeline.model):
        for batch in encoded_batches(pipeline, questions, prompts, plan, range(len(plan))):
            pipeline.model(**batch.inputs, use_cache=False, logits_to_keep=1)
    noted = torch.cat(policy.noted, 1).clone()
    order = torch.tensor([row for rows in plan for row in rows]).argsort()
    return list(noted[:, order].unbind(0))
