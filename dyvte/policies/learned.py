"""Trained gates decide, row by row (DyVTE, arXiv 2411.19628)."""

from __future__ import annotations

import torch

from dyvte.errors import ConfigError
from dyvte.gates import (
    GateStack,
    ScheduleRule,
    check_rule,
    follow_threshold,
    load_checkpoint,
    thresholds_named,
)
from dyvte.policies.base import POLICIES, Plan, Policy, Rows
from dyvte.policies.fixed import FixedPolicy
from dyvte.policies.gate_plan import GatePlan, decision_rule


@POLICIES.register
class LearnedPolicy(Policy):
    """A row leaves at the first layer whose gate fires; gates with two heads also say when it freezes.

    See `dyvte.gates.ScheduleRule`.

    Parameters
    ----------
    gates
        The trained stack.
    threshold, min_layer, fallback
        The rule's settings.
    freeze_threshold
        Of the freeze head, where there is one; None: as far from ``threshold`` as the gates' config has it.
    by_group
        Take the thresholds of each row's group, where the gates were calibrated by group; ``threshold`` is
        then of no effect.

    Raises
    ------
    ConfigError
        If it is asked for by group and the gates were not calibrated so.
    """

    name = "gates"
    usage = "gates:FOLDER[@THRESHOLD|@GROUP]"

    def __init__(
        self,
        gates: GateStack,
        threshold: float = 0.5,
        min_layer: int = 1,
        fallback: int | None = None,
        freeze_threshold: float | None = None,
        *,
        by_group: bool = False,
    ) -> None:
        if by_group and (gates.config.groups is None or gates.finder is None):
            raise ConfigError("these gates were not calibrated by group (dyvte calibrate --groups)")
        self.gates, self.by_group, config = gates, by_group, gates.config
        self.made_for = config
        self.threshold, self.min_layer, self.fallback = threshold, min_layer, fallback
        if freeze_threshold is None and config.freeze_head:
            freeze_threshold = follow_threshold(config.freeze_threshold, config.threshold, threshold)
        self.freeze_threshold, self.may_freeze = freeze_threshold, config.freeze_head

    @classmethod
    def parse(cls, argument: str) -> Policy:
        """Make the policy from the text after its name."""
        folder, at, threshold = argument.rpartition("@") if "@" in argument else (argument, "", "")
        config, gates = load_checkpoint(folder)
        if gates is not None and config.mode != "fixed":
            used, freeze = thresholds_named(config.groups, threshold) if at else (config.threshold, None)
            check_rule(config.num_layers, used, config.min_layer, config.fallback)
            by_group = not at and config.groups is not None
            return cls(gates, used, config.min_layer, config.fallback, freeze, by_group=by_group)
        if at:
            raise ConfigError(f"{folder} describes a fixed exit: @{threshold} means nothing there")
        return FixedPolicy(config.fallback, config)

    def check(self, num_layers: int, hidden_size: int) -> None:
        """Raise where a layer number or shape does not fit the backbone."""
        self.gates.config.check_shape(num_layers, hidden_size)
        if self.freeze_threshold is not None and not self.may_freeze:
            raise ConfigError("freeze_threshold is of gates with a freeze head; these have none")
        self._rule(0, num_layers)

    def to(self, device: torch.device) -> None:
        """Bring the gates to the backbone's device."""
        if device.type != "meta" and self.gates.device != device:  # an offloaded backbone has no device
            self.gates.to(device)

    def start(self, rows: Rows) -> Plan:
        """The plan for one prefill."""
        return GatePlan(self.gates, self._rule(len(rows.num_visual_B), rows.num_layers), rows)

    def _rule(self, num_rows: int, num_layers: int) -> ScheduleRule:
        stated = (self.threshold, self.freeze_threshold)
        thresholds = self.gates.config.groups if self.by_group else stated
        return decision_rule(self.gates, num_rows, num_layers, self.min_layer, self.fallback, thresholds)
