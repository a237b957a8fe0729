"""Visual tokens stay to the end: the stock model."""

from __future__ import annotations

import torch

from dyvte.errors import ConfigError
from dyvte.policies.base import POLICIES, Plan, Policy, Rows


@POLICIES.register
class NeverPolicy(Policy):
    """Every row has exit layer L."""

    name = "never"
    usage = "never"

    @classmethod
    def parse(cls, argument: str) -> NeverPolicy:
        """Make the policy from the text after its name."""
        if argument:
            raise ConfigError(f"policy never takes no argument, got {argument!r}")
        return cls()

    def start(self, rows: Rows) -> Plan:
        """The plan for one prefill."""
        return Plan(torch.full((len(rows.num_visual_B),), rows.num_layers))
