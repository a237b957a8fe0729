"""All rows leave after the same layer (VTW, arXiv 2405.05803)."""

from __future__ import annotations

import torch

from dyvte.errors import ConfigError
from dyvte.gates import check_rule
from dyvte.policies.base import POLICIES, Plan, Policy, Rows


@POLICIES.register
class FixedPolicy(Policy):
    """Every row leaves after the same layer (VTW, arXiv 2405.05803).

    Parameters
    ----------
    exit_layer
        In how many layers text can read the visual tokens, 0..L; None: L.
    """

    name = "fixed"
    usage = "fixed:K"

    def __init__(self, exit_layer: int | None) -> None:
        self.exit_layer = exit_layer

    @classmethod
    def parse(cls, argument: str) -> FixedPolicy:
        """Make the policy from the text after its name."""
        if not argument.isdecimal():
            raise ConfigError(f"policy fixed:{argument}: expected {cls.usage} with a number of layers K")
        return cls(int(argument))

    def check(self, num_layers: int, hidden_size: int) -> None:
        """Raise where a layer number or shape does not fit the backbone."""
        check_rule(num_layers, 0.5, 1, self.exit_layer, "fixed")

    def start(self, rows: Rows) -> Plan:
        """The plan for one prefill."""
        k = rows.num_layers if self.exit_layer is None else self.exit_layer
        return Plan(torch.full((len(rows.num_visual_B),), k))
