"""The plan of trained gates: it fills in while the layers run."""

from __future__ import annotations

import torch
from torch import Tensor

from dyvte.gates import CLOSED, FoundGroups, GateStack, GroupRule, GroupThresholds, ScheduleRule
from dyvte.policies.base import Plan, Rows


class GatePlan(Plan):
    """A plan that fills in while the layers run."""

    def __init__(self, gates: GateStack, rule: ScheduleRule, rows: Rows) -> None:
        super().__init__(rule.exit_layers_B)
        self.freeze_layers_B = rule.freeze_layers_B
        self.gates, self.rule, self.features = gates, rule, gates.config.features
        # Without text after the image there is nothing to read, and the answer starts from a visual token.
        rule.asking_B &= (rows.num_visual_B > 0) & (rows.num_prompt_B > 0)

    @property
    def num_fallbacks(self) -> int:  # type: ignore[override]
        """Rows whose gate output was not finite."""
        return int(self.rule.fallback_B.sum())

    @property
    def found(self) -> FoundGroups | None:
        """Groups of the rows, where thresholds are by group."""
        return self.rule.found if isinstance(self.rule, GroupRule) else None

    def asks(self, k: int) -> bool:
        """Does any row still need the gates after layer k? At 0, before the first: of a freeze head, or for
        the rows' groups.
        """
        return self.rule.wants(k)

    def asking_rows(self) -> Tensor:
        """(B,) bool: rows that no gate has settled yet."""
        return self.rule.asking_B.clone()

    def logits(self, k: int, features_BF: Tensor) -> Tensor:
        """(B,) logits of gate k; with a freeze head (2, B), exit and freeze. After the layer that tells
        groups (4 + Z, B): the two, of which one may be nan, and `FoundGroups.packed`.
        """
        # The same device, unless the backbone is spread over several.
        features_BF = features_BF.to(self.gates.device)
        finder = self.gates.finder
        if not isinstance(self.rule, GroupRule) or finder is None or k != self.rule.thresholds.layer:
            return self._heads(k, features_BF)
        heads = self._heads(k, features_BF)
        if heads.dim() == 1:
            heads = torch.stack((heads, torch.full_like(heads, torch.nan)))
        return torch.cat((heads, finder.find(features_BF).packed()))

    def _heads(self, k: int, features_BF: Tensor) -> Tensor:
        if self.gates.freezes is not None:
            return self.gates.heads(k, features_BF)
        if k == 0:  # asked for the groups alone
            return torch.full((len(features_BF),), CLOSED, device=features_BF.device)
        return self.gates.gate(k, features_BF)

    def own(self, logits: Tensor) -> Tensor:
        """What `step` takes of the logits of a plan on the same gates that also tells groups."""
        if isinstance(self.rule, GroupRule) or len(logits) <= 2 or logits.dim() == 1:
            return logits
        return logits[:2] if self.rule.freezes else logits[0]

    def step(self, k: int, logits: Tensor) -> None:
        """Freeze and settle the rows whose gates fire after layer k."""
        self.rule.step(k, logits)

    def settle(self, rows_B: Tensor, k: int) -> None:
        """Rows that have no visual token behind layer k: there is nothing left to decide."""
        self.rule.settle(rows_B, k)


def decision_rule(
    gates: GateStack,
    num_rows: int,
    num_layers: int,
    min_layer: int,
    fallback: int | None,
    thresholds: GroupThresholds | tuple[float, float | None],
) -> ScheduleRule:
    """The rule of a prefill.

    Parameters
    ----------
    gates
        That decide.
    num_rows, num_layers
        Of the prefill.
    min_layer, fallback
        See `ScheduleRule`.
    thresholds
        Of leaving and of freezing, for all rows; or those of each row's group.
    """
    if isinstance(thresholds, GroupThresholds):
        return GroupRule(num_rows, num_layers, thresholds, gates.finder.size, min_layer, fallback)
    leaving, freezing = thresholds
    return ScheduleRule(num_rows, num_layers, leaving, min_layer, fallback, freezing)
