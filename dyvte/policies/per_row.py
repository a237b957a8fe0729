"""A policy of its own for each row of a batch: what a server needs whose requests wait together.

Shapes: B rows, F gate features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dyvte.errors import ConfigError
from dyvte.gates import FoundGroups
from dyvte.policies.base import Plan, Policy, Rows
from dyvte.policies.gate_plan import GatePlan
from dyvte.policies.learned import LearnedPolicy


class PerRowPolicy(Policy):
    """Row i is decided by policy i, as if it stood in a batch alone.

    Not registered: it has no command line form.

    Parameters
    ----------
    policies
        One for each prompt. Those of trained gates, whatever their thresholds, must share one stack: its
        features are taken once for all rows.

    Raises
    ------
    ConfigError
        If there are gates of two stacks.
    """

    name = "per_row"
    usage = ""

    def __init__(self, policies: Sequence[Policy]) -> None:
        self.policies = tuple(policies)
        self._different = list({id(one): one for one in self.policies}.values())
        if len({id(one.gates) for one in self._different if isinstance(one, LearnedPolicy)}) > 1:
            raise ConfigError("rows of one batch can be decided by one stack of gates only")
        self.may_freeze = any(one.may_freeze for one in self._different)

    def check(self, num_layers: int, hidden_size: int) -> None:
        """Raise where one of the policies cannot serve a backbone of this shape."""
        for policy in self._different:
            policy.check(num_layers, hidden_size)

    def to(self, device: torch.device) -> None:
        """Bring weights, if any, to the backbone's device."""
        for policy in self._different:
            policy.to(device)

    def start(self, rows: Rows) -> Plan:
        """The plan for one prefill."""
        count = len(rows.num_visual_B)
        if not self.policies or count % len(self.policies):
            raise ConfigError(f"{len(self.policies)} policies for a batch of {count} rows")
        expansion = count // len(self.policies)
        parts = []
        for policy in self._different:
            own = [row for row in range(count) if self.policies[row // expansion] is policy]
            rows_R = torch.tensor(own)
            some = replace(
                rows,
                num_visual_B=rows.num_visual_B[rows_R],
                num_prompt_B=rows.num_prompt_B[rows_R],
                sample_ids=[rows.sample_ids[row] for row in own],
            )
            parts.append((rows_R, policy.start(some)))
        return PerRowPlan(count, parts)


class PerRowPlan(Plan):
    """The plans of some rows each, as one plan of all.

    Parameters
    ----------
    num_rows
        B.
    parts
        Rows and the plan that decides them; each row belongs to one of them.
    """

    def __init__(self, num_rows: int, parts: Sequence[tuple[Tensor, Plan]]) -> None:
        exits_B, freezes_B = torch.zeros((2, num_rows), dtype=torch.int64)
        super().__init__(exits_B, freezes_B)
        self.parts = list(parts)
        for rows_R, plan in self.parts:
            self._take(rows_R, plan)
        self._gates = [(rows_R, plan) for rows_R, plan in self.parts if isinstance(plan, GatePlan)]
        if self._gates:
            self.features = self._gates[0][1].features
            # The one that also tells groups says all that any of them needs.
            self._speaker = next((plan for _, plan in self._gates if plan.found), self._gates[0][1])

    @property
    def num_fallbacks(self) -> int:  # type: ignore[override]
        """Rows whose gate output was not finite."""
        return sum(plan.num_fallbacks for _, plan in self.parts)

    @property
    def found(self) -> FoundGroups | None:  # type: ignore[override]
        """Groups of the rows whose thresholds are by group."""
        parts = [(rows_R, plan.found) for rows_R, plan in self._gates if plan.found is not None]
        if not parts:
            return None
        whole = FoundGroups.none(len(self.exit_layers_B), parts[0][1].projected_BZ.shape[1])
        for rows_R, found in parts:
            whole.groups_B[rows_R] = found.groups_B
            whole.distances_B[rows_R] = found.distances_B
            whole.projected_BZ[rows_R] = found.projected_BZ
        return whole

    def asks(self, k: int) -> bool:
        """Does any row still need the gates after layer k?"""
        return any(plan.asks(k) for _, plan in self._gates)

    def asking_rows(self) -> Tensor:
        """(B,) bool: rows that no gate has settled yet."""
        asking_B = torch.zeros_like(self.exit_layers_B, dtype=torch.bool)
        for rows_R, plan in self._gates:
            asking_B[rows_R] = plan.asking_rows()
        return asking_B

    def logits(self, k: int, features_BF: Tensor) -> Tensor:
        """What the one stack of gates says of all rows."""
        return self._speaker.logits(k, features_BF)

    def step(self, k: int, logits: Tensor) -> None:
        """Freeze and settle the rows whose gates fire after layer k."""
        for rows_R, plan in self._gates:
            if plan.asks(k):
                plan.step(k, plan.own(logits)[..., rows_R])
                self._take(rows_R, plan)

    def settle(self, rows_B: Tensor, k: int) -> None:
        """Rows that have no visual token behind layer k: there is nothing left to decide."""
        super().settle(rows_B, k)
        for rows_R, plan in self.parts:
            plan.settle(rows_B[rows_R], k)

    def _take(self, rows_R: Tensor, plan: Plan) -> None:
        self.exit_layers_B[rows_R] = plan.exit_layers_B
        self.freeze_layers_B[rows_R] = plan.freeze_layers_B
