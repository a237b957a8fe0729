"""All rows leave after the same layer (VTW, arXiv 2405.05803)."""

from __future__ import annotations

import torch

from dyvte.errors import ConfigError
from dyvte.gates import GateConfig, check_rule
from dyvte.policies.base import POLICIES, Plan, Policy, Rows


@POLICIES.register
class FixedPolicy(Policy):
    """Every row leaves after the same layer (VTW, arXiv 2405.05803).

    Parameters
    ----------
    exit_layer
        In how many layers text can read the visual tokens, 0..L; None: L.
    made_for
        Of a layer that was found for a backbone and lies in a checkpoint: its configuration.
    """

    name = "fixed"
    usage = "fixed:K"

    def __init__(self, exit_layer: int | None, made_for: GateConfig | None = None) -> None:
        self.exit_layer, self.made_for = exit_layer, made_for

    @classmethod
    def parse(cls, argument: str) -> FixedPolicy:
        """Make the policy from the text after its name."""
        if not argument.isdecimal():
            raise ConfigError(f"policy fixed:{argument}: expected {cls.usage} with a number of layers K")
        return cls(int(argument))

    def check(self, num_layers: int, hidden_size: int) -> None:
        """Raise where a layer number or shape does not fit the backbone."""
        if self.made_for is not None:
            self.made_for.check_shape(num_layers, hidden_size)
        check_rule(num_layers, 0.5, 1, self.exit_layer, "fixed")

    def start(self, rows: Rows) -> Plan:
        """The plan for one prefill."""
        k = rows.num_layers if self.exit_layer is None else self.exit_layer
        return Plan(torch.full((len(rows.num_visual_B),), k))
