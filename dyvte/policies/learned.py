"""Trained gates decide, row by row (DyVTE, arXiv 2411.19628)."""

from __future__ import annotations

import torch
from torch import Tensor

from dyvte.errors import ConfigError, GateMismatchError
from dyvte.gates import ExitRule, GateStack, check_rule, load_checkpoint
from dyvte.policies.base import POLICIES, Plan, Policy, Rows
from dyvte.policies.fixed import FixedPolicy


class GatePlan(Plan):
    """A plan that fills in while the layers run."""

    def __init__(self, gates: GateStack, rule: ExitRule, rows: Rows) -> None:
        super().__init__(rule.exit_layers_B)
        self.gates, self.rule, self.features = gates, rule, gates.config.features
        # Without text after the image there is nothing to read, and the answer starts from a visual token.
        rule.asking_B &= (rows.num_visual_B > 0) & (rows.num_prompt_B > 0)

    @property
    def num_fallbacks(self) -> int:  # type: ignore[override]
        """Rows whose gate output was not finite."""
        return int(self.rule.fallback_B.sum())

    def asks(self, k: int) -> bool:
        """Does any row still need gate k?"""
        return self.rule.wants(k)

    def asking_rows(self) -> Tensor:
        """(B,) bool: rows that no gate has settled yet."""
        return self.rule.asking_B.clone()

    def logits(self, k: int, features_BF: Tensor) -> Tensor:
        """(B,) logits of gate k."""
        # The same device, unless the backbone is spread over several.
        return self.gates.gate(k, features_BF.to(self.gates.device))

    def step(self, k: int, logits_B: Tensor) -> None:
        """Settle the rows whose gate k fires."""
        self.rule.step(k, logits_B)

    def settle(self, rows_B: Tensor, k: int) -> None:
        """Rows that have no visual token behind layer k: there is nothing left to decide."""
        super().settle(rows_B, k)
        self.rule.asking_B &= ~rows_B


@POLICIES.register
class LearnedPolicy(Policy):
    """A row leaves at the first layer whose gate fires; see `dyvte.gates.ExitRule`."""

    name = "gates"
    usage = "gates:FOLDER[@THRESHOLD]"

    def __init__(
        self, gates: GateStack, threshold: float = 0.5, min_layer: int = 1, fallback: int | None = None
    ) -> None:
        self.gates, self.threshold, self.min_layer, self.fallback = gates, threshold, min_layer, fallback

    @classmethod
    def parse(cls, argument: str) -> Policy:
        """Make the policy from the text after its name."""
        folder, at, threshold = argument.rpartition("@") if "@" in argument else (argument, "", "")
        config, gates = load_checkpoint(folder)
        if gates is not None and config.mode != "fixed":
            try:
                used = float(threshold) if at else config.threshold
            except ValueError:
                raise ConfigError(f"threshold {threshold!r}: expected a probability in 0..1") from None
            check_rule(config.num_layers, used, config.min_layer, config.fallback)
            return cls(gates, used, config.min_layer, config.fallback)
        if at:
            raise ConfigError(f"{folder} describes a fixed exit: @{threshold} means nothing there")
        return FixedPolicy(config.fallback)

    def check(self, num_layers: int, hidden_size: int) -> None:
        """Raise where a layer number or shape does not fit the backbone."""
        config = self.gates.config
        if (config.num_layers, config.hidden_size) != (num_layers, hidden_size):
            raise GateMismatchError(
                f"these gates are for {config.num_layers} layers of hidden size {config.hidden_size}, "
                f"the backbone has {num_layers} layers of hidden size {hidden_size}: "
                "use the gates trained for this backbone"
            )
        ExitRule(0, num_layers, self.threshold, self.min_layer, self.fallback)

    def to(self, device: torch.device) -> None:
        """Bring the gates to the backbone's device."""
        if device.type != "meta" and self.gates.device != device:  # an offloaded backbone has no device
            self.gates.to(device)

    def start(self, rows: Rows) -> Plan:
        """The plan for one prefill."""
        count = len(rows.num_visual_B)
        rule = ExitRule(count, rows.num_layers, self.threshold, self.min_layer, self.fallback)
        return GatePlan(self.gates, rule, rows)
