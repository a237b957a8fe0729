"""All rows' visual tokens freeze after one layer and leave after another: a static schedule."""

from __future__ import annotations

import re

import torch

from dyvte.errors import ConfigError
from dyvte.gates import check_rule
from dyvte.policies.base import POLICIES, Plan, Policy, Rows


@POLICIES.register
class FreezePolicy(Policy):
    """Visual tokens are updated in layers 1..F, read in F+1..K, then gone.

    Parameters
    ----------
    freeze_layer
        F, 0..K. 0: no layer updates them; they are read as the projector made them.
    exit_layer
        K, up to L; None means L: they never leave. F = K is the fixed exit.

    Raises
    ------
    ConfigError
        If F is negative or larger than K.
    """

    name = "freeze"
    usage = "freeze:F[:K]"

    def __init__(self, freeze_layer: int, exit_layer: int | None = None) -> None:
        if freeze_layer < 0:
            raise ConfigError(f"freeze layer {freeze_layer}: expected 0 or more layers that update the image")
        if exit_layer is not None and freeze_layer > exit_layer:
            raise ConfigError(
                f"freeze layer {freeze_layer}, exit layer {exit_layer}: visual tokens cannot be updated in "
                f"layers where they are gone; expected a freeze layer in 0..{exit_layer}"
            )
        self.freeze_layer, self.exit_layer = freeze_layer, exit_layer

    @property
    def may_freeze(self) -> bool:  # type: ignore[override]
        """Is there a layer that reads visual tokens and does not update them?"""
        return self.freeze_layer != self.exit_layer

    @classmethod
    def parse(cls, argument: str) -> FreezePolicy:
        """Make the policy from the text after its name."""
        match = re.fullmatch(r"(\d+)(?::(\d+))?", argument)
        if match is None:
            raise ConfigError(f"policy freeze:{argument}: expected {cls.usage} with numbers of layers F <= K")
        return cls(int(match[1]), None if match[2] is None else int(match[2]))

    def check(self, num_layers: int, hidden_size: int) -> None:
        """Raise where a layer number does not fit the backbone."""
        check_rule(num_layers, 0.5, 1, self.exit_layer, "fixed")
        if self.freeze_layer > num_layers:
            raise ConfigError(
                f"freeze layer {self.freeze_layer}: expected 0..{num_layers}, "
                f"the backbone has {num_layers} layers"
            )

    def start(self, rows: Rows) -> Plan:
        """The plan for one prefill."""
        count = len(rows.num_visual_B)
        k = rows.num_layers if self.exit_layer is None else self.exit_layer
        return Plan(torch.full((count,), k), torch.full((count,), self.freeze_layer))
